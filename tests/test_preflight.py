"""What can be known beforehand is refused by `--plan`, and by a run before any of its data stages."""

import json

import pytest

from pipelines.recipe import DEFAULT, load_recipe
from pipelines.run import main


@pytest.fixture
def machine(monkeypatch):
    """Say whether the machine has a GPU; no stage may begin."""

    def never(*_):
        raise AssertionError("a stage was begun")

    def has(gpu: bool):
        for module in ("pipelines.single", "pipelines.plan", "stages.runtime.artifact"):
            monkeypatch.setattr(f"{module}.has_gpu", lambda: gpu)

    monkeypatch.setattr("pipelines.single.execute", never)
    monkeypatch.setattr("pipelines.launch.run_child", never)
    has(True)
    return has


@pytest.fixture
def cli(tmp_path, machine, capsys):
    def run(*argv):
        settings = [word for setting in argv[1:] if "=" in setting for word in ("--set", setting)]
        mode = [*argv[0].split(), *(word for word in argv[1:] if "=" not in word)]
        code = main([*mode, "--runs", str(tmp_path / "runs"), *settings])
        captured = capsys.readouterr()
        return code, captured.err if code else captured.out

    return run


def finished_parent(directory, *, final_lr, **changes):
    """A finished pretraining artifact outside the recipe, with the default recipe's model."""
    model = load_recipe(DEFAULT).model.model_dump(mode="json") | changes
    (directory / "output").mkdir(parents=True)
    (directory / "output" / "config.json").write_text(json.dumps(model))
    record = {"format": 1, "state": "done", "stage": "pretrain", "kind": "pretrain", "key": "0" * 64,
              "output_digest": "1" * 64, "metrics": {"final_lr": final_lr}}  # fmt: skip
    (directory / "stage.json").write_text(json.dumps(record))
    return f"pretrain.from={directory}"


MODES = ["--plan", "--stage pretrain", "--all"]


@pytest.mark.parametrize(("ranks", "asked", "taken"), [(1, 3, 2), (2, 8, 4), (4, 3, 2), (8, 8, 1), (1, 10**4, 8)])
def test_a_micro_batch_that_does_not_divide_the_share_of_a_rank_shrinks_and_says_so(cli, ranks, asked, taken):
    code, out = cli(f"--plan --num_gpus {ranks}", f"pretrain.micro_batch_size={asked}")
    assert code == 0
    assert f"note: pretrain: micro_batch_size {asked} -> {taken}, which divides " in out


@pytest.mark.parametrize("mode", ["--plan", "--all"])
def test_rows_that_these_ranks_cannot_share_are_refused(cli, mode):
    code, err = cli(f"{mode} --num_gpus 3")
    assert code == 2
    assert "pretrain.global_batch_size: must be a multiple of the 3 ranks; got 8" in err


def test_a_launch_with_ranks_that_cannot_share_the_rows_is_refused_before_the_data_stages(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    code, err = cli("--stage pretrain")
    assert code == 2
    assert "pretrain.global_batch_size: must be a multiple of the 3 ranks" in err


def test_offloading_without_a_gpu_is_refused_by_a_run_and_noted_by_a_plan(cli, machine):
    machine(False)
    engine = "pretrain.deepspeed=zero3_cpu_offload"
    words = "pretrain.deepspeed: off-loading needs a GPU to off-load from; this machine has none"
    for mode in ("--stage pretrain", "--all"):
        code, err = cli(mode, engine)
        assert code == 2
        assert words in err
        assert "set zero3" in err
    code, out = cli("--plan", engine)
    assert code == 0
    assert f"note: {words}" in out
    machine(True)
    assert words not in cli("--plan", engine)[1]


@pytest.mark.parametrize("mode", MODES)
def test_a_mixture_is_held_against_the_sources_that_the_recipe_cleans(cli, mode):
    code, err = cli(mode, "pretrain.mixture.wikipedia-eng=1", "pretrain.mixture.python-code=1")
    assert code == 2
    assert "pretrain.mixture.wikipedia-eng: must name one of the data's sources" in err
    assert "did you mean wikipedia-en?" in err
    assert "pretrain.mixture.messages-de: must give every source its weight" in err
    assert "mixture.python-code" not in err


@pytest.mark.parametrize("mode", MODES)
def test_a_warm_start_from_a_finished_artifact_is_held_against_it_beforehand(cli, tmp_path, mode):  # traps T1, K10
    cold = finished_parent(tmp_path / "old" / "cold", final_lr=1e-4)
    code, err = cli(mode, cold)
    assert code == 2
    assert "pretrain.lr: must be at most the parent's final lr 0.0001 on a warm start; got 0.004" in err
    other = finished_parent(tmp_path / "old" / "other", final_lr=1.0, d_ff=256)
    code, err = cli(mode, other)
    assert code == 2
    assert "pretrain.from: model.d_ff must be the parent's 256; got 512" in err


def test_a_finished_parent_that_fits_is_planned_with(cli, tmp_path):
    code, out = cli("--plan", finished_parent(tmp_path / "old" / "warm", final_lr=4e-3))
    assert code == 0
    assert "left to do: preferences, clean, tokenizer, tokenize, pretrain" in out


@pytest.mark.parametrize("mode", MODES)
def test_all_that_can_be_known_is_told_at_once(cli, tmp_path, mode):
    code, err = cli(f"{mode}", "pretrain.mixture.foo=1", finished_parent(tmp_path / "old" / "cold", final_lr=1e-4))
    assert code == 2
    assert "pretrain.mixture.foo: must name" in err
    assert "pretrain.lr: must be at most" in err
