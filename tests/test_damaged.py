"""A finished artifact that lost a file, or part of one, is called damaged before anything is run on it."""

import json

import pytest
from fake_chain import STAGES

from pipelines.chain import build_chain
from pipelines.recipe import load_recipe
from pipelines.staleness import standing
from stages.runtime.manifest import CheckpointError, damage_at_a_glance, verify_manifest, write_manifest


@pytest.fixture
def gathered(cli, tmp_path, capsys):
    """The finished artifact of the stage gather."""
    assert cli("--stage", "gather") == 0
    capsys.readouterr()
    (directory,) = (tmp_path / "runs" / "toy").glob("gather-*")
    return directory


DAMAGES = {
    "text.txt is missing": lambda output: (output / "text.txt").unlink(),
    "text.txt has 3 bytes, the manifest says 5": lambda output: (output / "text.txt").write_text("hel"),
    "more.txt is not in the manifest": lambda output: (output / "more.txt").touch(),
    "manifest.json is missing, so it was never finished": lambda output: (output / "manifest.json").unlink(),
    "manifest.json does not match its own checksum": lambda output: (output / "manifest.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_plan_and_status_say_damaged_with_the_way_out_and_a_run_is_refused(cli, gathered, capsys, damage):
    DAMAGES[damage](gathered / "output")
    assert cli("--plan", "--json") == 0
    plan = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    (reason,) = plan["gather"]["reasons"]
    assert plan["gather"]["state"] == "damaged"
    assert reason == f"damaged: {damage}; restore {gathered}/output, or rm -r {gathered} and run gather again"
    assert cli("--plan") == 0
    out = capsys.readouterr().out
    assert "as the recipe stands, a run of gather would be refused: see why" in out
    assert "left to do: train, tuned" in out
    assert cli("--status", "--json") == 0
    entries = {entry["stage"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert (entries["gather"]["state"], entries["gather"]["note"]) == ("damaged", reason)
    for mode in (("--all",), ("--stage", "train"), ("--stage", "gather")):
        assert cli(*mode) == 2, mode
        assert f"gather: must be whole where it is finished; got an output in which {damage}; restore " in (
            capsys.readouterr().err
        )


def test_an_output_of_another_seal_is_damaged(gathered, tmp_path):
    (gathered / "output" / "text.txt").write_text("jello")
    write_manifest(gathered / "output")
    verify_manifest(gathered / "output")
    chain = build_chain(load_recipe(tmp_path / "toy.yaml", [], STAGES), tmp_path / "runs", STAGES)
    assert "manifest.json is not the one that was sealed" in standing(chain.nodes["gather"]).reasons[0]


def test_what_only_hashing_finds_is_left_to_whoever_loads(gathered):
    (gathered / "output" / "text.txt").write_text("jello")
    assert damage_at_a_glance(gathered / "output") is None
    with pytest.raises(CheckpointError, match=r"text\.txt has another SHA-256"):
        verify_manifest(gathered / "output")


def test_once_removed_the_stage_runs_again(cli, gathered, capsys):
    import shutil

    (gathered / "output" / "text.txt").unlink()
    shutil.rmtree(gathered)
    assert cli("--stage", "gather") == 0
    assert (gathered / "output" / "text.txt").read_text() == "hello"
