"""Keys and staleness: what changes a key, what does not, and what `--plan` says about it."""

import json

import pytest
from fake_chain import RECIPE, STAGES, Gather, write_recipe

from pipelines.chain import build_chain
from pipelines.recipe import load_recipe
from pipelines.run import main
from pipelines.staleness import plain, standing, standings
from stages.base import ConfigError
from stages.runtime import artifact
from stages.runtime.artifact import canonical_digest, read_record, write_record

GOLDEN = {
    "gather": "17dea4db21b7",
    "train": "ed33972cb0b0",
    "tuned": "791e743490a7",
}
"""First digits of the toy recipe's keys. If they change, all users' artifacts are orphaned: never by accident."""


@pytest.fixture
def chain_of(tmp_path):
    def build(*overrides, text=RECIPE, stages=STAGES):
        recipe = load_recipe(write_recipe(tmp_path, text), overrides, stages)
        return build_chain(recipe, tmp_path / "runs", stages)

    return build


@pytest.fixture
def run(tmp_path):
    def run(stage, *overrides):
        settings = [word for override in overrides for word in ("--set", override)]
        argv = ["--pipeline", str(write_recipe(tmp_path)), "--runs", str(tmp_path / "runs"), *settings]
        return main(["--stage", stage, *argv], STAGES)

    return run


def keys(chain):
    return {node.name: node.job.key for node in chain}


def changed_by(chain_of, *overrides):
    before, after = keys(chain_of()), keys(chain_of(*overrides))
    return {name for name in before if before[name] != after[name]}


def test_golden_keys(chain_of):
    assert {name: key[:12] for name, key in keys(chain_of()).items()} == GOLDEN


def test_a_key_is_the_hash_of_the_identity_as_the_contract_has_it(chain_of):
    chain = chain_of()
    gather = {
        "kind": "gather",
        "code_version": 1,
        "config": {"kind": "gather", "sources": [{"type": "text", "text": "hello"}], "rules": {"min_words": 5}},
        "model": None,
        "seed": 17,
        "parents": {},
        "sources": {"s0": "00000000"},
    }
    assert chain.nodes["gather"].job.key == canonical_digest(gather)
    lineage = canonical_digest({"key": canonical_digest(gather), "extension": {}})
    train = chain.nodes["train"].job.identity
    assert train["parents"] == {"data": lineage}
    assert train["config"] == {"kind": "train", "lr": 2e-4, "betas": [0.9, 0.95], "schedule": "constant"}
    assert train["model"]["d_model"] == 64
    assert chain.nodes["train"].job.directory.name == f"train-{chain.nodes['train'].job.key[:8]}"


@pytest.mark.parametrize(
    "override",
    [
        "gather.workers=8",
        "gather.rules.verbose=true",
        "train.micro_batch_size=4",
        "tracking.wandb=offline",
        "tracking.project=other",
        "gather.ending=error",
    ],
)
def test_operational_fields_change_no_key(chain_of, override):
    assert changed_by(chain_of, override) == set()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("gather.rules.min_words=6", {"gather", "train", "tuned"}),
        ("train.lr=1e-3", {"train", "tuned"}),
        ("tuned.lr=1e-3", {"tuned"}),
        ("model.d_ff=256", {"train", "tuned"}),
        ("seed=18", {"gather", "train", "tuned"}),
        ("tuned.from=null", {"tuned"}),
        ("name=other", set()),
    ],
)
def test_what_decides_the_result_changes_the_key_of_the_stage_and_its_descendants(chain_of, override, changed):
    assert changed_by(chain_of, override) == changed


def test_a_raised_code_version_changes_the_key(chain_of, monkeypatch):
    before = keys(chain_of())
    monkeypatch.setattr(Gather, "code_version", 2)
    assert keys(chain_of())["gather"] != before["gather"]


