"""The evaluate stage on a tiny model: slow calculations, the same bytes twice, refusals (TRAPS M1-M8)."""

import dataclasses
import json
import math
import random
import shutil

import evaluated
import numpy as np
import pytest
import tiny_run
import torch
from evaluated import FACTS, config, content, evaluate, make_bench, slow_nats

from data import facts, rewards, shards
from data.chat import render
from data.heldout import HeldoutSet
from data.tokenizer import encode_text
from model.decode import generate
from stages.base import ConfigError
from stages.evaluate import MIN_PROMPT_TOKENS, Evaluate, length_faults
from stages.runtime import evaluation, rng
from stages.runtime.manifest import CheckpointError
from stages.runtime.suites import bench as benches
from stages.runtime.suites import bpb, format, margins, reasoning, safety, samples
from stages.runtime.suites.config import BpbConfig, MarginsConfig, SamplesConfig
from stages.runtime.suites.evaluation_run import summary
from stages.runtime.suites.intervals import ALL_ALIKE, TOO_FEW
from stages.runtime.suites.registry import SUITES
from stages.runtime.suites.scores import UNITS, Items

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    return evaluated.make_parents(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def bench(parents):
    return make_bench(parents, 4)


@pytest.fixture(scope="module")
def finished(parents, tmp_path_factory):
    """One evaluation by all suites but the harness: its result and output."""
    return evaluate(tmp_path_factory.mktemp("finished"), parents)


def test_likelihoods_are_those_of_each_row_alone_whatever_the_batch(bench, parents):  # traps M1, K4
    drawn = random.Random(1)
    rows = [([drawn.randrange(4, 320) for _ in range(length)], first) for length, first in
            ((5, 1), (40, 3), (17, 16), (2, 1), (33, 8), (16, 1), (64, 60))]  # fmt: skip
    found, alone = bench.score(rows), make_bench(parents, 1).score(rows)
    for (ids, first), one, other in zip(rows, found, alone, strict=True):
        # fp32 sums over 320 logits of magnitude 1 round by about 1e-6 of a nat.
        assert one.nats == pytest.approx(slow_nats(bench, ids, first), abs=2e-5)
        assert one.nats == pytest.approx(other.nats, abs=2e-5)
        assert len(one.nats) == len(ids) - first
        assert one.is_greedy == other.is_greedy
    with pytest.raises(ValueError, match="field first"):
        bench.score([([1, 2], 0)])


def test_bits_per_byte_agree_with_the_evaluation_during_training(bench, parents):  # trap M1
    result = bpb.run(bench, BpbConfig(seq_len=32, documents=None, document_tokens=None))
    found = {score.name: score for score in result.scores}
    expected = evaluation.evaluate(
        lambda **batch: bench.model(**batch).logits,
        HeldoutSet(parents["data"] / "output"),
        seq_len=32,
        rows=4,
        device=CPU,
    )
    for language in ("en", "de", "all"):
        assert found[f"bpb/{language}"].value == pytest.approx(expected.bpb(language), rel=1e-6)
        assert math.fsum(result.items[f"bpb/{language}"].denominator) == expected.n_bytes[language]
    assert (found["bpb/en"].n, found["bpb/all"].n) == (12, 24)
    assert found["bpb/en"].settings["heldout_hash"] == expected.heldout_hash


def test_a_subset_takes_the_lowest_ids_and_is_another_set(bench, parents):  # trap M3
    whole = bpb.run(bench, BpbConfig(seq_len=32, documents=None, document_tokens=None)).scores[0]
    part = list(bpb.chosen(parents["data"] / "output", BpbConfig(documents=3, document_tokens=16)))
    ids = sorted(shards.read_ids(parents["data"] / "output", "heldout", "en"))[:3]
    assert [document.id for document in part if document.language == "en"] == [f"en/{one}" for one in ids]
    assert max(len(document.ids) for document in part) == 16
    hashes = {
        bpb.run(bench, BpbConfig(seq_len=seq_len, documents=3, document_tokens=16)).scores[0].set_hash
        for seq_len in (16, 32)
    }
    assert len(hashes | {whole.set_hash}) == 3


def test_a_facts_margin_is_what_the_wrong_endings_cost_more_a_token(bench):  # trap M5
    result = margins.run(bench, MarginsConfig())
    items = result.items["margins/nats_per_token"]
    known = result.items["margins/accuracy"]
    for number, fact in enumerate(FACTS):
        means = []
        for ending in (fact["correct"], *fact["distractors"]["medium"]):
            prompt = encode_text(bench.tokenizer, fact["prompt"])
            whole = encode_text(bench.tokenizer, f"{fact['prompt']} {ending}")
            assert whole[: len(prompt)] == prompt
            nats = slow_nats(bench, whole, len(prompt))
            means.append(sum(nats) / len(nats))
        assert items.numerator[number] == pytest.approx(sum(means[1:]) / len(means[1:]) - means[0], abs=2e-5)
        assert known.numerator[number] == float(means[0] < min(means[1:]))
    names = [score.name for score in result.scores]
    assert "margins/accuracy/places" in names
    assert result.scores[0].set_hash == margins.run(bench, MarginsConfig()).scores[0].set_hash
    assert result.scores[0].set_hash != margins.run(bench, MarginsConfig(facts=1)).scores[0].set_hash


def test_facts_that_changed_after_they_were_frozen_are_refused(parents, bench, tmp_path):  # trap M2
    for name in ("facts.jsonl", "facts.json"):
        (tmp_path / name).write_text((parents["facts"] / "output" / name).read_text().replace("mat", "rug"))
    (tmp_path / "facts.json").write_text((parents["facts"] / "output" / "facts.json").read_text())
    with pytest.raises(ValueError, match="must hash to"):
        list(facts.read_facts(tmp_path))


def test_replies_do_not_depend_on_their_neighbours(bench, parents):  # trap K4
    asked = [(str(n), [{"role": "user", "content": "the cat " * n}]) for n in (1, 9, 4, 2, 6)]
    prompts = bench.prompts("x", asked, 8)
    together = bench.replies(prompts, 8)
    assert together == make_bench(parents, 1).replies(prompts, 8)
    for prompt, reply in zip(prompts, together, strict=True):
        ends = [bench.specials["<|im_end|>"], bench.specials["<|endoftext|>"]]
        alone = generate(bench.model, [prompt.ids], max_new_tokens=8, eos_token_ids=ends)[0]
        assert reply.tokens == len(alone.tokens) - (alone.tokens[-1] in ends)
        assert prompt.ids == render(bench.tokenizer, dict(asked)[prompt.id], add_generation_prompt=True).ids


def test_how_a_reply_ended_is_read_off_its_tokens(bench):
    end, document_end, start = (bench.specials[name] for name in ("<|im_end|>", "<|endoftext|>", "<|im_start|>"))
    text = encode_text(bench.tokenizer, "der schöne Hund")
    broken = encode_text(bench.tokenizer, "ö")[:1]
    cases = [
        ([*text, end], ("der schöne Hund", len(text), True, True, True)),
        ([*text, document_end], ("der schöne Hund", len(text), True, True, False)),
        (text, ("der schöne Hund", len(text), False, True, False)),
        ([*text, start, end], ("der schöne Hund", len(text) + 1, True, False, True)),
        ([end], ("", 0, True, True, True)),
        ([], ("", 0, False, True, False)),
    ]
    for tokens, expected in cases:
        assert tuple(bench._reply(tokens)) == expected
    if len(encode_text(bench.tokenizer, "ö")) > 1:
        assert not bench._reply([*broken, end]).is_clean


@pytest.mark.parametrize(
    ("reply", "obeys"),
    [
        (benches.Reply("Hello.", 2, True, True, True), True),
        (benches.Reply("Hello.", 2, True, True, False), False),
        (benches.Reply("Hello.", 2, False, True, False), False),
        (benches.Reply("Hello.", 2, True, False, True), False),
        (benches.Reply(" \n", 1, True, True, True), False),
        (benches.Reply("Hello.<|im_start|>user", 9, True, True, True), False),
    ],
)
def test_the_template_asks_for_one_visible_turn_that_ends(reply, obeys):
    assert format.obeys(reply) is obeys


def test_a_prompt_without_room_is_left_out_aloud_and_none_left_is_refused(bench, capsys):
    asked = [("long", [{"role": "user", "content": "the cat " * 150}]), ("short", [{"role": "user", "content": "cat"}])]
    assert [prompt.id for prompt in bench.prompts("format", asked, 8)] == ["short"]
    assert "format: 1 of 2 prompts are longer than 184 tokens and left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"suites\.format\.max_new_tokens: must leave room"):
        bench.prompts("format", asked[:1], 8)
    with pytest.raises(ConfigError, match="got 4096 and 2 prompts, none of which fits"):
        bench.prompts("format", asked, 4096)
    assert capsys.readouterr().out == ""


def test_the_summary_says_why_a_score_has_no_interval():
    score = {"name": "format/stop", "suite": "format", "part": None, "value": 0.0, "unit": "share", "n_unit": "replies"}
    scores = [score | {"interval": None, "n": n, "method": why} for n, why in ((9, ALL_ALIKE), (1, TOO_FEW))]
    head, alike, few = summary({"stage": "sft", "key": "k", "scores": scores}, [])
    assert alike.split()[2:] == "none share 9 replies (every item says the same)".split()
    assert few.split()[2:] == "none share 1 replies (fewer than two to draw from)".split()
    assert alike.index("share") == head.index("unit")


def test_each_prompt_is_put_once_and_categories_are_never_averaged(parents, finished):  # trap M8
    rows = safety.held_out_prompts(parents["preferences"] / "output", None)
    assert len(rows) == 12
    assert len(safety.held_out_prompts(parents["preferences"] / "output", 2)) == 8
    scores = {score["name"]: score for score in scores_of(finished)}
    assert {name for name in scores if name.startswith("safety")} == {
        f"safety/{kind}{part}" for kind in ("refusal", "over_refusal") for part in ("", "/en", "/de", "/a", "/b")
    }
    assert (scores["safety/refusal"]["better"], scores["safety/over_refusal"]["better"]) == ("higher", "lower")
    assert scores["safety/refusal"]["n"] == 6


def test_an_answer_counts_only_when_it_is_exact(parents, bench, monkeypatch):
    rows = reasoning.questions(parents["tasks"] / "output", 3)
    assert [row["task"] for row in rows] == ["add"] * 3 + ["reverse"] * 3
    texts = [f"So. Answer: {rows[0]['answer']}", f"Answer: {rows[1]['answer']} or so", "no answer",
             *(f"Answer: {row['answer']}" for row in rows[3:])]  # fmt: skip
    assert [rewards.is_correct(text, row) for text, row in zip(texts, rows, strict=True)] == [
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    # The last one is exact only because its text leaves out a special token in its midst.
    replies = [benches.Reply(text, 3, True, number < 5, True) for number, text in enumerate(texts)]
    monkeypatch.setattr(benches.Bench, "replies", lambda *_: replies)
    found = {score.name: score.value for score in reasoning.run(bench, evaluated.config().suites.reasoning.model_copy(
        update={"questions": 3})).scores}  # fmt: skip
    assert found == pytest.approx(
        {"reasoning/add": 1 / 3, "reasoning/reverse": 2 / 3, "reasoning/all": 3 / 6, "reasoning/answered": 5 / 6}
    )


def scores_of(finished):
    return json.loads((finished[1] / "scores.json").read_text())["scores"]


def test_every_score_has_n_interval_unit_set_and_items_that_reproduce_it(finished):  # traps M3, M6, M7
    items = json.loads((finished[1] / "items.json").read_text())
    scores = scores_of(finished)
    assert {score["suite"] for score in scores} == {
        "bpb", "margins", "reasoning", "safety", "decoding", "format", "needles",
    }  # fmt: skip
    assert len({score["name"] for score in scores}) == len(scores)
    for score in scores:
        assert score["n"] > 0
        assert len(score["set_hash"]) == 64
        assert score["unit"] in UNITS
        assert Items(**items[score["items"]]).value() == score["value"]
        assert len(items[score["items"]]["ids"]) == len(set(items[score["items"]]["ids"])) == score["n"]
        assert score["interval"] is None or score["interval"][0] <= score["value"] <= score["interval"][1]
        assert (score["decoding"] is None) == (score["suite"] in ("bpb", "margins", "needles"))
    assert finished[0].metrics["bpb/en"] == next(s["value"] for s in scores if s["name"] == "bpb/en")
    assert "heldout_hash" in finished[0].metrics


def test_a_diverged_model_has_no_score(parents):
    bench = make_bench(parents, 4)
    with torch.no_grad():
        bench.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="logits must be finite"):
        bench.score([([1, 2, 3], 1)])


def test_a_sample_is_cut_only_at_its_longest(bench):
    class Speaks:
        def prompts(self, suite, conversations, max_new_tokens):
            return bench.prompts(suite, conversations, max_new_tokens)

        def replies(self, prompts, max_new_tokens, sampling, seed):
            # The greedy one ends by <|endoftext|>, the other is cut.
            stopped = sampling.temperature == 0
            return [benches.Reply("text", 3, stopped=stopped, is_clean=True, closes_turn=False)]

    found = samples.run(Speaks(), SamplesConfig(prompts={"a": "x"}, max_new_tokens=4)).samples
    assert {sample["id"]: sample["finished"] for sample in found} == {"a/greedy": True, "a/sampled": False}


def test_samples_hold_each_prompt_greedy_and_sampled(finished):
    samples = json.loads((finished[1] / "samples.json").read_text())["samples"]
    assert [sample["id"] for sample in samples] == ["one/greedy", "one/sampled", "two/greedy", "two/sampled"]
    assert [sample["decoding"]["temperature"] for sample in samples[:2]] == [0.0, 0.8]
    assert len(finished[0].summary) < 40


def test_two_evaluations_are_equal_byte_for_byte_and_move_no_generator(parents, finished, tmp_path):  # trap M2
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    rng.seed_all(11)
    expected = draw()
    rng.seed_all(11)
    result, output = evaluate(tmp_path, parents)
    assert draw() == expected
    assert content(output) == content(finished[1])
    assert result == finished[0]


def test_an_interrupted_evaluation_keeps_its_finished_suites_and_ends_alike(
    parents, finished, tmp_path, monkeypatch, capsys
):
    def stop(bench, section):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(SUITES, "safety", SUITES["safety"]._replace(run=stop))
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path, parents)
    capsys.readouterr()
    _, output = evaluate(tmp_path, parents)
    kept = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "kept from before" in line]
    assert kept == ["bpb", "margins", "reasoning"]
    assert content(output) == content(finished[1])


