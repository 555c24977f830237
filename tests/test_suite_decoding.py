"""Decoding behaviour, recall and difficulty: what is drawn, how it repeats, in which language, what is only hard."""

from __future__ import annotations

import dataclasses

import evaluated
import pytest
import torch
from evaluated import FACTS, make_bench, slow_nats

from data.tokenizer import encode_text
from model.decode import Sampling, generate
from stages.runtime.suites import bench as benches
from stages.runtime.suites import decoding, languages, margins
from stages.runtime.suites.config import DecodingConfig, MarginsConfig


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    return evaluated.make_parents(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def bench(parents):
    return make_bench(parents, 4)


def reply(text):
    return benches.Reply(text, len(text.split()), True, True, True)


def test_a_sampled_reply_depends_on_its_prompts_id_and_seed_alone(bench, parents):  # traps M2, K4
    prompts = [benches.Prompt(f"p{n}", encode_text(bench.tokenizer, "the cat " * n)) for n in (1, 5, 2, 4, 3)]
    sampling = Sampling(1.0, 0.9)
    together = bench.replies(prompts, 8, sampling, 7)
    assert make_bench(parents, 2).replies(prompts[::-1], 8, sampling, 7) == together[::-1]
    assert bench.replies(prompts[2:3], 8, sampling, 7) == together[2:3]
    assert bench.replies(prompts, 8, sampling, 8) != together
    renamed = [prompt._replace(id=f"q{prompt.id}") for prompt in prompts]
    assert bench.replies(renamed, 8, sampling, 7) != together
    with pytest.raises(ValueError, match="must have ids of their own"):
        bench.replies([prompts[0], prompts[0]], 8, sampling, 7)


def test_each_row_takes_its_own_generator(bench):
    prompts = [[5, 6, 7], [9, 8]]
    made = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = generate(bench.model, prompts, max_new_tokens=5, sampling=Sampling(1.0), generator=made)
    for prompt, seed, one in zip(prompts, (1, 2), both, strict=True):
        alone = torch.Generator().manual_seed(seed)
        expected = generate(bench.model, [prompt], max_new_tokens=5, sampling=Sampling(1.0), generator=alone)
        assert expected[0].tokens == one.tokens
    with pytest.raises(ValueError, match="must hold one for each of 2 completions; got 1"):
        generate(bench.model, prompts, max_new_tokens=5, sampling=Sampling(1.0), generator=made[:1])


@pytest.mark.parametrize(
    ("text", "again", "runs"),
    [("a b c d e", 0, 2), ("a b c d a b c d", 1, 5), ("a a a a a a", 2, 3), ("a b c", 0, 0), ("", 0, 0)],
)
def test_a_run_of_four_words_counts_when_it_stood_before(text, again, runs):
    assert decoding.repeated(text) == (again, runs)


@pytest.mark.parametrize(
    ("one", "other", "share"), [("a b b", "b c", 0.4), ("a", "a", 1.0), ("a", "b", 0.0), ("", "", 1.0), ("", "a", 0.0)]
)
def test_agreement_is_the_share_of_words_in_common(one, other, share):
    assert decoding.overlap(one, other) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" Paris.", True),
        ("Paris", True),
        (" Parisian", False),
        (" Par", False),
        (" in Paris", False),
        (" Paris-Nord", False),
    ],
)
def test_an_ending_is_said_when_the_continuation_begins_with_it(text, said):
    assert decoding.says(text, "Paris") is said


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The city lies on the river and has many bridges.", "en"),
        ("Die Stadt liegt am Fluss und hat viele Brücken.", "de"),
        ("यह शहर नदी के किनारे है और इसमें कई पुल हैं।", "hi"),
    ],
)
def test_the_language_of_a_reply_is_told_by_its_text(text, language):
    assert [languages.is_in_language(text, one) for one in ("en", "de", "hi")] == [
        one == language for one in ("en", "de", "hi")
    ]


def test_scores_of_decoding_are_those_of_the_replies(bench, monkeypatch):
    rows = {"en": "the small dog runs over the old hill today", "de": "der kleine Hund läuft über die grüne Wiese"}
    loops = "the cat sat on the cat sat on the cat sat on"

    def replies(self, prompts, max_new_tokens, sampling=None, seed=None):
        if sampling is None:
            return [reply(loops) for _ in prompts]
        # Every sample answers in English, and says what greedy decoding says in half its words.
        return [reply(rows["en"]) for _ in prompts]

    monkeypatch.setattr(benches.Bench, "replies", replies)
    config = DecodingConfig(prompts=3, samples=2, max_new_tokens=8)
    found = decoding.run(bench, config)
    scores = {score.name: score for score in found.scores}
    assert scores["decoding/agreement"].value == pytest.approx(decoding.overlap(loops, rows["en"]))
    # Nine runs of four words in twelve; five of them stood before.
    assert scores["decoding/repetition_ratio_greedy"].value == pytest.approx(5 / 9)
    assert scores["decoding/repetition_ratio_sampled"].value == 0.0
    assert scores["decoding/language_sampled/en"].value == 1.0
    assert scores["decoding/language_sampled/de"].value == 0.0
    assert scores["decoding/language_sampled"].n == 12
    assert len(set(found.items["decoding/language_sampled"].families)) == 6
    assert scores["decoding/agreement"].decoding["samples"] == 2
    assert {score.better for score in found.scores} == {"none", "lower", "higher"}


