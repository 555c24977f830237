"""Directories that are whole or refused: hash manifest, fsync, atomic rename (TRAPS O2).

``manifest.json`` lists every other regular file of a directory with its size and SHA-256 and carries a checksum of
itself, so that any flipped byte, cut, lost or added file is found and named. A manifest shows that nothing changed
since it was written; that the writer is to be trusted is ``checkpoint.assert_own``'s part (TRAPS O3).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1

_CHUNK_BYTES = 4 << 20
_REPORT_BYTES = 4 << 30
_THREADS = 4
_WAY_OUT = "use another checkpoint or artifact, or make this one anew"

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint or artifact that cannot be written, or cannot be trusted; the message names file and fault."""


def write_manifest(directory: Path) -> str:
    """Hash every file below ``directory`` into its ``manifest.json``; returns the manifest's own SHA-256."""
    content = _manifest_bytes(_hash_files(directory, list(_files(directory))))
    write_atomic(directory / MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def verify_manifest(directory: Path) -> str:
    """Check every file below ``directory`` against its manifest; returns the manifest's SHA-256.

    Raises:
        CheckpointError: naming each file that is missing, unlisted, of another size or of other content. Sizes are
            compared first, so that a truncated file of many gigabytes is named at once.
    """
    content = _read_manifest(directory)
    listed: dict[str, dict[str, Any]] = json.loads(content)["files"]
    faults = _faults_of_sizes(directory, listed)
    if not faults:
        found = _hash_files(directory, sorted(listed))
        faults = [f"{name} has another SHA-256 than the manifest" for name in listed if found[name] != listed[name]]
    if faults:
        raise CheckpointError(f"{directory}: {'; '.join(faults)}; {_WAY_OUT}")
    return hashlib.sha256(content).hexdigest()


def sealed_digest(directory: Path) -> str | None:
    """SHA-256 of the manifest that lies in ``directory`` at this moment, nothing checked; None where there is none."""
    try:
        return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def damage_at_a_glance(directory: Path, digest: str | None = None) -> str | None:
    """What is wrong with a sealed directory, by names and sizes alone; None where nothing is.

    Nothing is hashed but the manifest, whose SHA-256 must be ``digest`` where that is given: content is looked at when
    it is loaded, or by ``verify_manifest``.
    """
    try:
        content = _read_manifest(directory)
        faults = _faults_of_sizes(directory, json.loads(content)["files"])
    except CheckpointError as error:
        return str(error).removeprefix(f"{directory}: ").removesuffix(f"; {_WAY_OUT}")
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    if not faults and digest not in (None, hashlib.sha256(content).hexdigest()):
        return f"{MANIFEST} is not the one that was sealed"
    return "; ".join(faults) or None


def _faults_of_sizes(directory: Path, listed: dict[str, dict[str, Any]]) -> list[str]:
    present = {name: (directory / name).stat().st_size for name in _files(directory)}
    faults = [f"{name} is missing" for name in sorted(listed.keys() - present.keys())]
    faults += [f"{name} is not in the manifest" for name in sorted(present.keys() - listed.keys())]
    return faults + [
        f"{name} has {present[name]} bytes, the manifest says {listed[name]['bytes']}"
        for name in sorted(listed.keys() & present.keys())
        if present[name] != listed[name]["bytes"]
    ]


def manifest_size_bytes(directory: Path) -> int:
    """Sum of the sizes that the manifest lists, without hashing anything; 0 when there is no readable manifest."""
    try:
        return sum(entry["bytes"] for entry in json.loads(_read_manifest(directory))["files"].values())
    except CheckpointError:
        return 0


def seal(temporary: Path, final: Path) -> str:
    """Make ``temporary`` durable and whole, then rename it to ``final``; returns the manifest's SHA-256.

    Order: fsync files, write manifest, fsync directories, rename, fsync the parent. A crash leaves either no ``final``
    or a whole one. An older ``final`` (a run that was extended) gives way; what a crash left of an even older one goes.

    Raises:
        CheckpointError: when ``temporary`` is no directory, holds something else than files, or cannot be written.
    """
    if temporary.is_symlink() or not temporary.is_dir():
        raise CheckpointError(f"{temporary} must be a directory to seal; got {_kind(temporary)}; fill it first")
    sync_files(temporary)
    digest = write_manifest(temporary)
    sync_directories(temporary)
    # Swept even where there is no ``final``: a crash between the two renames leaves exactly that.
    doomed = _doomed(final)
    _remove(doomed)
    if final.exists():
        # No portable call swaps two directories; a crash right here costs a stage's re-seal, never a checkpoint.
        os.rename(final, doomed)
    os.rename(temporary, final)
    sync_directory(final.parent)
    _remove(doomed)
    return digest


def discard(directory: Path) -> None:
    """Delete a directory so that a crash leaves a ``.tmp`` to sweep, never half of it under its old name."""
    doomed = _doomed(directory)
    _remove(doomed)
    os.rename(directory, doomed)
    sync_directory(directory.parent)
    _remove(doomed)


def _doomed(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.removed.tmp")


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: written beside it, flushed to the disk, renamed over it."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_files(directory: Path) -> None:
    """Flush every file below ``directory`` to the disk."""
    for name in _files(directory):
        _fsync(directory / name, os.O_RDONLY)


def sync_directories(directory: Path) -> None:
    """Flush the entries of ``directory`` and of all directories below it, deepest first."""
    for parent, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(parent))


def sync_directory(directory: Path) -> None:
    """Flush one directory's entries, which a rename or a new file changed."""
    _fsync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(directory: Path) -> Iterator[str]:
    """Names relative to ``directory`` of all files but the manifest, sorted; links and devices are refused."""
    for parent, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(names + [folder for folder in folders if os.path.islink(os.path.join(parent, folder))]):
            path = Path(parent, name)
            if not stat.S_ISREG(path.lstat().st_mode):
                raise CheckpointError(f"{path} must be a plain file; got {_kind(path)}; copy the content instead")
            relative = path.relative_to(directory).as_posix()
            if relative != MANIFEST:
                yield relative


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a symbolic link"
    if path.is_dir():
        return "a directory"
    return "a special file or a file" if path.exists() else "nothing"


def _hash_files(directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    # hashlib releases the interpreter's lock, so a few threads hash the shards of a large checkpoint side by side.
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_sha256, [directory / name for name in names])
        sizes = [(directory / name).stat().st_size for name in names]
        pairs = zip(sizes, digests, strict=True)
        return {name: {"bytes": size, "sha256": digest} for name, (size, digest) in zip(names, pairs, strict=True)}


def _sha256(path: Path) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if done % _REPORT_BYTES == 0:
                    logger.info("hashing %s: %.0f of %.0f GiB", path.name, done / 2**30, size / 2**30)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {_WAY_OUT}") from error
    return digest.hexdigest()


def _manifest_bytes(files: dict[str, dict[str, Any]]) -> bytes:
    """The one way to write these entries; comparing against it finds any flipped byte of a manifest."""
    entries = json.dumps(files, sort_keys=True)
    body = {"format": FORMAT, "files": files, "checksum": hashlib.sha256(entries.encode()).hexdigest()}
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: {MANIFEST} is missing, so it was never finished; {_WAY_OUT}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {_WAY_OUT}") from error
    try:
        whole = content == _manifest_bytes(json.loads(content)["files"])
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{directory}: {MANIFEST} does not match its own checksum; {_WAY_OUT}")
    return content
