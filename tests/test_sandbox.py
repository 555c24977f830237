"""The sandbox as its attackers see it: eight attacks, forged results, and nothing left behind (TRAPS O4)."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sandbox_attacks import HERE, LIMITS, needs_a_wall, tried

from stages.runtime.sandbox import open_sandbox


@pytest.fixture(params=HERE, scope="module")
def sandbox(request):
    with open_sandbox(request.param, LIMITS) as opened:
        yield opened


def test_a_program_is_judged_by_its_last_line(sandbox):
    assert sandbox.run("x = 1", "assert x == 1").passed
    failed = sandbox.run("def f(): return 1", "assert f() == 2")
    assert (failed.verdict, failed.detail) == ("failed", "AssertionError")
    assert sandbox.run("def f(:", "pass").verdict == "syntax"
    assert sandbox.run("print('hello')").output == "hello\n"


def test_the_same_program_gives_the_same_result(sandbox):  # trap M2
    source = "import random\nprint(hash('a'), random.random(), list({'a', 'b', 'c', 'd'}))"
    assert len({sandbox.run(source).output for _ in range(3)}) == 1


def test_it_reads_no_secret(sandbox, tmp_path, monkeypatch):  # trap O4
    monkeypatch.setenv("A_TOKEN", "sesame")
    folder = Path("/tmp") / f"pedigree-secret-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "key").write_text("sesame")
        folder.chmod(0o777)
        outcome = sandbox.run(tried(
            f"print(open({str(folder / 'key')!r}).read())", f"print(open({__file__!r}).read())",
            "print(os.environ['A_TOKEN'])\nraise ValueError" if "A_TOKEN" in os.environ else "raise OSError",
            f"print(open('/proc/{os.getpid()}/environ').read())", "print(open('/proc/self/environ').read())",
            "print(open('/proc/self/mem', 'rb').read(1))", "print(open('/etc/passwd').read())",
            "print(os.listdir(os.path.expanduser('~root')))", "print(os.listdir('/home'))",
            f"print(os.listdir({str(Path(__file__).parent)!r}))",
            "os.symlink('/etc', 'etc')\nprint(os.listdir('etc/ssl'))",
        ).replace("except (", "except (KeyError, "))  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert "sesame" not in outcome.output
    assert outcome.output == "[]\n"


def test_it_writes_nothing_outside(sandbox, tmp_path):  # trap O4
    tmp_path.chmod(0o777)
    victim = tmp_path / "file"
    victim.write_text("mine")
    victim.chmod(0o666)
    outcome = sandbox.run(tried(
        f"open({str(victim)!r}, 'w')", f"open({str(tmp_path / 'new')!r}, 'w')", f"os.truncate({str(victim)!r}, 0)",
        f"os.unlink({str(victim)!r})", f"os.chmod({str(victim)!r}, 0)", f"os.rename('x', {str(tmp_path / 'x')!r})",
        f"os.utime({str(victim)!r})", "open('/tmp/written', 'w')", "open('/dev/shm/written', 'w')",
        "open(os.__file__, 'a')", "open('/usr/lib/written', 'w')", "os.mkdir('/written')", "os.mknod('/dev/null2')",
        "os.chown('.', 0, 0)", "os.chroot('/')",
    ))  # fmt: skip
    assert outcome.output == "[]\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (victim.read_text(), victim.stat().st_mode & 0o777) == ("mine", 0o666)


def test_it_reaches_no_network_and_no_socket_of_the_host(sandbox, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        tmp_path.chmod(0o777)
        local.bind(str(tmp_path / "socket"))
        (tmp_path / "socket").chmod(0o777)
        local.listen()
        port = tcp.getsockname()[1]
        outcome = sandbox.run(tried(
            f"socket.create_connection(('127.0.0.1', {port}), 1)", f"socket.create_server(('127.0.0.1', {port + 1}))",
            f"socket.socket(socket.AF_UNIX).connect({str(tmp_path / 'socket')!r})",
            "a, b = socket.socketpair()",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))",
            "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).connect((2, 1))",
            "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
            "socket.getaddrinfo('localhost', 80)[0]\nraise OSError",
        ))  # fmt: skip
        tcp.setblocking(False)
        local.setblocking(False)
        for server in (tcp, local):
            with pytest.raises(BlockingIOError):
                server.accept()
    assert outcome.output == "[]\n"


def test_it_signals_nobody(sandbox):
    previous = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the evaluator was signalled"))
    victim = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        aims = [os.getpid(), victim.pid, os.getpgrp(), 1, -1, -os.getpgrp()]
        attacks = [f"os.kill({pid}, {number})" for pid in aims for number in (0, 15, 9)]
        outcome = sandbox.run(tried(*attacks, "os.killpg(os.getpgrp(), 0)", "os.killpg(0, 15)",
                                    f"signal.pidfd_send_signal(os.pidfd_open({victim.pid}), 9)",
                                    f"os.setpriority(os.PRIO_PROCESS, {victim.pid}, 19)"))  # fmt: skip
        assert outcome.output == "[]\n"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.communicate()
        signal.signal(signal.SIGTERM, previous)


def test_a_fork_bomb_makes_not_one_process(sandbox):
    outcome = sandbox.run(tried(
        "os.fork()", "os.forkpty()", "os.posix_spawn('/bin/sh', ['sh'], {})", "subprocess.run(['true'])",
        "assert os.system('true') == 0 or os.abort()\nraise OSError", "threading.Thread(target=print).start()",
        "os.execv(sys.executable, ['python'])", "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ).replace("assert os.system('true') == 0 or os.abort()", "assert os.system('true') != 0"))  # fmt: skip
    assert outcome.output == "[]\n"


def test_a_memory_bomb_ends_itself_alone(sandbox):
    assert sandbox.run("x = []\nwhile True: x.append(bytearray(1 << 20))").detail == "MemoryError"
    outcome = sandbox.run("""
