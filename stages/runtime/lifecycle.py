"""The life of one artifact: lock, running, run, seal, and then done, saved or failed.

``stage.json`` always tells the state, whatever becomes of the process; the exit code repeats it for the shell:
0 done or already done, 85 saved and to be started again, 2 the user's input, 1 failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

from stages.base import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_SAVED,
    Stage,
    StageContext,
    StageResult,
    StopRequested,
)
from stages.runtime import artifact, distributed, peers
from stages.runtime.artifact import ArtifactError, Job
from stages.runtime.checkpoint import seal
from stages.runtime.code import write_code
from stages.runtime.console import copied_to
from stages.runtime.faults import DONE, Ending, ending_of, is_refusal
from stages.runtime.lock import ArtifactBusyError, hold
from stages.runtime.lost import end_without, tell_for_rank_zero
from stages.runtime.out_of_memory import explained
from stages.runtime.parents import verified_parents
from stages.runtime.stop_file import clear_old
from stages.runtime.tracking import open_tracker


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What does not decide the result: the cache of fetched files, and where the run is tracked.

    ``mode``, ``project`` and ``entity`` are the tracker's, as the recipe's section ``tracking`` has them.
    """

    cache: Path
    mode: Literal["auto", "online", "offline", "disabled"] = "disabled"
    project: str = "pedigree"
    entity: str | None = None
    overridden_gates: tuple[Mapping[str, Any], ...] = ()
    """Gates that were overridden for the run to begin: ``stage``, ``key``, ``metric``, ``said`` and ``at`` of each."""


def execute(stage: Stage, job: Job, around: Surroundings, ready: Callable[[], None] = lambda: None) -> int:
    """Carry out ``job`` as rank 0, or as the only process, and return the exit code; other ranks ``follow``.

    ``ready`` is called once nothing but the stage itself can refuse the run any more.
    """
    try:
        with hold(job.directory):
            return _lead(stage, job, around, ready)
    except (ArtifactBusyError, ArtifactError) as error:
        print(f"{job.name}: {error}", file=sys.stderr)
        return EXIT_FAILED


def _lead(stage: Stage, job: Job, around: Surroundings, ready: Callable[[], None]) -> int:
    previous = artifact.read_record(job.directory)
    if artifact.is_done(previous, job):
        print(f"{job.name}: already done, {artifact.shown(job.directory)}")
        return EXIT_DONE
    with copied_to(job.directory / "log.txt") as log:
        record = _begin(job, previous, around)
        if line := clear_old(job.name, job.directory):
            print(line)
        return _attempt(stage, job, around, previous, record, log, ready)


def _attempt(
    stage: Stage,
    job: Job,
    around: Surroundings,
    previous: Mapping[str, Any] | None,
    record: dict[str, Any],
    log: TextIO,
    ready: Callable[[], None],
) -> int:
    started = time.monotonic()
    tracker = None
    try:
        digests = verified_parents(stage, job, previous)
        record["parents"] = {name: {**link, "digest": digests[name]} for name, link in record["parents"].items()}
        artifact.write_record(job.directory, record)
        tracker = _open_tracker(job, around)
        context = _context(stage, job, around, tracker, record)
        ready()
        with peers.on_loss(lambda lost: end_without(lost, job, record)):
            result = _run(stage, context)
        _seal(stage, job, record, tracker, result)
        ending = DONE
    except BaseException as caught:
        error = explained(caught, stage, job.config, job.model, distributed.world_size())
        ending = ending_of(error, job.name, job.directory)
        _report(ending, log)
        if is_refusal(error) and previous is not None and previous["state"] != "failed":
            return _refused(job, previous, tracker, ending)
        record.update(error=ending.error, step=artifact.reached_step(job.directory, previous))
    record["elapsed_s"] = round(record["elapsed_s"] + time.monotonic() - started, 3)
    return _close(job, record, tracker, ending)


def _refused(job: Job, previous: Mapping[str, Any], tracker: Any, ending: Ending) -> int:
    """Put back the record of a run that is as good as before: a command was refused, nothing has failed."""
    artifact.write_record(job.directory, previous)
    if tracker is not None:
        _finish_tracker(tracker, previous["state"])
    return ending.code


