"""Pretraining on two gloo ranks against one: the same losses, gradients, scores and resumes at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from tiny_run import Log, context, make_tokens, spec

from stages.base import ConfigError, StopRequested

ENGINES = ("zero0", "zero1", "zero2", "zero3")
STEPS = 4
ROWS, SEQ_LEN = 8, 32
UNIT = 2.0**-24  # half the spacing of fp32 numbers at 1


def engine_config(engine: str, micro_batch_size: int, world_size: int) -> dict[str, Any]:
    """The stage's own config, with ZeRO-3 partitioning even these small parameters."""
    from stages.runtime import ds_config

    facts = ds_config.engine_facts(engine)
    if ds_config.zero_stage(facts) == 3:
        facts["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return ds_config.engine_config(
        facts, global_batch_size=ROWS, micro_batch_size=micro_batch_size, world_size=world_size, max_grad_norm=1.0,
        precision="fp32",
    )  # fmt: skip


def make_model() -> Any:
    from model.config import HybridConfig
    from model.lm import HybridForCausalLM
    from stages.runtime import rng

    rng.seed_all(3)
    return HybridForCausalLM(HybridConfig.from_spec(spec(), eos_token_id=0, pad_token_id=1))


def make_batch(tokens: Path) -> dict[str, Any]:
    """Eight rows with very different numbers of scored tokens, as after packing or masking."""
    from data.loader import MixtureLoader

    loader = MixtureLoader(tokens / "output", seq_len=SEQ_LEN, global_batch_size=ROWS, seed=1)
    batch = loader.batch(0, slice(0, ROWS))._asdict()
    for row in range(ROWS):
        batch["labels"][row, : 3 * row] = -100
    return batch


def make_engine(engine: str, micro_batch_size: int) -> Any:
    from model.init import no_decay
    from stages.runtime import distributed
    from stages.runtime.engine import TrainingEngine
    from stages.runtime.optimizer import adamw, parameter_groups

    model = make_model()
    groups = parameter_groups(model, weight_decay=0.1, decay_embeddings=False, exempt=no_decay)
    settings = engine_config(engine, micro_batch_size, distributed.world_size())
    return TrainingEngine(model, adamw(groups, betas=(0.9, 0.95), eps=1e-8), settings)


def gradients(tokens: Path, engine: str, micro_batch_size: int) -> dict[str, Any]:
    """Full gradients as the optimizer is about to get them, by parameter, from this rank's share of the rows."""
    from deepspeed.utils import safe_get_full_grad

    from stages.runtime import distributed

    wrapped = make_engine(engine, micro_batch_size)
    batch = make_batch(tokens)
    n_tokens = int((batch["labels"][:, 1:] != -100).sum())
    share = ROWS // distributed.world_size()
    first = distributed.rank() * share
    for start in range(first, first + share, micro_batch_size):
        rows = {name: tensor[start : start + micro_batch_size] for name, tensor in batch.items()}
        wrapped.accumulate(rows, n_tokens)
    return {name: safe_get_full_grad(parameter).clone().numpy() for name, parameter in wrapped.model.named_parameters()}


def random_streams(directory: Path) -> tuple[list[float], list[float]]:
    """What this rank draws after a save, and again after a load; every rank has a stream of its own."""
    import torch

    from stages.runtime import distributed, rng

    wrapped = make_engine("zero0", 1)
    directory.mkdir(exist_ok=True)
    distributed.barrier()
    rng.seed_all(100 + distributed.rank())
    wrapped.save(directory)
    distributed.barrier()
    drawn = torch.rand(3).tolist()
    wrapped.load(directory)
    return drawn, torch.rand(3).tolist()


def losses(directory: Path, tokens: Path, engine: str) -> list[float]:
    from stages.pretrain import Pretrain

    log = Log()
    facts = {"deepspeed": engine, "precision": "bf16", "max_steps": STEPS, "micro_batch_size": 1}
    Pretrain().run(context(directory, tokens, tracker=log, **facts))
    return list(log.of("train", "loss_nats_per_token").values())


class StopsAtTwo(Log):
    """Rank 0 leaves the file STOP once step 2 is logged."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def log(self, event: str, step: int, values: dict[str, Any]) -> None:
        from stages.runtime import distributed

        super().log(event, step, values)
        if event == "train" and step == 2 and distributed.rank() == 0:
            (self.directory / "STOP").touch()


def stopped_and_resumed(directory: Path, tokens: Path, engine: str) -> None:
    from stages.pretrain import Pretrain

    facts = {"deepspeed": engine, "precision": "bf16", "max_steps": STEPS, "micro_batch_size": 1}
    try:
        Pretrain().run(context(directory, tokens, tracker=StopsAtTwo(directory), **facts))
    except StopRequested:
        Pretrain().run(context(directory, tokens, **facts))


def score(tokens: Path) -> Any:
    """Evaluation of the untrained model, batches dealt out to the ranks."""
    import torch

    from data.heldout import HeldoutSet
    from stages.runtime.evaluation import evaluate

    model = make_model().eval()
    return evaluate(
        lambda **batch: model(**batch).logits, HeldoutSet(tokens / "output"), seq_len=SEQ_LEN, rows=5,
        device=torch.device("cpu"),
    )  # fmt: skip


def everything(directory: Path, tokens: Path) -> dict[str, Any]:
    """All that two ranks are asked to do, in one pair of processes."""
    from stages.runtime import distributed, ds_config, engine

    engine.prepare_environment()
    distributed.init_process_group()
    real = ds_config.engine_facts

    def facts(name: str, *args: Any) -> dict[str, Any]:
        found = real(name, *args)
        if ds_config.zero_stage(found) == 3:
            found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    ds_config.engine_facts = facts
    result = {"losses": {}, "gradients": {}, "score": score(tokens)}
    result["random"] = random_streams(directory / "random")
    for name in ENGINES:
        result["losses"][name] = losses(directory / name, tokens, name)
        for micro in (1, 4):
            found = gradients(tokens, name, micro)
            result["gradients"][name, micro] = found if distributed.rank() == 0 else None
    for name in ("zero1", "zero3"):
        stopped_and_resumed(directory / f"{name}-parts", tokens, name)
    distributed.close_process_group()
    return result


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(folder, tokens):
    results = Ranks(2, everything, folder, tokens).results(timeout_s=240)
    assert all(isinstance(result, dict) for result in results), results
    return results


@pytest.fixture(scope="module")
def row_gradients(tokens):
    """One row's gradient of sum(NLL) / n at a time, by plain autograd: the independent reference."""
    model, batch = make_model(), make_batch(tokens)
    n_tokens = int((batch["labels"][:, 1:] != -100).sum())
    found = []
    for row in range(ROWS):
        model.zero_grad()
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        (model(**one).loss * int((one["labels"][:, 1:] != -100).sum()) / n_tokens).backward()
        found.append({name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()})
    return found


