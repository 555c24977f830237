"""``--runs`` where artifacts are looked at and none is made: what is no folder must not look like an empty one."""

from __future__ import annotations

from pathlib import Path

from stages.base import ConfigError, Fault

_FLAG = "--runs"


def refuse_no_folder(runs: Path, default: Path | None = None) -> None:
    """Refuse a file, or what is not there; ``default`` may be absent, since nobody named it.

    Raises:
        ConfigError: saying which.
    """
    must = f"must be the folder of artifacts; got {runs}"
    if runs.is_dir():
        return
    if runs.exists() or runs.is_symlink():
        raise ConfigError(
            Fault(_FLAG, f"{must}, which is {'a file' if runs.exists() else 'a broken link'}; name another")
        )
    if default is None or runs.absolute() != default.absolute():
        raise ConfigError(Fault(_FLAG, f"{must}, which is not there; name the one that run.py was given"))
