"""A folder of a few files as a checkpoint has them, and a way to damage one."""

from pathlib import Path

FILES = {"engine/zero_rank_0.pt": b"optimizer" * 50, "engine/model.pt": b"weights" * 60, "rng.bin": b"\x00\x01"}


def fill(folder: Path) -> None:
    """Write ``FILES`` below ``folder``."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def flip(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
