"""Pretraining end to end on one CPU rank under real DeepSpeed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_run import Log, config, context, make_tokens, spec

from stages.base import ConfigError, StopRequested
from stages.pretrain import Pretrain
from stages.runtime import ds_config
from stages.runtime.audit import AuditError, TrainingRecord, audit
from stages.runtime.engine import TrainingEngine
from stages.runtime.guards import TooManySkippedSteps

WSD = {"kind": "wsd", "warmup_steps": 1, "decay_steps": 2}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(autouse=True)
def partitioned_zero3(monkeypatch):
    """ZeRO-3 keeps small parameters whole, and here all are small: without this it would partition nothing."""
    real = ds_config.engine_facts

    def facts(name, *args):
        found = real(name, *args)
        if ds_config.zero_stage(found) == 3:
            found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    monkeypatch.setattr(ds_config, "engine_facts", facts)


class StopsAt(Log):
    """Asks the run to stop once ``step`` was logged, as an operator would: by the file STOP."""

    def __init__(self, directory, step):
        super().__init__()
        self.directory, self.step = directory, step

    def log(self, event, step, values):
        super().log(event, step, values)
        if event == "train" and step == self.step:
            (self.directory / "STOP").touch()


def run(directory, tokens, **changes):
    """What the lifecycle does: the parents are checked before anything is built."""
    at = context(directory, tokens, **changes)
    if faults := Pretrain.check_parents(at.config, at.model, at.parents):
        raise ConfigError(faults)
    return Pretrain().run(at)


def weights(directory):
    return (directory / "output.tmp" / "model.safetensors").read_bytes()


def finish_as_parent(directory, result):
    """What the lifecycle does after a run: seal the output, write the record."""
    from stages.runtime.checkpoint import seal

    seal(directory / "output.tmp", directory / "output")
    record = {"format": 1, "state": "done", "metrics": result.metrics}
    (directory / "stage.json").write_text(json.dumps(record))
    return directory


@pytest.mark.parametrize(
    ("engine", "precision"), [("zero0", "bf16"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16")]
)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, tokens, engine, precision):  # trap T6
    whole = Log()
    facts = {"deepspeed": engine, "precision": precision, "eval_every_steps": 2}
    expected = run(tmp_path / "whole", tokens, tracker=whole, **facts)
    stopped = StopsAt(tmp_path / "parts", 3)
    with pytest.raises(StopRequested, match="step 3"):
        run(tmp_path / "parts", tokens, tracker=stopped, **facts)
    torch.manual_seed(123)
    resumed = Log()
    result = run(tmp_path / "parts", tokens, tracker=resumed, **facts)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    for name in ("loss_nats_per_token", "lr", "grad_norm", "supervised_tokens"):
        assert stopped.of("train", name) | resumed.of("train", name) == whole.of("train", name)
    assert resumed.of("train", "loss_nats_per_token").keys() == {4, 5, 6}
    assert stopped.of("eval", "bpb") | resumed.of("eval", "bpb") == whole.of("eval", "bpb")
    clock = ("tokens_per_s",)
    assert {k: v for k, v in result.metrics.items() if k not in clock} == {
        k: v for k, v in expected.metrics.items() if k not in clock
    }


def test_a_longer_wsd_run_goes_on_from_before_the_decay_and_equals_one_that_was_long_from_the_start(tmp_path, tokens):
    run(tmp_path / "grown", tokens, schedule=WSD, max_steps=6, checkpoint_every_steps=1)
    first, second = StopsAt(tmp_path / "grown", 5), Log()
    with pytest.raises(StopRequested):
        run(tmp_path / "grown", tokens, schedule=WSD, max_steps=8, tracker=first)
    run(tmp_path / "grown", tokens, schedule=WSD, max_steps=8, tracker=second)
    run(tmp_path / "long", tokens, schedule=WSD, max_steps=8)
    # From before the short run's decay; then from the long run's own step 5, not from the short run's.
    assert [row["step"] for log in (first, second) for row in log.rows if row["event"] == "resume"] == [4, 5]
    assert weights(tmp_path / "grown") == weights(tmp_path / "long")


def test_max_steps_is_an_extension_under_wsd_and_constant_and_part_of_the_key_under_cosine():
    for schedule, extends in ((WSD, True), ({"kind": "constant"}, True), ({"kind": "cosine"}, False)):
        settings = config(schedule=schedule)
        assert (Pretrain.extension(settings) == {"max_steps": 6}) is extends
        assert ("max_steps" in Pretrain.key_config(settings)) is not extends


def test_the_key_does_not_see_operational_fields():
    changed = config(micro_batch_size=4, deepspeed="zero2", checkpoint_every_steps=3, log_every_steps=2, rewarm=False)
    assert Pretrain.key_config(changed) == Pretrain.key_config(config())
    assert Pretrain.key_config(config(lr=1e-3)) != Pretrain.key_config(config())


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4)])
def test_a_run_resumes_with_another_micro_batch_size_and_ends_within_rounding(tmp_path, tokens, before, after):
    with pytest.raises(StopRequested):
        run(tmp_path / "a", tokens, tracker=StopsAt(tmp_path / "a", 3), micro_batch_size=before)
    result = run(tmp_path / "a", tokens, micro_batch_size=after)
    whole = run(tmp_path / "b", tokens, micro_batch_size=2)
    assert result.metrics["final_loss_nats_per_token"] == pytest.approx(
        whole.metrics["final_loss_nats_per_token"], abs=1e-4
    )


def test_a_checkpoint_of_another_zero_stage_is_refused_with_the_way_out(tmp_path, tokens):
    with pytest.raises(StopRequested):
        run(tmp_path, tokens, tracker=StopsAt(tmp_path, 2), deepspeed="zero1")
    with pytest.raises(ConfigError, match=r"pretrain\.deepspeed: .*ZeRO-1.*go on with zero1"):
        run(tmp_path, tokens, deepspeed="zero2")


def test_a_warm_start_above_the_parents_final_lr_is_refused_unless_rewarm_says_so(tmp_path, tokens):  # trap T1
    first = run(tmp_path / "parent", tokens)
    parent = finish_as_parent(tmp_path / "parent", first)
    assert first.metrics["final_lr"] == pytest.approx(3e-4)
    with pytest.raises(ConfigError, match=r"^lr: must be at most the parent's final lr 0\.0003"):
        run(tmp_path / "refused", tokens, parent=parent, lr=1e-3)
    result = run(tmp_path / "rewarmed", tokens, parent=parent, lr=1e-3, rewarm=True)
    assert any("parent's final lr 0.0003, own peak lr 0.001" in line for line in result.summary)
    log = Log()
    run(tmp_path / "child", tokens, parent=parent, lr=3e-4, tracker=log, deepspeed="zero3")
    assert log.of("eval", "bpb")[0] == pytest.approx(first.metrics["bpb"], rel=1e-6)


def test_a_warm_start_refuses_weights_that_mean_something_else(tmp_path, tokens):
    parent = finish_as_parent(tmp_path / "parent", run(tmp_path / "parent", tokens, max_steps=2))
    with pytest.raises(ConfigError, match=r"^from: model\.norm_eps must be the parent's 1e-05; got 0\.001"):
        run(tmp_path / "child", tokens, parent=parent, lr=1e-6, model=spec(norm_eps=1e-3))
    (parent / "output" / "info.json").write_text('{"digest": "other"}')
    with pytest.raises(ConfigError, match="must carry the data's tokenizer"):
        run(tmp_path / "child", tokens, parent=parent, lr=1e-6)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3"])
def test_nonfinite_steps_are_skipped_counted_logged_and_leave_weights_alone(tmp_path, tokens, monkeypatch, engine):
    # trap T3
    real, fingerprints, calls = TrainingEngine.accumulate, [], []

    def poisoned(self, inputs, n_tokens):
        fingerprints.append(self.fingerprint())
        calls.append(len(calls))
        return real(self, inputs, 0 if len(calls) in (5, 6, 7) else n_tokens)

    monkeypatch.setattr(TrainingEngine, "accumulate", poisoned)
    log = Log()
    result = run(tmp_path, tokens, tracker=log, deepspeed=engine)
    assert log.of("skip", "reason") == {3: "nonfinite", 4: "nonfinite"}
    assert result.metrics["skipped_steps"] == result.metrics["skipped_nonfinite"] == 2
    # Two micro-steps a step: the weights seen by steps 3, 4 and 5 (index 4, 6, 8) are the same.
    assert fingerprints[4] == fingerprints[6] == fingerprints[8] != fingerprints[10]


class Scaled(torch.autograd.Function):
    """Passes a value through; its gradient comes back times ``factor``."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3"])