def test_another_question_is_not_answered_by_a_kept_result(parents, tmp_path, capsys):  # trap M3
    one = {"suites": {"margins": {}}} | {name: None for name in evaluated.INPUTS if name != "facts"}
    evaluate(tmp_path, parents, **one)
    capsys.readouterr()
    evaluate(tmp_path, parents, **one | {"suites": {"margins": {"facts": 1}}})
    assert "kept" not in capsys.readouterr().out


def test_a_suites_new_version_is_a_new_version_of_the_stage():
    # Otherwise finished artifacts with the old score would count as done, beside new ones that cannot be compared.
    assert Evaluate.code_version == 1 + sum(suite.version - 1 for suite in SUITES.values())


def test_a_suite_needs_its_set_and_a_set_its_suite():  # trap T7
    faults = [
        str(fault) for fault in Evaluate.check(config(suites={"bpb": {}, "harness": {}}, data=None, facts=None), None)
    ]
    assert [fault.split(":")[0] for fault in faults] == ["data", "facts", "messages", "tasks", "preferences"]
    assert "must name a stage, since suite bpb reads it" in faults[0]
    assert "since suite harness reads it" in faults[1]
    assert "must be left out where no suite reads it" in faults[2]
    assert [fault.path for fault in Evaluate.check(config(suites={}), None)] == ["suites"]
    assert Evaluate.check(config(), None) == []


