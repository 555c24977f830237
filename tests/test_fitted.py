"""A micro-batch that does not divide the share of a rank shrinks by itself; the result and the key stay the same."""

from typing import Any

import pytest
from fake_chain import STAGES as FAKES
from fake_chain import Train, records, write_recipe

from pipelines.recipe import DEFAULT, load_recipe
from pipelines.run import main
from stages import STAGES
from stages.runtime import ds_config, settings


class Fitting(Train):
    """A stage whose config is fitted to the ranks like that of the real ones."""

    @classmethod
    def fitted(cls, config: Any, world_size: int) -> Any:
        return config.model_copy(update={"micro_batch_size": 3}) if config.micro_batch_size > 3 else config

    def run(self, context: Any) -> Any:
        result = super().run(context)
        result.metrics["micro_batch_size"] = context.config.micro_batch_size
        return result


@pytest.mark.parametrize(
    ("batch", "asked", "ranks", "taken"),
    [(8, 8, 1, 8), (8, 8, 2, 4), (16, 8, 2, 8), (24, 8, 2, 6), (14, 4, 2, 1), (12, 5, 1, 4), (8, 100, 1, 8)],
)
def test_the_largest_divisor_of_the_share_of_a_rank_is_taken(batch, asked, ranks, taken):
    sizes = {"global_batch_size": batch, "world_size": ranks}
    assert ds_config.fitting_micro_batch_size(**sizes, micro_batch_size=asked) == taken
    assert ds_config.accumulation_steps(**sizes, micro_batch_size=taken) == batch // ranks // taken


def test_every_training_stage_of_the_default_recipe_runs_on_two_ranks_under_the_same_key():
    found = {}
    for name, config in load_recipe(DEFAULT).stages.items():
        stage = STAGES[config.kind]
        if not stage.launched:
            assert stage.fitted(config, 2) is config
            continue
        fitted = stage.fitted(config, 2)
        assert stage.check(config, None) == stage.check_devices(config, 2, None) == []
        assert stage.key_config(fitted) == stage.key_config(config)
        found[name] = (config.micro_batch_size, fitted.micro_batch_size)
    assert found == {
        "pretrain": (8, 4), "sft": (16, 8), "grpo": (64, 64), "dpo": (8, 4), "dpo-ipo": (8, 4), "qlora": (16, 8),
    }  # fmt: skip


def test_a_batch_that_the_ranks_cannot_share_is_refused_as_it_is():
    config = load_recipe(DEFAULT).stages["pretrain"]
    (fault,) = settings.device_faults(config, 3, None)
    assert (fault.path, fault.message) == (
        "global_batch_size", "must be a multiple of the 3 ranks; got 8; set one, or start fewer ranks",
    )  # fmt: skip
    assert settings.fitted(config, 3) is config


def test_the_stage_gets_the_fitted_config_and_one_line_says_so(tmp_path, capsys):
    argv = ["--stage", "train", "--pipeline", str(write_recipe(tmp_path)), "--runs", str(tmp_path / "runs")]
    assert main([*argv, "--set", "train.micro_batch_size=4"], FAKES | {"train": Fitting}) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "micro_batch_size" in line]
    assert said == ["train: micro_batch_size 4 -> 3, which divides the batch; the result stays the same"]
    record = records(tmp_path)["train"]
    assert (record["metrics"]["micro_batch_size"], record["config"]["micro_batch_size"]) == (3, 4)