def test_a_finite_loss_with_nonfinite_gradients_is_skipped(tmp_path, tokens, monkeypatch, engine, factor, precision):
    # trap T3
    real, fingerprints = TrainingEngine.forward, []

    def poisoned(self, **inputs):
        output = real(self, **inputs)
        if output.loss is not None and self.model.training:
            fingerprints.append(self.fingerprint())
            output.loss = Scaled.apply(output.loss, factor if len(fingerprints) == 2 else 1.0)
        return output

    monkeypatch.setattr(TrainingEngine, "forward", poisoned)
    log = Log()
    facts = {"deepspeed": engine, "precision": precision, "max_steps": 3, "micro_batch_size": 4}
    result = run(tmp_path, tokens, tracker=log, **facts)
    assert log.of("skip", "reason") == {2: "nonfinite"}
    assert math.isfinite(log.of("skip", "loss_nats_per_token")[2])
    assert fingerprints[0] != fingerprints[1] == fingerprints[2]
    # Two steps of four rows of 32 tokens were applied; what the skipped one read was not trained on.
    assert result.metrics["tokens"] == 2 * 4 * 32


def test_skipped_steps_in_a_row_end_the_run(tmp_path, tokens, monkeypatch):  # trap T3
    real = TrainingEngine.accumulate
    monkeypatch.setattr(TrainingEngine, "accumulate", lambda self, inputs, n: real(self, inputs, 0))
    with pytest.raises(TooManySkippedSteps, match="step 3: 3 steps in a row"):
        run(tmp_path, tokens, guards={"max_skipped_in_a_row": 3})


