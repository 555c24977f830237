"""Best-fit packing: whole documents, little padding, every token once an epoch."""

import itertools
import random

import numpy as np
import pytest
from tiny_corpus import build_tokens
from tiny_run import context, make_tokens

from data.best_fit import best_fit
from data.loader import MixtureLoader
from data.mixture import Mixture
from data.packing import pack
from stages.pretrain import Pretrain

T = 32


def slow_best_fit(sizes, length):
    """Row fills by the textbook: pieces in descending length, each into the fullest row with room."""
    pieces = sorted((min(length, size - at) for size in sizes for at in range(0, size, length)), reverse=True)
    rows = []
    for piece in pieces:
        fitting = [number for number, fill in enumerate(rows) if fill + piece <= length]
        if fitting:
            best = max(fitting, key=lambda number: rows[number])
            rows[best] += piece
        else:
            rows.append(piece)
    return sorted(rows)


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_as_full_as_the_textbooks(seed):
    drawn = random.Random(seed)
    sizes = [drawn.randint(1, drawn.choice((6, 20, 40, 100))) for _ in range(drawn.choice((1, 5, 60, 300)))]
    bins = best_fit(np.concatenate([[0], np.cumsum(sizes)]), T)
    fills = sorted((bins.places(np.arange(len(bins))) >= 0).sum(1).tolist())
    assert fills == slow_best_fit(sizes, T)
    assert bins.waste == pytest.approx(1 - sum(sizes) / (len(bins) * T))


@pytest.mark.parametrize("seed", range(4))
def test_every_token_stands_once_and_documents_that_fit_are_whole(seed):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 3 * T, size=200))])
    places = best_fit(offsets, T).places(np.arange(len(best_fit(offsets, T))))
    assert np.array_equal(np.sort(places[places >= 0]), np.arange(offsets[-1]))
    row_of = np.empty(offsets[-1], dtype=np.int64)
    for number, row in enumerate(places):
        text = row[row >= 0]
        row_of[text] = number
        assert (row[len(text) :] == -1).all(), "padding stands at the end"
    for first, last in itertools.pairwise(offsets.tolist()):
        assert len(np.unique(row_of[first:last])) == -(-(last - first) // T)


def test_the_worked_example_of_padding_holds():
    packed = pack(np.array([[7, 8, 0, 5, 6, 0, 1, 1]]), eos_id=0, pad_id=1)
    assert packed.labels.tolist() == [[-100, 8, 0, -100, 6, 0, -100, -100]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert packed.seq_idx.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]


def documents(first, count, seed):
    rng, result = np.random.default_rng(seed), []
    for length in rng.integers(1, 25, size=count):
        result.append(list(range(first, first + int(length))))
        first += int(length)
    return result


SOURCES = {"aa": documents(10, 90, 1), "bb": documents(10_000, 30, 2)}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return build_tokens(tmp_path_factory.mktemp("tokens"), SOURCES)


def make(tokens, packing="whole", **changes):
    plain = {"seq_len": T, "global_batch_size": 4, "seed": 3, "max_epochs": 1e9, "packing": packing, **changes}
    return MixtureLoader(tokens, **plain)


def test_an_epoch_holds_every_document_once_whole_and_the_next_in_another_order(tokens):
    only = Mixture({"aa": 1, "bb": 0})
    n_rows = len(make(tokens, mixture=only)._rows["aa"].bins)
    loader = make(tokens, mixture=only, global_batch_size=n_rows)
    epochs = [loader.batch(epoch, slice(0, n_rows)) for epoch in (0, 1)]
    for batch in epochs:
        found = []
        for row in batch.input_ids.tolist():
            text = " ".join(map(str, row)).split(" 1 ")[0].removesuffix(" 1")
            found += [part.strip() for part in f"{text} ".split(" 0 ") if part.strip()]
        assert sorted(found) == sorted(" ".join(map(str, ids)) for ids in SOURCES["aa"])
    assert sorted(map(tuple, epochs[0].input_ids.tolist())) == sorted(map(tuple, epochs[1].input_ids.tolist()))
    assert not epochs[0].input_ids.equal(epochs[1].input_ids)
    assert loader.plan(2)["aa"]["epochs"] == 2


def test_padding_is_neither_scored_nor_counted(tokens):
    loader = make(tokens)
    batches = [loader.batch(step, slice(0, 4)) for step in range(50)]
    text = sum(int((batch.input_ids != 1).sum()) for batch in batches)
    assert all((batch.labels[batch.input_ids == 1] == -100).all() for batch in batches)
    assert text < 50 * 4 * T
    assert sum(figures["tokens"] for figures in loader.plan(50).values()) == pytest.approx(text, rel=0.02)


def test_shares_are_of_text_not_of_rows(tmp_path):
    # trap T5: documents of 20 tokens leave 12 of 32 places open, those of 8 none
    long = [list(range(10_000 + 19 * n, 10_019 + 19 * n)) for n in range(40)]
    build_tokens(tmp_path, {"aa": [[5] * 7] * 100, "bb": long})
    loader = make(tmp_path, mixture=Mixture({"aa": 1, "bb": 1}))
    ids = np.concatenate([loader.batch(step, slice(0, 4)).input_ids.numpy() for step in range(600)])
    text, is_long = ids != 1, ids.max(1) >= 10_000
    assert text[is_long].sum() / text.sum() == pytest.approx(0.5, abs=0.005)
    assert is_long.mean() == pytest.approx(32 / (32 + 20), abs=0.005)
    plan = loader.plan(600)
    assert plan["bb"]["share_realised"] == pytest.approx(0.5, abs=0.005)
    assert plan["bb"]["padding"] == pytest.approx(12 / 32)


def test_whole_rows_are_found_by_step_alone(tokens):
    # trap T6
    whole, other = make(tokens), make(tokens)
    other.batch(99, slice(0, 4))
    for field, value in whole.batch(17, slice(0, 4))._asdict().items():
        assert value[2:].equal(getattr(other.batch(17, slice(2, 4)), field)), field


def test_padding_changes_nothing_that_is_scored(tmp_path):
    # trap K3: rows with and without padding behind the same documents
    import torch
    from tiny_run import spec

    from model.config import HybridConfig
    from model.lm import HybridForCausalLM

    torch.manual_seed(0)
    model = HybridForCausalLM(HybridConfig.from_spec(spec(), eos_token_id=0, pad_token_id=1)).eval()
    ids = np.array([[7, 8, 9, 0, 5, 6, 0, 1, 1, 1], [7, 8, 9, 0, 5, 6, 0, 33, 44, 0]])
    packed = pack(ids, 0, 1)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(packed.position_ids),
            seq_idx=torch.from_numpy(packed.seq_idx),
        ).logits
    assert torch.equal(logits[0, :7], logits[1, :7])


def test_pretraining_on_whole_documents_trains_and_says_what_padding_costs(tmp_path, capsys):
    tokens = make_tokens(tmp_path / "tokens")
    result = Pretrain().run(context(tmp_path / "run", tokens, packing="whole", max_steps=2))
    said = capsys.readouterr().out
    assert "of its rows padding" in said
    assert 0 < result.metrics["supervised_tokens"] < 2 * 4 * 32
