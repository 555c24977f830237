"""Which code made an artifact: every file of the program with its digest, beside ``stage.json``.

A commit says it for a clean checkout alone. The list says it for a changed one and for an installed package too, and
two lists say which files differ.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from stages.runtime.artifact import ROOT, canonical_digest
from stages.runtime.manifest import write_atomic

CODE_FILE = "code.json"
ROOMS = {"pipelines": "*.py", "stages": "*.py", "model": "*.py", "data": "*.py", "ds_configs": "*.json"}


def code_files(root: Path = ROOT) -> dict[str, str]:
    """SHA-256 of each file of the program below ``root``, by its path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for room, pattern in ROOMS.items()
        for path in sorted((root / room).rglob(pattern))
        if path.is_file()
    }


def code_digest(files: dict[str, str]) -> str:
    """One digest for a list of files."""
    return canonical_digest(files)


def write_code(directory: Path) -> str:
    """Write ``code.json`` of the program that runs here into an artifact; returns its digest."""
    files = code_files()
    text = json.dumps(files, indent=1, sort_keys=True)
    write_atomic(directory / CODE_FILE, f"{text}\n".encode())
    return code_digest(files)


def read_code(directory: Path) -> dict[str, str]:
    """The files that an artifact was made by; empty where it was made before they were kept, or cannot be read."""
    try:
        found = json.loads((directory / CODE_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