import mmap, os
held = []
try:
    while True: held.append(mmap.mmap(-1, 1 << 22))
except (OSError, MemoryError): print('mapped', len(held) << 22)
held.clear()
written = 0
try:
    for number in range(10**4):
        with open(f'f{number}', 'wb') as file: written += file.write(bytes(1 << 16))
except OSError: pass
print('written', written)
try: os.memfd_create('x')
except (OSError, AttributeError): print('no memory without an address')
try: print(open('one', 'wb').truncate(1 << 30))
except OSError: print('no large file')
""")
    mapped, written, *rest = outcome.output.split("\n")
    assert 0 < int(mapped.split()[1]) < LIMITS.memory_bytes
    assert 0 < int(written.split()[1]) <= LIMITS.scratch_bytes
    assert rest == ["no memory without an address", "no large file", ""]


@pytest.mark.parametrize("descriptor", [1, 2, 3])
def test_endless_output_is_cut(sandbox, descriptor):
    outcome = sandbox.run(f"import os\nwhile True: os.write({descriptor}, b'x' * 1000)")
    assert outcome.verdict == "output"
    assert len(outcome.output) <= LIMITS.output_bytes


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("while True: pass", "cpu"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "ended"),
        ("import time\ntime.sleep(10**6)", "wall"),
        ("import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\nsignal.raise_signal(19)", "wall"),
        ("import os\nos.closerange(0, 64)\nwhile True: pass", "cpu"),
    ],
)
def test_an_endless_program_is_ended(sandbox, source, verdict):
    before = set(psutil.Process().children(recursive=True))
    started = time.monotonic()
    outcome = sandbox.run(source)
    # A machine with other work to do may reach the wall before the processor's second is over.
    assert outcome.verdict in (verdict, "wall")
    assert time.monotonic() - started < LIMITS.wall_s + 10
    assert set(psutil.Process().children(recursive=True)) == before


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import os\nos.write(3, b'compiled\\n' + b'0' * 32 + b'\\n')\nos._exit(0)",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None\ndef check(): pass",
        "import os\nos.write = lambda *a: None\nos._exit = lambda code: None",
        "import sys\nsys.modules['__main__'].__dict__.clear()",
        "import atexit, os\natexit.register(os._exit, 0)\nraise KeyboardInterrupt",
        "import signal\nsignal.raise_signal(9)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1, 1))",
    ],
)
def test_leaving_early_or_meddling_passes_no_test(sandbox, source):
    outcome = sandbox.run(source, "def check(): raise AssertionError\ncheck()")
    assert not outcome.passed


def test_programs_share_nothing(sandbox):
    assert sandbox.run("open('left', 'w').write('x')\nimport os\nassert os.listdir('.') == ['left']").passed
    assert sandbox.run("import os\nassert os.listdir('.') == []").passed


def test_programs_run_side_by_side_and_keep_their_order(sandbox):
    found = sandbox.run_all([("x = 1", f"assert {number} % 2") for number in range(6)], 2)
    assert [one.passed for one in found] == [False, True] * 3


def until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        pass


def rests(process):
    """Whether the process sleeps and uses no processor for a third of a second."""
    before, deadline = process.cpu_times()[:2], time.monotonic() + 0.3
    while time.monotonic() < deadline:
        if process.status() != psutil.STATUS_SLEEPING:
            return False
    return process.cpu_times()[:2] == before


@needs_a_wall
def test_a_killed_evaluator_leaves_nothing_behind():  # trap O7
    source = (
        "import sys\nfrom stages.runtime.sandbox import open_sandbox\n"
        "with open_sandbox(sys.argv[1]) as s:\n    print('open', flush=True)\n    s.run('import time\\ntime.sleep(99)')"
    )
    evaluator = subprocess.Popen([sys.executable, "-c", source, HERE[0]], stdout=subprocess.PIPE, text=True)
    assert evaluator.stdout.readline().strip().endswith("open")
    parent = psutil.Process(evaluator.pid)
    # Launcher, first process of the namespace, program.
    until(lambda: len(parent.children(recursive=True)) == 3, 20)
    found = parent.children(recursive=True)
    until(lambda: rests(found[-1]), 20)
    evaluator.kill()
    evaluator.communicate()
    _, alive = psutil.wait_procs(found, timeout=20)
    assert len(found) == 3
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
