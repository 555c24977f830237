"""Checkpoints that survive a kill at any moment, and resume only from what verifies (TRAPS O2, O3).

A save writes into a temporary directory, flushes it, hashes it, renames it, and moves the pointer last; whatever a
crash leaves behind is a ``.tmp`` that the next save sweeps away. A load takes the newest checkpoint whose every byte
matches its manifest and names the ones it had to pass over.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.runtime import distributed
from stages.runtime.manifest import (
    CheckpointError,
    discard,
    manifest_size_bytes,
    seal,
    sync_files,
    verify_manifest,
    write_atomic,
    write_manifest,
)
from stages.runtime.weights import load_weights, save_weights

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "assert_own",
    "load_weights",
    "save_weights",
    "seal",
    "verify_manifest",
    "write_manifest",
]

STATE = "state.json"
POINTER = "latest"

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"step-\d{8,}(\.aside)?(\.removed)?\.tmp|step-\d{8,}\.pin\.tmp|latest\.tmp")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_REFUSES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_DISK_FULL_TEXT = (
    "No space left",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
)
_MAKE_ROOM = "free some space, lower keep_checkpoints, or put the runs on a larger disk"

logger = logging.getLogger(__name__)


def assert_own(directory: Path, root: Path) -> None:
    """Refuse engine state that does not lie in the stage's own folder ``root``, links followed (TRAPS O3).

    Engine state is pickled: loading a stranger's runs a stranger's code, and no hash helps against that.

    Raises:
        CheckpointError: when ``directory`` is outside ``root``, or reached through a symbolic link.
    """
    # The way down from root must be made of real directories (a way out has "..", which no resolved path has); root
    # itself may be mounted or linked by its owner.
    expected = root.resolve() / os.path.relpath(directory.absolute(), root.absolute())
    if directory.resolve() != expected:
        raise CheckpointError(
            f"engine state is only loaded from this stage's own folder {root}; got {directory}; "
            "start from another stage's weights with `from:`"
        )


class CheckpointStore:
    """The checkpoints of one stage: ``directory/step-00000120/{engine files, state.json, manifest.json}``.

    ``keep`` is how many of the newest stay; pinned ones (``step-00000120.pin`` beside them) stay besides. Methods that
    change files are collective over all ranks; rank 0 does what must be done once.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}; set keep to 2 to survive a faulty newest one")
        self.directory = directory
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending, verified or not."""
        if not self.directory.is_dir():
            return []
        found = [_NAME.fullmatch(entry.name) for entry in self.directory.iterdir()]
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies or would lie."""
        return self.directory / f"step-{step:08d}"

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        state: dict[str, Any],
        *,
        pin: bool = False,
        expected_bytes: int | None = None,
    ) -> Path:
        """Save a checkpoint; collective. Every rank calls ``write(folder)`` once on the same, empty, temporary folder.

        ``state`` is plain JSON data, rank 0's is kept. ``expected_bytes``, where known, is compared with the free space
        before anything is written. A verified checkpoint of the same step is left as it is.

        Raises:
            CheckpointError: when the disk is full or refuses to be written; the temporary folder is removed and older
                checkpoints are untouched. Other exceptions of ``write`` pass through after the same clean-up.
        """
        content = _state_bytes(step, state)
        if distributed.on_rank_zero(lambda: self._prepare(step, expected_bytes)):
            temporary = self._temporary(step)
            try:
                write(temporary)
                self._finish(step, temporary, content)
            except BaseException as error:
                self._give_up(step, temporary, error, expected_bytes)
                raise
        distributed.on_rank_zero(lambda: self._publish(step, pin))
        return self.path(step)

    def newest(
        self, accept: Callable[[int, dict[str, Any]], bool] | None = None
    ) -> tuple[int, Path, dict[str, Any]] | None:
        """Step, folder and state of the newest checkpoint that verifies, or None when there is none at all.

        Collective: rank 0 hashes, all ranks get its choice. Each faulty one passed over is logged with file and fault.
        ``accept(step, state)``, where given, passes over whole ones that this run cannot go on from (saved in the decay
        of a shorter run); None then also means that there are only such.

        Raises:
            CheckpointError: when there are checkpoints and not one verifies, accepted or not; starting over is then the
                user's decision.
        """
        found = distributed.on_rank_zero(lambda: self._newest_verified(accept))
        return None if found is None else (found[0], self.path(found[0]), found[1])

    def set_aside_after(self, step: int) -> None:
        """Make ``step`` the newest checkpoint, -1 for none, since the run goes on from there; collective.

        Later ones (faulty, or of another course) are renamed to ``*.aside``, so that none stands where this run is
        about to save its own. A half done save is ended: leftovers go, the pointer is set, old ones are pruned.
        """
        distributed.on_rank_zero(lambda: self._set_aside_and_tidy(step))

    def prune(self) -> None:
        """Delete all but the ``keep`` newest and the pinned; rank 0 only. What cannot be deleted is logged."""
        for step in self.steps()[: -self.keep]:
            if not self._pin(step).exists():
                try:
                    discard(self.path(step))
                except OSError as error:
                    logger.warning("old checkpoint %s could not be deleted: %s", self.path(step), error)

    def remove_leftovers(self) -> None:
        """Delete what crashes left behind (``*.tmp``); rank 0 only, and only while holding the artifact's lock."""
        if not self.directory.is_dir():
            return
        for entry in self.directory.iterdir():
            if _LEFTOVER.fullmatch(entry.name) and not entry.is_symlink():
                logger.info("removing %s, left by a run that was killed while saving", entry.name)
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _set_aside_and_tidy(self, step: int) -> None:
        try:
            self.remove_leftovers()
            self._set_aside_from(step + 1)
            if step in self.steps():
                self._publish(step, pin=False)
        except OSError as error:
            raise _unwritable(self.directory, error) from error

    def _temporary(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.tmp"

    def _pin(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.pin"

    def _prepare(self, step: int, expected_bytes: int | None) -> bool:
        """Rank 0: an empty temporary folder, or False when this step is already saved and whole."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.remove_leftovers()
            if self._is_saved(step):
                return False
            self._set_aside_from(step)
            _require_space(self.directory, expected_bytes)
            self._temporary(step).mkdir()
        except OSError as error:
            raise _unwritable(self.directory, error) from error
        return True

    def _is_saved(self, step: int) -> bool:
        if not self.path(step).is_dir():
            return False
        try:
            verify_manifest(self.path(step))
        except CheckpointError:
            return False
        return True

    def _set_aside_from(self, step: int) -> None:
        """Rename checkpoints at or after ``step``: the run fell back behind them, so they must not count as newest."""
        for later in [found for found in self.steps() if found >= step]:
            aside = self.path(later).with_name(f"{self.path(later).name}.aside")
            if aside.exists():
                discard(aside)
            os.rename(self.path(later), aside)
            logger.warning("%s was passed over and is now %s; delete it when you like", self.path(later), aside.name)

    def _finish(self, step: int, temporary: Path, content: bytes) -> None:
        distributed.barrier()
        if distributed.local_rank() == 0:
            # Once on each machine: flushing a shared file from another machine does not flush this one's writes.
            sync_files(temporary)
        distributed.barrier()
        distributed.on_rank_zero(lambda: self._seal(step, temporary, content))

    def _seal(self, step: int, temporary: Path, content: bytes) -> None:
        write_atomic(temporary / STATE, content)
        seal(temporary, self.path(step))

    def _publish(self, step: int, pin: bool) -> None:
        if pin:
            write_atomic(self._pin(step), b"")
        write_atomic(self.directory / POINTER, f"{self.path(step).name}\n".encode())
        self.prune()

    def _give_up(self, step: int, temporary: Path, error: BaseException, expected_bytes: int | None) -> None:
        """Remove the temporary folder, and say it plainly when the disk was the cause."""
        free = _free_bytes(self.directory)
        full = not isinstance(error, OSError) or error.errno in _DISK_FULL
        needed = expected_bytes or self._last_size_bytes()
        if distributed.rank() == 0:
            # Other ranks may still be writing; what they add is swept at the next start.
            shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception) or not _is_disk_fault(error):
            return
        older = [found for found in self.steps() if found != step]
        # The writers of torch and safetensors say in their own words that a file came out short.
        cause = str(error) if isinstance(error, OSError) else f"a file could not be written whole ({error})"
        size = f"it needs about {needed} bytes" if needed else "its size is unknown"
        kept = f"{self.path(older[-1]).name} is untouched" if older else "there was none before it"
        raise CheckpointError(
            f"checkpoint step {step} could not be saved in {self.directory}: {cause}; {size}, {free} bytes are free; "
            f"{kept}; {_MAKE_ROOM if full else 'give this user the right to write there'}, then start again"
        ) from error

    def _last_size_bytes(self) -> int:
        steps = self.steps()
        return manifest_size_bytes(self.path(steps[-1])) if steps else 0

    def _newest_verified(
        self, accept: Callable[[int, dict[str, Any]], bool] | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        faults: list[str] = []
        whole = 0
        for step in reversed(self.steps()):
            try:
                assert_own(self.path(step), self.directory.parent)
                verify_manifest(self.path(step))
                state = _read_state(self.path(step))
            except CheckpointError as error:
                faults.append(str(error))
                continue
            whole += 1
            if accept is not None and not accept(step, state):
                logger.info("%s belongs to another course of this run and is passed over", self.path(step).name)
                continue
            _warn_of(faults)
            if faults:
                logger.warning("falling back to %s, the newest checkpoint that verifies", self.path(step).name)
            return step, state
        if faults and not whole:
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be trusted: {' | '.join(faults)}; restore one from a copy, "
                "or delete that folder to start from step 0"
            )
        _warn_of(faults)
        return None


def _warn_of(faults: list[str]) -> None:
    for fault in faults:
        logger.warning("checkpoint passed over: %s", fault)


def _state_bytes(step: int, state: dict[str, Any]) -> bytes:
    return (json.dumps({"step": step, "state": state}, indent=1, sort_keys=True) + "\n").encode()


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state = json.loads((directory / STATE).read_bytes())["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: {STATE} cannot be read: {error!r}; use another checkpoint") from error
    return state


def _free_bytes(directory: Path) -> int:
    """Bytes that this user may still write there (the root's reserve left out)."""
    return shutil.disk_usage(directory).free


def _require_space(directory: Path, expected_bytes: int | None) -> None:
    free = _free_bytes(directory)
    if expected_bytes is not None and expected_bytes > free:
        raise CheckpointError(
            f"a checkpoint in {directory} needs {expected_bytes} bytes; {free} bytes are free; nothing was written; "
            f"{_MAKE_ROOM}, then start again"
        )


def _is_disk_fault(error: Exception) -> bool:
    """Whether the disk refused. Torch's and safetensors' writers report it in text only."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL + _DISK_REFUSES
    return any(text in str(error) for text in _DISK_FULL_TEXT)


def _unwritable(directory: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"checkpoints cannot be written to {directory}: {error.strerror} ({error.filename}); give this user the right "
        "to write there, or put the runs elsewhere"
    )
