"""Preference optimisation: ids, the reference cache, losses against their formulas, and whole runs of a tiny model."""

import itertools
import json
import math

import pytest
import torch
from finetune_cases import Case, context, make_inputs, spec
from tiny_preferences import pairs, preferences_data, write_preferences
from tiny_run import Log

from data.preferences import SPLITS, read_split
from data.tokenizer import load
from stages.base import ConfigError
from stages.dpo import Dpo
from stages.runtime.audit import AuditError
from stages.runtime.dpo_data import tokenise

CASE = Case("stages.dpo:Dpo", preferences_data)
LOSSES = ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "apo_zero", "apo_down", "sigmoid_norm")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(CASE, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def tokenizer(inputs):
    return load(inputs["from_"] / "output")


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A finished run of four steps with its log; the directory is kept."""
    directory, log = tmp_path_factory.mktemp("run"), Log()
    result = Dpo().run(context(CASE, directory, inputs, tracker=log, nll_weight=0.5))
    return directory, log, result


def plain_logprobs(folder, prompt, answer):
    """Of one answer alone, from the logits of the plain model in float64: no padding, no fused head, no batch."""
    from safetensors.torch import load_file

    from model.config import HybridConfig
    from model.lm import HybridForCausalLM

    model = HybridForCausalLM(HybridConfig.from_spec(spec())).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(logits[place].log_softmax(-1)[ids[0, place + 1]]) for place in places)


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        ([], pairs(2, 1, "h"), "must hold pairs on both sides; train.jsonl has none"),
        (pairs(2, 1, "t"), [], "must hold pairs on both sides; heldout.jsonl has none"),
        ([r | {"rejected": r["chosen"]} for r in pairs(2, 1, "t")], pairs(2, 1, "h"), "pair t0 of train has equal"),
        (pairs(2, 1, "t"), pairs(2, 2, "t"), "templates .* stand on both sides"),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_refused_before_a_model_is_built(
    inputs, tmp_path, train, heldout, message
):  # trap T4
    write_preferences(tmp_path / "data", train, heldout)
    with pytest.raises(ConfigError, match=f"dpo.data: {message}"):
        Dpo().run(context(CASE, tmp_path / "run", inputs | {"data": tmp_path / "data"}))


def test_a_length_that_leaves_no_room_is_refused_with_the_counts(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"got 16, which leaves none \(of train 18 long prompts"):
        Dpo().run(context(CASE, tmp_path, inputs, max_length=16))


def test_the_margin_is_exactly_zero_at_the_first_step(run):
    """The parent's cached log-probabilities equal the policy's to the last bit, though batches differ."""
    _, log, _ = run
    assert log.of("train", "rewards/margins")[1] == 0.0
    assert log.of("train", "rewards/chosen")[1] == 0.0
    assert log.of("train", "rewards/rejected")[1] == 0.0
    assert log.of("train", "rewards/margins")[4] != 0.0
    assert log.of("eval", "margin_nats")[0] == 0.0


def test_the_cached_log_probabilities_are_those_of_an_independent_calculation(run, inputs, tokenizer):
    directory, _, _ = run
    sides = [read_split(inputs["data"] / "output", side) for side in SPLITS]
    members = [one for rows in sides for one in tokenise(tokenizer, rows, 64).pairs]
    (path,) = (directory / "work").glob("reference-*/block-00000.json")
    found = json.loads(json.loads(path.read_text())["body"])["nats"]
    assert len(found) == len(members) == 28
    for one, values in list(zip(members, found, strict=True))[::5]:
        expected = [
            plain_logprobs(inputs["from_"] / "output", one.prompt_ids, ids)
            for ids in (one.chosen_ids, one.rejected_ids)
        ]
        # A sum of up to 30 float32 terms of about 6 nats, each of a log-sum over 320: 30 * 6 * 2**-24 * some tens.
        assert values == pytest.approx(expected, abs=3e-4)


def test_the_output_holds_the_trained_weights_and_gives_the_margins_that_were_measured(run, inputs, tokenizer):
    directory, _, result = run
    rows = read_split(inputs["data"] / "output", "heldout")
    margins = []
    for one in tokenise(tokenizer, rows, 64).pairs:
        new, old = (
            [plain_logprobs(folder, one.prompt_ids, ids) for ids in (one.chosen_ids, one.rejected_ids)]
            for folder in (directory / "output.tmp", inputs["from_"] / "output")
        )
        margins.append(new[0] - old[0] - (new[1] - old[1]))
    assert abs(result.metrics["margin_nats"]) > 0.1
    assert result.metrics["margin_nats"] == pytest.approx(sum(margins) / len(margins), abs=1e-3)


def test_under_bf16_the_first_margin_is_zero_too(inputs, tmp_path):
    log = Log()
    Dpo().run(context(CASE, tmp_path, inputs, tracker=log, precision="bf16", max_steps=2, schedule={"kind": "cosine"}))
    assert log.of("train", "rewards/margins")[1] == 0.0


def test_held_out_margins_are_measured_before_and_after_by_category_and_language(run):
    _, log, result = run
    metrics = result.metrics
    assert log.of("eval", "margin_nats").keys() == {0, 4}
    assert metrics["before/margin_nats"] == 0.0
    assert metrics["margin_nats_low"] <= metrics["margin_nats"] <= metrics["margin_nats_high"]
    groups = ["harmful", "benign", "en", "de", *(f"{c}/{lang}" for c in ("harmful", "benign") for lang in ("en", "de"))]
    for group in groups:
        assert math.isfinite(metrics[f"margin_nats/{group}"])
        assert 0 <= metrics[f"preference_accuracy_low/{group}"] <= metrics[f"preference_accuracy_high/{group}"] <= 1
        assert math.isfinite(metrics[f"before/preference_accuracy/{group}"])
    assert metrics["n_pairs"] == 10 == metrics["n_pairs/harmful"] + metrics["n_pairs/benign"]
    assert metrics["train_pairs"] == 18
    assert metrics["train_truncated_answers"] == 0
    assert any(line.startswith("harmful/de") for line in result.summary)


def test_no_reference_model_stays_in_memory(run, inputs, tmp_path, monkeypatch):
    from stages.runtime.dpo_training import DpoTraining

    held = {}
    begin = DpoTraining.begin

    def look(self):
        held["reference"] = self.trainer.ref_model
        begin(self)

    monkeypatch.setattr(DpoTraining, "begin", look)
    Dpo().run(context(CASE, tmp_path, inputs, max_steps=2, schedule={"kind": "cosine"}))
    assert held == {"reference": None}


def formula(loss, beta, smoothing, change, lengths):
    """A pair's loss by its paper, in plain float arithmetic."""
    chosen, rejected = change
    margin = beta * (chosen - rejected)

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    if loss == "sigmoid":
        return -log_sigmoid(margin)
    if loss == "ipo":
        return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return max(0.0, 1 - margin)
    if loss == "robust":
        return (-(1 - smoothing) * log_sigmoid(margin) + smoothing * log_sigmoid(-margin)) / (1 - 2 * smoothing)
    if loss == "exo_pair":
        up, down = sigmoid(margin), sigmoid(-margin)
        return up * math.log(up / (1 - smoothing)) + down * math.log(down / smoothing)
    if loss == "apo_zero":
        return 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)
    if loss == "apo_down":
        return sigmoid(beta * chosen) + 1 - sigmoid(margin)
    return -log_sigmoid(beta * (chosen / lengths[0] - rejected / lengths[1]))


