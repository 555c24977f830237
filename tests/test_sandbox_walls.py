"""Walls with a stone missing: the probe sees it, or the wall is not built at all (TRAPS O4)."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from sandbox_attacks import HERE, LIMITS, tried

from stages.runtime import sandbox as sandboxes
from stages.runtime import sandbox_levels
from stages.runtime.sandbox import Sandbox, SandboxError, open_sandbox, probe
from stages.runtime.sandbox_levels import LEVELS, Unavailable, prepare

PARTS = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1)) >= 3
assert libc.unshare(0x6E020000 | (0x10000000 if os.getuid() else 0)) == 0
"""


def test_where_the_kernel_has_the_parts_the_wall_stands():
    """Else a fault of ours would look like a machine without a sandbox, and every test above be left out."""
    has_parts = (
        subprocess.run([sys.executable, "-S", "-c", PARTS], stderr=subprocess.DEVNULL, check=False).returncode == 0
    )
    if has_parts and os.uname().machine in ("x86_64", "aarch64"):
        assert sandboxes.why_none("landlock-own-uid" if os.getuid() else "landlock") is None
    if shutil.which("bwrap"):
        works = subprocess.run(["bwrap", "--unshare-pid", "--ro-bind", "/", "/", "true"], check=False).returncode == 0
        assert not works or sandboxes.why_none("bubblewrap") is None
    for level in LEVELS:
        assert "does not hold" not in (sandboxes.why_none(level) or "")


needs_landlock = pytest.mark.skipif("landlock" not in HERE, reason="Landlock as root is not to be had here")


@pytest.fixture
def built(tmp_path):
    """A landlock sandbox whose job is changed before it is tried."""

    def build(**changes):
        launch = prepare("landlock", LIMITS, tmp_path)
        launch.job.update(changes)
        return Sandbox(launch, LIMITS)

    return build


NAMESPACES = ["mount", "pid", "net", "ipc", "uts", "cgroup"]


@needs_landlock
@pytest.mark.parametrize(
    ("changes", "hole"),
    [
        ({"filter": ""}, "no filter of system calls"),
        ({"filter": ""}, "it opens a TCP socket"),
        ({"filter": "", "limits": {}}, "it makes a process"),
        ({"landlock": False}, None),
        ({"uid": None}, "it is root"),
        ({"limits": {}}, "limit NPROC is"),
        ({"scratch_bytes": 1 << 30}, "its scratch folder is larger than said"),
        ({"namespaces": [name for name in NAMESPACES if name != "pid"]}, "its processes are numbered among the host's"),
        ({"namespaces": [name for name in NAMESPACES if name != "uts"]}, "it knows the host's name"),
    ],
)
def test_a_missing_stone_is_found_by_the_probe(built, changes, hole):
    weak = built(**changes)
    holes = probe(weak)
    assert (holes == []) if hole is None else any(found.startswith(hole) for found in holes)


@needs_landlock
def test_a_missing_landlock_is_found_by_the_probe(built, monkeypatch):
    weak = built(landlock=False)
    monkeypatch.setattr(Sandbox, "has_landlock", True)
    assert probe(weak) == ["Landlock does not hold it"]


@needs_landlock
def test_without_a_root_of_its_own_nothing_is_run(built):
    with pytest.raises(SandboxError, match=r"could not be built: .*No such file.*; nothing was run"):
        built(namespaces=["pid", "net", "ipc", "uts", "cgroup"]).run("x = 1")


@needs_landlock
def test_each_wall_alone_still_holds_what_it_is_there_for(built, tmp_path):
    """Without the filter of system calls: files by mounts and Landlock, the network and processes by namespaces."""
    secret = tmp_path / "secret"
    secret.write_text("sesame")
    attacks = tried(
        f"print(open({str(secret)!r}).read())", "socket.socket().connect(('127.0.0.1', 80))",
        f"os.kill({os.getpid()}, 0)",
        "os.fork() or os._exit(0)", "os.setuid(0)", "os.listdir('/')", "os.execv('/bin/sh', ['sh'])",
    )  # fmt: skip
    assert built(filter="").run(attacks).output == "[]\n"
    without = built(filter="", landlock=False).run(attacks)
    # Its own root is there to be listed; there is no shell in it.
    assert without.output == "[5]\n"


