"""GRPO for real on a tiny model: TRL's loss on our rollouts, dead starts, gaps, filtered groups.

Kills, flipped bytes, stops and two ranks are in ``test_finetune_stages.py``, for every fine-tuning stage alike.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import finetune_cases
import grpo_cases
import pytest
import torch
from finetune_cases import Case
from tiny_run import Log
from trl import GRPOTrainer

from data.rewards import REWARDS
from data.tasks import rows
from model.decode import Sampling, generate
from stages.base import ConfigError
from stages.grpo import GRPO
from stages.runtime import distributed
from stages.runtime.grpo_finetuning import GRPOFinetuning, Probe, dead_start
from stages.runtime.grpo_trainer import OwnedGRPOTrainer, RolloutMismatchError
from stages.runtime.rollouts import Roller, Rollout, generator_of, groups_of, is_informative

CASE = Case("stages.grpo:GRPO", grpo_cases.tasks_data, grpo_cases.CONFIG)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return finetune_cases.make_inputs(CASE, tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def context(inputs: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    yield lambda **changes: finetune_cases.context(CASE, tmp_path / "run", inputs, **changes)
    distributed.close_process_group()


@pytest.fixture
def roller(inputs: dict[str, Path]) -> tuple[Roller, Any, list[dict[str, Any]]]:
    """A roller with the tiny parent and four questions."""
    run = GRPOFinetuning(finetune_cases.context(CASE, inputs["data"] / "x", inputs))
    run._open_parent()
    made = Roller(run.tokenizer, rewards={"vowels": 1.0}, max_completion_length=12, temperature=1.0)
    return made, run.load_model(), list(rows(grpo_cases.CHOICE, "train", 1))[:4]


def test_completions_of_a_group_are_those_of_prompts_given_one_by_one(roller: Any) -> None:
    made, model, questions = roller
    found = made.sample(model, questions, group=3, generator=torch.Generator().manual_seed(1))
    prompts = [made.encode(row) for row in questions for _ in range(3)]
    plain = generate(
        model, prompts, max_new_tokens=12, eos_token_ids=made._ends, sampling=Sampling(1.0),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert [rollout.completion_ids for rollout in found] == [completion.tokens for completion in plain]
    assert [rollout.prompt_ids for rollout in found] == prompts


def test_a_completion_that_does_not_stop_earns_nothing(roller: Any) -> None:
    made, _, questions = roller
    ids = made.tokenizer("aeiou")["input_ids"]
    for finished, reward in ((True, 1.0), (False, 0.0)):
        completion = types.SimpleNamespace(tokens=ids, logprobs=[0.0] * len(ids), finished=finished)
        assert made._scored(questions[0], [1], completion).reward == reward


def test_a_special_token_within_an_answer_makes_it_wrong(roller: Any) -> None:
    made, _, questions = roller
    exact = made.tokenizer(f"Answer: {questions[0]['answer']}")["input_ids"]
    start, end = (made.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    for ids, correct in (([*exact, end], True), ([*exact[:-1], start, exact[-1], end], False)):
        completion = types.SimpleNamespace(tokens=ids, logprobs=[0.0] * len(ids), finished=True)
        assert made._scored(questions[0], [1], completion).correct is correct


def test_the_policy_that_sampled_is_scored_in_the_arithmetic_of_its_rollouts(monkeypatch: Any) -> None:
    # trap T10: TRL runs it beside the engine, whose autocast it would miss
    seen = []

    def score(self: Any, model: Any) -> Any:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return torch.zeros(1), None, None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", score)
    trainer: Any = object.__new__(OwnedGRPOTrainer)
    run: Any = object.__new__(GRPOFinetuning)
    run.model, run.config = torch.nn.Linear(1, 1), types.SimpleNamespace(precision="bf16")
    trainer.finetuning, trainer.ref_model = run, object()
    for model in (run.model, trainer.ref_model):
        trainer._get_per_token_logps_and_entropies(model)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert trainer._logprobs.shape == (1,)


def test_generators_are_decided_by_their_names_alone() -> None:
    def first(*names: int | str) -> float:
        return float(torch.rand(1, generator=generator_of("cpu", *names)))

    assert first(1, "rollout", 2, 0) == first(1, "rollout", 2, 0)
    others = [(1, "rollout", 2, 1), (1, "rollout", 3, 0), (2, "rollout", 2, 0), (1, "probe", 2, 0)]
    assert len({first(*names) for names in others} | {first(1, "rollout", 2, 0)}) == 5


def rollout(reward: float) -> Rollout:
    return Rollout([1], [2], [0.0], True, "", reward, reward > 0)


def test_groups_are_informative_where_rewards_differ() -> None:
    first, second = groups_of([rollout(value) for value in (0.0, 1.0, 1.0, 1.0)], 2)
    assert is_informative(first)
    assert not is_informative(second)


def test_a_whole_run_reports_what_happened(context: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[tuple[float, float]] = []
    batches: list[dict[str, Any]] = []
    monkeypatch.setattr(OwnedGRPOTrainer, "_compute_loss", comparing(OwnedGRPOTrainer._compute_loss, losses, batches))
    log = Log()
    made = context(tracker=log, beta=0.05, oversampling=2)
    result = GRPO().run(made)
    assert (made.output / "model.safetensors").is_file()
    # TRL's loss against the formula, off-policy passes and the KL term included; fp32 sums of some hundred terms.
    assert len(losses) == 16 * 3
    for theirs, ours in losses:
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
    metrics = result.metrics
    # Completions of groups without a difference are out of the sums; each of them is seen in two passes.
    left_out = [row for batch in batches for row in (batch["tool_mask"].sum(1) == 0).nonzero()[:, 0].tolist()]
    assert len(left_out) == 2 * 8 * metrics["groups_filtered"]
    assert all((batch["advantages"][batch["tool_mask"].sum(1) == 0] == 0).all() for batch in batches)
    kept = sum(int((batch["tool_mask"] * batch["completion_mask"]).sum()) for batch in batches)
    assert sum(float(batch["num_items_in_batch"]) for batch in batches) / 4 == kept == metrics["supervised_tokens"]
    assert metrics["n"] == 12
    assert metrics["accuracy_gain_low"] <= metrics["accuracy_gain"] <= metrics["accuracy_gain_high"]
    assert metrics["groups"] == 2 * 2 * 2
    assert metrics["groups_trained"] + metrics["groups_filtered"] == 2 * 2
    assert {"probe/pass@1", "probe/pass@8", "probe/informative"} <= metrics.keys()
    trained = [row for row in log.rows if row["event"] == "train"]
    expected = {
        "reward_mean", "reward_std", "accuracy", "stop_rate", "groups_all_zero", "groups_all_one", "groups_filtered",
        "rollout_tokens_per_s", "completion_length_tokens", "kl_nats", "logprob_gap_mean_nats", "logprob_gap_max_nats",
    }  # fmt: skip
    assert expected <= trained[0].keys()
    # trap T10: log-probabilities of some -6 nats from sums of a few hundred fp32 terms.
    assert all(row["logprob_gap_max_nats"] < 1e-4 for row in trained)


def comparing(
    compute: Callable[..., Any], losses: list[tuple[float, float]], batches: list[dict[str, Any]]
) -> Callable[..., Any]:
    """TRL's loss, with the papers' formulas worked out beside it, term by term, from the model's own logits."""

    def compute_both(self: Any, model: Any, inputs: Any) -> Any:
        loss = compute(self, model, inputs)
        batches.append(inputs)
        own = self.loss_type, self.importance_sampling_level
        with torch.no_grad():
            terms = slow_terms(self, inputs)
            losses.append((float(loss.detach()), sum(map(sum, terms)) / max(1.0, float(inputs["num_items_in_batch"]))))
            # The other losses on the same batch: they share all but the sum.
            for self.loss_type, self.importance_sampling_level, formula in OTHER_LOSSES:
                theirs = float(GRPOTrainer._compute_loss(self, model, inputs))
                losses.append((theirs, formula(self, inputs)))
        self.loss_type, self.importance_sampling_level = own
        return loss

    return compute_both