def test_recall_counts_the_worst_rank_of_the_ending_among_all_tokens(bench):  # trap M5
    found = margins.run(bench, MarginsConfig(top_k=[1, 5, 320]))
    items = {k: found.items[f"margins/recall_at_{k}"].numerator for k in (1, 5, 320)}
    for number, fact in enumerate(FACTS):
        prompt = encode_text(bench.tokenizer, fact["prompt"])
        whole = encode_text(bench.tokenizer, f"{fact['prompt']} {fact['correct']}")
        with torch.no_grad():
            logits = bench.model(input_ids=torch.tensor([whole])).logits[0]
        places = range(len(prompt), len(whole))
        worst = max(int((logits[place - 1] > logits[place - 1, whole[place]]).sum()) for place in places)
        assert [items[k][number] for k in (1, 5, 320)] == [float(worst < k) for k in (1, 5, 320)]
    assert items[320] == [1.0] * 3


def test_each_difficulty_is_scored_on_the_facts_that_have_it(bench):
    found = margins.run(bench, MarginsConfig())
    scores = {score.name: score for score in found.scores}
    hard = found.items["margins/nats_per_token/hard"]
    having = [fact for fact in FACTS if "hard" in fact["distractors"]]
    assert hard.ids == [fact["id"] for fact in having]
    for number, fact in enumerate(having):
        means = []
        for ending in (fact["correct"], *fact["distractors"]["hard"]):
            prompt = encode_text(bench.tokenizer, fact["prompt"])
            nats = slow_nats(bench, encode_text(bench.tokenizer, f"{fact['prompt']} {ending}"), len(prompt))
            means.append(sum(nats) / len(nats))
        assert hard.numerator[number] == pytest.approx(sum(means[1:]) / 2 - means[0], abs=2e-5)
    assert scores["margins/accuracy/hard"].part == "difficulty"
    assert scores["margins/accuracy"].value == scores["margins/accuracy/medium"].value
    assert scores["margins/accuracy"].settings["chance"] == pytest.approx(1 / 3, abs=1e-6)
    assert "margins/accuracy/easy" not in scores


def test_facts_of_one_thing_are_one_family(bench):  # trap M6
    found = margins.run(bench, MarginsConfig())
    assert found.items["margins/accuracy"].families == [fact["family"] for fact in FACTS]
    assert dataclasses.asdict(found.scores[0])["n"] == 3


def test_models_whose_replies_differ_in_length_are_compared_on_the_same_prompts(bench, monkeypatch):
    config = DecodingConfig(prompts=None, samples=1, facts=None, max_new_tokens=8)
    found = []
    for texts in (["one two three four five six one two three four", "short"], ["no", "one two three four one two"]):
        said = iter(texts * 100)
        monkeypatch.setattr(
            decoding, "_replies", lambda *rest, said=said: [[reply(next(said)), reply("x")] for _ in rest[1]]
        )
        found.append(decoding.run(bench, config))
    one, other = (result.items["decoding/repetition_ratio_greedy"] for result in found)
    assert one.ids == other.ids
    assert one.counted().ids != other.counted().ids
    (score,) = [score for score in found[0].scores if score.name == "decoding/repetition_ratio_greedy"]
    # One of the seven runs of four words in the long reply stands there twice; the short one counts nothing.
    assert score.value == pytest.approx(1 / 7)
    assert score.n == len(one.counted().ids) < len(one.ids)
    one, other = (result.items["decoding/language_greedy"] for result in found)
    assert one.ids == other.ids
    assert set(one.denominator) == {0.0, 1.0}  # "short" has too few letters to tell its language


def test_items_that_all_say_the_same_have_no_interval_of_no_width():  # trap M6
    from stages.runtime.suites.intervals import ALL_ALIKE, described_interval

    ids = [str(number) for number in range(9)]
    assert described_interval(ids, [0.0] * 9, [3.0] * 9, None, unit="ratio", n_unit="prompts") == (None, ALL_ALIKE)