def test_a_longer_run_keeps_its_key_and_changes_its_childrens(chain_of):
    assert changed_by(chain_of, "train.max_steps=600") == {"tuned"}
    assert changed_by(chain_of, "train.schedule=cosine", "train.max_steps=600") == {"train", "tuned"}
    cosine = keys(chain_of("train.schedule=cosine"))
    longer = keys(chain_of("train.schedule=cosine", "train.max_steps=600"))
    assert cosine["train"] != longer["train"]


def test_the_order_of_fields_and_stages_in_the_file_changes_no_key(chain_of):
    text = RECIPE.replace("    max_steps: 300\n    lr: 2e-4\n", "    lr: 0.0002\n    max_steps: 300\n")
    head, _, body = text.partition("stages:\n")
    gather, train = body.split("  train:\n")
    moved = f"{head}stages:\n  train:\n{train}{gather}"
    assert keys(chain_of(text=moved)) == keys(chain_of())
    assert list(chain_of(text=moved).nodes) == ["gather", "train", "tuned"]


def test_variants_of_one_kind_branch_from_one_parent(chain_of, run):
    text = RECIPE + "  other:\n    kind: train\n    data: gather\n    from: train\n    max_steps: 10\n    lr: 3e-4\n"
    chain = chain_of(text=text)
    assert chain.ancestors("other") == chain.ancestors("tuned") == {"gather", "train"}
    assert chain.nodes["other"].job.parents["from_"] == chain.nodes["tuned"].job.parents["from_"]
    assert chain.nodes["other"].job.key != chain.nodes["tuned"].job.key
    assert [node.name for node in chain.selection("tuned", None)] == ["tuned"]
    assert [node.name for node in chain.selection(None, "train")] == ["gather", "train"]
    with pytest.raises(ConfigError, match="--until"):
        chain.selection("tuned", "other")


def test_a_fresh_clone_has_never_run_anything(chain_of):
    found = standings(chain_of())
    assert {name: (standing.state, standing.reasons) for name, standing in found.items()} == {
        name: ("stale", ["never run"]) for name in ("gather", "train", "tuned")
    }


def test_staleness_says_which_value_changed_and_makes_a_new_artifact_beside_the_old(chain_of, run, tmp_path):
    assert run("train") == 0
    assert standing(chain_of().nodes["train"]).done
    found = standings(chain_of("train.lr=1e-4", "model.d_ff=256"))
    assert found["train"].reasons == ["train.lr 2e-4 -> 1e-4", "model.d_ff 128 -> 256"]
    assert found["gather"].done
    assert run("train", "train.lr=1e-4") == 0
    assert len(list((tmp_path / "runs" / "toy").glob("train-*/output/weights.txt"))) == 2
    # Compared with the nearest of the two, not with any.
    assert standing(chain_of("train.lr=1e-4", "seed=17", "train.betas=[0.9, 0.99]").nodes["train"]).reasons == [
        "train.betas [0.9, 0.95] -> [0.9, 0.99]"
    ]


def test_staleness_names_changed_parents_sources_and_code(chain_of, run, monkeypatch):
    assert run("train") == 0
    found = standings(chain_of("gather.rules.min_words=9"))
    assert found["gather"].reasons == ["gather.rules.min_words 5 -> 9"]
    assert found["train"].reasons == ["parent gather changed"]
    assert standing(chain_of("seed=5").nodes["gather"]).reasons == ["seed 17 -> 5"]
    monkeypatch.setattr(Gather, "source_revisions", classmethod(lambda cls, config: {"s0": "11111111"}))
    monkeypatch.setattr(Gather, "code_version", 3)
    assert standing(chain_of().nodes["gather"]).reasons == ["code version 1 -> 3", "source s0 changed"]


