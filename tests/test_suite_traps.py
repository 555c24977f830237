"""Each trap of measuring with its fault injected: the fault is refused or shown, never averaged away (TRAPS M1-M8)."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil

import evaluated
import numpy as np
import pytest
import torch
from evaluated import content, evaluate, make_bench
from tiny_run import Log, context

from data.tokenizer import encode_text
from pipelines.comparison import UnlikeError, compare
from pipelines.scores import read_evaluation
from stages.base import ConfigError, StopRequested
from stages.pretrain import Pretrain
from stages.runtime.suites import bench as benches
from stages.runtime.suites import bpb, registry, safety
from stages.runtime.suites.config import BpbConfig, DecodingConfig, MarginsConfig, SafetyConfig
from stages.runtime.suites.scores import Items, ScoreSheet

ONLY_BPB = {"suites": {"bpb": {"seq_len": 32, "documents": 4}}} | dict.fromkeys(evaluated.INPUTS[1:])


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    return evaluated.make_parents(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def bench(parents):
    return make_bench(parents, 4)


@pytest.fixture
def tokens(parents, tmp_path):
    """A copy of the tokens artifact's output to damage."""
    shutil.copytree(parents["data"] / "output", tmp_path / "tokens")
    return tmp_path / "tokens"


def scored(bench, tokens):
    return bpb.run(dataclasses.replace(bench, inputs={**bench.inputs, "data": tokens}), BpbConfig(seq_len=32))


def test_bits_per_byte_are_those_of_the_raw_logits_to_a_millionth(bench, parents):  # trap M1
    config = BpbConfig(seq_len=128, documents=None, document_tokens=None)
    found = {score.name: score.value for score in bpb.run(bench, config).scores}
    totals: dict[str, list[float]] = {}
    for document in bpb.chosen(parents["data"] / "output", config):
        with torch.no_grad():
            logits = bench.model(input_ids=torch.tensor([document.ids])).logits[0].double()
        text = bench.tokenizer.decode(document.ids).encode()
        first = bench.tokenizer.decode(document.ids[:1]).encode()
        log_probabilities = logits - logits.exp().sum(-1, keepdim=True).log()
        nats = -sum(log_probabilities[place - 1, token].item() for place, token in enumerate(document.ids) if place)
        for name in (f"bpb/{document.language}", f"bpb/source/{document.source}", "bpb/all"):
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += nats / math.log(2)
            total[1] += len(text) - len(first)
    assert set(found) == set(totals)
    for name, (bits, n_bytes) in totals.items():
        assert found[name] == pytest.approx(bits / n_bytes, rel=1e-6), name


def test_a_constant_of_bytes_a_token_is_refused(bench, tokens):  # trap M1
    scored(bench, tokens)
    table = np.load(tokens / "tokenizer" / "token_bytes.npy")
    np.save(tokens / "tokenizer" / "token_bytes.npy", np.where(table > 0, 2, 0).astype(table.dtype))
    with pytest.raises(ConfigError, match=r"must count the bytes that its tokens decode to; document .* the table"):
        scored(bench, tokens)


def test_other_held_out_tokens_than_the_frozen_ones_are_refused(bench, tokens):  # trap M2
    stream = tokens / "heldout" / "en.bin"
    raw = bytearray(stream.read_bytes())
    raw[0:2], raw[2:4] = raw[2:4], raw[0:2]
    stream.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match="the held-out files changed"):
        scored(bench, tokens)


@pytest.mark.parametrize(
    "draw", [random.random, np.random.random, lambda: torch.rand(1)], ids=["python", "numpy", "torch"]
)
def test_a_suite_that_draws_from_a_global_generator_is_refused(parents, tmp_path, monkeypatch, draw):  # trap M2
    real = registry.SUITES["bpb"]

    def drawing(bench, section):
        draw()
        return real.run(bench, section)

    monkeypatch.setitem(registry.SUITES, "bpb", real._replace(run=drawing))
    with pytest.raises(RuntimeError, match="suite bpb must draw from generators of its own"):
        evaluate(tmp_path, parents, **ONLY_BPB)


