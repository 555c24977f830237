"""The sequence mixers by name: one file and one line each."""

from __future__ import annotations

from model.mixers.attention import Attention
from model.mixers.contract import Mixer
from model.mixers.gla import GLA
from model.mixers.mamba2 import Mamba2

MIXERS: dict[str, type[Mixer]] = {
    "mamba2": Mamba2,
    "gla": GLA,
    "attention": Attention,
}
