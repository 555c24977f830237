"""``--all``: each stage in a process group of its own, watched and reaped; results are read from ``stage.json``.

The exit code of a launcher is not believed (TRAPS O1): it can be 0 when a rank was killed. ``stage.json`` says what
became of the stage, and only an attempt that began after the launch counts.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipelines.chain import Chain, Node
from pipelines.single import CommandFor, needed
from pipelines.staleness import standing
from stages.base import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_SAVED, ConfigError, Fault
from stages.runtime import artifact
from stages.runtime.artifact import ArtifactError, Job, has_gpu
from stages.runtime.distributed import STOP_FILE

WARDEN = Path(__file__).resolve().parent / "warden.py"
GRACE_S = 300.0
"""How long a stage may take to save after it was asked to stop, before it is killed."""

Argv = Callable[[Node], Sequence[str]]


class Interrupts:
    """SIGTERM, SIGUSR1 and SIGINT ask the running stage to save and end; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self._line: int | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside."""
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        old = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def passed_to(self, line: int) -> Iterator[None]:
        """Pass requests on by the file descriptor ``line``, one that came before included."""
        self._line = line
        if self.requested:
            self._say(b"stop\n")
        try:
            yield
        finally:
            self._line = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.requested and number == signal.SIGINT
        self.requested = True
        self._say(b"kill\n" if again else b"stop\n")

    def _say(self, word: bytes) -> None:
        if self._line is not None:
            with suppress(OSError):
                os.write(self._line, word)


def run_all(
    chain: Chain, chosen: Sequence[Node], argv_for: Argv, command_for: CommandFor, grace_s: float = GRACE_S
) -> int:
    """Run what is left to do of ``chosen``, in order, and return the exit code of the first that did not finish.

    ``argv_for`` gives the command that runs one stage alone; ``command_for`` the same for messages.

    Raises:
        ConfigError: before anything runs, when a training stage outside ``chosen`` is needed and not finished.
    """
    _refuse_gaps(chain, chosen, command_for)
    interrupts = Interrupts()
    with interrupts.handled():
        for node in chosen:
            found = standing(node)
            if found.done:
                print(f"{node.name}: already done, {artifact.shown(node.job.directory)}", flush=True)
                continue
            if interrupts.requested:
                print(f"{node.name}: not started, asked to stop; the same command goes on from here", flush=True)
                return EXIT_SAVED
            print(f"{node.name}: {'; '.join(found.reasons)}", flush=True)
            code = run_child(node, argv_for(node), interrupts, grace_s)
            if code != EXIT_DONE:
                return code
    return EXIT_DONE


def run_child(node: Node, argv: Sequence[str], interrupts: Interrupts, grace_s: float) -> int:
    """Run one stage's command under a warden, and return the exit code that its ``stage.json`` amounts to."""
    before = _attempts(node.job)
    stop_file = node.job.directory / STOP_FILE
    stop = ["--stop-file", str(stop_file)] if node.stage.launched else []
    command = [sys.executable, str(WARDEN), *stop, "--grace-s", str(grace_s), "--", *argv]
    # A pipe that only this process holds open: its end tells the warden that we are gone.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, env=environment(os.environ, node.stage.launched)
    )
    assert process.stdin is not None, "a pipe was asked for"
    with process.stdin as line, interrupts.passed_to(line.fileno()):
        code = process.wait()
    if code < 0:
        # The warden itself was killed, and with it the promise that nobody is left.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # One that nobody honoured would stop the next run of this artifact at its first step.
    stop_file.unlink(missing_ok=True)
    return outcome(node.job, code, before)


def outcome(job: Job, code: int, attempts_before: int) -> int:
    """The stage's exit code, from ``stage.json``; the command's ``code`` counts only when no attempt was begun."""
    try:
        record = artifact.read_record(job.directory)
    except ArtifactError as error:
        print(f"{job.name}: {error}", file=sys.stderr)
        return EXIT_FAILED
    if artifact.is_done(record, job):
        return EXIT_DONE
    if record is None or record["attempts"] == attempts_before:
        print(f"{job.name}: ended with code {code} before it began", file=sys.stderr)
        return EXIT_CONFIG if code == EXIT_CONFIG else EXIT_FAILED
    if record["state"] == "saved":
        return EXIT_SAVED
    if record["state"] == "failed":
        print(f"{job.name} failed: {record['error']}", file=sys.stderr)
        return int(record["exit_code"])
    log = artifact.shown(job.directory / "log.txt")
    print(f"{job.name} failed: it was killed while {record['state']}; see {log}", file=sys.stderr)
    return EXIT_FAILED


def launcher_argv(script: Path, num_gpus: int | None) -> list[str]:
    """The deepspeed launcher and ``script``; without ``num_gpus`` the launcher takes the devices that it finds."""
    devices = [] if num_gpus is None else ["--num_gpus", str(num_gpus)]
    # Two runs on one machine must not meet at the launcher's fixed default port.
    port = ["--master_port", str(_free_port())]
    # The launcher's own chatter repeats the whole command several times.
    quiet = ["--log_level", "error"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *quiet, *devices, *port, str(script)]


def environment(base: Mapping[str, str], launched: bool) -> dict[str, str]:
    """The environment of a child; without a GPU the launcher must be told so."""
    env = dict(base)
    if launched and not has_gpu():
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def _attempts(job: Job) -> int:
    try:
        return int((artifact.read_record(job.directory) or {}).get("attempts", 0))
    except ArtifactError:
        return 0


def _refuse_gaps(chain: Chain, chosen: Sequence[Node], command_for: CommandFor) -> None:
    """Every training stage that is needed must be finished or among the chosen."""
    names = {node.name for node in chosen}
    faults: list[Fault] = []
    for node in chosen:
        if standing(node).done:
            continue
        try:
            needed(chain, node, command_for, also=names)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