def excess(found, row_gradients):
    """Largest error of any gradient entry over its bound; at most 1 when right.

    An entry is a sum over at most n = ROWS * SEQ_LEN tokens in some order, so two orders differ by at most
    2 n u sum|terms| (Higham 2002, section 4.2); sum|terms| is at least the rows' absolute sum, taken at the parameter's
    largest entry, since the errors of what flows into small entries are those of the large ones.
    """
    worst = 0.0
    for name in found:
        rows = [row[name] for row in row_gradients]
        bound = 2 * ROWS * SEQ_LEN * UNIT * max(sum(abs(row) for row in rows).max(), 1e-12)
        worst = max(worst, abs(found[name] - sum(rows)).max() / bound)
    return worst


@pytest.mark.parametrize("engine", ENGINES)
def test_one_by_eight_and_eight_by_one_give_the_same_gradients(tokens, row_gradients, engine):  # trap T2
    for micro in (8, 1):
        assert excess(gradients(tokens, engine, micro), row_gradients) <= 1


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_by_four_give_the_same_gradients(two_ranks, row_gradients, engine):  # trap T2
    for micro in (4, 1):
        assert excess(two_ranks[0]["gradients"][engine, micro], row_gradients) <= 1


def test_the_gradient_bound_tells_a_mean_of_means_apart(tokens, row_gradients):  # trap T2
    batch = make_batch(tokens)
    counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    share = sum(counts) / ROWS
    naive = {
        name: sum(row[name] * share / count for row, count in zip(row_gradients, counts, strict=True))
        for name in row_gradients[0]
    }
    assert excess(naive, row_gradients) > 100


def test_loss_curves_agree_over_zero_stages_and_ranks_within_bf16_rounding(two_ranks, tokens, tmp_path):
    reference = losses(tmp_path, tokens, "zero0")
    assert reference[-1] < reference[0]
    for rank in two_ranks:
        for engine in ENGINES:
            # One bf16 rounding, relatively; the curves are measured to agree far closer.
            assert rank["losses"][engine] == pytest.approx(reference, rel=2**-9), engine


def test_a_score_on_two_ranks_is_that_on_one_to_the_last_bit(two_ranks, tokens):  # trap M2
    assert two_ranks[0]["score"] == two_ranks[1]["score"] == score(tokens)


@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_two_ranks_resume_bit_for_bit(two_ranks, folder, engine):  # trap T6
    whole = (folder / engine / "output.tmp" / "model.safetensors").read_bytes()
    parts = (folder / f"{engine}-parts" / "output.tmp" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (folder / f"{engine}-parts" / "checkpoints").glob("step-*")) == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip
    assert parts == whole


def test_every_rank_saves_and_takes_up_its_own_random_stream(two_ranks):  # trap T6
    for rank in two_ranks:
        drawn, again = rank["random"]
        assert again == drawn
    assert two_ranks[0]["random"] != two_ranks[1]["random"]


def test_an_off_loaded_checkpoint_of_two_ranks_is_refused_on_one():
    from types import SimpleNamespace

    from stages.runtime import ds_config
    from stages.runtime.pretraining import Pretraining

    run = Pretraining.__new__(Pretraining)
    run.engine, run.engine_config = SimpleNamespace(zero_stage=3), ds_config.engine_facts("zero3_cpu_offload")
    with pytest.raises(ConfigError, match=r"was saved by 2 ranks, off-loaded.*got 1; start 2 ranks"):
        run._check_shape(4, {"world_size": 2, "zero_stage": 3})
    run.engine_config = ds_config.engine_facts("zero3")
    run._check_shape(4, {"world_size": 2, "zero_stage": 3})


def test_rows_that_do_not_divide_over_the_ranks_are_refused():
    from stages.runtime.ds_config import accumulation_steps

    assert accumulation_steps(global_batch_size=8, micro_batch_size=2, world_size=2) == 2
    with pytest.raises(ConfigError, match="global_batch_size: must be a multiple of the 3 ranks; got 8"):
        accumulation_steps(global_batch_size=8, micro_batch_size=1, world_size=3)
