"""Every shipped recipe is valid, says what it claims, and plans sane figures."""

import json
from pathlib import Path

import pytest
import yaml

from model import cost
from model.presets import PRESETS
from pipelines.recipe import RECIPES, SCHEMA, load_recipe
from stages import STAGES

SHIPPED = sorted(RECIPES.glob("*.yaml"))
PRESET_OF = {
    "default": "nano_chimera",
    "tiny_helix": "nano_helix",
    "chimera_700m": "chimera_700m",
    "hybrid_1b3": "hybrid_1b3",
    "helix_900m": "helix_900m",
}
LARGE = ["chimera_700m", "hybrid_1b3", "helix_900m"]


def recipe(name: str):
    return load_recipe(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_named_like_its_file(path):
    assert load_recipe(path).name == path.stem
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_fits_the_schema_that_editors_use(path):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipes_own_checks_find_nothing(path):
    loaded = load_recipe(path)
    for config in loaded.stages.values():
        assert STAGES[config.kind].check(config, loaded.model) == []


@pytest.mark.parametrize("name", PRESET_OF)
def test_a_recipes_model_is_the_preset_of_its_name(name):
    assert recipe(name).model == PRESETS[PRESET_OF[name]]


def test_every_recipe_has_a_preset():
    assert {path.stem for path in SHIPPED} == set(PRESET_OF)


@pytest.mark.parametrize("name", PRESET_OF)
def test_the_tokenizer_fills_the_embedding(name):
    loaded = recipe(name)
    assert loaded.stages["tokenizer"].vocab_size == loaded.model.vocab_size


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_plans_twenty_tokens_a_parameter(name):
    loaded = recipe(name)
    plan = STAGES["pretrain"].plan(loaded.stages["pretrain"], loaded.model, 8)
    assert plan["parameters"] == cost.count_parameters(PRESETS[name]).total
    assert 19 <= plan["tokens"] / plan["parameters"] <= 22
    # Six a parameter and token, within a third: the embedding look-up costs nothing, scans and attention come on top.
    assert 0.67 <= plan["training_flops"] / (6 * plan["tokens"] * plan["parameters"]) <= 1.33


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_fits_the_gpu_that_its_comment_names(name):
    loaded = recipe(name)
    plan = STAGES["pretrain"].plan(loaded.stages["pretrain"], loaded.model, 8)
    text = (RECIPES / f"{name}.yaml").read_text()
    claimed = int(text.split(" GB a GPU")[0].split()[-1])
    assert plan["memory_per_gpu_bytes"] / 1e9 == pytest.approx(claimed, rel=0.1)
    assert plan["memory_per_gpu_bytes"] < 80e9


@pytest.mark.parametrize("name", PRESET_OF)
def test_a_batch_divides_over_one_to_eight_devices(name):
    config = recipe(name).stages["pretrain"]
    assert all(config.global_batch_size % world == 0 for world in (1, 2, 4, 8))


@pytest.mark.parametrize("name", LARGE)
def test_hub_sources_are_pinned_and_mixed_by_name(name):
    stages = recipe(name).stages
    read = stages[stages["pretrain"].data]
    # Shards hold the corpus's sources; a stream has its own.
    sources = read.sources if read.kind == "stream" else stages[read.corpus].sources
    assert {source.type for source in sources} == {"hub"}
    assert set(stages["pretrain"].mixture) == {source.name for source in sources}
    assert sum(stages["pretrain"].mixture.values()) == pytest.approx(1)
    assert all(len(set(source.revision)) > 4 for source in sources)  # a real commit, not a placeholder


def test_tiny_helix_reads_what_the_default_pins():
    small, default = recipe("tiny_helix"), recipe("default")
    known = {source.name: source for source in default.stages["clean"].sources}
    assert all(source == known[source.name] for source in small.stages["clean"].sources)
    assert {m.mixer for m in small.model.layer_mixers} == {"mamba2", "gla", "attention"}


def test_a_model_that_departs_from_its_preset_is_seen(tmp_path: Path):
    text = (RECIPES / "helix_900m.yaml").read_text().replace("window: 1024", "window: 512")
    (tmp_path / "other.yaml").write_text(text)
    assert load_recipe(tmp_path / "other.yaml").model != PRESETS["helix_900m"]
