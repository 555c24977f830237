"""Stages that do not train share a process under `--all`, and its imports; never artifacts, endings or settings."""

import os
import random
import signal
import sys
import warnings

import pytest
from fake_chain import FAKE_RUN, RECIPE, STAGES, records, write_recipe

from pipelines import launch
from pipelines.chain import build_chain
from pipelines.recipe import load_recipe
from pipelines.run import main
from stages.runtime.isolation import own_settings

MORE = "".join(
    f"  {name}:\n    kind: gather\n    sources:\n      - {{type: text, text: {name}}}\n" for name in ("second", "third")
)
TEXT = RECIPE.replace("  train:\n", f"{MORE}  train:\n", 1)


@pytest.fixture
def chain(tmp_path):
    return build_chain(load_recipe(write_recipe(tmp_path, TEXT), [], STAGES), tmp_path / "runs", STAGES)


def fake_argv(tmp_path, started, *extra):
    """Remembers in `started` which stages each child was given."""

    def argv(nodes):
        started.append([node.name for node in nodes])
        names = [word for node in nodes for word in ("--stage", node.name)]
        where = ["--pipeline", str(tmp_path / "toy.yaml"), "--runs", str(tmp_path / "runs")]
        return [sys.executable, str(FAKE_RUN), *names, *where, *extra]

    return argv


def shown(node):
    return node.name


def log(tmp_path, name):
    return next((tmp_path / "runs" / "toy").glob(f"{name}-*/log.txt")).read_text()


def test_stages_that_do_not_train_run_in_one_child_and_are_artifacts_of_their_own(chain, tmp_path):
    started = []
    assert launch.run_all(chain, list(chain), fake_argv(tmp_path, started), shown) == 0
    assert started == [["gather", "second", "third"], ["train"], ["tuned"]]
    found = records(tmp_path)
    assert {name: record["state"] for name, record in found.items()} == dict.fromkeys(found, "done")
    assert len({found[name]["pid"] for name in ("gather", "second", "third")}) == 1
    assert len({record["pid"] for record in found.values()}) == 3
    for name in ("gather", "second", "third"):
        assert f"{name}: done in" in log(tmp_path, name)
        assert log(tmp_path, name).count(": started in") == 1


@pytest.mark.parametrize(("ending", "code", "state"), [("error", 1, "failed"), ("sigterm", 85, "saved")])
def test_a_stage_that_does_not_finish_stops_the_rest_with_its_own_code(chain, tmp_path, capfd, ending, code, state):
    started = []
    argv = fake_argv(tmp_path, started, "--set", f"second.ending={ending}")
    assert launch.run_all(chain, list(chain), argv, shown) == code
    assert started == [["gather", "second", "third"]]
    states = {name: (record["state"], record["exit_code"]) for name, record in records(tmp_path).items()}
    assert states == {"gather": ("done", 0), "second": (state, code)}
    said = capfd.readouterr().err
    # Once where it happened, and once as the last word.
    assert said.count("second failed: ") == (2 if ending == "error" else 0)
    assert ("second failed: " in said.strip().split("\n")[-1]) == (ending == "error")
    # It goes on where it stopped.
    assert launch.run_all(chain, chain.selection(None, "third"), fake_argv(tmp_path, started), shown) == 0
    assert started[1:] == [["third"]]
    assert records(tmp_path)["third"]["state"] == "done"


def test_a_killed_stage_is_not_done_and_stops_the_rest(chain, tmp_path, capfd):  # trap O1
    argv = fake_argv(tmp_path, [], "--set", "second.ending=kill")
    assert launch.run_all(chain, list(chain), argv, shown) == 1
    assert "second failed: it was killed while running" in capfd.readouterr().err
    assert set(records(tmp_path)) == {"gather", "second"}


def in_one_process(tmp_path, *names):
    words = [word for name in names for word in ("--stage", name)]
    return main([*words, "--pipeline", str(write_recipe(tmp_path, TEXT)), "--runs", str(tmp_path / "runs")], STAGES)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_between_two_stages_begins_no_other(tmp_path, monkeypatch, capsys, number):
    from pipelines import single

    execute = single.execute

    def then_asked(stage, job, *rest):
        code = execute(stage, job, *rest)
        if job.name == "gather":
            os.kill(os.getpid(), number)
        return code

    monkeypatch.setattr(single, "execute", then_asked)
    assert in_one_process(tmp_path, "gather", "second", "third") == 85
    found = records(tmp_path)
    assert {name: record["state"] for name, record in found.items()} == {"gather": "done", "second": "saved"}
    assert not list(tmp_path.glob("runs/toy/second-*/output"))
    assert f"asked to stop by {number.name}: " in capsys.readouterr().err


def test_what_a_stage_sets_for_the_process_ends_with_it(tmp_path, monkeypatch):
    real, seen = STAGES["gather"].run, []
    before = random.getstate()

    def spoiling(self, context):
        # Of the warning filters the address tells: catch_warnings works on a copy.
        seen.append((os.environ.get("SPOILT"), os.getcwd(), random.getstate() == before, len(warnings.filters)))
        os.environ["SPOILT"] = "1"
        os.environ.pop("PATH", None)
        os.chdir(tmp_path)
        random.seed(1)
        warnings.simplefilter("ignore")
        return real(self, context)

    monkeypatch.setattr(STAGES["gather"], "run", spoiling)
    path = os.environ["PATH"]
    assert in_one_process(tmp_path, "gather", "second") == 0
    assert seen[0] == seen[1] == (None, os.getcwd(), True, len(warnings.filters))
    assert "SPOILT" not in os.environ
    assert os.environ["PATH"] == path


def test_a_training_stage_shares_with_nobody(tmp_path, capsys):
    assert in_one_process(tmp_path, "gather", "train") == 2
    assert capsys.readouterr().err == (
        "--stage may be given several times for stages that do not train; got train, which does\n"
    )


def switches(torch):
    names = "get_default_dtype is_grad_enabled are_deterministic_algorithms_enabled get_float32_matmul_precision"
    return [*(getattr(torch, name)() for name in names.split()), torch.get_num_threads()]


def spoil(torch):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_num_threads(3)
    torch.manual_seed(5)


def test_torch_is_for_the_next_stage_as_it_was_or_as_in_a_new_process(monkeypatch):
    import torch

    torch.manual_seed(3)
    drawn = torch.rand(3).tolist()
    torch.manual_seed(3)
    with own_settings():
        spoil(torch)
    fresh = [torch.float32, True, False, "highest", 1]
    assert switches(torch) == fresh
    assert torch.rand(3).tolist() == drawn
    # As if the stage were the first to import it.
    monkeypatch.delitem(sys.modules, "torch")
    with own_settings():
        sys.modules["torch"] = torch
        spoil(torch)
        drawn = torch.rand(3).tolist()
        spoil(torch)
    assert switches(torch) == fresh
    assert torch.rand(3).tolist() != drawn


def test_numpys_switches_and_draws_are_put_back():
    import numpy

    numpy.random.seed(3)
    expected = numpy.random.RandomState(3).rand()
    with own_settings():
        numpy.random.seed(4)
        numpy.seterr(all="raise")
    assert numpy.random.rand() == expected
    assert numpy.geterr()["divide"] == "warn"
