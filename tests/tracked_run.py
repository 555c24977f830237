"""Helpers of the tracking tests: trackers, sealed folders, and children that are killed or kept from a library."""

import os
import subprocess
import sys
from pathlib import Path

from stages.runtime.manifest import write_manifest
from stages.runtime.tracking import open_tracker

ROOT = Path(__file__).resolve().parent.parent
KEY = "ab12cd34" * 8
IDENTITY = {"pipeline": "demo", "stage": "pretrain", "kind": "pretrain", "key": KEY, "config": {"lr": 0.002}}


def tracker_in(directory, **changes):
    return open_tracker(directory, **{**IDENTITY, "mode": "disabled", **changes})


def run_child(code, *argv, check=True, **environment):
    """Run Python `code` in a process of its own that can import the project; warnings are errors there too."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *argv], env=env, capture_output=True, text=True, check=check
    )


def sealed(directory, content=b"weights"):
    """A folder with one file and a manifest, and the manifest's digest."""
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(content)
    return write_manifest(directory)