def test_five_evaluations_of_one_checkpoint_are_one(parents, tmp_path):  # trap M2
    found = []
    for number in range(5):
        # Whatever was drawn before must not matter.
        torch.manual_seed(number)
        random.seed(number)
        found.append(content(evaluate(tmp_path / str(number), parents)[1]))
    assert all(one == found[0] for one in found)


class Stops(Log):
    """Asks to stop after two steps."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory

    def log(self, event, step, values):
        super().log(event, step, values)
        if event == "train" and step == 2:
            (self.directory / "STOP").touch()


def test_a_run_that_was_stopped_and_resumed_is_measured_as_the_whole_one(parents, tmp_path):  # traps M2, T6
    small = {"max_steps": 4, "data": "data"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Pretrain().run(context(whole, parents["data"], **small))
    with pytest.raises(StopRequested):
        Pretrain().run(context(parts, parents["data"], tracker=Stops(parts), **small))
    Pretrain().run(context(parts, parents["data"], **small))
    scores = []
    for run in (whole, parts):
        (run / "output.tmp").rename(run / "output")
        evaluated.finish(run, {})
        _, output = evaluate(run / "evaluation", {**parents, "from_": run}, **ONLY_BPB)
        plain = {path.name: json.loads(path.read_text()) for path in output.iterdir()}
        # The artifact's own digest covers its log of times; the numbers are what must be alike.
        scores.append((plain["scores.json"]["scores"], plain["items.json"]))
    assert scores[0] == scores[1]


def read(folder):
    return read_evaluation("evaluate", folder)


def test_scores_of_two_validation_sets_cannot_be_compared(parents, tmp_path):  # trap M3
    for name, documents in (("a", 4), ("b", 4), ("c", 5)):
        changes = ONLY_BPB | {"suites": {"bpb": {"seq_len": 32, "documents": documents}}}
        evaluate(tmp_path / name, parents, **changes)
    same = compare({name: [read(tmp_path / name)] for name in "ab"})
    assert {row.differences[0].value for row in same.rows} == {0.0}
    with pytest.raises(UnlikeError, match=r"bpb: .* must be measured alike to be compared; set") as caught:
        compare({name: [read(tmp_path / name)] for name in "ac"})
    assert {fault.path for fault in caught.value.every} == {row.name for row in same.rows}


def test_a_held_out_document_that_is_in_training_is_refused(bench, tokens):  # trap M4
    lines = (tokens / "train" / "de.ids.txt").read_text().splitlines()
    lines[3] = (tokens / "heldout" / "en.ids.txt").read_text().splitlines()[2]
    (tokens / "train" / "de.ids.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ConfigError, match=r"must not be trained on what it holds out; document heldout2 of de .* of de"
    ):
        scored(bench, tokens)


def test_a_source_without_held_out_documents_is_refused(bench, tokens):  # trap M4
    facts = json.loads((tokens / "tokens.json").read_text())
    facts["sources"][1]["heldout"] = {**facts["sources"][1]["heldout"], "documents": 0}
    (tokens / "tokens.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="must hold out documents of every source; got none of de"):
        scored(bench, tokens)


def learned(bench, facts):
    """The bench's own kind of model after it has learned the facts by heart, and nothing else."""
    model = make_bench_model(bench)
    texts = [encode_text(bench.tokenizer, f"{fact['prompt']} {fact['correct']}.") for fact in facts]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = sum(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dataclasses.replace(bench, model=model.eval())


def make_bench_model(bench):
    from model.lm import HybridForCausalLM

    torch.manual_seed(1)
    return HybridForCausalLM(bench.model.config)


def test_a_model_that_knows_and_does_not_say_is_not_called_ignorant(bench, parents):  # trap M5
    knowing = learned(bench, evaluated.FACTS)
    config = DecodingConfig(prompts=1, facts=9, samples=1, max_new_tokens=8)

    def scores():
        found = {}
        for name, section in (("margins", MarginsConfig(top_k=[1])), ("decoding", config)):
            found |= {score.name: score.value for score in registry.SUITES[name].run(knowing, section).scores}
        return found

    said = scores()
    assert said["margins/accuracy"] == said["margins/recall_at_1"] == said["decoding/said_greedy"] == 1.0
    # Everywhere one and the same token is now likelier than any other: what is preferred to what is as it was.
    junk = encode_text(bench.tokenizer, "zzz")[0]
    handle = knowing.model.lm_head.register_forward_hook(
        lambda module, given, logits: logits + 60.0 * torch.nn.functional.one_hot(torch.tensor(junk), logits.shape[-1])
    )
    silent = scores()
    handle.remove()
    assert silent["decoding/said_greedy"] == silent["decoding/said_sampled"] == silent["margins/recall_at_1"] == 0.0
    assert silent["margins/accuracy"] == 1.0
    # No name stands for a mean of knowledge, recall, decoding and format.
    assert {name.split("/")[0] for name in silent} == {"margins", "decoding"}


def test_no_score_is_made_of_the_items_of_two_suites(parents, tmp_path):  # traps M5, M8
    _, output = evaluate(tmp_path, parents)
    plain = json.loads((output / "scores.json").read_text())
    for score in plain["scores"]:
        assert score["name"].split("/")[0] == score["suite"] == score["items"].split("/")[0]
    assert set(plain) == {
        "format", "stage", "key", "digest", "confidence", "settings", "scores", "not_run",
    }  # fmt: skip


def test_a_suites_bare_number_is_refused(parents, tmp_path, monkeypatch):  # traps M6, M7
    def bare(bench, section):
        sheet = ScoreSheet("bpb", 1, "0" * 64, {})
        sheet.put("bpb/all", 1.5, 20, None, "none", unit="bits_per_byte", better="lower", n_unit="documents")
        return sheet.result()

    monkeypatch.setitem(registry.SUITES, "bpb", registry.SUITES["bpb"]._replace(run=bare))
    with pytest.raises(ValueError, match="score bpb/all must have an interval"):
        evaluate(tmp_path, parents, **ONLY_BPB)


def test_a_perplexity_ratio_cannot_pass_for_bits(bench):  # trap M7
    sheet = ScoreSheet("bpb", 1, "0" * 64, {})
    with pytest.raises(ValueError, match="score bpb/all must be named by its unit; got ratio"):
        sheet.add("bpb/all", Items(["a", "b"], [1.0, 2.0]), unit="ratio", better="lower", n_unit="documents")


def test_one_class_that_is_always_refused_shows_in_a_small_whole(bench, tmp_path, monkeypatch):  # trap M8
    rows = [
        {"id": f"{template}{number:02}", "category": "benign", "language": "en", "template": f"benign/{template}",
         "prompt": [{"role": "user", "content": f"{template} {number}"}]}
        for template in ("cook", "walk", "read", "kill-weeds") for number in range(8)
    ]  # fmt: skip
    evaluated.write_rows(tmp_path / "heldout.jsonl", rows)
    refuses = benches.Reply("I can't help with that.", 6, True, True, True)
    helps = benches.Reply("Use a spade.", 4, True, True, True)
    monkeypatch.setattr(
        benches.Bench, "replies",
        lambda self, prompts, *_: [refuses if prompt.id.startswith("kill") else helps for prompt in prompts],
    )  # fmt: skip
    one = dataclasses.replace(bench, inputs={**bench.inputs, "preferences": tmp_path})
    found = {score.name: score for score in safety.run(one, SafetyConfig()).scores}
    whole = found["safety/over_refusal"]
    assert (whole.value, whole.n) == (0.25, 32)
    classes = {name.rpartition("/")[2]: score.value for name, score in found.items() if score.part == "template"}
    assert classes == {"cook": 0.0, "kill-weeds": 1.0, "read": 0.0, "walk": 0.0}
    # Four templates, each all or nothing, are no 32 answers: Wilson's half width of 32 would be 0.15.
    assert whole.interval[1] - whole.interval[0] > 0.5
    assert "4 families" in whole.method
