"""Processes that read a stream: the same rows and places as without, faults in one line, and nothing left behind."""

import itertools
import json
import os
import signal

import pytest
import torch
from stream_cases import freeze, make_tokenizer, write_sources
from test_stream import EQUAL, STREAMED, G, T, joined, loader, read
from tiny_run import Log, context

from data.errors import DataError
from data.mixture import Mixture
from data.prefetch import Prefetcher
from data.stream_workers import ParallelStream
from stages.base import ConfigError, StopRequested
from stages.pretrain import Pretrain
from stages.runtime.training_data import TrainingData


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, tokenizer, sources):
    return freeze(tmp_path_factory.mktemp("stream"), tokenizer, sources, lanes=4, passes={"web-en": 9, "buch-de": 9})


@pytest.fixture
def parallel():
    """Opens streams, and ends their processes."""
    opened = []

    def open_one(folder, workers=2, lanes=range(4), **changes):
        plain = {"seq_len": T, "global_batch_size": G, "seed": 7, "mixture": Mixture(EQUAL), **changes}
        opened.append(ParallelStream(folder / "output", workers=workers, lanes=lanes, steps_ahead=3, **plain))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_processes_give_the_rows_places_and_counts_of_one_and_resume_either_way(frozen, parallel):
    # trap T6
    plain = loader(frozen)
    whole, stream = read(plain, 30), parallel(frozen)
    assert torch.equal(joined(read(stream, 17)), joined(whole[:17]))
    place = json.loads(json.dumps(stream.position()))
    single = loader(frozen)
    read(single, 17)
    assert place == json.loads(json.dumps(single.position()))
    assert stream.report() == single.report()
    single = loader(frozen)
    single.restore(place)
    assert torch.equal(joined(read(single, 13, first=17)), joined(whole[17:]))
    stream.restore(place)
    assert stream.position() == place
    assert torch.equal(joined(read(stream, 13, first=17)), joined(whole[17:]))
    assert stream.report() == plain.report()


def test_a_rank_reads_its_own_lanes_in_micro_batches_ahead(frozen, parallel):
    whole = read(loader(frozen), 6, rows=(slice(0, 2), slice(2, 4)))
    stream = parallel(frozen, workers=5, lanes=range(2, 4))
    ahead = Prefetcher(stream.batch, steps=2, last_step=6, position=stream.position)
    for step in range(6):
        rows = [ahead(step, slice(at, at + 1)).input_ids for at in (2, 3)]
        assert torch.equal(torch.cat(rows), whole[step][1])
        assert {place["rows"] for place in ahead.position.values()} == {step + 1}
    assert sorted(ahead.position) == ["2", "3"]
    ahead.close()


def test_rows_out_of_order_are_refused(frozen, parallel):
    stream = parallel(frozen, workers=1)
    stream.batch(0, slice(0, 2))
    with pytest.raises(ValueError, match=r"must be read in order, and be of lanes read here; got step 0, row 0"):
        stream.batch(0, slice(0, 2))
    with pytest.raises(ValueError, match="must be read in order: step 1 comes next; got step 1"):
        stream.batch(1, slice(0, 2))
    stream.batch(0, slice(2, 4))
    with pytest.raises(ValueError, match="must be read in order: step 1 comes next; got step 2"):
        stream.batch(2, slice(0, 4))


def test_what_ends_a_process_is_raised_at_its_step_and_not_before(tmp_path, tokenizer, sources, parallel):
    # trap T5
    folder = freeze(tmp_path, tokenizer, sources, lanes=4, passes={"web-en": 9})
    plain, faults, steps = loader(folder), [], []
    for stream in (plain, parallel(folder)):
        for step in itertools.count():
            try:
                stream.batch(step, slice(0, G))
            except DataError as error:
                faults.append(error.faults)
                break
        steps.append(step)
    assert faults[0] == faults[1]
    assert steps[0] == steps[1] > 3


def test_a_killed_process_is_one_line(frozen, parallel):
    stream = parallel(frozen, workers=1)
    stream.batch(0, slice(0, G))
    os.kill(stream._processes[0][0].pid, signal.SIGTERM)  # the training's to answer, not theirs
    stream.batch(1, slice(0, G))
    os.kill(stream._processes[0][0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a process that reads the stream ended with -9: out of memory, or killed"):
        read(stream, 500, first=2)


def test_closing_leaves_no_process_behind(frozen, parallel):  # trap O7
    stream = parallel(frozen)
    stream.batch(0, slice(0, G))
    processes = [process for process, _ in stream._processes]
    assert [process.is_alive() for process in processes] == [True, True]
    stream.close()
    assert [process.is_alive() for process in processes] == [False, False]
    dropped = parallel(frozen, workers=1)
    dropped.batch(0, slice(0, G))


def test_pretraining_with_processes_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, frozen):
    # trap T6
    from test_pretrain import StopsAt, weights

    whole = Log()
    Pretrain().run(context(tmp_path / "whole", frozen, tracker=whole, **STREAMED))
    stopped, resumed = StopsAt(tmp_path / "parts", 3), Log()
    with pytest.raises(StopRequested, match="step 3"):
        Pretrain().run(context(tmp_path / "parts", frozen, tracker=stopped, **STREAMED, data_workers=2))
    Pretrain().run(context(tmp_path / "parts", frozen, tracker=resumed, **STREAMED, data_workers=2))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_processes_for_shards_are_refused(tmp_path):
    from tiny_run import make_tokens

    with pytest.raises(ConfigError, match="data_workers: must be 0 with shards, which cost nothing to read; got 2"):
        TrainingData(context(tmp_path / "run", make_tokens(tmp_path / "tokens"), data_workers=2))