def slow_terms(trainer: Any, inputs: Any, level: str = "token") -> list[list[float]]:
    """Loss of each token that counts, by completion: clipped surrogate and KL (to be summed over ``1 / normaliser``).

    Yu et al. 2025 (arXiv:2503.14476), equation 8; by completion the ratio is GSPO's (arXiv:2507.18071, equation 7).
    """
    config, found = trainer.finetuning.config, []
    for row in range(len(inputs["prompt_ids"])):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row] == 1].tolist()
        completion = inputs["completion_ids"][row][inputs["completion_mask"][row] == 1].tolist()
        kept = bool(inputs["tool_mask"][row, 0])
        now = token_logprobs(trainer.model, prompt, completion)
        parent = token_logprobs(trainer.ref_model, prompt, completion)
        then = inputs["old_per_token_logps"][row, : len(completion)]
        ratios = torch.exp(now - then)
        if level == "sequence":
            ratios = torch.exp((now - then).mean()).expand(len(completion))
        advantage, behind = float(inputs["advantages"][row]), parent - now
        clipped = ratios.clamp(1 - config.epsilon, 1 + config.epsilon_high)
        surrogate = -torch.minimum(ratios * advantage, clipped * advantage)
        divergence = ratios * (behind.exp() - behind - 1)
        found.append((surrogate + config.beta * divergence).tolist() if kept else [])
    return found


