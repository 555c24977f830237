"""The generated flat file gives the model's very logits in an interpreter that lacks our package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import tiny_model, tokens
from transformers import AutoModelForCausalLM

import model as model_room
from model.export import remote_code as room
from model.export.remote_code import AUTO_MAP, FILE, remote_code

ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("model", "data", "stages", "pipelines"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import numpy, torch
from transformers import AutoModelForCausalLM

directory = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
given = numpy.load(directory + "/given.npz")
ids, mask = torch.tensor(given["ids"]), torch.tensor(given["mask"])
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=mask).logits
    packed = model(input_ids=ids[:1], seq_idx=torch.tensor(given["seq_idx"])).logits
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=True)
    again = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=False)
numpy.savez(directory + "/made.npz", logits=logits, packed=packed, made=made, again=again)
print(type(model).__module__)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model of every mixer in every variant, with its code beside it and inputs that are padded and packed."""
    path = tmp_path_factory.mktemp("elsewhere") / "model"
    model = tiny_model(seed=3)
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    (path / f"{FILE}.py").write_text(remote_code())
    ids, mask = tokens(2, 37).numpy(), np.ones((2, 37), np.int64)
    ids[1, :9], mask[1, :9] = 1, 0
    seq_idx = np.repeat([[0, 1, 2]], [10, 20, 7], 1)
    np.savez(path / "given.npz", ids=ids, mask=mask, seq_idx=seq_idx)
    return path


@pytest.fixture(scope="module")
def elsewhere(directory, tmp_path_factory):
    """What the clean interpreter computed, and the module that its model came from."""
    home = tmp_path_factory.mktemp("home")
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(directory)],
        cwd=home, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.load(directory / "made.npz"), done.stdout.strip()


@pytest.fixture(scope="module")
def here(directory):
    model_room.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.set_num_threads(threads)


def test_our_registration_loads_the_directory_by_our_own_classes(here):
    assert type(here).__module__ == "model.lm"


def test_a_clean_interpreter_gives_the_same_bits(directory, elsewhere, here):
    made, module = elsewhere
    given = np.load(directory / "given.npz")
    ids, mask = torch.tensor(given["ids"]), torch.tensor(given["mask"])
    with torch.no_grad():
        logits = here(input_ids=ids, attention_mask=mask).logits
        packed = here(input_ids=ids[:1], seq_idx=torch.tensor(given["seq_idx"])).logits
    assert module.startswith("transformers_modules.")
    assert np.array_equal(made["logits"], logits.numpy())
    assert np.array_equal(made["packed"], packed.numpy())


def test_a_clean_interpreter_generates_the_same_with_and_without_its_cache(directory, elsewhere, here):  # trap K5
    made, _ = elsewhere
    given = np.load(directory / "given.npz")
    ids, mask = torch.tensor(given["ids"]), torch.tensor(given["mask"])
    with torch.no_grad():
        ours = here.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert np.array_equal(made["made"], ours.numpy())
    assert np.array_equal(made["made"], made["again"])


def test_the_file_imports_nothing_of_ours():
    tree = ast.parse(remote_code())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    own = {name for name in modules if name.split(".")[0] in {"model", "data", "stages", "pipelines", ""}}
    assert own == set()


def test_no_name_is_defined_twice():
    defined = [name for node in ast.parse(remote_code()).body for name in room._defined(node)]
    assert len(defined) == len(set(defined))


def joined(tmp_path, monkeypatch, **sources: str) -> str:
    """The flat file of other sources; the entry is ``lm``."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").write_text("")
    for name, text in sources.items():
        (tmp_path / "model" / f"{name}.py").write_text(text)
    monkeypatch.setattr(room, "ROOT", tmp_path / "model")
    return remote_code()


def test_names_that_clash_are_told_apart(tmp_path, monkeypatch):
    text = joined(
        tmp_path, monkeypatch,
        a="def _size(x):\n    return x + 1\n\ndef grown(x):\n    return _size(x)\n",
        b="SIZE = 5\ndef size():\n    return SIZE\n",
        lm="from model import b\nfrom model.a import grown\n\ndef _size(x):\n    return 10 * x\n\n"
        "def total():\n    return grown(1) + _size(2) + b.size() + b.SIZE\n",
    )  # fmt: skip
    names: dict = {}
    exec(text, names)
    assert names["total"]() == 2 + 20 + 5 + 5


def test_a_variable_that_would_be_renamed_with_a_function_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model.lm must not use \['_size'\] for a variable"):
        joined(
            tmp_path, monkeypatch,
            a="def _size(x):\n    return x\n",
            lm="from model.a import grown\n\ndef _size(x):\n    return x\n\ndef other(_size):\n    return _size\n",
        )  # fmt: skip


def test_two_packages_things_under_one_name_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must not import another field than `from dataclasses import field`"):
        joined(
            tmp_path, monkeypatch,
            a="from dataclasses import field\n",
            lm="from model.a import x\nfrom attrs import field\n",
        )  # fmt: skip
