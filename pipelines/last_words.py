"""The last line of a run that did not finish: which stage, why, where its log is, and what to run next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.chain import Node
from stages.base import EXIT_CONFIG, EXIT_SAVED
from stages.runtime import artifact
from stages.runtime.artifact import ArtifactError
from stages.runtime.lock import busy
from stages.runtime.scrub import environment_secrets, scrub_text

MAX_REASON = 300
"""Characters of an error that are repeated; the whole stands in the log."""


def last_words(nodes: Sequence[Node], code: int, command_for: Callable[[Node], str]) -> str | None:
    """One line on the first of ``nodes``, the stages of one child, that is not done; None where all are.

    None too for a data stage that was saved: it has said so itself, and no launcher after it.

    ``code`` is the exit code of the child; ``command_for`` gives the command that runs one stage alone.
    """
    for node in nodes:
        try:
            record = artifact.read_record(node.job.directory)
        except ArtifactError as error:
            return _line(f"{node.name} failed: {error}")
        if artifact.is_done(record, node.job):
            continue
        if code != EXIT_SAVED or (record is not None and node.stage.launched):
            return _line(_words(node, record or {}, code, command_for(node)))
        break
    return None


def _words(node: Node, record: dict[str, object], code: int, command: str) -> str:
    step = record.get("step")
    at_step = f" at step {step}" if step else ""
    log = node.job.directory / "log.txt"
    see = f"; log: {artifact.shown(log)}" if log.exists() else ""
    if code == EXIT_SAVED:
        return f"{node.name}: saved{at_step}{see}; the same command goes on from there, or that stage alone: {command}"
    # Of two starts at once the record is that of the other one, which goes on.
    if said := busy(node.job.directory):
        return f"{node.name} was not run: {said}; the same command goes on then, or that stage alone: {command}"
    error = " ".join(str(record.get("error") or _without_error(record)).split())
    reason = error if len(error) <= MAX_REASON else f"{error[: MAX_REASON - 3]}..."
    what = "was refused" if code == EXIT_CONFIG else f"failed{at_step}"
    return f"{node.name} {what}: {reason}{see}; mended, the same command goes on, or that stage alone: {command}"


def _without_error(record: dict[str, object]) -> str:
    """A process that was killed writes no error."""
    return f"it was killed while {record['state']}" if record.get("state") else "it ended before it began, see above"


def _line(text: str) -> str:
    return scrub_text(text, environment_secrets())
