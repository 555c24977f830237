"""Needles: exact lengths, the needle at its depth, and a model that looks back told from one that cannot."""

from __future__ import annotations

import dataclasses

import evaluated
import pytest
import torch
from evaluated import make_bench, slow_nats

from data.tokenizer import decode_bytes
from stages.base import ConfigError
from stages.evaluate import Evaluate
from stages.runtime.suites import needles
from stages.runtime.suites.config import NeedlesConfig

CONFIG = NeedlesConfig(lengths=[144, 176], depths=[0.0, 0.5, 1.0], needles=3, languages=["en", "de"], others=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return make_bench(evaluated.make_parents(tmp_path_factory.mktemp("evaluated")), 8)


@pytest.fixture(scope="module")
def rows(bench):
    return needles.make(bench, CONFIG)


def text_of(bench, ids):
    return decode_bytes(bench.tokenizer, ids).decode(errors="replace")


def test_a_row_is_exactly_as_long_as_asked_and_the_same_text_stands_at_every_depth(bench, rows):
    assert len(rows) == 2 * 2 * 3 * 3
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert len(row.prompt) + max(map(len, row.answers)) == row.length
    for family in {row.family for row in rows}:
        mine = [row for row in rows if row.family == family]
        assert len(mine) == 3
        assert len({tuple(sorted(row.prompt)) for row in mine}) == 1
        assert len({tuple(row.prompt) for row in mine}) > 1


def test_the_needle_stands_at_its_depth_and_every_number_is_in_the_text(bench, rows):
    for row in rows:
        text = text_of(bench, row.prompt)
        numbers = [text_of(bench, answer).strip() for answer in row.answers]
        assert all(text.count(number) == 1 for number in numbers)
        question = text.splitlines()[-1]
        assert text.count(question) == 2
        # The sentence that is asked for, and how much of the text stands before it.
        before = text[: text.index(f"{question} {numbers[0]}")]
        share = len(before) / len(text)
        assert {0.0: share < 0.1, 0.5: 0.15 < share < 0.75, 1.0: share > 0.4}[row.depth]


def test_the_right_number_must_be_the_likeliest_of_those_in_the_text(bench, rows):
    found = needles.run(bench, CONFIG)
    scores = {score.name: score for score in found.scores}
    items = found.items["needles/accuracy"]
    exact = found.items["needles/exact"]
    for number in (0, 20, 35):
        row = rows[number]
        nats = [slow_nats(bench, row.prompt + answer, len(row.prompt)) for answer in row.answers]
        means = [sum(one) / len(one) for one in nats]
        assert items.ids[number] == row.id
        assert items.numerator[number] == float(means[0] < means[1])
        assert exact.numerator[number] <= items.numerator[number]
    assert items.families == [row.family for row in rows]
    assert scores["needles/accuracy"].settings["chance"] == 0.5
    for part, names in (
        ("language", ["en", "de"]), ("length", ["length_144", "length_176"]),
        ("depth", ["depth_0", "depth_0.5", "depth_1"]), ("cell", ["length_144_depth_0", "length_176_depth_1"]),
    ):  # fmt: skip
        for name in names:
            assert scores[f"needles/accuracy/{name}"].part == part
    assert scores["needles/accuracy/length_144_depth_0"].n == 6


class Copies(torch.nn.Module):
    """Logits of a model that copies what followed the longest earlier match of its last tokens; with a blind window."""

    def __init__(self, bench, reach):
        super().__init__()
        self.config, self.reach, self.vocab = bench.model.config, reach, bench.model.config.vocab_size

    def forward(self, input_ids, **_):
        rows = torch.zeros(*input_ids.shape, self.vocab)
        for row, ids in zip(rows, input_ids.tolist(), strict=True):
            for place in range(6, len(ids)):
                earliest = 0 if self.reach is None else max(0, place - self.reach)
                best = max(
                    (self._match(ids, place, other), other)
                    for other in range(earliest, place) if self._match(ids, place, other)
                ) if any(self._match(ids, place, other) for other in range(earliest, place)) else None  # fmt: skip
                if best is not None:
                    row[place, ids[best[1] + 1]] = 20.0
        return rows

    @staticmethod
    def _match(ids, place, other):
        length = 0
        while length < 8 and other - length >= 0 and ids[place - length] == ids[other - length]:
            length += 1
        return length


def copier(bench, reach):
    model = Copies(bench, reach)

    def scored(rows):
        found = []
        for ids, first in rows:
            logits = model(torch.tensor([ids]))[0]
            logprobs = torch.log_softmax(logits[first - 1 : len(ids) - 1].double(), -1)
            nats = -logprobs.gather(1, torch.tensor(ids[first:])[:, None])[:, 0]
            ranks = (logprobs > -nats[:, None]).sum(-1)
            found.append(type(bench.score([([1, 2], 1)])[0])(nats.numpy(), int(ranks.max())))
        return found

    class Copying:
        inputs, tokenizer, max_seq_len = bench.inputs, bench.tokenizer, bench.max_seq_len
        score = staticmethod(scored)

    return Copying()


def test_a_model_that_copies_from_afar_finds_all_and_a_short_sighted_one_only_what_is_near(bench):
    config = NeedlesConfig(lengths=[112], depths=[0.0, 1.0], needles=4, others=1)
    everything = {score.name: score.value for score in needles.run(copier(bench, None), config).scores}
    assert everything["needles/accuracy"] == 1.0
    near = {score.name: score.value for score in needles.run(copier(bench, 45), config).scores}
    assert near["needles/accuracy/depth_1"] == 1.0
    assert near["needles/accuracy/depth_0"] < 1.0


def test_languages_without_text_and_lengths_without_room_are_refused(bench):
    with pytest.raises(
        ConfigError, match=r"suites\.needles\.languages: must be languages with held-out documents; got hi"
    ):
        needles.run(bench, NeedlesConfig(languages=["hi"], lengths=[112]))
    with pytest.raises(ConfigError, match=r"suites\.needles\.lengths: must leave room for text"):
        needles.run(bench, NeedlesConfig(lengths=[96], others=6))


def test_lengths_beyond_the_models_are_refused_before_anything_runs(bench):
    spec = bench.model.config.spec
    config = evaluated.config(
        suites={"needles": {"lengths": [112, 4096]}}, messages=None, tasks=None, preferences=None, facts=None
    )
    faults = Evaluate.check(config, dataclasses.replace(spec) if dataclasses.is_dataclass(spec) else spec)
    assert [fault.path for fault in faults] == ["suites.needles.lengths[1]"]
