"""The walls that a sandbox can have, and what each hands to the far side: a command and a job.

- ``bubblewrap``: ``bwrap`` makes the namespaces and a root of the interpreter's files alone.
- ``landlock``: we make the same by system calls, Landlock refuses files besides, and the program is another user.
- ``landlock-own-uid``: the same without another user, where the evaluator is no root and so can become none. Weaker:
  what guards its owner's files is one mechanism less. It is taken only where a recipe names it.

In each the program has no capability, no environment, no network, no process of its own making, limits that it cannot
raise, and a list of system calls (``sandbox_syscalls``).
"""

from __future__ import annotations

import base64
import dataclasses
import os
import platform
import pwd
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, Literal, get_args

from stages.runtime.sandbox_syscalls import filter_program

Level = Literal["bubblewrap", "landlock", "landlock-own-uid"]
LEVELS: tuple[Level, ...] = get_args(Level)
STRONG: tuple[Level, ...] = ("bubblewrap", "landlock")
"""What ``auto`` may take, in this order."""
SCRATCH = "/scratch"
MIN_LANDLOCK = 3
"""The first version that refuses to shorten a file (Linux 6.2)."""
_INSIDE = Path(__file__).with_name("sandbox_inside.py")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TMPDIR": SCRATCH, "HOME": SCRATCH, "OMP_NUM_THREADS": "1"}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d")


class Unavailable(Exception):  # noqa: N818 - an answer, not an error
    """This machine cannot build that wall; the message says why."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use; each is enforced by the kernel or, time and output, from outside too."""

    cpu_s: int = 4
    """Seconds of a processor. What it waits for others does not count, so that a busy machine changes no verdict."""
    wall_s: float = 30.0
    """Seconds until it is ended whatever it does, above all when it sleeps."""
    memory_bytes: int = 512 << 20
    """Address space."""
    scratch_bytes: int = 16 << 20
    """All files together that it can write, in memory; also the largest one."""
    output_bytes: int = 64 << 10
    """What it may print; one byte more ends it."""
    open_files: int = 32
    """Descriptors."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One wall, ready to be used: the command that starts its far side, and the job without the program."""

    level: Level
    command: list[str]
    environment: dict[str, str]
    job: dict[str, Any]


def prepare(level: Level, limits: Limits, root: Path) -> Launch:
    """The command and job of ``level``; ``root`` is an empty folder to mount upon.

    Raises:
        Unavailable: when the machine lacks what the level needs, as far as that shows without trying.
    """
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"needs Linux; this is {sys.platform}")
    try:
        code = filter_program(platform.machine())
    except ValueError as error:
        raise Unavailable(str(error)) from error
    readable, links = visible_paths()
    is_root = os.geteuid() == 0
    job: dict[str, Any] = {
        "parent": os.getpid(), "namespaces": [], "root": str(root), "readable": readable, "links": links,
        "devices": [path for path in _DEVICES if os.path.exists(path)], "scratch": SCRATCH,
        "scratch_bytes": limits.scratch_bytes, "uid": free_uid() if is_root else None, "landlock": False,
        "min_landlock": MIN_LANDLOCK, "filter": base64.b64encode(code).decode(), "limits": _resource_limits(limits),
    }  # fmt: skip
    python = os.path.realpath(sys.executable)
    # -E would hide the hash seed; the environment holds nothing else that an interpreter heeds.
    inside = [python, "-s", "-S", "-P", "-B", "-Xutf8", "-Wignore", "-c", _INSIDE.read_text(encoding="utf-8")]
    if level == "bubblewrap":
        return Launch(level, [*_bubblewrap(job, python, is_root), *inside], {}, job)
    if (level == "landlock") != is_root:
        raise Unavailable("needs root to become another user" if level == "landlock" else "is for those without root")
    job["namespaces"] = ["mount", "pid", "net", "ipc", "uts", "cgroup", *([] if is_root else ["user"])]
    return Launch(level, inside, _ENVIRONMENT, {**job, "landlock": True})


def visible_paths() -> tuple[list[str], dict[str, str]]:
    """What of the host a program sees: the standard library and the system's shared libraries, read-only.

    Returns the paths, none inside another, and the links of the root (``/lib`` to ``usr/lib``) to be made again.
    """
    # The folder above the library: there lie the shared libraries that an interpreter of one's own brings along.
    folders = {Path(sysconfig.get_path("stdlib")).parent, Path(sys.base_exec_prefix) / sys.platlibdir}
    wanted = sorted(str(path) for path in folders if path.is_dir())
    links: dict[str, str] = {}
    for path in _LIBRARIES:
        if os.path.islink(path):
            links[path] = os.readlink(path)
            wanted.append(os.path.realpath(path))
        elif os.path.exists(path):
            wanted.append(path)
    real = sorted({os.path.realpath(path) for path in wanted})
    links |= {path: os.path.realpath(path) for path in wanted if os.path.realpath(path) != path}
    return [path for path in real if not any(_within(path, other) for other in real)], links


def _within(path: str, other: str) -> bool:
    return path != other and path.startswith(other.rstrip("/") + "/")


def free_uid() -> int:
    """A user that is nobody: no account has its number, and no process of ours runs under it."""
    first = 61_000 + os.getpid() % 2_000
    for uid in range(first, first + 1_000):
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise Unavailable("needs a user number without an account between 61,000 and 64,000")


def _resource_limits(limits: Limits) -> dict[str, tuple[int, int]]:
    """``setrlimit`` values, soft and hard; no process or thread can be made at all."""
    alike = {
        "AS": limits.memory_bytes, "FSIZE": limits.scratch_bytes, "NOFILE": limits.open_files, "NPROC": 0, "CORE": 0,
        "MEMLOCK": 0, "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0, "SIGPENDING": 16,
    }  # fmt: skip
    # The first of the two only asks to end, and can be ignored; the second cannot.
    return {name: (value, value) for name, value in alike.items()} | {"CPU": (limits.cpu_s, limits.cpu_s + 1)}


def _bubblewrap(job: dict[str, Any], python: str, is_root: bool) -> list[str]:
    """``bwrap`` and its options."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise Unavailable("needs bwrap, which is not installed")
    command = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv", "--cap-drop", "ALL"]
    if is_root:
        # Its own root is no other user: the far side becomes one, and then loses these too.
        command += [word for name in ("SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{name}")]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    shown = [*job["readable"], *([] if _seen(python, job) else [python])]
    # bwrap would make them for its own user alone.
    for folder in sorted({str(above) for path in shown for above in Path(path).parents if str(above) != "/"}):
        command += ["--perms", "0755", "--dir", folder]
    for path in shown:
        command += ["--ro-bind", path, path]
    for path in job["devices"]:
        command += ["--dev-bind", path, path]
    for path, aim in job["links"].items():
        command += ["--symlink", aim, path]
    command += ["--perms", "0777", "--size", str(job["scratch_bytes"]), "--tmpfs", SCRATCH, "--remount-ro", "/"]
    command += [word for name, value in _ENVIRONMENT.items() for word in ("--setenv", name, value)]
    return [*command, "--chdir", SCRATCH, "--"]


def _seen(path: str, job: dict[str, Any]) -> bool:
    return any(_within(path, other) for other in job["readable"])
