"""Attacks upon a sandbox from inside, each harmless where it succeeds, and targets that notice it outside.

A wall is believed because it was tried on this machine, this minute: kernels, containers and versions of bubblewrap
differ in what they refuse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROBE = """
import ctypes, json, os, resource, sys

holes, libc = [], ctypes.CDLL(None, use_errno=True)


def must_fail(what, attack):
    try:
        attack()
    except (OSError, RuntimeError, ValueError):
        return
    holes.append(what)


def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def fork():
    if os.fork() == 0:
        os._exit(0)


def socket_of(family, kind):
    call(*{"x86_64": (41,), "aarch64": (198,)}[os.uname().machine], family, kind, 0)


def thread():
    import _thread
    _thread.start_new_thread(lambda: None, ())


must_fail("it reads a file of the host", lambda: open(AIMS["secret"]).read())
must_fail("it reads the list of users", lambda: open("/etc/passwd").read())
must_fail("it sees processes", lambda: os.listdir("/proc/1"))
must_fail("it writes into a folder of the host", lambda: open(AIMS["folder"] + "/written", "w").close())
must_fail("it writes beside its scratch folder", lambda: open("/written", "w").close())
must_fail("it writes into the library", lambda: open(os.__file__ + ".written", "w").close())
if AIMS["landlock"]:
    # A root of its own would let it: that this fails is Landlock's doing.
    must_fail("Landlock does not hold it", lambda: os.listdir("/"))
must_fail("it changes a file's mode", lambda: os.chmod(os.__file__, 0o600))
must_fail("it opens a TCP socket", lambda: socket_of(2, 1))
must_fail("it opens a packet socket", lambda: socket_of(17, 3))
must_fail("it opens a local socket", lambda: socket_of(1, 1))
must_fail("it opens a socket to the hypervisor", lambda: socket_of(40, 1))
must_fail("it signals the evaluator", lambda: os.kill(AIMS["pid"], 0))
must_fail("it signals its first process", lambda: os.kill(1, 0))
must_fail("it signals everything", lambda: os.kill(-1, 0))
must_fail("it makes a process", fork)
must_fail("it makes a thread", thread)
must_fail("it executes a file", lambda: os.execv(AIMS["python"], [AIMS["python"], "-V"]))
must_fail("it becomes root", lambda: os.setuid(0))
must_fail("it makes a namespace", lambda: call({"x86_64": 272, "aarch64": 97}[os.uname().machine], 0x10000000))
must_fail("it traces a process", lambda: call({"x86_64": 101, "aarch64": 117}[os.uname().machine], 16, 1, 0, 0))
must_fail("it reads key rings", lambda: call({"x86_64": 250, "aarch64": 219}[os.uname().machine], 0, -3, 0))
must_fail("it holds memory without an address", lambda: os.memfd_create("x"))
must_fail("it raises a limit", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)))

if os.getuid() == 0 or os.geteuid() == 0 or os.getgid() == 0:
    holes.append("it is root")
if os.getgroups() not in ([], [65534]):
    holes.append("it belongs to groups of the evaluator")
if set(os.environ) - {"PYTHONHASHSEED", "LC_ALL", "TMPDIR", "HOME", "OMP_NUM_THREADS", "PWD"}:
    holes.append("it has an environment: " + ", ".join(sorted(os.environ)))
if libc.prctl(39, 0, 0, 0, 0) != 1:
    holes.append("it could gain privileges")
if libc.prctl(21, 0, 0, 0, 0) != 2:
    holes.append("no filter of system calls")
if os.getpid() > 9:
    holes.append("its processes are numbered among the host's")
if os.uname().nodename != "sandbox":
    holes.append("it knows the host's name")
if os.getcwd() != os.environ.get("HOME"):
    holes.append("it is not in its scratch folder")


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


if [number for number in range(4, 32) if is_open(number)]:
    holes.append("it inherited descriptors")
wanted, found = AIMS["limits"], lambda name: resource.getrlimit(getattr(resource, "RLIMIT_" + name))
for name, value in (("AS", wanted["memory_bytes"]), ("FSIZE", wanted["scratch_bytes"]),
                    ("NOFILE", wanted["open_files"]), ("NPROC", 0), ("CORE", 0)):
    if found(name) != (value, value):
        holes.append("limit " + name + " is " + str(found(name)))
if found("CPU") != (wanted["cpu_s"], wanted["cpu_s"] + 1):
    holes.append("limit CPU is " + str(found("CPU")))
try:
    if os.statvfs(".").f_blocks * os.statvfs(".").f_frsize > 2 * wanted["scratch_bytes"]:
        holes.append("its scratch folder is larger than said")
    open("mine", "w").close()
except OSError:
    holes.append("its scratch folder is not its own")
print(json.dumps(holes), flush=True)
"""
"""A program that attacks; it prints what succeeded as a JSON list. ``AIMS`` says where the targets are."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """What an attack aims at: a secret in a folder that all may write, and this process."""

    folder: Path
    secret: Path

    def plain(self) -> dict[str, Any]:
        """For the program."""
        return {
            "folder": str(self.folder), "secret": str(self.secret), "pid": os.getpid(),
            "python": os.path.realpath(sys.executable),
        }  # fmt: skip

    def touched(self) -> list[str]:
        """What shows outside that an attack succeeded."""
        return ["a file of its own appeared on the host"] if (self.folder / "written").exists() else []


@contextlib.contextmanager
def targets() -> Iterator[Targets]:
    """Targets that stand open to every user of the host: only the wall is between them and the program."""
    with tempfile.TemporaryDirectory(prefix="pedigree-target-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        secret = folder / "secret"
        secret.write_text(secrets.token_hex(8), encoding="utf-8")
        secret.chmod(0o666)
        yield Targets(folder, secret)


def findings(output: str, finished: bool) -> list[str]:
    """What the program found; a probe that did not come to its end proves nothing and counts as a hole."""
    try:
        found = json.loads(output)
    except ValueError:
        found = None
    # Else what would have come after its end is not known.
    if not finished or not isinstance(found, list):
        return [f"the probe did not come to its end: {output.strip()[-200:] or 'no word of it'}"]
    return [str(one) for one in found]