def test_a_run_without_supervised_tokens_is_not_done(tmp_path, tokens, monkeypatch):  # trap T4
    from data.loader import MixtureLoader

    real = MixtureLoader.batch
    monkeypatch.setattr(
        MixtureLoader,
        "batch",
        lambda self, step, rows: (batch := real(self, step, rows))._replace(labels=torch.full_like(batch.labels, -100)),
    )
    with pytest.raises(AuditError, match="no token was scored"):
        run(tmp_path, tokens, max_steps=2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps_applied": 0}, "no optimizer step"),
        ({"supervised_tokens": 0}, "no token"),
        ({"loss": math.nan}, "last loss is nan"),
        ({"weights_after": [1.0, 2.0]}, "no weight changed"),
        ({"weights_after": [1.0, math.inf]}, "not finite"),
        ({"evaluation": {}}, "final evaluation is missing"),
    ],
)
def test_the_audit_names_what_did_not_happen(change, reason):  # trap T4
    good = {
        "steps_applied": 1, "supervised_tokens": 9, "loss": 2.0, "weights_before": [1.0, 2.0],
        "weights_after": [1.0, 2.5], "evaluation": {"bpb": 1.5},
    }  # fmt: skip
    audit(TrainingRecord(**good))
    with pytest.raises(AuditError, match=reason):
        audit(TrainingRecord(**(good | change)))


