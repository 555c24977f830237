"""The export stage: what it writes, what it measures of it, what it refuses, and when it fails."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import chimera, make_model, random_model
from tiny_run import Log, make_tokens
from tiny_run import spec as three_mixers
from transformers import AutoModelForCausalLM

from model.export.gguf_chat import open_gguf
from model.presets import PRESETS
from stages.base import StageContext
from stages.export import Export
from stages.runtime.export_tokens import compare_ids
from stages.runtime.parity import Parity, ParityError, parity_windows

WEIGHTS = ("*.safetensors", "*.gguf")


def config(**changes):
    plain = {"kind": "export", "from": "sft", "parity_tokens": 300, "window_tokens": 48, "timing_prompt_tokens": 20,
             "timing_new_tokens": 4, "threads": 1}  # fmt: skip
    return Export.Config.model_validate(plain | changes)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def parents(tokens, tmp_path_factory) -> dict[str, Path]:
    model = random_model(chimera())
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights of an untrained size, so that four bits keep the model recognisable.
            if parameter.dim() == 2:
                parameter.mul_(0.5)
    return {"from_": make_model(tmp_path_factory.mktemp("sft"), tokens, model), "data": tokens}


def run(directory: Path, parents: dict[str, Path], **changes):
    for name in ("output.tmp", "work"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    context = StageContext(
        pipeline="test", name="export", key="0" * 64, seed=17, config=config(**changes), model=None,
        directory=directory, output=directory / "output.tmp", work=directory / "work", cache=directory / "cache",
        parents=parents, tracker=Log(),
    )  # fmt: skip
    return Export().run(context), context


@pytest.fixture(scope="module")
def finished(tmp_path_factory, parents):
    """Result, context and ``parity.json`` of one run with every format."""
    result, context = run(tmp_path_factory.mktemp("export"), parents)
    return result, context, json.loads((context.output / "parity.json").read_text())


def test_every_format_is_measured_against_the_model(finished):
    result, _, report = finished
    rows = {row["format"]: row for row in report["rows"]}
    assert list(rows) == ["huggingface", "granite", "f16", "q8_0", "q4_0"]
    assert all(row["passed"] for row in report["rows"])
    kl = {name: row["mean_kl_nats"] for name, row in rows.items() if name != "huggingface"}
    assert kl["granite"] < 1e-9 < kl["q8_0"] < kl["q4_0"] < 0.5
    assert kl["f16"] < 1e-4
    assert {row["tokens"] for name, row in rows.items() if name != "huggingface"} == {report["text"]["tokens"]} == {300}
    assert rows["q8_0"]["file_bytes"] < rows["f16"]["file_bytes"] < rows["granite"]["file_bytes"]
    assert result.metrics["q4_0/mean_kl_nats"] == kl["q4_0"]


def test_llama_cpps_ids_are_checked_on_held_out_text(finished):
    _, context, report = finished
    assert report["tokenizer"]["mismatches"] == 0
    # The set is the windows that were compared, not all that is held out (TRAPS M3).
    windows = parity_windows(context.parents["data"] / "output", 300, context.config.window_tokens)
    canonical = json.dumps(windows, separators=(",", ":"))
    assert report["text"]["set_hash"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert report["tokenizer"]["texts"] == 24 + 10  # twelve held-out documents of two languages, and the probes


def test_every_row_is_logged_and_summarised(finished):
    result, context, report = finished
    logged = [row for row in context.tracker.rows if row["event"] == "parity"]
    assert [row["format"] for row in logged] == [row["format"] for row in report["rows"]]
    assert len(result.summary) == len(report["rows"]) + 1


def test_a_licence_lies_in_every_folder_with_weights(finished):
    output = finished[1].output
    folders = {path.parent for pattern in WEIGHTS for path in output.rglob(pattern)}
    assert {folder.name for folder in folders} == {"huggingface", "granite", "gguf"}
    assert all((folder / "MODEL_LICENSE").is_file() for folder in folders)


def test_nothing_of_the_measurement_is_left_behind(finished):
    context = finished[1]
    assert list(context.work.iterdir()) == []
    assert {path.name for path in context.output.iterdir()} == {"huggingface", "granite", "gguf", "parity.json"}


def test_the_hugging_face_directory_holds_the_parents_weights_byte_for_byte(finished, parents):
    output = finished[1].output / "huggingface"
    source = parents["from_"] / "output"
    assert (output / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (output / "info.json").read_bytes() == (source / "info.json").read_bytes()
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_the_granite_directory_needs_no_code_of_ours(finished):
    directory = finished[1].output / "granite"
    assert "auto_map" not in json.loads((directory / "config.json").read_text())
    assert list(directory.glob("*.py")) == []
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model).__module__.startswith("transformers.models.granitemoehybrid")


def test_the_gguf_file_chats(finished):
    with open_gguf(finished[1].output / "gguf" / "model-Q4_0.gguf", threads=1) as chat:
        assert isinstance("".join(chat.stream([{"role": "user", "content": "the cat"}], max_new_tokens=4)), str)
        assert chat.timings["tokens"] >= 1


def test_a_format_beyond_its_bound_fails_the_stage(tmp_path, parents):
    formats = {"granite": False, "f16": False, "q8_0": False}
    with pytest.raises(ParityError, match=r"q4_0 has a mean KL of .* nats, bound 1e-07"):
        run(tmp_path, parents, formats=formats, bounds={"q4_0": 1e-7})
    report = json.loads((tmp_path / "output.tmp" / "parity.json").read_text())
    assert [row["passed"] for row in report["rows"]] == [True, False]
    assert sorted(report["not_run"]) == ["f16", "granite", "q8_0"]


def test_a_format_that_loses_much_is_warned_of(tmp_path, parents):
    formats = {"granite": False, "f16": False, "q8_0": False}
    _, context = run(tmp_path, parents, formats=formats, bounds={"q4_0_warning": 1e-7})
    (alert,) = [row["text"] for row in context.tracker.rows if row["event"] == "alert"]
    assert "q4_0: mean KL is above 1e-07" in alert


def test_a_model_of_other_mixers_gets_its_hugging_face_directory(tmp_path, tokens, tmp_path_factory):
    parent = make_model(tmp_path_factory.mktemp("gla"), tokens, random_model(three_mixers()))
    off = {"granite": False, "f16": False, "q8_0": False, "q4_0": False}
    result, context = run(tmp_path, {"from_": parent, "data": tokens}, formats=off)
    assert {path.name for path in context.output.iterdir()} == {"huggingface", "parity.json"}
    assert list(result.metrics) == ["huggingface/file_bytes", "huggingface/tokens_per_s"]


@pytest.mark.parametrize(
    ("name", "words"), [("hybrid_1b3", ["output_gate must be false"]), ("helix_900m", ["'gla'", "qk_norm", "window"])]
)
def test_models_that_llama_cpp_lacks_are_refused_before_anything_runs(name, words):
    faults = Export.check(Export.Config.model_validate({"kind": "export", "from": "sft"}), PRESETS[name])
    text = "\n".join(map(str, faults))
    assert all(word in text for word in words)
    assert {fault.path for fault in faults} == {"formats"}
    assert "set formats.granite=false, formats.f16=false, formats.q8_0=false, formats.q4_0=false" in text


def test_widths_are_refused_for_the_formats_that_need_blocks():
    faults = Export.check(config(formats={"q8_0": False}), chimera(d_ff=100))
    assert [fault.path for fault in faults] == ["formats.q4_0"]
    assert "d_ff must be a multiple of 32" in faults[0].message
    assert "or set formats.q4_0=false" in faults[0].message


def test_a_default_config_suits_the_chimera_presets():
    plain = {"kind": "export", "from": "sft"}
    for name in ("chimera_700m", "nano_chimera"):
        assert Export.check(Export.Config.model_validate(plain), PRESETS[name]) == []


def test_measurements_beyond_the_models_length_are_refused():
    faults = Export.check(config(window_tokens=129, timing_prompt_tokens=126), chimera())
    assert [fault.path for fault in faults] == ["window_tokens", "timing_prompt_tokens"]


def test_a_model_from_elsewhere_is_checked_when_its_artifact_is_opened(parents, tokens, tmp_path_factory):
    assert Export.check(config(**{"from": "runs/other/sft"}), PRESETS["helix_900m"]) == []
    assert Export.check_parents(config(), None, parents) == []
    gla = make_model(tmp_path_factory.mktemp("gla"), tokens, random_model(three_mixers()))
    faults = Export.check_parents(config(), chimera(), {"from_": gla, "data": tokens})
    assert any("'gla'" in fault.message for fault in faults)


def test_text_of_another_tokenizer_is_refused(parents, tmp_path):
    other = make_tokens(tmp_path)
    path = other / "output" / "tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_digest": "f" * 64, "vocab_size": 999}))
    paths = [fault.path for fault in Export.check_parents(config(), None, parents | {"data": other})]
    assert paths == ["from", "data"]  # trap K10


def test_figures_by_hand():
    ours = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], np.float32))
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]], np.float32)) + 3.0
    parity = Parity()
    parity.add([0, 1], ours, other)
    figures = parity.figures()
    # First row: 0.5 ln 2 - 0.25 ln 2; the second is the same distribution. Only token 1 is scored: 0.25 against 0.5.
    assert figures["mean_kl_nats"] == pytest.approx(0.25 * math.log(2) / 2, rel=1e-5)
    assert figures["perplexity_ratio"] == pytest.approx(0.5, rel=1e-5)
    assert figures["top1_agreement"] == 0.5
    assert figures["max_logit_difference"] == pytest.approx(3 + math.log(2), rel=1e-5)
    assert (figures["tokens"], figures["scored_tokens"]) == (2, 1)


@pytest.mark.parametrize("count", [2, 64, 65, 128, 129, 150])  # after 64 and 128 the last one stands alone
def test_chunks_of_a_long_window_are_scored_once_each(count):
    ids = list(range(count))
    logits = np.random.default_rng(1).normal(size=(count, 200)).astype(np.float32)
    parity = Parity()
    parity.add(ids, logits, logits)
    assert (parity.positions, parity.scored) == (count, count - 1)
    wide = torch.tensor(logits, dtype=torch.float64)
    nats = torch.nn.functional.cross_entropy(wide[:-1], torch.tensor(ids[1:]), reduction="sum")
    assert parity.reference_nats == pytest.approx(float(nats), rel=1e-9)


def test_a_nan_never_passes():
    logits = np.zeros((4, 8), np.float32)
    broken = logits.copy()
    broken[2, 3] = np.nan
    parity = Parity()
    parity.add([0, 1, 2, 3], logits, broken)
    figures = parity.figures()
    assert not figures["mean_kl_nats"] <= 1e9
    assert math.isnan(figures["max_logit_difference"])


def test_windows_take_the_sources_in_turn_and_are_always_the_same(tokens):
    windows = parity_windows(tokens / "output", 100, 16)
    assert windows == parity_windows(tokens / "output", 100, 16)
    assert sum(map(len, windows)) == 100
    assert max(map(len, windows)) == 16


def test_other_ids_are_counted_and_shown(parents, tokens):
    from data.tokenizer import encode_text, load

    tokenizer = load(parents["from_"] / "output")

    class Wrong:
        def tokenize(self, text: str) -> list[int]:
            return encode_text(tokenizer, text.replace("dog", "god"))

    found = compare_ids(Wrong(), tokenizer, tokens / "output")
    assert 0 < found.mismatches < found.texts
    (fault,) = found.faults()
    assert "dog" in fault