def slow_dr_grpo(trainer: Any, inputs: Any) -> float:
    """Liu et al. 2025 (arXiv:2503.20783): a constant in the place of the length; a quarter of the step's rows."""
    terms = slow_terms(trainer, inputs)
    return sum(map(sum, terms)) / (len(terms) * trainer.finetuning.config.max_completion_length) / 4


def slow_gspo(trainer: Any, inputs: Any) -> float:
    terms = slow_terms(trainer, inputs, "sequence")
    return sum(sum(row) / max(1, len(row)) for row in terms) / len(terms) / 4


OTHER_LOSSES = [("dr_grpo", "token", slow_dr_grpo), ("grpo", "sequence", slow_gspo)]


def token_logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """One row alone, without padding."""
    logprobs = torch.log_softmax(model(torch.tensor([prompt + completion])).logits[0].double(), -1)
    return torch.stack([logprobs[len(prompt) + place - 1, token] for place, token in enumerate(completion)])


def test_a_dead_start_is_refused_with_what_was_measured_and_the_way_out(context: Callable[..., Any]) -> None:
    # trap T9: random weights never answer right
    with pytest.raises(ConfigError) as caught:
        GRPO().run(context(rewards={"correct": 1.0}))
    (fault,) = caught.value.faults
    assert fault.path == "grpo.from"
    assert "of 4 training questions with 8 completions each, 0.0%" in fault.message
    assert "pass@1 0.000, pass@8 0.000" in fault.message
    assert "set more max_completion_length" in fault.message


def test_a_parent_that_knows_everything_is_a_dead_start_too() -> None:
    # trap T9
    known = Probe(passed={1: 1.0, 8: 1.0}, informative=0.0, stop_rate=1.0, questions=4, samples=8)
    fault = dead_start(known, 0.05)
    assert fault is not None
    assert "set harder tasks" in fault.message
    assert dead_start(known._replace(informative=0.05), 0.05) is None
    wrong = dead_start(known._replace(passed={1: 0.0, 8: 0.0}), 0.05)
    assert wrong is not None
    assert "more demonstrations in the sft stage" in wrong.message


def test_rollouts_from_another_distribution_end_the_run(context: Callable[..., Any], monkeypatch: Any) -> None:
    # trap T10
    plain, check, trainers = Roller.__init__, OwnedGRPOTrainer._check_gap, []

    def cooler(self: Any, tokenizer: Any, **settings: Any) -> None:
        plain(self, tokenizer, **(settings | {"temperature": 0.7}))

    def checked(self: Any) -> None:
        trainers.append(self)
        check(self)

    monkeypatch.setattr(Roller, "__init__", cooler)
    monkeypatch.setattr(OwnedGRPOTrainer, "_check_gap", checked)
    settings = {"loss_type": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "batch", "epsilon": 0.1}
    with pytest.raises(RolloutMismatchError, match=r"nats apart on average .* max_logprob_gap is 0\.001"):
        GRPO().run(context(max_logprob_gap=1e-3, generation_batch_size=32, num_iterations=1, **settings))
    (trainer,) = trainers
    assert {name: getattr(trainer.args, name) for name in settings} == settings
    args = trainer.args
    assert (args.steps_per_generation, args.num_iterations, args.max_completion_length) == (8, 1, 24)
    # Nothing is cut from the distribution that is sampled.
    assert (args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty) == (1.0, 1.0, 0, None, 1.0)


def test_a_run_in_which_no_group_ever_differed_is_not_done(context: Callable[..., Any], monkeypatch: Any) -> None:
    # trap T4
    from stages.runtime.audit import AuditError

    monkeypatch.setattr(GRPOFinetuning, "_probe", lambda self: self.probe.update({"probe/informative": 1.0}))
    with pytest.raises(AuditError, match="in no group did completions earn different rewards"):
        GRPO().run(context(rewards={"correct": 1.0}))


def test_a_prompt_that_does_not_fit_is_refused_before_any_model_is_built(context: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"must hold the longest prompt \(\d+ tokens\) and max_completion_length"):
        GRPO().run(context(max_completion_length=50))


def test_an_answer_that_can_never_be_given_whole_is_refused_before_any_model_is_built(context: Any) -> None:
    # trap T9: every right answer would be cut off and earn nothing
    with pytest.raises(ConfigError, match=r"must hold the longest worked answer; got 3; set \d+ or more"):
        GRPO().run(context(max_completion_length=3))


def test_the_reward_that_only_this_module_knows_is_registered() -> None:
    assert REWARDS["vowels"]("aeb", {}) == 0.67
