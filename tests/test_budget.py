"""The budget planner: laws against their own loss, hours against arithmetic, epochs against the mixture."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from model.presets import PRESETS
from model.scaling import LAWS, Parametric, effective_tokens, wanted_tokens
from pipelines import budget as room
from pipelines.budget import budget, budget_lines, epochs, hours
from pipelines.chain import build_chain
from pipelines.recipe import RECIPES, load_recipe
from pipelines.run import main, parse
from stages import STAGES
from stages.pretrain import PretrainConfig

FITS = [law for law in LAWS if isinstance(law, Parametric)]
TUNED = {"kind": "pretrain", "data": "tokenize", "seq_len": 32, "global_batch_size": 4, "max_steps": 100, "lr": 1e-3,
         "schedule": {"kind": "constant"}}  # fmt: skip


@pytest.mark.parametrize("law", FITS, ids=lambda law: law.name)
@pytest.mark.parametrize("parameters", [1e8, 1.36e9, 7e10])
def test_a_fits_tokens_are_where_its_loss_is_least_for_that_compute(law, parameters):
    """The loss over many splits of 6 N D: none is better than the one that has this N."""

    def loss(n, d):
        return law.A / n**law.alpha + law.B / d**law.beta

    tokens = law.tokens(parameters)
    best = loss(parameters, tokens)
    for factor in (0.5, 0.8, 0.97, 1.03, 1.25, 2):
        assert loss(parameters * factor, tokens / factor) > best


def test_the_laws_say_what_their_papers_say():
    # Chinchilla: 70B on 1.4T. Hoffmann et al. 2022, table A3, approach 3: 27.1B tokens for 1B parameters (fits of exact
    # exponents come within a tenth). Besiroglu et al. 2024: a ratio of about 20 at Chinchilla's size.
    assert wanted_tokens(70_000_000_000)["20 a parameter"] == 1_400_000_000_000
    hoffmann, besiroglu = FITS
    assert hoffmann.tokens(1e9) == pytest.approx(27.1e9, rel=0.1)
    assert 15 < besiroglu.tokens(70e9) / 70e9 < 25
    assert all("arXiv:" in law.source for law in LAWS)


@pytest.mark.parametrize("passes", [1.5, 4, 16, 60])
def test_repeated_tokens_are_worth_the_integral_of_a_decay(passes):
    """Each repetition is worth exp(-r / R*) of a fresh pass: summed in small steps."""
    steps = 20_000
    width = (passes - 1) / steps
    summed = sum(math.exp(-(step + 0.5) * width / 15.387756) * width for step in range(steps))
    assert effective_tokens(1e9, passes * 1e9) == pytest.approx(1e9 * (1 + summed), rel=1e-6)


def test_tokens_that_are_seen_once_count_whole():
    assert effective_tokens(1000, 400) == 400
    assert effective_tokens(1000, 1000) == 1000
    assert effective_tokens(1000, 10**9) < 1000 * 16.4, "no number of passes is worth more"


def write_result(folder, preset="hybrid_1b3", speed=50_000):
    rows = [
        {"implementation": "transformers", "scope": "step", "preset": preset, "tokens_per_s": 1},
        {"implementation": "pedigree", "scope": "fwd_bwd", "preset": preset, "tokens_per_s": 2},
        {"implementation": "pedigree", "scope": "step", "preset": preset, "tokens_per_s": speed,
         "micro_batch_size": 8, "seq_len": 4096, "precision": "bf16"},
        {"implementation": "pedigree", "kernels": "other", "share": 0.1},
    ]  # fmt: skip
    content = {"hardware": {"gpus": ["Accelerator"]}, "rows": rows}
    (folder / "throughput_a.json").write_text(json.dumps(content))
    return folder


def test_hours_and_cost_come_from_the_measured_step(tmp_path):
    found = hours(PRESETS["hybrid_1b3"], 3_600_000_000, 1, 2.5, write_result(tmp_path))
    # 3.6e9 tokens at 50,000 a second are 72,000 s, 20 hours.
    assert (found["hours"], found["cost"], found["is_projection"]) == (20.0, 50.0, False)
    more = hours(PRESETS["hybrid_1b3"], 3_600_000_000, 8, 2.5, tmp_path)
    assert (more["hours"], more["cost"], more["is_projection"]) == (2.5, 50.0, True)
    assert hours(PRESETS["hybrid_1b3"], 10, 1, None, tmp_path)["cost"] is None


def test_a_model_that_nobody_measured_has_no_hours(tmp_path):
    write_result(tmp_path)
    assert hours(PRESETS["chimera_700m"], 10, 1, None, tmp_path) is None
    assert hours(PRESETS["hybrid_1b3"], 10, 1, None, tmp_path, precision="fp8") is None, "measured in bf16 alone"
    wider = PRESETS["hybrid_1b3"].model_copy(update={"d_ff": 5120})
    assert hours(wider, 10, 1, None, tmp_path) is None
    assert hours(PRESETS["hybrid_1b3"], 10, 1, None, write_result(tmp_path, preset="gone")) is None


def write_tokens(folder, **tokens):
    (folder / "output").mkdir(parents=True)
    sources = [
        {"name": name, "language": "en", "domain": None, "train": {"tokens": count}} for name, count in tokens.items()
    ]
    (folder / "output" / "tokens.json").write_text(json.dumps({"sources": sources}))
    return folder


def test_epochs_follow_the_mixture_and_its_phases(tmp_path):
    # 12,800 tokens: 50 steps at 3:1, then 50 steps of b alone: a gets 4,800 and b 8,000.
    data = write_tokens(tmp_path, a=4_800, b=1_000)
    phases = [{"from_step": 50, "mixture": {"a": 0, "b": 1}}]
    config = PretrainConfig.model_validate({**TUNED, "mixture": {"a": 3, "b": 1}, "phases": phases})
    found = epochs(config, data, 12_800)
    assert found["by_source"] == {"a": 1.0, "b": 8.0}
    assert found["unique_tokens"] == 5_800
    assert found["worth_tokens"] == round(4_800 + effective_tokens(1_000, 8_000))
    assert found["tokens_in_nearly_free_epochs"] == 23_200


def test_data_that_are_not_tokenized_have_no_epochs(tmp_path):
    config = PretrainConfig.model_validate(TUNED)
    assert epochs(config, tmp_path, 12_800) is None
    assert epochs(PretrainConfig.model_validate({**TUNED, "mixture": {"c": 1}}), write_tokens(tmp_path, a=5), 9) is None


@pytest.fixture
def node(tmp_path):
    recipe = load_recipe(RECIPES / "hybrid_1b3.yaml")
    return build_chain(recipe, tmp_path / "runs", STAGES).nodes["pretrain"]


def test_a_budget_says_all_of_it_in_a_few_lines(node, tmp_path):
    found = budget(node, 8, 3.0, write_result(tmp_path))
    assert found["tokens"] == 13_000 * 512 * 4096
    assert set(found["wanted_tokens"]) == {law.name for law in LAWS}
    assert found["epochs"] is None
    found["epochs"] = epochs(PretrainConfig.model_validate(TUNED), write_tokens(tmp_path / "t", a=6_400), 12_800)
    lines = "\n".join(budget_lines(found))
    assert "27.26 billion tokens, 20.0 a parameter" in lines
    assert "(Besiroglu 2024)" in lines
    assert "is a projection" in lines
    assert "a 2.00" in lines
    found["hours"] = None
    assert "nobody measured this model here" in "\n".join(budget_lines(found))


def test_other_stages_have_no_budget(node, tmp_path):
    other = SimpleNamespace(job=SimpleNamespace(kind="sft", model=node.job.model))
    assert budget(other, 1, None, tmp_path) is None


def test_a_warm_start_is_not_held_against_the_laws(node, tmp_path):
    warm = node.job.config.model_copy(update={"from_": "before"})
    job = SimpleNamespace(kind="pretrain", model=node.job.model, config=warm, parents=node.job.parents)
    assert budget(SimpleNamespace(job=job, stage=node.stage), 1, None, tmp_path)["wanted_tokens"] is None


def test_the_plan_shows_the_budget_in_text_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room, "RESULTS", tmp_path)
    command = ["--plan", "--pipeline", str(RECIPES / "hybrid_1b3.yaml"), "--runs", str(tmp_path / "runs")]
    assert main([*command, "--price_per_gpu_hour", "2"]) == 0
    assert "laws of Transformers want 27.27 billion (20 a parameter)" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["pretrain"]["budget"]["parameters"] == stages["pretrain"]["figures"]["parameters"]
    assert stages["clean"]["budget"] is None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--all", "--price_per_gpu_hour", "2"], "--price_per_gpu_hour belongs to --plan"),
        (["--plan", "--price_per_gpu_hour", "-1"], "--price_per_gpu_hour must be a number from 0 to 1000000; got -1"),
    ],
)
def test_a_price_belongs_to_the_plan(argv, line):
    with pytest.raises(ValueError, match=line):
        parse(argv)
