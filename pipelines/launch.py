"""``--all``: children in process groups of their own, watched and reaped; results are read from ``stage.json``.

The exit code of a launcher is not believed (TRAPS O1): it can be 0 when a rank was killed. ``stage.json`` says what
became of the stage, and only an attempt that began after the launch counts.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pipelines.chain import Chain, Node
from pipelines.gates_graph import gates_of
from pipelines.gates_run import is_open, settle, unmeasured_faults
from pipelines.interrupts import Interrupts
from pipelines.last_words import last_words
from pipelines.single import CommandFor, needed
from pipelines.staleness import extension_notes, standing
from stages.base import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_SAVED, ConfigError, Fault
from stages.runtime import artifact
from stages.runtime.artifact import ArtifactError, Job, has_gpu
from stages.runtime.distributed import STOP_FILE
from stages.runtime.lock import busy
from stages.runtime.stop_file import clear_old

WARDEN = Path(__file__).resolve().parent / "warden.py"
GRACE_S = 300.0
"""How long a stage may take to save after it was asked to stop, before it is killed."""

Argv = Callable[[Sequence[Node]], Sequence[str]]


def run_all(
    chain: Chain,
    chosen: Sequence[Node],
    argv_for: Argv,
    command_for: CommandFor,
    grace_s: float = GRACE_S,
    finish: Callable[[], None] = lambda: None,
    overrides: Sequence[str] = (),
) -> int:
    """Run what is left to do of ``chosen``, in order, and return the exit code of the first that did not finish.

    Evaluations that are done are judged first: a gate that is closed, and not among ``overrides``, stops all. One that
    is compared with an evaluation still to be run is judged after it.

    ``argv_for`` gives the command that runs some stages, one after another; ``command_for`` the one for a single stage,
    for messages. ``finish`` is called last, however the stages ended, while signals are still handled.

    Raises:
        ConfigError: before anything runs, when a training stage outside ``chosen`` is needed and not finished.
    """
    _refuse_gaps(chain, chosen, command_for, overrides)
    interrupts = Interrupts()
    with interrupts.handled():
        try:
            left = _left(chain, chosen)
            if not all([settle(chain, node, overrides) for node in chosen if node not in left]):
                return EXIT_FAILED
            code, ended = _run_left(chain, left, argv_for, interrupts, grace_s)
        finally:
            finish()
    # A launcher says more of a rank's end than anyone wants to know, and what matters scrolls away.
    if ended and (words := last_words(ended, code, command_for)):
        print(words, file=sys.stderr, flush=True)
    return code


def _left(chain: Chain, chosen: Sequence[Node]) -> list[Node]:
    """The nodes that are not done, and those whose gates are to be judged by one of them; the others are told."""
    left: list[Node] = []
    for node in chosen:
        if standing(node).done and not {one.name for one in left} & set(_baselines(chain, node)):
            print(f"{node.name}: already done, {artifact.shown(node.job.directory)}", flush=True)
        else:
            left.append(node)
    return left


def _baselines(chain: Chain, node: Node) -> Sequence[str]:
    """The evaluations that the gates of ``node`` compare it with."""
    return chain.first.get(node.name, ()) if gates_of(node.job.config) else ()


def _run_left(
    chain: Chain, left: Sequence[Node], argv_for: Argv, interrupts: Interrupts, grace_s: float
) -> tuple[int, Sequence[Node]]:
    """The exit code, and the stages of the child that ended with it where that is not 0 (none was begun: no stage)."""
    for nodes in together(left):
        if interrupts.requested:
            print(f"{nodes[0].name}: not started, asked to stop; the same command goes on from here", flush=True)
            return EXIT_SAVED, []
        for node in nodes:
            if said := busy(node.job.directory):
                print(f"{node.name}: {said}", file=sys.stderr)
                return EXIT_FAILED, []
            print(f"{node.name}: {'; '.join(standing(node).reasons) or 'its gates are judged anew'}", flush=True)
            for note in extension_notes(node):
                print(f"note: {note}", flush=True)
        code = run_child(nodes, argv_for(nodes), interrupts, grace_s)
        # The child has said what its gates found; its exit code is not believed.
        if code == EXIT_DONE and not is_open(chain, nodes[-1]):
            code = EXIT_FAILED
        if code != EXIT_DONE:
            return code, nodes
    return EXIT_DONE, []


def together(nodes: Sequence[Node]) -> list[list[Node]]:
    """What one child runs: a training stage alone, others together as long as they follow one another.

    A stage with gates is the last of its child, since what follows may not be run.

    Imports cost seconds, which a process of their own would cost each of them.
    """
    children: list[list[Node]] = []
    for node in nodes:
        last = children[-1][-1] if children else None
        if last is not None and not (node.stage.launched or last.stage.launched or gates_of(last.job.config)):
            children[-1].append(node)
        else:
            children.append([node])
    return children


def run_child(nodes: Sequence[Node], argv: Sequence[str], interrupts: Interrupts, grace_s: float) -> int:
    """Run one command under a warden, and return the exit code that the ``stage.json`` of its stages amount to."""
    before = [_attempts(node.job) for node in nodes]
    launched = nodes[0].stage.launched
    stop_file = nodes[0].job.directory / STOP_FILE
    stop = ["--stop-file", str(stop_file)] if launched else []
    command = [sys.executable, str(WARDEN), *stop, "--grace-s", str(grace_s), "--", *argv]
    if removed := clear_old(nodes[0].name, stop_file.parent, started_s=0.0):
        print(removed, flush=True)
    # One from before this run is no request to this run, however shortly before.
    stop_file.unlink(missing_ok=True)
    # A pipe that only this process holds open: its end tells the warden that we are gone.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True, env=environment(os.environ, launched)
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
    for node, attempts in zip(nodes, before, strict=True):
        ended = outcome(node.job, code, attempts, interrupts)
        if ended != EXIT_DONE:
            return ended
    return EXIT_DONE


def outcome(job: Job, code: int, attempts_before: int, interrupts: Interrupts) -> int:
    """The stage's exit code, from ``stage.json``; the command's ``code`` counts only when no attempt was begun.

    What the stage itself has said of its end is not said again.
    """
    try:
        record = artifact.read_record(job.directory)
    except ArtifactError as error:
        print(f"{job.name}: {error}", file=sys.stderr)
        return EXIT_FAILED
    if artifact.is_done(record, job):
        return EXIT_DONE
    if record is None or record["attempts"] == attempts_before:
        return _not_begun(job, code, interrupts)
    if record["state"] == "saved":
        return EXIT_SAVED
    if record["state"] == "failed":
        return int(record["exit_code"])
    log = artifact.shown(job.directory / "log.txt")
    by = "ended at once" if interrupts.killing else "killed"
    print(f"{job.name} failed: it was {by} while {record['state']}; see {log}", file=sys.stderr)
    return EXIT_FAILED


def _not_begun(job: Job, code: int, interrupts: Interrupts) -> int:
    if code == EXIT_CONFIG:
        return EXIT_CONFIG
    if interrupts.requested and not interrupts.killing:
        print(f"{job.name}: stopped before it began; the same command goes on from here", flush=True)
        return EXIT_SAVED
    print(f"{job.name}: ended with code {code} before it began", file=sys.stderr)
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


def _refuse_gaps(chain: Chain, chosen: Sequence[Node], command_for: CommandFor, overrides: Sequence[str]) -> None:
    """Every training stage that is needed, and every gate on the way, must be finished or among the chosen."""
    names = {node.name for node in chosen}
    faults: list[Fault] = []
    for node in chosen:
        if standing(node).done:
            continue
        faults += unmeasured_faults(chain, node, overrides, command_for, also=names)
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
