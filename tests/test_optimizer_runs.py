"""Pretraining runs with every optimizer: stopped, resumed, skipping steps, on one rank under real DeepSpeed."""

from __future__ import annotations

import pytest
from tiny_run import Log, context, make_tokens, spec

from stages.base import StopRequested
from stages.pretrain import Pretrain

KINDS = ("adamw_8bit", "muon")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


class StopsAt(Log):
    """Asks the run to stop once ``step`` was logged."""

    def __init__(self, directory, step):
        super().__init__()
        self.directory, self.step = directory, step

    def log(self, event, step, values):
        super().log(event, step, values)
        if event == "train" and step == self.step:
            (self.directory / "STOP").touch()


def run(directory, tokens, kind, **changes):
    facts = {"deepspeed": "zero1", "precision": "bf16", "optimizer": {"kind": kind}, "max_steps": 4}
    # Wide enough for 8-bit moments: some projections have 4,096 weights or more.
    return Pretrain().run(context(directory, tokens, model=spec(d_model=64, d_ff=96), **facts | changes))


def weights(directory):
    return (directory / "output.tmp" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, tokens, kind):  # trap T6
    log = Log()
    run(tmp_path / "whole", tokens, kind, tracker=log)
    with pytest.raises(StopRequested, match="step 2"):
        run(tmp_path / "parts", tokens, kind, tracker=StopsAt(tmp_path / "parts", 2))
    run(tmp_path / "parts", tokens, kind)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    losses = list(log.of("train", "loss_nats_per_token").values())
    assert losses[-1] < losses[0]


def test_optimizers_make_different_models(tmp_path, tokens):
    for kind in ("adamw", *KINDS):
        run(tmp_path / kind, tokens, kind, max_steps=2)
    assert len({weights(tmp_path / kind) for kind in ("adamw", *KINDS)}) == 3