def follow(stage: Stage, job: Job, around: Surroundings) -> int:
    """Carry out ``job`` as any other rank: run the stage, write nothing, say only what went wrong here."""
    record = artifact.read_record(job.directory) or {}
    try:
        context = _context(stage, job, around, _open_tracker(job, around), record)
        with peers.on_loss(lambda lost: end_without(lost, job, record)):
            _run(stage, context)
    except BaseException as caught:
        error = explained(caught, stage, job.config, job.model, distributed.world_size())
        ending = ending_of(error, job.name, job.directory)
        if is_refusal(error) and record.get("host") == socket.gethostname():
            # Every rank of this machine is given the same, and rank 0 says it.
            return ending.code
        if ending.state == "failed":
            tell_for_rank_zero(job, record)
            for line in [*ending.lines, "" if ending.quiet else ending.traceback]:
                print(f"rank {distributed.rank()}: {line}\n" if line else "", end="", file=sys.stderr)
        else:
            _part()
        return ending.code
    return EXIT_DONE


def _begin(job: Job, previous: Mapping[str, Any] | None, around: Surroundings) -> dict[str, Any]:
    """Write ``running`` and return the record."""
    record: dict[str, Any] = {
        "format": artifact.FORMAT,
        "state": "running",
        "pipeline": job.pipeline,
        "stage": job.name,
        "kind": job.kind,
        "key": job.key,
        "identity": dict(job.identity),
        "extension": dict(job.extension),
        "code_version": job.identity["code_version"],
        "config": job.config.model_dump(mode="json", by_alias=True),
        "model": None if job.model is None else job.model.model_dump(mode="json"),
        "seed": job.seed,
        "parents": {name: _link(job, name, previous) for name in job.parents},
        "sources": dict(job.identity["sources"]),
        "code_digest": write_code(job.directory),
        "overridden_gates": _overridden(previous, around),
        "output_digest": None,
        "finished": artifact.finished_of(previous, job.directory),
        "metrics": {},
        "summary": [],
        **artifact.environment(),
        "world_size": distributed.world_size(),
        "started_at": artifact.now(),
        "finished_at": None,
        "elapsed_s": (previous or {}).get("elapsed_s", 0.0),
        "step": artifact.reached_step(job.directory),
        "error": None,
        "attempts": (previous or {}).get("attempts", 0) + 1,
    }
    artifact.write_record(job.directory, record)
    # Not yet verified; and a finished run may be extended from before its newest checkpoint (wsd).
    step = None if previous and previous["state"] == "done" else record["step"]
    newest = f", newest checkpoint: step {step}" if step else ""
    print(f"{job.name}: started in {artifact.shown(job.directory)} (attempt {record['attempts']}{newest})")
    return record


def _overridden(previous: Mapping[str, Any] | None, around: Surroundings) -> list[dict[str, Any]]:
    """What earlier attempts and this one were let past, each once."""
    found: list[dict[str, Any]] = []
    for gate in [*(previous or {}).get("overridden_gates", []), *around.overridden_gates]:
        found += [dict(gate)] if gate not in found else []
    return found


def _link(job: Job, name: str, previous: Mapping[str, Any] | None) -> dict[str, Any]:
    parent = job.parents[name]
    digest = ((previous or {}).get("parents", {}).get(name) or {}).get("digest")
    return {**dataclasses.asdict(parent), "path": str(parent.path), "digest": digest}


def _open_tracker(job: Job, around: Surroundings) -> Any:
    return open_tracker(
        job.directory,
        pipeline=job.pipeline,
        stage=job.name,
        kind=job.kind,
        key=job.key,
        config={**job.identity, "config": job.config.model_dump(mode="json", by_alias=True)},
        rank=distributed.rank(),
        mode=around.mode,
        project=around.project,
        entity=around.entity,
    )


