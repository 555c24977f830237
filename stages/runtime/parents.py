"""The parents of a run: verified before it begins, and held to what they were for as long as they are read.

A longer run may extend a parent meanwhile, and its output takes the place of the one that is being read
(``manifest.seal``). Nothing that was read then may stand under the digest of what was there before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.base import ConfigError, Fault, Stage
from stages.runtime import artifact
from stages.runtime.artifact import ArtifactError, Job, ParentLink
from stages.runtime.manifest import CheckpointError, sealed_digest, verify_manifest


def verified_parents(stage: Stage, job: Job, previous: Mapping[str, Any] | None) -> dict[str, str]:
    """Output digests by field, every byte of each parent's output checked.

    Raises:
        ArtifactError: when a parent is not the finished artifact that the job's key was made from.
        CheckpointError: when a parent's files do not match their manifest, or gave way to those of a longer run.
        ConfigError: when a parent does not fit this stage, or changed under a run that is to be continued.
    """
    records = {name: _finished(link) for name, link in job.parents.items()}
    try:
        digests = {name: _verified(link, records[name]) for name, link in job.parents.items()}
        faults = _changed_parents(job, previous, digests)
        places = {name: link.path for name, link in job.parents.items()}
        faults += type(stage).check_parents(job.config, job.model, places)
    except (ValueError, OSError) as error:
        _refuse_replaced(job, records, error)
        raise
    if faults:
        _refuse_replaced(job, records, None)
        raise ConfigError(faults)
    return digests


@contextlib.contextmanager
def unchanged(output: Path, digest: str | None) -> Iterator[None]:
    """What is read inside comes from the parent's sealed ``output`` of that ``digest``, all of it.

    Nothing takes its place and is replaced by it again, so that one look afterwards tells of the whole time.

    Raises:
        CheckpointError: where something else lies there now, whatever else went wrong on account of that.
    """
    try:
        yield
    except Exception as error:
        if sealed_digest(output) != digest:
            raise CheckpointError(_replaced(output.parent)) from error
        raise
    if sealed_digest(output) != digest:
        raise CheckpointError(_replaced(output.parent))


def _replaced(directory: Path) -> str:
    return (
        f"parent {artifact.shown(directory)} is no longer what it was when this command began: a longer run of it was "
        "finished meanwhile, or its output was changed; run the command again"
    )


def _finished(link: ParentLink) -> Mapping[str, Any]:
    record = artifact.finished_of(artifact.read_record(link.path), link.path)
    if record is None or record["key"] != link.key:
        raise ArtifactError(f"parent {link.stage} in {link.path} is not done; run it first")
    grown_to = artifact.lineage_key(record["key"], record.get("extension") or {})
    if link.lineage not in (record["output_digest"], grown_to):
        raise CheckpointError(_replaced(link.path))
    return record


def _refuse_replaced(job: Job, records: Mapping[str, Mapping[str, Any]], error: Exception | None) -> None:
    """Say that a parent gave way, where one did: what went wrong is on account of that, and no fault of its own."""
    for name, link in job.parents.items():
        now = artifact.finished_of(artifact.read_record(link.path), link.path)
        if now is None or now["output_digest"] != records[name]["output_digest"]:
            raise CheckpointError(_replaced(link.path)) from error


def _verified(link: ParentLink, record: Mapping[str, Any]) -> str:
    try:
        digest = verify_manifest(link.path / "output")
    except CheckpointError as error:
        again = f"restore it, or make it anew: rm -r {artifact.shown(link.path)}, then run stage {link.stage}"
        raise CheckpointError(f"parent {link.stage} is damaged: {error}; {again}") from error
    if digest != record["output_digest"]:
        raise ArtifactError(
            f"parent {link.stage}: the output in {link.path} is not the one that its {artifact.RECORD} names; "
            "delete that directory and run it anew"
        )
    return digest


def _changed_parents(job: Job, previous: Mapping[str, Any] | None, digests: Mapping[str, str]) -> list[Fault]:
    """Faults for a run that would go on from its checkpoints on other inputs than it began with."""
    if previous is None or not artifact.checkpoint_steps(job.directory):
        return []
    began = {name: (link or {}).get("digest") for name, link in previous.get("parents", {}).items()}
    return [
        Fault(
            name.rstrip("_"),
            f"must be the artifact that this run began with ({str(began[name])[:8]}); {job.parents[name].stage} has "
            f"other content now ({digest[:8]}); delete {artifact.shown(job.directory)} to start it over",
        )
        for name, digest in digests.items()
        if began.get(name) not in (None, digest)
    ]
