"""What a running stage reports: rows to ``metrics.jsonl``, edges to ``lineage.json``, and a copy of both to W&B.

``open_tracker`` is the way in; on ranks other than 0 it returns a tracker that writes nothing.

Names of metrics end in their unit where they have one (``loss_nats_per_token``, ``tokens_per_s``; TRAPS M7), and a
score on a held-out set travels with that set's hash in the same row: ``bpb`` without ``heldout_hash`` is an error, so
that a reader can refuse to compare two sets (TRAPS M3).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.runtime import distributed, edges
from stages.runtime.journal import ALERT, RESUME, Journal, read_metrics
from stages.runtime.mirror import CHECKPOINT, Mode, WandbMirror, identity, resolve_mode
from stages.runtime.scrub import environment_secrets, scrub, scrub_text

__all__ = ["Tracker", "open_tracker", "read_metrics"]

logger = logging.getLogger(__name__)


class Tracker:
    """Reports of one stage; with ``enabled=False`` every method does nothing.

    Raises ``OSError`` when ``metrics.jsonl`` cannot be written, since it is the truth; a failure of W&B is said once.
    """

    def __init__(
        self,
        directory: Path,
        *,
        pipeline: str,
        stage: str,
        kind: str,
        key: str,
        config: Mapping[str, Any],
        mode: Mode = "auto",
        enabled: bool = True,
        project: str = "pedigree",
        entity: str | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.enabled = enabled
        self.last_step = 0
        self._mirror: WandbMirror | None = None
        if not enabled:
            return
        self._secrets = environment_secrets()
        self._journal = Journal(self.directory)
        run = identity(pipeline, stage, kind, key, project, entity)
        self._name = run.name
        self._edges = edges.EdgeFile(self.directory, run)
        resolved = resolve_mode(mode)
        if resolved != "disabled":
            self._mirror = WandbMirror(self.directory, run, scrub(config, self._secrets), resolved)
        if self._journal.repaired:
            self.alert(self._journal.repaired)

    def log(self, event: str, step: int, values: Mapping[str, float | str | int]) -> None:
        """Append one row, and copy it to W&B as ``event/name`` on the axis ``event/step``.

        A value is a number or a string; 0-d tensors and NumPy numbers are unwrapped. Anything else, a name that a row
        itself uses (``step``), and ``bpb`` without ``heldout_hash`` are a ``ValueError``.
        """
        if not self.enabled:
            return
        if "heldout_hash" not in values and any(name.split("/")[0] == "bpb" for name in values):
            raise ValueError(f"a row of event {event!r} with a score bpb must name its set; add heldout_hash")
        self.last_step = step
        clean = {name: self._clean(value) for name, value in values.items()}
        row = self._journal.append(event, step, clean)
        if self._mirror:
            self._mirror.log(event, step, clean, row)

    def resume(self, step: int) -> None:
        """Say that the run goes on from the state after ``step``; what was logged beyond it no longer counts."""
        self.log(RESUME, step, {})
        self.flush()

    def flush(self) -> None:
        """Force every row onto the disk: a checkpoint calls this first, and so never outlives the rows before it."""
        if self.enabled:
            self._journal.sync()

    def use_artifact(self, name: str, path: Path, digest: str, kind: str = "artifact") -> None:
        """Record an input, name and kind as its maker gave them: in ``lineage.json``, and online in W&B."""
        if not self.enabled:
            return
        self._edges.add("inputs", name, kind, path, digest)
        if self._mirror:
            self._mirror.use_artifact(name, kind, Path(path), {"digest": digest})

    def log_artifact(
        self, name: str, type: str, path: Path, digest: str, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Record an output (a checkpoint, the sealed result) as a checksummed reference; nothing is uploaded."""
        if not self.enabled:
            return
        # Plain data, and no NaN in a JSON file.
        plain = json.loads(json.dumps(dict(metadata or {}), default=str), parse_constant=str)
        described = scrub(plain, self._secrets)
        self._edges.add("outputs", name, type, path, digest, described)
        if self._mirror:
            self._mirror.log_artifact(name, type, Path(path), {**described, "digest": digest})

    def log_checkpoint(self, step: int, path: Path) -> None:
        """Record a sealed checkpoint as an output; its digest is that of its manifest."""
        if self.enabled:
            self.log_artifact(
                f"{self._name}-checkpoint", CHECKPOINT, path, edges.sealed_digest(path) or "", {"step": step}
            )

    def alert(self, text: str) -> None:
        """Say something an operator should read: to the log, as a row at the last step, and to W&B."""
        if not self.enabled:
            return
        text = scrub_text(text, self._secrets)
        logger.warning("%s", text)
        row = self._journal.append(ALERT, self.last_step, {"text": text})
        self._journal.sync()
        if self._mirror:
            self._mirror.log(ALERT, self.last_step, {"text": text}, row)
            self._mirror.alert(self.directory.name, text)

    def notify(self, text: str) -> None:
        """Send what a row already says to whoever watches the run in W&B."""
        if self.enabled and self._mirror:
            # W&B takes one alert of a title a minute: an alarm is not to be lost to what was said before.
            self._mirror.alert(f"{self.directory.name}: alarm", scrub_text(text, self._secrets))

    def finish(self, state: str) -> None:
        """Flush and close everything; ``state`` is ``done``, ``saved`` or ``failed``. A second call does nothing."""
        if not self.enabled:
            return
        self.enabled = False
        try:
            self._journal.close()
        except OSError as error:
            # The stage's own ending is under way and must not be covered by this.
            logger.error("%s could not be flushed to the disk: %s", self._journal.path, error)
        if self._mirror:
            self._mirror.finish(state)

    def _clean(self, value: Any) -> Any:
        return scrub_text(value, self._secrets) if isinstance(value, str) else value


def open_tracker(
    directory: Path,
    *,
    pipeline: str,
    stage: str,
    kind: str,
    key: str,
    config: Mapping[str, Any],
    rank: int | None = None,
    mode: Mode = "auto",
    project: str = "pedigree",
    entity: str | None = None,
) -> Tracker:
    """The tracker of a stage on this rank: a working one on rank 0, a silent one elsewhere.

    ``rank`` is taken from the launcher's environment where it is not given.
    """
    return Tracker(
        directory,
        pipeline=pipeline,
        stage=stage,
        kind=kind,
        key=key,
        config=config,
        mode=mode,
        enabled=(distributed.rank() if rank is None else rank) == 0,
        project=project,
        entity=entity,
    )
