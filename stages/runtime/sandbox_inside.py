"""What runs on the far side of the sandbox's wall: it locks itself in for good, then executes the program.

This file is not imported there: its text is handed to a bare interpreter (``python -S -c``), which has neither this
project nor any package. It reads a job (JSON) from standard input, confines itself as the job says, and speaks one
line a fact on standard output: ``refused why``, or ``ready``, ``compiled``, then ``failed Name`` or the job's secret
word. Each measure that fails ends it before the program runs: it fails closed.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import struct
import sys
from typing import Any, NoReturn

REFUSED = 125
_RESULT = 3
_FLAGS = {
    "mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000,
    "pid": 0x20000000, "net": 0x40000000,
}  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_AT_RECURSIVE, _AT_FDCWD, _MNT_DETACH = 0x8000, -100, 2
_PDEATHSIG, _CAPBSET_DROP, _NO_NEW_PRIVS, _SECCOMP, _DUMPABLE = 1, 24, 38, 22, 4
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 442, 444, 445, 446
_READ_FILE, _READ_DIR, _WRITE_FILE = 4, 8, 2
_SCRATCH = _READ_FILE | _READ_DIR | _WRITE_FILE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_LIBC = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):  # noqa: N818 - the answer, not an error of ours
    """A measure that could not be taken."""


def main() -> None:
    """Read the job, confine, run; the exit code tells nothing that the lines do not."""
    job = json.loads(sys.stdin.buffer.read())
    result = os.dup(1)
    try:
        if job["namespaces"]:
            enter(job, result)
        confine(job, result)
    except (Refused, OSError, ValueError) as error:
        os.write(result, f"refused {error}\n".encode()[:900])
        os._exit(REFUSED)
    run(job)


def _checked(what: str, code: int) -> int:
    if code < 0:
        number = ctypes.get_errno()
        raise Refused(f"{what}: {os.strerror(number)}")
    return code


def _call(what: str, number: int, *arguments: Any) -> int:
    return _checked(what, int(_LIBC.syscall(ctypes.c_long(number), *arguments)))


def _prctl(what: str, option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    _checked(what, _LIBC.prctl(option, *words))


def enter(job: dict[str, Any], result: int) -> None:
    """Leave the host's namespaces; it returns in the process that is to be confined, grandchild of the caller.

    Between them stands the first process of the new PID namespace, which runs nothing but a wait: its end is the end
    of every process there, and the program cannot signal it.
    """
    _prctl("die with the evaluator", _PDEATHSIG, 9)
    if os.getppid() != job["parent"]:
        raise Refused("the evaluator is gone")
    uid, gid = os.getuid(), os.getgid()
    flags = sum(_FLAGS[name] for name in job["namespaces"])
    _checked(f"new namespaces ({', '.join(job['namespaces'])})", _LIBC.unshare(flags))
    if "user" in job["namespaces"]:
        for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
            _write(f"/proc/self/{name}", text)
    ours, theirs = os.pipe()
    if child := os.fork():
        _relay(child, result, ours)
    os.close(theirs)
    _prctl("die with the launcher", _PDEATHSIG, 9)
    os.set_blocking(ours, False)
    try:
        if os.read(ours, 1) == b"":
            os._exit(REFUSED)
    except BlockingIOError:
        pass  # the launcher lives and holds its end
    if "uts" in job["namespaces"]:
        _checked("host name", _LIBC.sethostname(b"sandbox", 7))
    if "mount" in job["namespaces"]:
        new_root(job)
    if child := os.fork():
        _relay(child, result, ours)
    os.close(ours)


def _relay(child: int, *held: int) -> NoReturn:
    """Wait for ``child`` and end as it did; nothing is held that would keep a reader waiting."""
    for descriptor in (0, 1, 2, *held):
        os.close(descriptor)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    words = [text.encode() if text else None for text in (source, target, kind)]
    _checked(f"mount {target}", _LIBC.mount(*words, ctypes.c_ulong(flags), data.encode() or None))


def _attributes(target: str, attributes: int, flags: int = 0) -> None:
    content = struct.pack("=QQQQ", attributes, 0, 0, 0)
    _call(f"attributes of {target}", _MOUNT_SETATTR, _AT_FDCWD, target.encode(), flags, content, ctypes.c_size_t(32))


def new_root(job: dict[str, Any]) -> None:
    """A root of its own: the interpreter's files read-only, a small scratch folder, and nothing else of the host."""
    root, owner = job["root"], "65534" if job["uid"] is None else str(job["uid"])
    closed = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", closed, "mode=755,size=1m,nr_inodes=1024")
    for path, extra in [(path, _ATTR_NODEV) for path in job["readable"]] + [(path, 0) for path in job["devices"]]:
        target = root + path
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            _write(target, "")
        _mount(path, target, "", _MS_BIND | _MS_REC)
        _attributes(target, _ATTR_RDONLY | _ATTR_NOSUID | extra, _AT_RECURSIVE)
    for path, aim in job["links"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(aim, root + path)
    scratch = root + job["scratch"]
    os.makedirs(scratch)
    size = f"size={job['scratch_bytes']},nr_inodes=1024,mode=700,uid={owner},gid={owner}"
    _mount("tmpfs", scratch, "tmpfs", closed, size)
    _attributes(root, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC)
    os.chdir(root)
    # The old root lands upon the new one and is taken off.
    _call("new root", _PIVOT_ROOT[os.uname().machine], b".", b".")
    _checked("leave the old root", _LIBC.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def confine(job: dict[str, Any], result: int) -> None:
    """Take away, for good: descriptors, limits, the user, privileges, files, system calls; in that order."""
    os.chdir(job["scratch"])
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.dup2(result, _RESULT)
    os.closerange(_RESULT + 1, 1 << 16)
    drop_user(job["uid"])
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), tuple(value))
    _prctl("no new privileges", _NO_NEW_PRIVS, 1)
    if job["landlock"]:
        landlock(job)
    if job["filter"]:
        code = base64.b64decode(job["filter"])
        kept = ctypes.create_string_buffer(code, len(code))
        content = struct.pack("@HP", len(code) // 8, ctypes.addressof(kept))
        pointer = ctypes.create_string_buffer(content, len(content))
        _prctl("filter of system calls", _SECCOMP, 2, ctypes.addressof(pointer))


def drop_user(uid: int | None) -> None:
    """Become ``uid``, where one is given, and give up every capability."""
    if uid is not None:
        for number in range(64):
            if _LIBC.prctl(_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) < 0:
                break
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _checked("give up capabilities", _LIBC.capset(header, none))
    # Whoever shares the user may neither trace it nor read its memory.
    _prctl("not dumpable", _DUMPABLE, 0)


def landlock(job: dict[str, Any]) -> None:
    """Landlock (landlock(7)): reading the interpreter's files, writing in scratch; all that the kernel knows besides
    (execution, devices, TCP, signals and abstract sockets outside) is refused."""
    version = _call("Landlock", _CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < job["min_landlock"]:
        raise Refused(f"Landlock must be of version {job['min_landlock']}; the kernel's is {version}")
    files = (1 << 13) - 1 | _REFER | _TRUNCATE | (_IOCTL_DEV if version >= 5 else 0)
    handled = [files, 3 if version >= 4 else 0, 3 if version >= 6 else 0]
    words = handled[: 1 if version < 4 else 2 if version < 6 else 3]
    content = struct.pack(f"={len(words)}Q", *words)
    ruleset = _call("Landlock's rules", _CREATE_RULESET, content, ctypes.c_size_t(len(content)), ctypes.c_uint(0))
    rules = [(path, _READ_FILE | _READ_DIR) for path in job["readable"]]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in job["devices"]]
    for path, access in [*rules, (job["scratch"], _SCRATCH | _REFER | _TRUNCATE)]:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        # A file cannot be listed, and a rule that says otherwise is refused.
        allowed = access if os.path.isdir(path) else access & ~_READ_DIR
        rule = struct.pack("=Qi", allowed, place)
        _call(f"Landlock's rule for {path}", _ADD_RULE, ruleset, ctypes.c_uint(1), rule, ctypes.c_uint(0))
        os.close(place)
    _call("Landlock", _RESTRICT_SELF, ruleset, ctypes.c_uint(0))
    os.close(ruleset)


def run(job: dict[str, Any]) -> NoReturn:
    """Execute the parts of the program one after another in one module, and say how it went.

    What is used after the program has begun is bound before it: replacing a builtin changes nothing here. A program
    that searches this frame can find the secret word, though: the wall guards the machine, not the tests.
    """
    import random

    result, parts, word = _RESULT, job["parts"], job["word"].encode()
    job.clear()
    execute, write, leave, kind = exec, os.write, os._exit, type
    random.seed(0)
    write(result, b"ready\n")
    try:
        built = [compile(text, f"<part {place}>", "exec", 0, True, 0) for place, text in enumerate(parts)]
    except BaseException:
        write(result, b"syntax\n")
        leave(1)
    write(result, b"compiled\n")
    module = {"__name__": "program"}
    try:
        for part in built:
            execute(part, module)
        sys.stdout.flush()
    except BaseException as error:
        # What it printed is for reading, and is lost where it cannot be written any more.
        write(result, b"failed %s\n" % kind(error).__name__.encode()[:60])
        leave(1)
    write(result, b"%s\n" % word)
    leave(0)


if __name__ == "__main__":
    main()