def test_windows_beyond_the_models_length_are_refused_wherever_the_model_comes_from(parents):
    long = config(suites={"bpb": {"seq_len": 4096}}, messages=None, tasks=None, preferences=None, facts=None)
    found = [*Evaluate.check(long, tiny_run.spec()), *Evaluate.check_parents(long, None, {"from_": parents["from_"]})]
    assert [fault.path for fault in found] == ["suites.bpb.seq_len"] * 2
    assert "must be at most model.max_seq_len" in found[0].message


def test_replies_that_leave_no_room_for_a_prompt_are_refused_before_anything_runs(parents):
    most = tiny_run.spec().max_seq_len - MIN_PROMPT_TOKENS
    for length, refused in ((most, False), (most + 1, True)):
        names = ["reasoning", "safety", "decoding", "format", "samples", "code"]
        suites = {name: {"max_new_tokens": length} for name in names}
        task = {"name": "cats_local", "type": "file", "kind": "answer", "path": "x", "licence": "CC0"}
        suites["harness"] = {"local": ["tasks_local"], "max_new_tokens": length}
        suites["harness"]["files"] = [task | {"max_new_tokens": length}]
        faults = length_faults(config(suites=suites), tiny_run.spec())
        paths = [f"suites.{name}.max_new_tokens" for name in [*names, "harness", "harness.files[0]"]]
        assert [fault.path for fault in faults] == (paths if refused else [])
    assert f"must leave 8 tokens of model.max_seq_len {most + 8} to a prompt; got {most + 1}; set" in faults[0].message
    # Where no answer is generated its length is not read.
    assert length_faults(config(suites={"harness": {"max_new_tokens": 4096}}), tiny_run.spec()) == []


