"""Group-relative policy optimisation on verifiable tasks (Shao et al. 2024, arXiv:2402.03300), by TRL's trainer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from data.rewards import REWARDS
from model.spec import ModelSpec
from stages.base import ConfigError, Fault, Input, Section, StageConfig, StageContext, StageResult, operational
from stages.runtime import ds_config
from stages.runtime.finetune_config import FinetuneConfig, FinetuneStage
from stages.runtime.schedule import WSDSchedule


class ProbeConfig(Section):
    """What is sampled from the parent before the first step, to see whether there is anything to learn from (T9)."""

    questions: int = Field(32, ge=1, le=1_000_000)
    """Training questions that are asked."""
    samples: int = Field(16, ge=2, le=10_000)
    """Completions a question; pass@k is estimated for k up to this."""
    min_informative: float = operational(0.05, gt=0, le=1)
    """Least share of those questions whose completions earn different rewards; less is a dead start and refused."""


class GRPOConfig(FinetuneConfig):
    """Configuration of one run; ``global_batch_size`` counts completions."""

    kind: Literal["grpo"]
    """Reinforcement learning with verifiable rewards."""
    data: str = "tasks"
    """Stage (or artifact path) whose questions are answered."""
    rewards: dict[str, float] = Field({"correct": 1.0}, min_length=1)
    """Weight of each reward of ``data.rewards.REWARDS``; a completion that does not stop earns nothing."""
    num_generations: int = Field(8, ge=2, le=2**16)
    """Completions a question: the group in which rewards are compared."""
    generation_batch_size: int | None = Field(None, ge=2, le=2**24)
    """Completions sampled from one policy before it changes; none means ``global_batch_size``, on-policy."""
    num_iterations: int = Field(1, ge=1, le=1000)
    """Passes over each generation batch."""
    oversampling: int = Field(1, ge=1, le=1000)
    """Questions rolled out for each one trained on: groups that differ in reward go first (DAPO's dynamic sampling)."""
    max_completion_length: int = Field(ge=1, le=2**24)
    """Longest completion, tokens."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Temperature of rollouts and of the trained policy alike; nothing is cut from the distribution (TRAPS T10)."""
    loss_type: Literal["dapo", "dr_grpo", "grpo"] = "dapo"
    """How token losses are summed: ``dapo`` over the tokens of the batch, ``dr_grpo`` over a constant, ``grpo`` within
    each completion first."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios to the sampling policy by token, or by completion (GSPO: ``sequence`` with ``loss_type: grpo``)."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """What advantages are divided by the standard deviation of; unset is ``none`` for ``dr_grpo``, else ``group``."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """Clipping of ratios below one."""
    epsilon_high: float = Field(0.28, gt=0, le=1000)
    """Clipping of ratios above one (DAPO's clip-higher)."""
    beta: float = Field(0.0, ge=0, le=1000)
    """Weight of the KL divergence to the parent (times the ratio, for an unbiased gradient); 0 keeps no reference."""
    max_logprob_gap: float = operational(0.05, gt=0, le=1000)
    """Largest mean difference of a token's log-probability, nats, between rollout and trainer; more ends the run."""
    probe: ProbeConfig = ProbeConfig()
    """The measurement before the first step."""

    @property
    def completions_per_generation(self) -> int:
        """Completions of one generation batch over all devices."""
        return self.generation_batch_size or self.global_batch_size

    @property
    def steps_per_generation(self) -> int:
        """Optimizer steps from one sampling to the next."""
        return self.completions_per_generation // self.global_batch_size * self.num_iterations

    @property
    def advantage_scale(self) -> str:
        """``scale_rewards``, or what belongs to the loss."""
        return self.scale_rewards or ("none" if self.loss_type == "dr_grpo" else "group")


class GRPO(FinetuneStage):
    """Sample, score, compare within groups, step; the artifact is a Hugging Face directory like pretrain's."""

    kind: ClassVar[str] = "grpo"
    Config: ClassVar[type[StageConfig]] = GRPOConfig
    code_version: ClassVar[int] = 1
    inputs: ClassVar[dict[str, Input]] = {"from_": Input("model"), "data": Input("tasks")}

    @classmethod
    def check(cls, config: Any, model: ModelSpec | None) -> list[Fault]:
        """Faults between fields, and between the fields and the model."""
        faults = super().check(config, model)
        faults += _batch_faults(config) + _loss_faults(config) + _reward_faults(config)
        if config.max_completion_length >= config.max_length:
            message = f"must leave room for the prompt in max_length {config.max_length}"
            faults.append(
                Fault("max_completion_length", f"{message}; got {config.max_completion_length}; set one or the other")
            )
        return faults

    @classmethod
    def check_devices(cls, config: Any, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
        """Groups that would be torn apart by the ranks, and off-loading without a GPU."""
        faults = super().check_devices(config, world_size, has_gpu)
        if world_size is None or config.global_batch_size % (world_size * config.num_generations) == 0:
            return faults
        needed = world_size * config.num_generations
        message = f"must be a multiple of {needed}: whole groups of num_generations on each of {world_size} ranks"
        return [*faults, Fault("global_batch_size", f"{message}; got {config.global_batch_size}; set {needed}")]

    @classmethod
    def plan(cls, config: Any, model: ModelSpec | None, world_size: int) -> dict[str, Any]:
        """Tokens at most, completions, parameters, FLOPs, bytes."""
        plan = super().plan(config, model, world_size)
        generations = -(-config.max_steps // config.steps_per_generation)
        return plan | {"completions": generations * config.completions_per_generation * config.oversampling}

    def run(self, context: StageContext) -> StageResult:
        """Probe, train, measure, audit, and write weights with their tokenizer.

        Raises:
            ConfigError: for what does not fit the devices, the data or the parent, and for a dead start (TRAPS T9).
            RolloutMismatchError: when rollouts and trainer disagree about the policy (TRAPS T10).
            StopRequested: after a save, on all ranks together.
            AuditError: when nothing was trained (TRAPS T4).
        """
        from stages.runtime.grpo_finetuning import GRPOFinetuning

        return GRPOFinetuning(context).run()


def _batch_faults(config: GRPOConfig) -> list[Fault]:
    faults, schedule = [], config.schedule
    batch, group, generation = config.global_batch_size, config.num_generations, config.completions_per_generation
    if batch % group:
        message = f"must be a multiple of num_generations {group}; got {batch}; set {-(-batch // group) * group}"
        faults.append(Fault("global_batch_size", message))
    if generation % batch:
        message = f"must be a multiple of global_batch_size {batch}; got {generation}"
        faults.append(Fault("generation_batch_size", f"{message}; set {-(-generation // batch) * batch}"))
    elif config.max_steps % config.steps_per_generation:
        every = config.steps_per_generation
        message = f"must be a multiple of the {every} steps that share a generation batch; got {config.max_steps}"
        faults.append(Fault("max_steps", f"{message}; set {-(-config.max_steps // every) * every}"))
    elif isinstance(schedule, WSDSchedule) and schedule.decay_steps % config.steps_per_generation:
        # A longer run goes on from before the decay, and checkpoints are taken between generations alone.
        every, decay = config.steps_per_generation, schedule.decay_steps
        message = f"must be a multiple of the {every} steps that share a generation batch; got {decay}"
        faults.append(Fault("schedule.decay_steps", f"{message}; set {max(1, decay // every) * every}"))
    return faults


def _loss_faults(config: GRPOConfig) -> list[Fault]:
    faults = []
    if config.importance_sampling_level == "sequence" and config.loss_type != "grpo":
        message = f"must be token with loss_type {config.loss_type}, which sums over tokens; got sequence"
        faults.append(Fault("importance_sampling_level", f"{message}; set loss_type: grpo for GSPO"))
    try:
        facts = ds_config.engine_facts(config.deepspeed)
    except ConfigError:
        # The faults of every training stage have said so.
        return faults
    if ds_config.zero_stage(facts) == 3:
        message = f"must keep parameters whole (ZeRO-0, 1 or 2): rollouts decode with them; got {config.deepspeed}"
        faults.append(Fault("deepspeed", f"{message}; set zero2"))
    return faults


def _reward_faults(config: GRPOConfig) -> list[Fault]:
    known = ", ".join(sorted(REWARDS))
    faults = [
        Fault(f"rewards.{name}", f"must be one of {known}; got {name}; set one of them")
        for name in config.rewards
        if name not in REWARDS
    ]
    if not any(weight > 0 for weight in config.rewards.values()):
        faults.append(Fault("rewards", f"must weigh one reward above 0; got {config.rewards}; set correct: 1.0"))
    return faults
