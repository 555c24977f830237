"""A longer run of a parent is finished while a child reads it: nothing new is recorded as what was there before."""

import dataclasses
import os

import evaluated
import finetune_cases
import pytest
import tiny_run
from fake_chain import records
from test_weights import equal, saved, tiny

from stages.pretrain import Pretrain
from stages.runtime import lifecycle, manifest, parents, weights
from stages.runtime.manifest import CheckpointError, seal
from stages.runtime.parents import unchanged
from stages.runtime.weights import load_weights, save_weights

LONGER = ("--set", "train.max_steps=600")
REPLACED = (
    r"is no longer what it was when this command began: a longer run of it was finished meanwhile, or its output was "
    r"changed; run the command again$"
)


@pytest.mark.parametrize(
    ("room", "name"),
    [
        pytest.param(lifecycle, "verified_parents", id="before-its-record-is-read"),
        pytest.param(parents, "verify_manifest", id="before-its-manifest-is-read"),
        pytest.param(manifest, "_hash_files", id="between-its-manifest-and-its-files"),
    ],
)
def test_a_parent_that_grows_while_it_is_verified_is_named_and_not_called_damaged(
    cli, capsys, tmp_path, monkeypatch, room, name
):
    assert cli("--stage", "train") == 0
    real = getattr(room, name)

    def meanwhile(*arguments):
        if "train-" in str(arguments):
            monkeypatch.setattr(room, name, real)
            assert cli("--stage", "train", *LONGER) == 0
        return real(*arguments)

    monkeypatch.setattr(room, name, meanwhile)
    assert cli("--stage", "tuned") == 1
    child = records(tmp_path)["tuned"]
    assert child["state"] == "failed"
    assert child["error"].startswith("parent ")
    assert records(tmp_path)["train"]["key"][:8] in child["error"]
    assert "run the command again" in child["error"]
    assert "damaged" not in child["error"]
    capsys.readouterr()
    # The command, run again, tells what has come of the parent.
    assert cli("--stage", "tuned") == 2
    assert "train.max_steps: must be at least 600" in capsys.readouterr().err


def longer(folder, seed=9):
    """Seal another model in the place of the one in ``folder``, as a longer run does at its end."""
    save_weights(folder.with_name("output.tmp"), tiny(seed), None)
    return seal(folder.with_name("output.tmp"), folder)


@pytest.fixture
def parent(tmp_path):
    """A sealed output, and its digest."""
    folder = saved(tmp_path / "train-0123" / "output", tiny(0))
    return folder, manifest.verify_manifest(folder)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("name", "after"), [("verify_manifest", True), ("_stored_tensors", True), ("_copy_in", False), ("_copy_in", True)]
)
def test_weights_that_are_replaced_while_they_are_loaded_are_refused(parent, monkeypatch, name, after, known):
    folder, digest = parent
    real = getattr(weights, name)

    def meanwhile(*arguments):
        monkeypatch.setattr(weights, name, real)
        if not after:
            longer(folder)
        found = real(*arguments)
        # A generator opens its files when it is asked.
        found = list(found) if name == "_stored_tensors" else found
        if after:
            longer(folder)
        return found

    monkeypatch.setattr(weights, name, meanwhile)
    with pytest.raises(CheckpointError, match=rf"^parent \S*train-0123 {REPLACED}"):
        load_weights(folder, tiny(1), digest if known else None)


def test_weights_that_were_replaced_before_they_are_loaded_are_refused_where_the_record_names_others(parent):
    folder, digest = parent
    new = longer(folder)
    with pytest.raises(CheckpointError, match=REPLACED):
        load_weights(folder, tiny(1), digest)
    other = tiny(1)
    assert load_weights(folder, other, new) == new
    assert equal(other, tiny(9))


def test_the_moment_in_which_the_old_output_is_away_and_the_new_one_not_there_yet_is_no_damage(parent):
    folder, digest = parent
    os.rename(folder, folder.with_name("output.removed.tmp"))
    with pytest.raises(CheckpointError, match=REPLACED):
        load_weights(folder, tiny(1), digest)


def test_what_goes_wrong_with_a_parent_that_stays_is_told_as_it_is(parent):
    folder, digest = parent
    with pytest.raises(CheckpointError, match=r"has shape \[16\], the model \[32\]"):
        load_weights(folder, tiny(hidden=32), digest)
    with pytest.raises(RuntimeError, match="torn"), unchanged(folder, digest):
        raise RuntimeError("torn")


def of_another_run(context):
    """``context`` of a run whose record names another output of its parent than the one that lies there."""
    return dataclasses.replace(context, record={"parents": {"from_": {"digest": "0" * 64}}})


def pretrain(folder, parent, tokens):
    context = tiny_run.context(folder, tokens, parent=parent, lr=1e-6)
    return lambda: Pretrain().run(of_another_run(context))


def sft(folder, parent, tokens):
    case = finetune_cases.CASES["sft"]
    case.data(folder / "messages")
    inputs = {"from_": parent, "data": finetune_cases.finish(folder / "messages", {})}
    context = of_another_run(finetune_cases.context(case, folder, inputs))
    return lambda: case.stage_class()().run(context)


def evaluate(folder, parent, tokens):
    changes = {"suites": {"bpb": evaluated.SUITES["bpb"]}, **dict.fromkeys(evaluated.INPUTS[1:])}
    context = of_another_run(evaluated.context(folder, {"from_": parent, "data": tokens}, **changes))
    return lambda: evaluated.Evaluate().run(context)


def export(folder, parent, tokens):
    from stages.export import Export

    asked = {"kind": "export", "from": "sft", "parity_tokens": 64, "window_tokens": 32, "timing_prompt_tokens": 4,
             "timing_new_tokens": 2, "formats": dict.fromkeys(("granite", "f16", "q8_0", "q4_0"), False)}  # fmt: skip
    context = tiny_run.context(folder, tokens, parent=parent, lr=1e-6)
    context = dataclasses.replace(context, config=Export.Config.model_validate(asked))
    return lambda: Export().run(of_another_run(context))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return finetune_cases.make_parent(folder), folder / "tokens"


@pytest.mark.parametrize("reader", [pretrain, sft, evaluate, export])
def test_every_stage_that_starts_from_a_model_holds_it_to_the_digest_in_its_record(made, tmp_path, reader):
    with pytest.raises(CheckpointError, match=REPLACED):
        reader(tmp_path, *made)()