def test_held_out_tokens_of_another_tokenizer_are_refused(parents, tmp_path):  # trap K10
    other = tmp_path / "other" / "output"
    other.mkdir(parents=True)
    plain = json.loads((parents["data"] / "output" / "tokens.json").read_text())
    (other / "tokens.json").write_text(json.dumps(plain | {"tokenizer_digest": "f" * 64}))
    found = Evaluate.check_parents(config(), None, {"from_": parents["from_"], "data": tmp_path / "other"})
    assert [fault.path for fault in found] == ["from"]
    assert "must carry the data's tokenizer" in found[0].message
    assert Evaluate.check_parents(config(), None, {"from_": parents["from_"], "data": parents["data"]}) == []


def test_bits_per_byte_go_by_source_and_by_the_domains_that_are_declared(parents, bench, tmp_path):
    tokens = tmp_path / "tokens"
    shutil.copytree(parents["data"] / "output", tokens)
    facts = json.loads((tokens / "tokens.json").read_text())
    facts["sources"][0]["domain"], facts["sources"][1]["domain"] = "science", None
    (tokens / "tokens.json").write_text(json.dumps(facts))
    one = dataclasses.replace(bench, inputs={**bench.inputs, "data": tokens})
    scores = {score.name: score for score in bpb.run(one, BpbConfig(seq_len=32)).scores}
    assert set(scores) == {"bpb/en", "bpb/de", "bpb/source/en", "bpb/source/de", "bpb/domain/science", "bpb/all"}
    assert scores["bpb/domain/science"].value == scores["bpb/source/en"].value == scores["bpb/en"].value
    assert [scores[name].part for name in ("bpb/en", "bpb/source/en", "bpb/domain/science", "bpb/all")] == [
        "language", "source", "domain", None,
    ]  # fmt: skip