@needs_landlock
def test_an_older_landlock_is_refused_not_taken(built):
    with pytest.raises(SandboxError, match="Landlock must be of version 99; the kernel's is"):
        built(min_landlock=99).run("x = 1")


def test_where_no_wall_holds_nothing_is_run_and_each_reason_is_said(monkeypatch):  # trap O4
    monkeypatch.setattr(sandbox_levels.shutil, "which", lambda name: None)
    monkeypatch.setattr(sandboxes, "probe", lambda opened: ["it reads a file of the host"])
    with pytest.raises(SandboxError) as caught, open_sandbox("auto"):
        pass
    message = str(caught.value)
    assert "bubblewrap needs bwrap, which is not installed" in message
    assert "landlock" in message
    assert "install bubblewrap" in message


def test_a_weaker_wall_is_taken_only_where_it_is_named(monkeypatch):
    asked = []

    def refuse(level, limits, root):
        asked.append(level)
        raise Unavailable("cannot be had")

    monkeypatch.setattr(sandboxes, "prepare", refuse)
    for wanted in ("auto", "landlock", "landlock-own-uid"):
        with pytest.raises(SandboxError), open_sandbox(wanted):
            pass
    assert asked == ["bubblewrap", "landlock", "landlock", "landlock-own-uid"]
    with pytest.raises(ValueError, match="must be one of auto"), open_sandbox("none"):
        pass


def test_a_machine_whose_system_calls_are_not_known_has_no_sandbox(monkeypatch):
    monkeypatch.setattr(sandbox_levels.platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="needs x86_64 or aarch64; got riscv64"), open_sandbox("auto"):
        pass


@pytest.mark.skipif(not shutil.which("true"), reason="needs /bin/true")
def test_a_bubblewrap_that_does_nothing_is_refused(monkeypatch, tmp_path):
    """A stand-in of that name that isolates nothing: what it says of itself is not believed."""
    fake = tmp_path / "bwrap"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != "--" ]; do shift; done\nshift\nmkdir -p /tmp/x\nexec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox_levels.shutil, "which", lambda name: str(fake))
    with pytest.raises(SandboxError, match="bubblewrap the sandbox"), open_sandbox("bubblewrap"):
        pass
    monkeypatch.setattr(sandbox_levels, "SCRATCH", str(tmp_path))
    monkeypatch.setattr(sandbox_levels, "free_uid", lambda: None)
    with (
        pytest.raises(SandboxError, match=r"bubblewrap does not hold here: .*it reads a file of the host"),
        open_sandbox("bubblewrap"),
    ):
        pass


def test_the_folder_to_mount_upon_goes_away(monkeypatch, tmp_path):
    monkeypatch.setattr(sandboxes.tempfile, "tempdir", str(tmp_path))
    with contextlib.suppress(SandboxError), open_sandbox("auto"):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_program_sees_holds_the_library_and_no_home():
    paths, links = sandbox_levels.visible_paths()
    assert any(Path(json.__file__).resolve().is_relative_to(path) for path in paths)
    # Neither this project nor what is installed beside it.
    for hidden in (sandboxes.__file__, psutil.__file__):
        assert sys.prefix == sys.base_prefix or not any(Path(hidden).is_relative_to(path) for path in paths)
    assert not any(path in ("/", "/usr", "/home", "/root", "/etc", str(Path.home())) for path in [*paths, *links])


def test_why_a_stronger_wall_was_passed_over_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sandbox_levels.shutil, "which", lambda name: None)
    if "landlock" not in HERE:
        pytest.skip("Landlock as root is not to be had here")
    with open_sandbox("auto") as opened:
        assert opened.described() == "sandbox: landlock, since bubblewrap needs bwrap, which is not installed"
    with open_sandbox("landlock") as opened:
        assert opened.described() == "sandbox: landlock"
    # A plan may be printed as JSON.
    assert capsys.readouterr().out == ""
