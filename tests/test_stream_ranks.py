"""A stream under two gloo ranks: the lanes are shared out, and a stop and resume changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from stream_cases import freeze, make_tokenizer, write_sources
from tiny_run import Log, context

from stages.base import ConfigError, StopRequested
from stages.runtime.training_data import TrainingData

MIXTURE = {"web-en": 1.0, "buch-de": 1.0}


def train(directory: Path, stream: Path, stop_at: int | None, workers: int = 0) -> dict[int, float]:
    """Losses by step of one attempt; rank 0 asks to stop once ``stop_at`` was logged."""
    from stages.pretrain import Pretrain
    from stages.runtime import distributed

    class Tracker(Log):
        def log(self, event: str, step: int, values: dict[str, Any]) -> None:
            super().log(event, step, values)
            if (event, step) == ("train", stop_at) and distributed.rank() == 0:
                (directory / "STOP").touch()

    tracker = Tracker()
    asked = {"mixture": MIXTURE, "precision": "fp32", "micro_batch_size": 1, "data_workers": workers}
    at = context(directory, stream, tracker=tracker, **asked)
    try:
        Pretrain().run(at)
    except StopRequested:
        assert stop_at is not None
    finally:
        if distributed.rank() == 0:
            (directory / "STOP").unlink(missing_ok=True)
    return tracker.of("train", "loss_nats_per_token")


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    described = write_sources(root / "text")
    return freeze(root, make_tokenizer(root / "tokenizer"), described, passes={"web-en": 9, "buch-de": 9})


def on(world_size, directory, stream, stop_at=None, workers=0):
    found = Ranks(world_size, train, directory, stream, stop_at, workers).results(timeout_s=240)
    assert all(isinstance(losses, dict) for losses in found), found
    return found[0]


def test_two_ranks_stopped_and_resumed_train_as_two_undisturbed(tmp_path, stream):
    # trap T6; tests/test_stream.py shows that one rank reads the same rows
    whole = on(2, tmp_path / "whole", stream)
    parts = on(2, tmp_path / "parts", stream, 3) | on(2, tmp_path / "parts", stream)
    assert parts == whole
    files = [tmp_path / name / "output.tmp" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # The same rows by processes of each rank, stopped and resumed, and then gone on with without them.
    read_by = on(2, tmp_path / "workers", stream, 2, 2) | on(2, tmp_path / "workers", stream, 4, 1)
    assert read_by | on(2, tmp_path / "workers", stream) == whole
    assert (tmp_path / "workers" / "output.tmp" / "model.safetensors").read_bytes() == files[0].read_bytes()


def test_ranks_that_do_not_divide_the_lanes_are_refused(tmp_path, stream, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="must be read by a number of ranks that divides the stream's 2 lanes; got 4"):
        TrainingData(context(tmp_path, stream, mixture=MIXTURE))