class Probe:
    """A trainer without a model: log-probabilities are given."""

    def __init__(self, loss, beta, smoothing, nll_weight):
        from collections import defaultdict
        from types import SimpleNamespace

        from stages.runtime.dpo_trainer import OwnedDpoTrainer

        self.trainer = OwnedDpoTrainer.__new__(OwnedDpoTrainer)
        gather = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
        facts = {
            "model": SimpleNamespace(training=True), "accelerator": gather, "aux_loss_enabled": False, "ld_alpha": None,
            "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "loss_types": [loss],
            "loss_weights": [1.0], "beta": beta, "label_smoothing": smoothing, "use_weighting": False,
            "_total_train_tokens": 0, "_tp_size": 1,
            "_metrics": {"train": defaultdict(list)},
            "finetuning": SimpleNamespace(config=SimpleNamespace(nll_weight=nll_weight)),
        }  # fmt: skip
        self.trainer.__dict__.update(facts)

    def loss(self, log_probs, mask, reference):
        from types import SimpleNamespace

        zeros = torch.zeros_like(log_probs)
        output = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        inputs = {
            "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
            "ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1],
        }  # fmt: skip
        return float(self.trainer._compute_loss(lambda **_: output, inputs))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_its_formula_and_the_nll_is_that_of_the_chosen(loss):
    drawn = torch.Generator().manual_seed(3)
    lengths = [(4, 2), (3, 5), (1, 6)]
    mask = torch.zeros(6, 9, dtype=torch.long)
    for place, (chosen, rejected) in enumerate(lengths):
        mask[place, 2 : 2 + chosen], mask[3 + place, 2 : 2 + rejected] = 1, 1
    log_probs = -torch.rand(6, 8, generator=drawn) * mask[:, 1:]
    reference = -torch.rand(3, 2, generator=drawn) * 3
    beta, smoothing = 0.7, 0.2 if loss in ("robust", "exo_pair") else 0.0
    totals = log_probs.double().sum(1).view(2, 3).T
    change = (totals - reference).tolist()
    expected = sum(formula(loss, beta, smoothing, c, n) for c, n in zip(change, lengths, strict=True)) / 3
    nll = sum(-float(totals[place, 0]) / lengths[place][0] for place in range(3)) / 3
    assert Probe(loss, beta, smoothing, 0.0).loss(log_probs, mask, reference) == pytest.approx(expected, rel=1e-5)
    found = Probe(loss, beta, smoothing, 0.5).loss(log_probs, mask, reference)
    assert found == pytest.approx(expected + 0.5 * nll, rel=1e-5)


