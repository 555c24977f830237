"""Names that are not valid lead to those that were meant: other programs' words, misspelt, or written otherwise."""

import pytest

from pipelines.recipe import DEFAULT
from pipelines.run import CommandError, main, parse
from pipelines.suggest import ALIASES, nearest, suggestion
from stages import STAGES
from stages.base import ConfigError
from stages.runtime.ds_config import engine_facts

PRETRAIN = [field.alias or name for name, field in STAGES["pretrain"].Config.model_fields.items()]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("learning_rate", "lr"), ("learningRate", "lr"), ("learnig_rate", "lr"), ("LR", "lr"),
        ("batch_size", "global_batch_size"), ("per_device_train_batch_size", "micro_batch_size"),
        ("steps", "max_steps"), ("max-steps", "max_steps"), ("num_train_epochs", "max_epochs"),
        ("warmup_steps", "schedule.warmup_steps"), ("gradient_checkpointing", "activation_checkpointing"),
        ("sequence_length", "seq_len"), ("seqlen", "seq_len"), ("ds_config", "deepspeed"), ("save_steps",
        "checkpoint_every_steps"), ("grad_clip", "max_grad_norm"), ("wieght_decay", "weight_decay"),
    ],
)  # fmt: skip
def test_a_field_is_found_by_what_other_programs_call_it(asked, meant):
    assert nearest(asked, PRETRAIN) == meant
    assert suggestion(asked, PRETRAIN, "field") == f"did you mean {meant!r}?"


def test_a_name_that_is_near_to_nothing_gets_the_list():
    assert nearest("zzzzzz", PRETRAIN) is None
    assert suggestion("zzzzzz", ["b", "a"], "field") == "use one of a, b"
    assert suggestion("zzzzzz", [], "field") == "there is no field here"


def test_every_alias_leads_to_a_field_or_an_option_that_there_is():
    import json

    from pipelines.recipe import recipe_schema
    from pipelines.run import option_rows

    schema = recipe_schema()
    there = {name for part in schema["$defs"].values() for name in part.get("properties", {})}
    there |= {words.split()[0].lstrip("-") for words, _ in option_rows()}
    for alias, names in ALIASES.items():
        for name in names:
            assert set(name.split(".")) <= there, json.dumps([alias, name])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--plan", "--bogus"], ["unknown option --bogus; there are --stage, --all, --plan, --status, "]),
        (["--bogus=sk-1234"], ["unknown option --bogus; "]),
        (["--plan", "--recipe", "x"], ["unknown option --recipe (did you mean --pipeline?)"]),
        (["--plan", "--num-gpus", "2"], ["--num-gpus (did you mean --num_gpus?)"]),
        (["--pln", "--jsn"], ["unknown options --pln (did you mean --plan?), --jsn (did you mean --json?)"]),
        (["--all", "-v"], ["unknown option -v; "]),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_one(argv, words, capsys):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
    assert "sk-1234" not in line


def test_values_that_begin_with_a_dash_are_no_options():
    with pytest.raises(CommandError, match=r"--price_per_gpu_hour must be a number from 0 .*; got -1\.0"):
        parse(["--plan", "--price_per_gpu_hour", "-1"])


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [("price_per_gpu_hour", "nan", "a number from 0"), ("price_per_gpu_hour", "inf", "a number from 0"),
     ("num_gpus", "0", "from 1 to 100000"), ("num_gpus", "1000000000000", "from 1 to 100000")],
)  # fmt: skip
def test_a_number_that_means_nothing_is_refused_in_one_line(option, value, rule, capsys):
    assert main(["--plan", f"--{option}", value, "--pipeline", str(DEFAULT)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--{option} must be ")
    assert rule in line
    assert f"got {value}" in line


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("zero9", "zero1"), ("ZeRO-2", "zero2"), ("stage3", "zero3"), ("cpu_offload", "zero3_cpu_offload"),
     ("auto", "zero1"), ("zero_0", "zero0"), ("", "zero1")],
)  # fmt: skip
def test_engine_facts_that_there_are_not_lead_to_those_of_the_same_stage_or_the_default(asked, meant):
    with pytest.raises(ConfigError, match=rf"got '{asked}'; set {meant}$"):
        engine_facts(asked)
