"""Generated code runs behind a wall that was tried before, or not at all (TRAPS O4).

``open_sandbox`` builds the strongest wall that the machine allows and attacks it from inside (``sandbox_probe``); only
where every attack failed is a sandbox returned, and its ``level`` goes with whatever is measured in it. A program is
judged by a secret word that it says after its last line: leaving early, with whatever exit code, passes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from stages.runtime.sandbox_levels import LEVELS, STRONG, Launch, Level, Limits, Unavailable, prepare
from stages.runtime.sandbox_probe import PROBE, findings, targets

Verdict = Literal["passed", "failed", "syntax", "cpu", "wall", "output", "ended"]
MAX_PROGRAM_BYTES = 1 << 20
_FACT_BYTES = 4096
_SIGXCPU = 128 + signal.SIGXCPU


class SandboxError(RuntimeError):
    """No wall that holds can be built here, or one broke down; one line that says why and the way out."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a program.

    ``passed``: it came past its last line. ``failed``: it raised ``detail``. ``syntax``: it is no Python. ``cpu``,
    ``wall``, ``output``: it used more than it may. ``ended``: it left, or was ended, before its last line.
    ``output`` is what it printed, as far as that was taken.
    """

    verdict: Verdict
    detail: str
    output: str

    @property
    def passed(self) -> bool:
        """Whether it came past its last line."""
        return self.verdict == "passed"


class Sandbox:
    """A wall that was tried; ``level`` names it. Programs share nothing: each runs behind a wall of its own."""

    def __init__(self, launch: Launch, limits: Limits) -> None:
        self.level: Level = launch.level
        self.limits = limits
        self.passed_over: list[str] = []
        """Why it is not a stronger one."""
        self._launch = launch

    @property
    def has_landlock(self) -> bool:
        """Whether Landlock is among its measures."""
        return bool(self._launch.job["landlock"])

    def described(self) -> str:
        """The level, and why it is not a stronger one: a line for the log."""
        return f"sandbox: {self.level}" + (f", since {'; '.join(self.passed_over)}" if self.passed_over else "")

    def run(self, *parts: str) -> Outcome:
        """Execute the parts of a program one after another in one module.

        Raises:
            SandboxError: when the wall could not be built this time: nothing was run then, and nothing is judged.
        """
        word = secrets.token_hex(16)
        job = json.dumps({**self._launch.job, "parts": list(parts), "word": word}).encode()
        if sum(map(len, parts)) > MAX_PROGRAM_BYTES:
            return Outcome("syntax", f"longer than {MAX_PROGRAM_BYTES} characters", "")
        facts, output, code, why = _communicate(self._launch, job, self.limits)
        text = output[: self.limits.output_bytes].decode("utf-8", "replace")
        lines = facts.decode("ascii", "replace").split("\n")[:-1]
        if lines[:1] != ["ready"]:
            said = lines[0].removeprefix("refused ") if lines else text.strip()[-300:] or f"exit code {code}"
            raise SandboxError(f"the sandbox ({self.level}) could not be built: {said}; nothing was run")
        return _judge(lines[1:], word, code, why, text)

    def run_all(self, programs: Sequence[Sequence[str]], workers: int) -> list[Outcome]:
        """Each program's outcome, ``workers`` at a time."""
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return list(pool.map(lambda parts: self.run(*parts), programs))


def _judge(lines: list[str], word: str, code: int, why: str, output: str) -> Outcome:
    """``why`` is the limit for which it was ended from outside; ``lines`` may have been forged but for the word."""
    if why:
        return Outcome("wall" if why == "wall" else "output", "", output)
    if lines == ["compiled", word]:
        return Outcome("passed", "", output)
    if lines == ["syntax"]:
        return Outcome("syntax", "", output)
    if code == _SIGXCPU:
        return Outcome("cpu", "", output)
    match = re.fullmatch(r"failed ([A-Za-z_][A-Za-z0-9_]{0,59})", lines[-1]) if lines else None
    if match:
        return Outcome("failed", match[1], output)
    return Outcome("ended", f"by signal {code - 128}" if code > 128 else f"with code {code}", output)