def test_a_longer_run_extends_and_a_shorter_one_is_refused(chain_of, run):
    assert run("train") == 0
    assert standing(chain_of("train.max_steps=600").nodes["train"]).reasons == ["extended: max_steps 300 -> 600"]
    shorter = standing(chain_of("train.max_steps=200").nodes["train"])
    assert (shorter.state, shorter.done) == ("longer", False)
    assert shorter.reasons == [
        "holds 300 of max_steps, the recipe asks for 200: set train.max_steps=300 to go on from it"
    ]
    assert "must be at least 300" in str(shorter.refusal)
    assert run("train", "train.max_steps=200") == 2
    assert run("train", "train.max_steps=600") == 0
    node = chain_of("train.max_steps=600").nodes["train"]
    assert (node.job.directory / "output" / "weights.txt").read_text() == "hello 600"
    record = read_record(node.job.directory)
    assert (record["attempts"], record["extension"], record["step"]) == (2, {"max_steps": 600}, 600)


def state_as(chain, name, **changes):
    directory = chain.nodes[name].job.directory
    write_record(directory, {**read_record(directory), **changes})
    return standing(chain.nodes[name])


def test_each_unfinished_state_has_its_reason(chain_of, run):
    assert run("train") == 0
    chain = chain_of()
    checkpoint = chain.nodes["train"].job.directory / "checkpoints" / "step-00000120"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    assert state_as(chain, "train", state="saved").reasons == ["saved at step 120"]
    assert state_as(chain, "train", state="failed", error="loss is nan").reasons == ["failed at step 120: loss is nan"]
    living = state_as(chain, "train", state="running")
    assert living.state == "running"
    dead = state_as(chain, "train", state="running", pid_started="1")
    assert dead.state == "interrupted"
    assert dead.reasons[0].startswith("interrupted at step 120: process ")
    elsewhere = state_as(chain, "train", state="running", host="another")
    assert "which cannot be seen from here" in elsewhere.reasons[0]
    # 120 steps are done, so 150 are no shorter than what was trained, though 300 were once asked for.
    record = read_record(chain.nodes["train"].job.directory)
    write_record(chain.nodes["train"].job.directory, {**record, "state": "saved"})
    assert standing(chain_of("train.max_steps=150").nodes["train"]).state == "saved"
    shorter = standing(chain_of("train.max_steps=100").nodes["train"])
    assert shorter.state == "longer"
    assert "must be at least 120" in str(shorter.refusal)


def test_a_record_that_cannot_be_read_and_a_lost_output_are_no_tracebacks(chain_of, run):
    assert run("gather") == 0
    node = chain_of().nodes["gather"]
    (node.job.directory / "output").rename(node.job.directory / "gone")
    assert "output is gone" in standing(node).reasons[0]
    (node.job.directory / artifact.RECORD).write_text("{")
    assert standing(node).state == "failed"


def test_a_parent_elsewhere_counts_by_its_outputs_digest(chain_of, run, tmp_path):
    assert run("train") == 0
    trained = chain_of().nodes["train"].job.directory
    node = chain_of(f"tuned.from={trained}").nodes["tuned"]
    digest = json.loads((trained / "stage.json").read_text())["output_digest"]
    assert node.job.identity["parents"]["from_"] == digest
    assert node.parents == {"data": "gather"}
    assert run("tuned", f"tuned.from={trained}") == 0
    with pytest.raises(ConfigError, match=r"tuned\.from: must produce model"):
        chain_of(f"tuned.from={chain_of().nodes['gather'].job.directory}")
    write_record(trained, {**read_record(trained), "state": "failed"})
    with pytest.raises(ConfigError, match=r"tuned\.from: .*whose state is failed"):
        chain_of(f"tuned.from={trained}")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0002, "2e-4"),
        (1e-05, "1e-5"),
        (-0.00125, "-1.25e-3"),
        (0.1, "0.1"),
        (3.0, "3"),
        (1e22, "1e+22"),
        (None, "none"),
        (True, "true"),
        (300, "300"),
    ],
)
def test_values_in_reasons_are_short(value, text):
    assert plain(value) == text
