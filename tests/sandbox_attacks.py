"""Attacks upon the sandbox as programs, and the walls that this machine can build."""

import pytest

from stages.runtime import sandbox as sandboxes
from stages.runtime.sandbox_levels import LEVELS, Limits

LIMITS = Limits(cpu_s=1, wall_s=1.6, memory_bytes=160 << 20, scratch_bytes=1 << 20, output_bytes=4096)
HERE = [level for level in LEVELS if sandboxes.why_none(level) is None]
"""Walls that this machine can build; without one, what is tested is the refusal alone."""

needs_a_wall = pytest.mark.skipif(not HERE, reason=f"no sandbox on this machine: {sandboxes.why_none('auto')}")


def tried(*attacks):
    """A program that says which of the attacks, source texts of statements, were not refused."""
    lines = ["import os, sys, signal, socket, subprocess, threading, mmap", "done = []"]
    for number, attack in enumerate(attacks):
        lines += ["try:", *(f"    {line}" for line in attack.split("\n")), f"    done.append({number})"]
        lines += ["except (OSError, RuntimeError, ValueError, MemoryError, AttributeError): pass"]
    return "\n".join([*lines, "print(done)"])
