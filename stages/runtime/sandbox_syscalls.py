"""The system calls that a sandboxed program may make, as a seccomp filter: all others fail, no matter who asks.

A filter is an array of classic BPF instructions over ``struct seccomp_data`` (seccomp(2)): number of the call at byte
0, architecture at 4, the six arguments as 64-bit words from 16 on. It is an allowlist: what computing, files of its own
and clocks need. There is no call that makes a process, a thread, a socket or a namespace, none that executes a file,
signals, traces or watches another process, none of key rings, shared memory, io_uring, bpf or mounts.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""``AUDIT_ARCH_*`` by ``platform.machine()``; on any other machine no filter can be made."""
ALLOW, KILL, DENY, UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38
"""Actions: run it; end the process; fail with EPERM; fail with ENOSYS, so that the C library takes an older one."""
NEWER = 424
"""Calls from this number on are numbered alike everywhere; those not listed are as unknown as on an older kernel."""
_X32 = 0x40000000

# name=number on x86_64/number on aarch64, as in the kernel's unistd.h; a dash where there is no such call.
_PLAIN = """
read=0/63 write=1/64 readv=19/65 writev=20/66 pread64=17/67 pwrite64=18/68 preadv=295/69 pwritev=296/70
close=3/57 close_range=436/436 lseek=8/62 dup=32/23 dup2=33/- dup3=292/24 fcntl=72/25 fsync=74/82
fdatasync=75/83 ftruncate=77/46 truncate=76/45 fallocate=285/47 fadvise64=221/223 sendfile=40/71
copy_file_range=326/285 pipe=22/- pipe2=293/59 open=2/- openat=257/56 creat=85/- stat=4/- fstat=5/80 lstat=6/-
newfstatat=262/79 statx=332/291 access=21/- faccessat=269/48 faccessat2=439/439 getdents=78/- getdents64=217/61
getcwd=79/17 chdir=80/49 fchdir=81/50 mkdir=83/- mkdirat=258/34 rmdir=84/- unlink=87/- unlinkat=263/35
rename=82/- renameat=264/38 renameat2=316/276 readlink=89/- readlinkat=267/78 umask=95/166 utimensat=280/88
chmod=90/- fchmod=91/52 fchmodat=268/53 statfs=137/43 fstatfs=138/44 mmap=9/222 munmap=11/215 mprotect=10/226
mremap=25/216 madvise=28/233 brk=12/214 mincore=27/232 rt_sigaction=13/134 rt_sigprocmask=14/135
rt_sigreturn=15/139 rt_sigpending=127/136 rt_sigsuspend=130/133 rt_sigtimedwait=128/137 sigaltstack=131/132
tgkill=234/131 pause=34/- restart_syscall=219/128 getpid=39/172 gettid=186/178 getppid=110/173 getuid=102/174
geteuid=107/175 getgid=104/176 getegid=108/177 getresuid=118/148 getresgid=120/150 getgroups=115/158
getpgid=121/155 getpgrp=111/- getsid=124/156 uname=63/160 sysinfo=99/179 times=100/153 getrusage=98/165
gettimeofday=96/169 time=201/- clock_gettime=228/113 clock_getres=229/114 clock_nanosleep=230/115
nanosleep=35/101 alarm=37/- getitimer=36/102 setitimer=38/103 getrlimit=97/163 futex=202/98 sched_yield=24/124
sched_getaffinity=204/123 set_robust_list=273/99 get_robust_list=274/100 rseq=334/293 set_tid_address=218/96
arch_prctl=158/- getrandom=318/278 select=23/- pselect6=270/72 poll=7/- ppoll=271/73 epoll_create=213/-
epoll_create1=291/20 epoll_ctl=233/21 epoll_wait=232/- epoll_pwait=281/22 exit=60/93 exit_group=231/94
"""
_BY_ARGUMENT = "ioctl=16/29 prctl=157/167 prlimit64=302/261"
_TERMINAL_AND_FLAGS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_GET_SECCOMP, _GET_NO_NEW_PRIVS = 21, 39


class Condition(NamedTuple):
    """A call is allowed where the 32 low bits of argument ``place`` are one of ``values``.

    ``null`` is an argument that must be 0 in all its 64 bits.
    """

    place: int
    values: tuple[int, ...]
    null: int | None = None


CONDITIONS = {
    # Is it a terminal, its size, bytes to be read, blocking or not, closed on execution or not; nothing that types.
    "ioctl": Condition(1, _TERMINAL_AND_FLAGS),
    "prctl": Condition(0, (_GET_SECCOMP, _GET_NO_NEW_PRIVS)),
    # Its own limits, to be read and not to be set.
    "prlimit64": Condition(0, (0,), null=2),
}


def numbers(machine: str) -> dict[str, int]:
    """Numbers of the calls in the allowlist on ``machine``, those with conditions too."""
    column = list(ARCHITECTURES).index(machine)
    found = (entry.partition("=") for entry in f"{_PLAIN} {_BY_ARGUMENT}".split())
    pairs = {name: both.split("/")[column] for name, _, both in found}
    return {name: int(number) for name, number in pairs.items() if number != "-"}


def filter_program(machine: str) -> bytes:
    """The filter for ``machine`` (``x86_64``, ``aarch64``) as an array of ``struct sock_filter``.

    Raises:
        ValueError: for a machine whose numbers are not known here.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(f"a filter of system calls needs {' or '.join(ARCHITECTURES)}; got {machine}")
    code = [_load(4), _jump_unless_equal(ARCHITECTURES[machine], 1), _skip(1), _return(KILL), _load(0)]
    # Skips are counted in instructions: the kill stands right behind each test that may reach it.
    code += [_at_least(_X32, 0, 1), _return(KILL)] if machine == "x86_64" else []
    for name, number in numbers(machine).items():
        body = _conditional(CONDITIONS[name]) if name in CONDITIONS else [_return(ALLOW)]
        code += [_jump_unless_equal(number, len(body)), *body]
    return b"".join([*code, _at_least(NEWER, 0, 1), _return(UNKNOWN), _return(DENY)])


def _conditional(condition: Condition) -> list[bytes]:
    """Instructions that end in a return whatever the arguments are."""
    nulls = [] if condition.null is None else [16 + 8 * condition.null, 20 + 8 * condition.null]
    code: list[bytes] = []
    for offset in nulls:
        code += [_load(offset), _jump_unless_equal(0, 1), _skip(1), _return(DENY)]
    code.append(_load(16 + 8 * condition.place))
    for value in condition.values:
        code += [_jump_unless_equal(value, 1), _return(ALLOW)]
    return [*code, _return(DENY)]


def _instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _load(offset: int) -> bytes:
    return _instruction(0x20, 0, 0, offset)


def _skip(count: int) -> bytes:
    return _instruction(0x05, 0, 0, count)


def _return(action: int) -> bytes:
    return _instruction(0x06, 0, 0, action)


def _jump_unless_equal(value: int, count: int) -> bytes:
    return _instruction(0x15, 0, count, value)


def _at_least(value: int, if_true: int, if_false: int) -> bytes:
    return _instruction(0x35, if_true, if_false, value)