def _context(stage: Stage, job: Job, around: Surroundings, tracker: Any, record: Mapping[str, Any]) -> StageContext:
    output, work = job.directory / "output.tmp", job.directory / "work"
    ranks = distributed.world_size()
    config = stage.fitted(job.config, ranks)
    if distributed.rank() == 0:
        if note := fitted_note(job.name, job.config, config, ranks):
            print(note)
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        work.mkdir(exist_ok=True)
        for name, link in record["parents"].items():
            path, produces = Path(link["path"]) / "output", stage.inputs[name].produces
            tracker.use_artifact(f"{link['stage']}-{link['key'][:8]}", path, link["digest"], produces)
    return StageContext(
        pipeline=job.pipeline,
        name=job.name,
        key=job.key,
        seed=job.seed,
        config=config,
        model=job.model,
        directory=job.directory,
        output=output,
        work=work,
        cache=around.cache,
        parents={name: link.path for name, link in job.parents.items()},
        tracker=tracker,
        record=record,
    )


def fitted_note(name: str, asked: Any, config: Any, ranks: int) -> str | None:
    """What a stage's ``fitted`` made of the config that was asked for, in one line; None where nothing."""
    changes = [
        f"{field} {getattr(asked, field)} -> {getattr(config, field)}"
        for field in type(asked).model_fields
        if getattr(asked, field) != getattr(config, field)
    ]
    share = f"the share of each of {ranks} ranks" if ranks > 1 else "the batch"
    return f"{name}: {', '.join(changes)}, which divides {share}; the result stays the same" if changes else None


def _run(stage: Stage, context: StageContext) -> StageResult:
    # Where ranks wait for each other they must stop at the same place, which the stage itself looks for.
    is_together = stage.launched or (stage.shared and distributed.world_size() > 1)
    with contextlib.nullcontext() if is_together else _stop_on_signals():
        result = stage.run(context)
    # Together: whoever goes first would be missed by those that still watch.
    _part()
    return result


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """A signal to stop raises ``StopRequested``: a data stage keeps its work in files and goes on from them.

    A second SIGINT interrupts whatever is left to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # A forked worker inherits the handler; for it the signal means what it always meant.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise StopRequested(signal.Signals(number).name)

    old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _seal(stage: Stage, job: Job, record: dict[str, Any], tracker: Any, result: StageResult) -> None:
    digest = seal(job.directory / "output.tmp", job.directory / "output")
    record.update(metrics=result.metrics, summary=result.summary, output_digest=digest, finished=None)
    record["step"] = result.metrics.get("step", artifact.reached_step(job.directory))
    name, output = f"{job.name}-{job.key[:8]}", job.directory / "output"
    tracker.log_artifact(name, stage.produces, output, digest, result.metrics)
    for line in result.summary:
        print(line)


def _report(ending: Ending, log: TextIO) -> None:
    for line in ending.lines:
        print(line, file=sys.stderr if ending.state == "failed" else sys.stdout)
    if ending.traceback:
        print(ending.traceback, file=log if ending.quiet else sys.stderr)


def _close(job: Job, record: dict[str, Any], tracker: Any, ending: Ending) -> int:
    """Write the final state, finish the tracker, part from the other ranks; returns the exit code."""
    code = ending.code
    try:
        record.update(state=ending.state, exit_code=code, finished_at=artifact.now())
        artifact.write_record(job.directory, record)
    except (OSError, ValueError) as error:
        # The state "running" of a process that has ended is read as interrupted, never as done.
        print(f"{job.name} failed: {artifact.RECORD} could not be written: {error}", file=sys.stderr)
        code = EXIT_FAILED
    if tracker is not None:
        _finish_tracker(tracker, ending.state)
    if code == EXIT_DONE:
        _remove_work(job)
        print(f"{job.name}: done in {record['elapsed_s']:.1f} s, {artifact.shown(job.directory)}")
    if code == EXIT_SAVED:
        _part()
    return code


def _remove_work(job: Job) -> None:
    """What a finished stage would have gone on from is of no use any more; it may be larger than the result."""
    shutil.rmtree(job.directory / "work", ignore_errors=True)


def _finish_tracker(tracker: Any, state: str) -> None:
    """Close the tracker; the artifact's state is on disk by now and a tracker's fault must not change it."""
    try:
        tracker.finish(state)
    except Exception as error:
        print(f"tracking could not be finished: {error}", file=sys.stderr)


def _part() -> None:
    """Leave together: the launcher ends all ranks as soon as one of them has ended with a code other than 0."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        distributed.barrier()
        distributed.close_process_group()