def _communicate(launch: Launch, job: bytes, limits: Limits) -> tuple[bytes, bytes, int, str]:
    """Facts, output, exit code (128 + signal), and the limit for which it was ended."""
    with tempfile.TemporaryFile() as file:
        file.write(job)
        file.seek(0)
        process = subprocess.Popen(
            launch.command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=launch.environment,
            cwd="/", close_fds=True, start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None, "it was asked for"
    assert process.stderr is not None, "it was asked for"
    caps = {process.stdout.fileno(): _FACT_BYTES, process.stderr.fileno(): limits.output_bytes}
    try:
        read, why = _read(caps, time.monotonic() + limits.wall_s)
        if not why and not _wait(process, 5.0):
            why = "wall"
    finally:
        _end(process)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    found = tuple(read.values())
    process.stdout.close()
    process.stderr.close()
    return found[0], found[1], code, why


def _read(caps: dict[int, int], deadline: float) -> tuple[dict[int, bytes], str]:
    """Read the descriptors until all are closed, one gives more than its cap, or time is over."""
    found = dict.fromkeys(caps, b"")
    with selectors.DefaultSelector() as selector:
        for descriptor in caps:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return found, "wall"
            for key, _ in selector.select(left):
                data = os.read(key.fd, 1 << 16)
                found[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
                elif len(found[key.fd]) > caps[key.fd]:
                    return found, "output"
    return found, ""


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and its group; the first process of the namespace dies with it, and all others with that."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def open_sandbox(wanted: Level | Literal["auto"] = "auto", limits: Limits | None = None) -> Iterator[Sandbox]:
    """A sandbox whose wall withstood the probe; ``auto`` takes the strongest of bubblewrap and Landlock.

    Raises:
        SandboxError: when none does, each with its reason. Nothing weaker is taken instead.
    """
    if wanted not in ("auto", *LEVELS):
        raise ValueError(f"field sandbox must be one of auto, {', '.join(LEVELS)}; got {wanted!r}")
    limits = limits or Limits()
    root = Path(tempfile.mkdtemp(prefix="pedigree-sandbox-"))
    try:
        yield _strongest(STRONG if wanted == "auto" else (wanted,), limits, root)
    finally:
        # Never more than an empty folder: what is mounted upon it is seen by the far side alone.
        with contextlib.suppress(OSError):
            root.rmdir()


@functools.cache
def why_none(wanted: Level | Literal["auto"]) -> str | None:
    """Why this machine has no such sandbox; None where it has. Tried once a process."""
    try:
        with open_sandbox(wanted):
            return None
    except SandboxError as error:
        return str(error)


def _strongest(levels: Sequence[Level], limits: Limits, root: Path) -> Sandbox:
    reasons = []
    for level in levels:
        try:
            sandbox = Sandbox(prepare(level, limits, root), limits)
            holes = probe(sandbox)
        except (Unavailable, SandboxError, OSError) as error:
            reasons.append(f"{level} {error}")
            continue
        if not holes:
            sandbox.passed_over = reasons
            return sandbox
        reasons.append(f"{level} does not hold here: {'; '.join(holes)}")
    hint = "install bubblewrap (bwrap)" if "landlock-own-uid" in levels or os.geteuid() == 0 else (
        "install bubblewrap (bwrap), or name the weaker landlock-own-uid"
    )  # fmt: skip
    raise SandboxError(
        f"generated code needs a sandbox; there is none: {'; '.join(reasons)}; {hint}, or leave code out"
    )


def probe(sandbox: Sandbox) -> list[str]:
    """What a hostile program could do behind this wall; empty when every attack failed."""
    with targets() as aims:
        plan: dict[str, Any] = {
            **aims.plain(), "limits": dataclasses.asdict(sandbox.limits), "landlock": sandbox.has_landlock,
        }  # fmt: skip
        outcome = sandbox.run(f"AIMS = {plan!r}", PROBE)
        return [*findings(outcome.output, outcome.passed), *aims.touched()]
