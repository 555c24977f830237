"""Broken recipes: exit 2, one line a fault, never a traceback, the path and a way out in the line."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_chain import MODEL, RECIPE, STAGES, write_recipe

from pipelines.run import main

ROOT = Path(__file__).resolve().parent.parent


def changed(old: str, new: str) -> str:
    assert old in RECIPE, f"{old!r} is not in the recipe that is broken here"
    return RECIPE.replace(old, new, 1)


TRAIN = "  train:\n    kind: train\n    data: gather\n    max_steps: 300\n    lr: 2e-4\n"

# name: (text, overrides, [(path, words of the line)...])
BROKEN = {
    # the text itself
    "empty": ("", [], [("recipe", "must be a mapping")]),
    "a list": ("- 1\n- 2\n", [], [("recipe", "must be a mapping of fields; got a list")]),
    "a word": ("hello", [], [("recipe", "got text")]),
    "open bracket": (changed("seed: 17", "seed: [17"), [], [("recipe", "is not valid YAML")]),
    "tab": (changed("seed: 17", "\tseed: 17"), [], [("recipe", "'\\t' that cannot start any token")]),
    "control character": (changed("toy", "t\x07y"), [], [("recipe", "special characters are not allowed")]),
    "two documents": (RECIPE + "---\na: 1\n", [], [("recipe", "single document")]),
    "too deep": (changed("seed: 17", "seed: " + "[" * 40 + "]" * 40), [], [("seed", "nested more than 32 deep")]),
    "bottomless": (changed("seed: 17", "seed: " + "[" * 5000), [], [("recipe", "nested more than 32 deep")]),
    "too long": (RECIPE + "#" * (1 << 20), [], [("recipe", "must be at most 1048576 characters")]),
    "duplicate field": (
        changed("seed: 17", "seed: 17\nseed: 18"),
        [],
        [("seed", "is given twice; the first is in line 2")],
    ),
    "duplicate stage": (RECIPE + TRAIN, [], [("train", "is given twice; the first is in line 19")]),
    "duplicate deep": (changed("lr: 2e-4", "lr: 2e-4\n    lr: 1"), [], [("train.lr", "is given twice")]),
    "alias": (changed("data: gather", "data: &d gather") + "    extra: *d\n", [], [("tuned.extra", "by an alias")]),
    "merge key": (
        changed("data: gather", "<<: {data: gather}"),
        [],
        [("train.data", "is required"), ("train.<<", "is not a field")],
    ),
    "python tag": (
        changed("seed: 17", "seed: !!python/object/apply:os.system [ls]"),
        [],
        [("seed", "must be a valid integer")],
    ),
    "scalar tag": (changed("seed: 17", "seed: !secret x"), [], [("seed", "has the tag '!secret'")]),
    "number as key": (changed("seed: 17", "seed: 17\n5: x"), [], [("recipe", "has a key that must be text; got '5'")]),
    "list as key": (changed("seed: 17", "seed: 17\n? [a]\n: x"), [], [("recipe", "has a key that must be text")]),
    # names and unknown keys
    "unknown top field": (changed("seed: 17", "sede: 17"), [], [("sede", "did you mean 'seed'?")]),
    "stages misspelt": (
        changed("stages:", "stagse:"),
        [],
        [("stages", "got nothing"), ("stagse", "did you mean 'stages'?")],
    ),
    "unknown stage field": (
        changed("max_steps: 300", "max_step: 300"),
        [],
        [("train.max_steps", "is required"), ("train.max_step", "did you mean 'max_steps'?")],
    ),
    "unknown nested field": (
        changed("    sources:", "    rules: {min_word: 3}\n    sources:"),
        [],
        [("gather.rules.min_word", "did you mean 'min_words'?")],
    ),
    "unknown field in a list": (
        changed("text: hello", "text: hello, txt: x"),
        [],
        [("gather.sources.0.txt", "did you mean 'text'?")],
    ),
    "unknown model field": (
        changed("d_model: 64", "d_model: 64\n  dmodel: 64"),
        [],
        [("model.dmodel", "did you mean 'd_model'?")],
    ),
    "unknown mixer field": (
        changed("head_dim: 16", "head_dims: 16"),
        [],
        [("model.mixers.m.head_dims", "did you mean 'head_dim'?")],
    ),
    "no near name": (
        changed("lr: 2e-4", "lr: 2e-4\n    zzzzzz: 1"),
        [],
        [("train.zzzzzz", "use one of betas, data, ")],
    ),
    "name escapes": (changed("name: toy", "name: ../../etc"), [], [("name", "got '../../etc'")]),
    "name with a slash": (changed("name: toy", "name: a/b"), [], [("name", "must match")]),
    "name absent": (changed("name: toy\n", ""), [], [("name", "is required and absent")]),
    "name a number": (changed("name: toy", "name: 5"), [], [("name", "must be a valid string; got 5")]),
    "name too long": (changed("name: toy", "name: " + "a" * 65), [], [("name", "must match")]),
    "stage name escapes": (
        changed("  train:\n", "  ../train:\n"),
        [],
        [("../train", "directories"), ("tuned.from", "did you mean")],
    ),
    "stage name upper case": (changed("  tuned:", "  Tuned:"), [], [("Tuned", "lower-case letters")]),
    "stage name hidden": (changed("  tuned:", "  .tuned:"), [], [(".tuned", "rename the stage")]),
    "stage named like a field": (
        changed("  tuned:", "  model:"),
        [],
        [("model", "differ from the recipe's own fields")],
    ),
    "too many stages": (
        "name: t\nstages:\n" + "".join(f"  s{i}: {{}}\n" for i in range(101)),
        [],
        [("stages", "must map 1 to 100")],
    ),
    # types
    "seed true": (changed("seed: 17", "seed: true"), [], [("seed", "must be a valid integer; got true")]),
    "seed text": (changed("seed: 17", "seed: '17'"), [], [("seed", "without quotes")]),
    "seed negative": (
        changed("seed: 17", "seed: -1"),
        [],
        [("seed", "greater than or equal to 0; got -1; set 0 or more")],
    ),
    "steps a float": (changed("max_steps: 300", "max_steps: 1e3"), [], [("train.max_steps", "got 1000.0; set 1000")]),
    "steps with underscore": (changed("max_steps: 300", "max_steps: 1_000"), [], [("train.max_steps", "underscores")]),
    "rate a word": (changed("lr: 2e-4", "lr: small"), [], [("train.lr", "must be a valid number; got 'small'")]),
    "rate zero": (changed("lr: 2e-4", "lr: 0"), [], [("train.lr", "greater than 0; got 0")]),
    "rate a list": (changed("lr: 2e-4", "lr: [1]"), [], [("train.lr", "must be a valid number")]),
    "rates too few": (changed("lr: 2e-4", "lr: 2e-4\n    betas: [0.9]"), [], [("train.betas.1", "is required")]),
    "rates a word": (changed("lr: 2e-4", "lr: 2e-4\n    betas: fast"), [], [("train.betas", "got 'fast'")]),
    "choice": (
        changed("lr: 2e-4", "lr: 2e-4\n    schedule: cosin"),
        [],
        [("train.schedule", "must be one of constant, cosine; got 'cosin'; did you mean 'cosine'?")],
    ),
    "choice of a section": (
        changed("wandb: disabled", "wandb: sometimes"),
        [],
        [("tracking.wandb", "must be one of auto, online, offline, disabled")],
    ),
    "union member": (
        changed("type: text, text: hello", "type: txt, text: hello"),
        [],
        [("gather.sources.0.type", "did you mean 'text'?")],
    ),
    "union without its tag": (
        changed("type: text, text: hello", "text: hello"),
        [],
        [("gather.sources.0.type", "is required")],
    ),
    "union member's field": (
        changed("type: text, text: hello", "type: text"),
        [],
        [("gather.sources.0.text", "is required")],
    ),
    "mixer unknown": (
        changed("mixer: attention", "mixer: atention"),
        [],
        [("model.mixers.m.mixer", "did you mean 'attention'?")],
    ),
    "stage a word": (changed("stages:", "stages:\n  x: soon"), [], [("x", "must be a mapping of fields; got 'soon'")]),
    "stage empty": (changed("stages:", "stages:\n  x:"), [], [("x", "got null")]),
    "stages a list": (
        changed("stages:", "stagez:") + "stages: [1]\n",
        [],
        [("stagez", "did you mean 'stages'?"), ("stages", "must map")],
    ),
    "model a word": (changed(MODEL, "\nmodel: big\n"), [], [("model", "must be a mapping of fields; got 'big'")]),
    "sources empty": (changed("- {type: text, text: hello}", "[]"), [], [("gather.sources", "at least 1 item")]),
    # kinds and the graph
    "kind absent": (
        changed("    kind: gather\n", ""),
        [],
        [("gather.kind", "is required and absent; set one of gather, train")],
    ),
    "kind unknown": (changed("kind: train", "kind: trian"), [], [("train.kind", "did you mean 'train'?")]),
    "kind a list": (changed("kind: train", "kind: [train]"), [], [("train.kind", "must be one of gather, train")]),
    "parent missing": (changed("data: gather", "data: gathr"), [], [("train.data", "did you mean 'gather'?")]),
    "parent produces something else": (
        changed("from: train", "from: gather"),
        [],
        [("tuned.from", "produces corpus; use one of train, tuned")],
    ),
    "parent a number": (changed("data: gather", "data: 5"), [], [("train.data", "must be a valid string; got 5")]),
    "own parent": (changed("from: train", "from: tuned"), [], [("tuned", "the cycle tuned -> tuned")]),
    "cycle": (changed("lr: 2e-4", "lr: 2e-4\n    from: tuned"), [], [("train", "the cycle train -> tuned -> train")]),
    "parent elsewhere absent": (
        changed("from: train", "from: ../../nowhere/x"),
        [],
        [("tuned.from", "holds no stage.json")],
    ),
    "model absent": (changed(MODEL, "\n"), [], [("model", "is required by train, tuned")]),
    "fields at odds": (
        changed("lr: 2e-4", "lr: 2e-4\n    micro_batch_size: 9"),
        [],
        [("train.micro_batch_size", "must be at most 4; got 9; set 4")],
    ),
    "layers undefined": (
        changed('"2*m"', '"2*n 1*m"'),
        [],
        [("model.layers", "must use words that mixers defines; got 'n'; define it, or use one of m")],
    ),
    "heads do not divide": (
        changed("n_kv_heads: 2", "n_kv_heads: 3"),
        [],
        [("model.mixers.m.n_kv_heads", "must divide n_heads 4; got 3; set one of [1, 2, 4]")],
    ),
    # absurd sizes
    "steps absurd": (
        changed("max_steps: 300", "max_steps: 10000000000000"),
        [],
        [("train.max_steps", "set 1000000000 or less")],
    ),
    "digits without end": (
        changed("max_steps: 300", "max_steps: " + "9" * 5000),
        [],
        [("train.max_steps", "must be a finite number")],
    ),
    "infinite": (changed("lr: 2e-4", "lr: .inf"), [], [("train.lr", "finite number")]),
    "not a number": (changed("lr: 2e-4", "lr: .nan"), [], [("train.lr", "finite number")]),
    "overflow": (changed("lr: 2e-4", "lr: 1e999"), [], [("train.lr", "finite number")]),
    "model absurd": (changed("d_model: 64", "d_model: 1000000"), [], [("model.d_model", "set 65536 or less")]),
    "layers absurd": (
        changed('"2*m"', '"999999999*m"'),
        [],
        [("model.layers", "must give 1 to 512 layers; got '999999999*m'")],
    ),
    "seed absurd": (changed("seed: 17", "seed: 99999999999"), [], [("seed", "less than 4294967296")]),
    # secrets
    "secret key": (
        changed("wandb: disabled", "wandb: disabled, api_key: abc"),
        [],
        [("tracking.api_key", "looks like a secret; secrets come from the environment")],
    ),
    "secret token": (
        changed("lr: 2e-4", "lr: 2e-4\n    hf_token: abc"),
        [],
        [("train.hf_token", "looks like a secret")],
    ),
    "secret password": (changed("seed: 17", "seed: 17\npassword: abc"), [], [("password", "looks like a secret")]),
    "secret value": (
        changed("text: hello", "text: hf_abcdefghijklmnopqrstuvwxyz"),
        [],
        [("gather.sources.0.text", "looks like a credential")],
    ),
    "secret in a URL": (
        changed("text: hello", "text: 'https://u:p4ss@h/x'"),
        [],
        [("gather.sources.0.text", "looks like a credential")],
    ),
    "tracker's key": (
        changed("wandb: disabled", "wandb: disabled, entity: " + "0a1b2c3d4e" * 4),
        [],
        [("tracking.entity", "looks like a credential")],
    ),
    # --set
    "set unknown stage": (RECIPE, ["trian.lr=1"], [("trian.lr", "did you mean 'train'?")]),
    "set unknown field": (RECIPE, ["train.lrr=1"], [("train.lrr", "is not a field; got 1; did you mean 'lr'?")]),
    "set without value": (RECIPE, ["train.lr="], [("train.lr", "needs a value; write --set train.lr=VALUE")]),
    "set without sign": (RECIPE, ["train.lr"], [("train.lr", "needs a value; write --set train.lr=VALUE")]),
    "set what is no path": (RECIPE, ["train lr=1"], [("--set", "must be path=value")]),
    "set without path": (RECIPE, ["=5"], [("--set", "must be path=value")]),
    "set bad YAML": (RECIPE, ["train.lr=[1"], [("train.lr", "is not valid YAML")]),
    "set below a value": (RECIPE, ["train.lr.x=1"], [("train.lr.x", "train.lr holds no fields of its own")]),
    "set beyond a list": (RECIPE, ["gather.sources.7=1"], [("gather.sources.7", "from 0 to 0; got '7'")]),
    "set with stages": (RECIPE, ["stages.train.lr=1"], [("stages.train.lr", "set train.lr")]),
    "set wrong type": (RECIPE, ["train.lr=fast"], [("train.lr", "must be a valid number; got 'fast'")]),
    "set a secret": (RECIPE, ["tracking.api_key=abc123"], [("tracking.api_key", "looks like a secret")]),
    "set to escape": (RECIPE, ["name=../x"], [("name", "got '../x'")]),
    "several at once": (
        changed("seed: 17", "seed: x"),
        ["train.lr=-1", "a.b=1"],
        [("a.b", "use one of"), ("train.lr", "greater than 0"), ("seed", "integer")],
    ),
}


def test_there_are_at_least_sixty():
    assert len(BROKEN) >= 60


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_refused_with_one_line_a_fault(name, tmp_path, capsys):  # trap T7
    text, overrides, expected = BROKEN[name]
    path = write_recipe(tmp_path, text)
    settings = [word for override in overrides for word in ("--set", override)]
    argv = ["--all", "--pipeline", str(path), "--runs", str(tmp_path / "runs"), *settings]
    assert main(argv, STAGES) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == len(expected), captured.err
    assert "Traceback" not in captured.err
    for line, (where, words) in zip(lines, expected, strict=True):
        place = line.split(": ", 1)[1] if line.startswith("line ") else line
        assert place.startswith(f"{where}: "), line
        assert words in line, line
    assert not (tmp_path / "runs").exists(), "a refused recipe must leave nothing behind"


@pytest.mark.parametrize("mode", [["--plan"], ["--status"], ["--stage", "train"], ["--all"]], ids=lambda m: m[0])
def test_every_mode_refuses_a_broken_recipe(mode, tmp_path, capsys):
    path = write_recipe(tmp_path, changed("lr: 2e-4", "lr: fast"))
    assert main([*mode, "--pipeline", str(path)], STAGES) == 2
    assert capsys.readouterr().err == (
        "line 23: train.lr: must be a valid number; got 'fast'; "
        "write it as a plain number, without quotes, underscores or units\n"
    )


def test_secrets_are_not_repeated(tmp_path, capsys):  # trap O6
    secrets = ["hf_abcdefghijklmnopqrstuvwxyz", "hunter2hunter2"]
    text = changed("text: hello", f"text: {secrets[0]}, password: {secrets[1]}")
    argv = ["--plan", "--pipeline", str(write_recipe(tmp_path, text)), "--set", f"tracking.api_key={secrets[1]}"]
    assert main(argv, STAGES) == 2
    captured = capsys.readouterr()
    assert not any(secret in captured.err + captured.out for secret in secrets)
    assert len(captured.err.splitlines()) == 3


@pytest.mark.parametrize("content", [b"name: \xff\xfe", None, "directory"], ids=["latin", "absent", "directory"])
def test_a_file_that_cannot_be_read_is_one_line(content, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert main(["--plan", "--pipeline", str(path)], STAGES) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [("name: x\nstages:\n  clean: {kind: clan}\n", "did you mean 'clean'?"), ("name: [", "is not valid YAML")],
)
def test_the_script_itself_exits_2_without_a_traceback(text, words, tmp_path):
    argv = [str(ROOT / "pipelines" / "run.py"), "--plan", "--pipeline", str(write_recipe(tmp_path, text))]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_may_be_a_secret_is_not_repeated(tmp_path, capsys):
    digits, foreign = "1234567890" * 4, tmp_path / "env.yaml"
    foreign.write_text(f"TOKEN={digits}\n")
    for path, more in ((foreign, []), (write_recipe(tmp_path), ["--set", f"seed={digits}"])):
        assert main(["--plan", "--pipeline", str(path), *more], STAGES) == 2
        assert digits[:20] not in capsys.readouterr().err