def test_the_output_is_a_model_with_its_tokenizer_that_scores_as_reported(tmp_path, tokens):
    from transformers import AutoTokenizer

    import model
    from data.heldout import HeldoutSet
    from stages.runtime.evaluation import evaluate

    result = run(tmp_path, tokens)
    model.register()
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "output.tmp").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "output.tmp").convert_tokens_to_ids("<|endoftext|>") == 0
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    again = evaluate(
        lambda **batch: loaded(**batch).logits, HeldoutSet(tokens / "output"), seq_len=32, rows=8,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert again.metrics()["bpb"] == result.metrics["bpb"]
    assert json.loads((tmp_path / "output.tmp" / "evaluation.json").read_text())["heldout_hash"] == again.heldout_hash
    assert {"bpb/en", "bpb/de", "bpb_unigram", "bpb_xz", "final_loss_nats_per_token", "final_lr"} <= set(result.metrics)


def test_activation_checkpointing_gives_the_same_run(tmp_path, tokens):
    plain = run(tmp_path / "plain", tokens, max_steps=3)
    for engine in ("zero0", "zero3"):
        facts = {"activation_checkpointing": True, "deepspeed": engine, "max_steps": 3}
        again = run(tmp_path / engine, tokens, **facts)
        assert again.metrics["final_loss_nats_per_token"] == pytest.approx(
            plain.metrics["final_loss_nats_per_token"], abs=1e-5
        )


def test_the_engine_never_casts_or_decays_the_islands(tmp_path, tokens, monkeypatch):  # trap K7
    seen = {}
    real = TrainingEngine.assert_precision

    def check(self, islands, undecayed):
        seen.update(islands=islands, decay=self.weight_decay_by_parameter())
        real(self, islands, undecayed)
        with pytest.raises(RuntimeError, match=r"mlp\..*must not be decayed"):
            real(self, islands, {name for name in seen["decay"] if "mlp" in name})
        parameter = dict(self.model.named_parameters())[min(islands)]
        parameter.comm_dtype = torch.bfloat16
        with pytest.raises(RuntimeError, match=r"fp32 island\) must stay float32"):
            real(self, islands, undecayed)
        del parameter.comm_dtype

    monkeypatch.setattr(TrainingEngine, "assert_precision", check)
    for engine in ("zero0", "zero1", "zero2", "zero3"):
        run(tmp_path / engine, tokens, deepspeed=engine, precision="bf16", max_steps=1, schedule={"kind": "constant"})
        assert any(name.endswith("A_log") for name in seen["islands"])
        assert {seen["decay"][name] for name in seen["islands"]} == {0.0}
        assert set(seen["decay"].values()) == {0.0, 0.1}


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path, tokens):  # trap K10
    with pytest.raises(ConfigError, match=r"^data: model\.vocab_size must be at least"):
        run(tmp_path, tokens, model=spec(vocab_size=64))


def test_what_does_not_fit_the_datas_sources_is_named_by_the_field_that_asks_for_it(tmp_path, tokens):
    with pytest.raises(ConfigError) as refused:
        run(tmp_path, tokens, mixture={"en": 1.0, "fr": 1.0})
    assert [fault.path for fault in refused.value.faults] == ["mixture.fr", "mixture.de"]
    with pytest.raises(ConfigError, match=r"max_epochs: must cover .*; got 0\.01; lower mixture\.de"):
        run(tmp_path, tokens, max_epochs=0.01)


def test_a_micro_batch_that_does_not_divide_is_refused_with_the_sizes_that_do(tmp_path, tokens):
    with pytest.raises(ConfigError, match=r"pretrain\.micro_batch_size: must divide .*got 3; set 2"):
        run(tmp_path, tokens, micro_batch_size=3)


def test_offloading_without_a_gpu_is_refused_before_the_model_is_built(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pretrain\.deepspeed: .*needs a GPU.*set zero3"):
        run(tmp_path, tokens, deepspeed="zero3_cpu_offload")


def test_check_gathers_every_fault_at_once():
    bad = config(seq_len=128, micro_batch_size=8, schedule={"kind": "wsd", "warmup_steps": 9, "decay_steps": 2},
                 deepspeed="zero9", rewarm=True, mixture={"en": -1.0})  # fmt: skip
    paths = {fault.path for fault in Pretrain.check(bad, spec())}
    assert paths == {"seq_len", "schedule.warmup_steps", "deepspeed", "rewarm", "mixture.en"}
    assert Pretrain.check(config(), spec()) == []


def test_the_plan_counts_tokens_and_parameters_exactly():
    from model.config import HybridConfig
    from model.lm import HybridForCausalLM

    figures = Pretrain.plan(config(), spec(), 1)
    assert figures["tokens"] == 6 * 4 * 32
    built = HybridForCausalLM(HybridConfig.from_spec(spec(), eos_token_id=0, pad_token_id=1))
    assert figures["parameters"] == sum(parameter.numel() for parameter in built.parameters())
