"""The filter of system calls, run by an interpreter of BPF written here from its definition (bpf(4), seccomp(2))."""

import re
import struct
from pathlib import Path

import pytest

from stages.runtime.sandbox_syscalls import ALLOW, ARCHITECTURES, DENY, KILL, UNKNOWN, filter_program, numbers

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
OTHERS = {
    "x86_64": {"clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101, "socket": 41, "bpf": 321,
               "connect": 42, "socketpair": 53, "unshare": 272, "setns": 308, "mount": 165, "memfd_create": 319,
               "keyctl": 250, "shmget": 29, "process_vm_writev": 311, "execveat": 322, "setuid": 105},
    "aarch64": {"clone": 220, "execve": 221, "kill": 129, "ptrace": 117, "socket": 198, "connect": 203, "unshare": 97,
                "mount": 40, "memfd_create": 279, "keyctl": 219, "bpf": 280, "setuid": 146, "socketpair": 199},
}  # fmt: skip
"""Numbers of calls that must fail, from the kernel's tables."""
NEW = {"clone3": 435, "io_uring_setup": 425, "pidfd_open": 434, "openat2": 437, "mount_setattr": 442, "futex_wait": 455}


def decided(machine, number, arguments=(), arch=None):
    """What the filter answers to one call."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=IIQ6Q", number, ARCHITECTURES[machine] if arch is None else arch, 0, *words)
    program = list(struct.iter_unpack("=HBBI", filter_program(machine)))
    place, held = 0, 0
    while True:
        code, if_true, if_false, value = program[place]
        place += 1
        if code == 0x06:
            return value
        if code == 0x20:
            held = struct.unpack_from("=I", data, value)[0]
        elif code == 0x05:
            place += value
        elif code == 0x15:
            place += if_true if held == value else if_false
        elif code == 0x35:
            place += if_true if held >= value else if_false
        else:
            raise AssertionError(f"no such instruction: {code:#x}")


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_what_computes_is_allowed_and_what_reaches_out_fails(machine):
    listed = numbers(machine)
    for name in ("read", "write", "mmap", "openat", "exit_group", "futex", "clock_gettime", "getrandom"):
        assert decided(machine, listed[name]) == ALLOW
    for name, number in OTHERS[machine].items():
        assert name not in listed
        assert decided(machine, number) == DENY
    for name, number in NEW.items():
        assert name not in listed
        assert decided(machine, number) == UNKNOWN


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_some_calls_are_allowed_by_their_arguments_alone(machine):
    listed = numbers(machine)
    assert decided(machine, listed["ioctl"], (1, 0x5401)) == ALLOW
    assert decided(machine, listed["ioctl"], (0, 0x5412)) == DENY  # typing into a terminal
    assert decided(machine, listed["prctl"], (39,)) == ALLOW
    assert decided(machine, listed["prctl"], (1, 0)) == DENY  # outliving the evaluator
    assert decided(machine, listed["prlimit64"], (0, 7, 0, 1 << 40)) == ALLOW
    assert decided(machine, listed["prlimit64"], (0, 7, 1 << 40, 0)) == DENY  # the high half alone is set
    assert decided(machine, listed["prlimit64"], (0, 7, 4096, 0)) == DENY
    assert decided(machine, listed["prlimit64"], (1, 7, 0, 1)) == DENY


def test_calls_by_another_architecture_end_the_process():
    # On x86 every call has two more numbers, of 32-bit programs and of x32; an allowlist of one of them is none.
    assert decided("x86_64", 1, arch=0x40000003) == KILL
    assert decided("x86_64", 0x40000000 | 56) == KILL
    assert decided("aarch64", 64, arch=0xC000003E) == KILL


@pytest.mark.parametrize("machine", list(ARCHITECTURES))
def test_numbers_are_the_kernels(machine):
    if not HEADERS[machine].is_file():
        pytest.skip("the kernel's headers are not installed")
    found = {}
    for line in HEADERS[machine].read_text().splitlines():
        if match := re.match(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", line):
            found[match[1]] = int(match[2])
    if machine == "aarch64":
        found["newfstatat"] = found["fstatat"]
    assert {name: found[name] for name in numbers(machine)} == numbers(machine)
    assert {name: found[name] for name in OTHERS[machine]} == OTHERS[machine]


def test_another_machine_has_no_filter():
    with pytest.raises(ValueError, match="needs x86_64 or aarch64; got riscv64"):
        filter_program("riscv64")
