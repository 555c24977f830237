"""The mixture loader: pure, exact in its shares, honest about epochs."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from tiny_corpus import build_tokens

from data.errors import DataError
from data.loader import MixtureLoader
from data.mix import PERIOD_ROWS, SourceSchedule, permute
from data.mixture import Mixture
from data.packing import pack

T = 16


def documents(first: int, count: int, rng_seed: int) -> list[list[int]]:
    """Documents of 1 to 40 tokens whose ids are all different, counting up from ``first``."""
    rng, result, place = np.random.default_rng(rng_seed), [], first
    for length in rng.integers(1, 41, size=count):
        result.append(list(range(place, place + int(length))))
        place += int(length)
    return result


SOURCES = {"aa": documents(10, 60, 1), "bb": documents(10_000, 20, 2), "cc": documents(20_000, 4, 3)}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return build_tokens(tmp_path_factory.mktemp("tokens"), SOURCES)


def make(tokens, **kwargs):
    words = [field.name for field in dataclasses.fields(Mixture) if field.name in kwargs]
    mixture = Mixture(**{word: kwargs.pop(word) for word in words})
    settings = {"seq_len": T, "global_batch_size": 8, "seed": 3, "max_epochs": 1e9, "mixture": mixture, **kwargs}
    return MixtureLoader(tokens, **settings)


def stream(name: str) -> np.ndarray:
    return np.array([token for ids in SOURCES[name] for token in [*ids, 0]])


def source_of(row: np.ndarray) -> str:
    top = int(row.max())
    return "aa" if top < 10_000 else "bb" if top < 20_000 else "cc"


def slow_pack(row: list[int]) -> tuple[list[int], list[int], list[int]]:
    labels, positions, numbers = [], [], []
    position, number = 0, 0
    for place, token in enumerate(row):
        if place and row[place - 1] == 0:
            position, number = 0, number + 1
        labels.append(-100 if position == 0 else token)
        positions.append(position)
        numbers.append(number)
        position += 1
    return labels, positions, numbers


def test_the_worked_example_of_pack_holds():
    packed = pack(np.array([[7, 8, 0, 5, 6, 0, 9]]), eos_id=0)
    assert packed.labels.tolist() == [[-100, 8, 0, -100, 6, 0, -100]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0]]
    assert packed.seq_idx.tolist() == [[0, 0, 0, 1, 1, 1, 2]]


def test_batches_agree_with_a_slow_reading_of_documents(tokens):
    # traps K3, K9: boundaries, and labels that are not shifted
    batch = make(tokens).batch(5, slice(0, 8))
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.seq_idx.dtype == torch.int32
    for row in range(8):
        expected = slow_pack(batch.input_ids[row].tolist())
        assert (batch.labels[row].tolist(), batch.position_ids[row].tolist(), batch.seq_idx[row].tolist()) == expected


def test_every_row_is_a_stretch_of_one_source_read_as_a_circle(tokens):
    loader = make(tokens)
    for row in torch.cat([loader.batch(step, slice(0, 8)).input_ids for step in range(40)]).numpy():
        circle = stream(source_of(row))
        starts = np.flatnonzero(circle == row[0]) if row[0] else np.flatnonzero(circle == row[1]) - 1
        assert any(np.array_equal(np.take(circle, start + np.arange(T), mode="wrap"), row) for start in starts)


def test_a_batch_does_not_depend_on_what_was_read_before_or_on_who_reads_it(tokens):
    # trap T6
    whole = make(tokens).batch(7, slice(0, 8))
    other = make(tokens)
    other.batch(123, slice(2, 4))
    parts = [other.batch(7, slice(first, first + 2)) for first in (6, 0, 4, 2)]
    for field, value in whole._asdict().items():
        joined = torch.cat([getattr(parts[place], field) for place in (1, 3, 2, 0)])
        assert torch.equal(value, joined), field


def test_the_same_rows_come_in_the_same_order_whatever_the_batch_size(tokens):
    small = [make(tokens, global_batch_size=2).batch(step, slice(0, 2)).input_ids for step in range(12)]
    large = [make(tokens, global_batch_size=8).batch(step, slice(0, 8)).input_ids for step in range(3)]
    assert torch.equal(torch.cat(small), torch.cat(large))


def test_another_seed_gives_another_order(tokens):
    assert not torch.equal(make(tokens).batch(0, slice(0, 8)).input_ids,
                           make(tokens, seed=4).batch(0, slice(0, 8)).input_ids)  # fmt: skip


def test_an_epoch_reads_each_token_once_but_for_less_than_a_window(tokens):
    n_windows = len(stream("aa")) // T
    loader = make(tokens, weights={"aa": 1, "bb": 0, "cc": 0}, global_batch_size=n_windows)
    for epoch in range(3):
        ids = loader.batch(epoch, slice(0, n_windows)).input_ids.numpy().ravel()
        text = ids[ids > 0]
        assert len(np.unique(text)) == len(text)
        assert len(ids) > len(stream("aa")) - T


def test_epochs_are_cut_at_different_places(tokens):
    n_windows = len(stream("aa")) // T
    loader = make(tokens, weights={"aa": 1, "bb": 0, "cc": 0}, global_batch_size=n_windows)
    first, second = (set(map(tuple, loader.batch(e, slice(0, n_windows)).input_ids.tolist())) for e in (0, 1))
    assert not first & second


def test_windows_are_visited_in_another_order_in_each_epoch(tokens):
    circle = stream("aa")
    place = {token: index for index, token in enumerate(circle.tolist()) if token}
    n_windows = len(circle) // T
    loader = make(tokens, weights={"aa": 1, "bb": 0, "cc": 0}, global_batch_size=n_windows)
    jumps = []
    for epoch in range(3):
        rows = loader.batch(epoch, slice(0, n_windows)).input_ids.tolist()
        starts = [place[row[0]] if row[0] else place[row[1]] - 1 for row in rows]
        jumps.append(tuple(((b - a) % len(circle)) // T for a, b in itertools.pairwise(starts)))
    assert len(set(jumps)) == 3
    assert all(jump.count(1) < n_windows // 4 for jump in jumps), "not the order of the stream"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_permute_is_a_permutation_that_depends_on_its_key(size):
    images = [permute(np.arange(size), size, key) for key in range(4)]
    for image in images:
        assert sorted(image.tolist()) == list(range(size))
    if size > 16:
        assert len({tuple(image.tolist()) for image in images}) == 4
        assert not np.array_equal(images[0], np.arange(size))


@pytest.mark.parametrize("seq_len", [512, 4096, 16_384])
@pytest.mark.parametrize("n_sources", [2, 5, 20])
def test_shares_hold_within_half_a_percent_over_any_ten_million_tokens(n_sources, seq_len):
    # trap T5
    rng = np.random.default_rng(n_sources)
    rows = 10_000_000 // seq_len
    for concentration in (0.3, 3):
        shares = rng.dirichlet(np.full(n_sources, concentration)) + 1e-6
        shares /= shares.sum()
        owners, _ = SourceSchedule(shares).locate(np.arange(PERIOD_ROWS + rows))
        for source, share in enumerate(shares):
            seen = np.concatenate([[0], np.cumsum(owners == source)])
            assert np.abs((seen[rows:] - seen[:-rows]) / rows - share).max() < 0.005


@pytest.mark.parametrize("n_sources", [2, 3, 7, 40])
def test_no_source_is_ever_a_whole_row_ahead_or_behind(n_sources):
    # trap T5: Tijdeman's bound, the best there is
    schedule = SourceSchedule(np.random.default_rng(n_sources).dirichlet(np.ones(n_sources)))
    owners, _ = schedule.locate(np.arange(PERIOD_ROWS))
    shares = schedule.rows_per_period / PERIOD_ROWS
    for source, share in enumerate(shares):
        due = share * np.arange(1, PERIOD_ROWS + 1)
        assert np.abs(np.cumsum(owners == source) - due).max() <= 1 - 1 / (2 * n_sources - 2) + 1e-9


def test_the_schedule_numbers_each_source_without_gaps_and_counts_itself():
    schedule, n = SourceSchedule(np.array([0.7, 0.2999, 0.0001])), 2 * PERIOD_ROWS + 777
    owners, numbers = schedule.locate(np.arange(n))
    for source in range(3):
        assert numbers[owners == source].tolist() == list(range(int((owners == source).sum())))
    assert schedule.counts(n).tolist() == np.bincount(owners).tolist()


def test_a_share_below_one_row_a_batch_is_not_lost(tokens):
    # trap T5
    loader = make(tokens, weights={"aa": 0.998, "bb": 0.001, "cc": 0.001})
    rows = torch.cat([loader.batch(step, slice(0, 8)).input_ids for step in range(250)]).numpy()
    counts = {name: sum(source_of(row) == name for row in rows) for name in SOURCES}
    assert counts["bb"] in (2, 3)
    assert counts["cc"] in (2, 3)


def test_a_share_below_the_schedules_grain_is_not_lost():
    # trap T5
    assert SourceSchedule(np.array([1.0, 1e-9, 1e-12])).rows_per_period.tolist() == [PERIOD_ROWS - 2, 1, 1]


def test_the_plan_says_what_the_batches_then_read(tokens):
    # trap T5
    loader = make(tokens, weights={"aa": 2, "bb": 1, "cc": 1})
    rows = torch.cat([loader.batch(step, slice(0, 8)).input_ids for step in range(25)]).numpy()
    plan = loader.plan(25)
    for name, figures in plan.items():
        count = sum(source_of(row) == name for row in rows)
        assert figures["tokens"] == count * T
        assert figures["share_realised"] == pytest.approx(count / 200)
        assert figures["epochs"] == pytest.approx(count * T / len(stream(name)))
    assert plan["aa"]["share_asked"] == 0.5


def test_natural_weights_follow_the_tokens(tokens):
    plan, total = make(tokens).plan(100), sum(len(stream(name)) for name in SOURCES)
    for name in SOURCES:
        assert plan[name]["share_asked"] == pytest.approx(len(stream(name)) / total)


def test_too_many_epochs_are_refused_naming_source_count_cap_and_way_out(tokens):
    # trap T5
    loader = make(tokens, weights={"aa": 1, "bb": 0, "cc": 1}, max_epochs=4)
    epochs = 400 * T / len(stream("cc"))
    with pytest.raises(
        DataError, match=rf"{epochs:.2f} times that 100 steps read source cc; got 4; lower mixture.cc"
    ) as e:
        loader.plan(100)
    assert [field for field, _ in e.value.faults] == ["max_epochs", "max_epochs"]


def test_a_weighted_source_that_gets_no_row_is_refused(tokens):
    # traps T4, T5
    loader = make(tokens, weights={"aa": 1e9, "bb": 1, "cc": 1}, global_batch_size=1)
    assert make(tokens, global_batch_size=1).plan(1)
    with pytest.raises(ValueError, match=r"mixture.bb must give a row in 1 steps or be 0; got the share 1e-09"):
        loader.plan(1)


def test_a_source_shorter_than_one_window_goes_round(tmp_path):
    build_tokens(tmp_path, {"aa": [[5, 6], [7]]})
    loader = MixtureLoader(tmp_path, seq_len=12, global_batch_size=1, seed=0, max_epochs=9)
    row = loader.batch(0, slice(0, 1)).input_ids[0].tolist()
    assert sorted(row) == sorted([5, 6, 0, 7, 0, 5, 6, 0, 7, 0, *row[10:]])
    assert loader.plan(1)["aa"]["epochs"] == pytest.approx(12 / 5)
    with pytest.raises(ValueError, match="max_epochs"):
        MixtureLoader(tmp_path, seq_len=12, global_batch_size=1, seed=0, max_epochs=2).plan(1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"aa": 1, "bb": 1, "c": 1}, r"mixture.c must name a source.*did you mean cc"),
        ({"aa": 1, "bb": 1}, r"mixture.cc must give every source its weight; got none"),
        ({"aa": -1, "bb": 1, "cc": 1}, r"mixture.aa must be 0 or a positive number; got -1"),
        ({"aa": float("nan"), "bb": 1, "cc": 1}, r"mixture.aa must be 0 or a positive number; got nan"),
        ({"aa": 0, "bb": 0, "cc": 0}, r"mixture must leave at least one source"),
    ],
)
def test_bad_weights_are_refused(tokens, weights, message):
    with pytest.raises(ValueError, match=message):
        make(tokens, weights=weights)


def test_a_weight_on_an_empty_source_is_refused(tmp_path):
    build_tokens(tmp_path, {"aa": [[5]], "bb": []})
    with pytest.raises(ValueError, match=r"mixture.bb must be 0"):
        make(tmp_path, weights={"aa": 1, "bb": 1})
    assert list(make(tmp_path).plan(1)) == ["aa"]


@pytest.mark.parametrize(("field", "value"), [("seq_len", 1), ("global_batch_size", 0)])
def test_absurd_sizes_are_refused(tokens, field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        make(tokens, **{field: value})


@pytest.mark.parametrize(("step", "rows"), [(-1, slice(0, 1)), (0, slice(0, 9)), (0, slice(4, 4)), (0, slice(0, 8, 2))])
def test_rows_outside_the_batch_are_refused(tokens, step, rows):
    with pytest.raises(ValueError, match="rows must be a part"):
        make(tokens).batch(step, rows)


def test_wide_ids_are_read(tmp_path):
    build_tokens(tmp_path, {"aa": [[69_999] * 30]}, vocab_size=70_000)
    assert make(tmp_path).batch(0, slice(0, 1)).input_ids.max() == 69_999