def test_a_pair_weighs_the_same_in_whatever_micro_batch_it_comes():  # trap T2
    from stages.runtime.dpo_trainer import chosen_nll

    drawn = torch.Generator().manual_seed(4)
    mask = torch.zeros(4, 9, dtype=torch.long)
    mask[0, 1:2], mask[1, 1:9], mask[2, 1:4], mask[3, 1:5] = 1, 1, 1, 1
    log_probs = -torch.rand(4, 8, generator=drawn) * mask[:, 1:]
    both = chosen_nll(log_probs, mask)
    singles = [chosen_nll(log_probs[[n, n + 2]], mask[[n, n + 2]]) for n in range(2)]
    assert float(both) == pytest.approx(float(sum(singles)) / 2, rel=1e-6)


def test_a_run_after_which_no_answer_moved_is_refused(inputs, tmp_path, monkeypatch):  # trap T4
    from stages.runtime.dpo_training import DpoTraining

    monkeypatch.setattr(DpoTraining, "_policy", lambda self, members: self.heldout_reference)
    with pytest.raises(AuditError, match="no held-out answer changed its probability"):
        Dpo().run(context(CASE, tmp_path, inputs, max_steps=2, schedule={"kind": "cosine"}))


def test_every_loss_trains_a_model(inputs, tmp_path):
    found = {}
    for loss in ("ipo", "robust"):
        log = Log()
        smoothing = {"label_smoothing": 0.1} if loss == "robust" else {}
        facts = {"max_steps": 2, "schedule": {"kind": "cosine"}, "beta": 0.2, "loss": loss} | smoothing
        Dpo().run(context(CASE, tmp_path / loss, inputs, tracker=log, **facts))
        found[loss] = log.of("train", "loss_nats")[1]
    # At step 0 every change is 0: IPO is (1 / (2 beta))**2 = 6.25, the robust loss log 2.
    assert found["ipo"] == pytest.approx(6.25, rel=1e-6)
    assert found["robust"] == pytest.approx(math.log(2), rel=1e-6)


def test_a_limit_of_length_that_cuts_an_answer_names_another_held_out_set(inputs, tmp_path):  # trap M3
    from stages.runtime.dpo_training import DpoTraining

    def prepared(**changes):
        training = DpoTraining(context(CASE, tmp_path, inputs, **changes))
        training._open_parent()
        training.prepare()
        return training

    whole = prepared()
    longest = max(len(pair.prompt_ids) + max(pair.lengths) for pair in whole.sides["heldout"].pairs)
    assert longest < whole.config.max_length
    assert prepared(max_length=longest).heldout_hash == whole.heldout_hash
    assert prepared(max_length=longest - 1).heldout_hash != whole.heldout_hash


def test_a_run_that_the_library_ended_early_is_not_done(inputs, tmp_path, monkeypatch):  # trap T4
    from stages.runtime.finetune_trainer import RowOrder

    whole = RowOrder.__iter__
    monkeypatch.setattr(RowOrder, "__iter__", lambda self: itertools.islice(whole(self), self.rows // 2))
    with pytest.raises(AuditError, match="2 of max_steps 4 were trained"):
        Dpo().run(context(CASE, tmp_path, inputs))
