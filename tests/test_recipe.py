"""A recipe becomes typed data; what ``--set`` changes is what the key sees; the schema is the one that is committed."""

import pytest
from fake_chain import RECIPE, STAGES, write_recipe

from model.spec import expand_pattern
from pipelines.credentials import is_secret_value
from pipelines.document import parse
from pipelines.overrides import apply_overrides
from pipelines.recipe import RECIPES, SCHEMA, load_recipe, recipe_schema, schema_text
from stages.base import ConfigError


def load(tmp_path, *overrides, text=RECIPE):
    return load_recipe(write_recipe(tmp_path, text), overrides, STAGES)


def faults(tmp_path, *overrides, text=RECIPE):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, text=text)
    return [(fault.path, fault.line) for fault in caught.value.faults]


def test_a_recipe_is_typed_by_the_kind_of_each_stage(tmp_path):
    recipe = load(tmp_path)
    assert recipe.name == "toy"
    assert recipe.seed == 17
    assert recipe.stages["train"].lr == 0.0002
    assert recipe.stages["train"].betas == (0.9, 0.95)
    assert recipe.stages["tuned"].from_ == "train"
    assert type(recipe.stages["gather"]).__name__ == "GatherConfig"
    assert list(recipe.stages) == ["gather", "train", "tuned"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("12", 12),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("'5'", "5"),
        ("", None),
        ("~", None),
        ("true", True),
    ],
)
def test_scalars_are_read_as_yaml_1_2_reads_them(text, value):
    read = parse(f"x: {text}").data["x"]
    assert read == value
    assert type(read) is type(value)


def test_set_replaces_values_at_any_depth(tmp_path):
    recipe = load(
        tmp_path,
        "train.lr=3e-4",
        "seed=3",
        "model.mixers.m.n_heads=2",
        "gather.sources.0.text=bye",
        "gather.rules.min_words=7",
        "train.betas=[0.8, 0.9]",
        "tuned.from=null",
        "tracking.project=x",
        "train.lr=5e-4",
    )
    assert recipe.stages["train"].lr == 5e-4
    assert recipe.seed == 3
    assert recipe.model.mixers["m"].n_heads == 2
    assert recipe.stages["gather"].sources[0].text == "bye"
    assert recipe.stages["gather"].rules.min_words == 7
    assert recipe.stages["train"].betas == (0.8, 0.9)
    assert recipe.stages["tuned"].from_ is None
    assert recipe.tracking.project == "x"


def test_all_faults_are_reported_at_once_in_the_order_of_lines(tmp_path):  # trap T7
    text = RECIPE.replace("seed: 17", "sead: 17").replace("lr: 2e-4", "lrr: 2e-4")
    text = text.replace("max_steps: 10", "max_steps: x")
    assert faults(tmp_path, text=text) == [
        ("sead", 2),
        ("train.lr", 19),
        ("train.lrr", 23),
        ("tuned.max_steps", 28),
    ]


def test_a_value_from_set_has_no_line(tmp_path):
    assert faults(tmp_path, "train.lr=-1", "nothing.x=1") == [("nothing.x", None), ("train.lr", None)]


def test_a_recipe_without_training_needs_no_model(tmp_path):
    text = "name: t\nstages:\n  g: {kind: gather, sources: [{type: text, text: a}]}\n"
    assert load(tmp_path, text=text).model is None


def test_a_refused_value_is_reported_once(tmp_path):
    assert faults(tmp_path, "train.lr=.inf") == [("train.lr", None)]
    assert faults(tmp_path, text=RECIPE.replace("lr: 2e-4", "lr: .nan")) == [("train.lr", 23)]


@pytest.mark.parametrize(
    "value",
    ["hf_" + "a" * 30, "sk-proj-" + "b" * 30, "ghp_" + "c" * 36, "AKIA" + "D" * 16, "https://me:pass@host/x"],
)
def test_credentials_are_never_repeated(tmp_path, value):  # trap O6
    assert is_secret_value(value)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"gather.sources.0.text={value}", f"train.{value[:8]}.api_key={value}", f"x.y={value}")
    assert value not in str(caught.value)
    assert "environment" in str(caught.value)


def test_a_secret_of_the_environment_is_recognised(tmp_path, monkeypatch):  # trap O6
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    assert faults(tmp_path, "tracking.project=correct-horse-battery") == [("tracking.project", None)]


def test_words_of_text_processing_are_no_secrets(tmp_path):
    text = RECIPE.replace("text: hello", "text: hello, eos_token: x")
    assert faults(tmp_path, text=text) == [("gather.sources.0.eos_token", 18)]


def test_own_text_reaches_the_conversations_that_are_drawn_from_the_corpus(tmp_path):
    own = tmp_path / "text"
    own.mkdir()
    for number in range(130):
        (own / f"{number}.txt").write_text("The quick brown fox jumps over the lazy dog and runs away from it. " * 9)
    recipe = load_recipe(RECIPES / "default.yaml", data=own)
    (text,) = recipe.stages["clean"].sources
    (passages,) = recipe.stages["languages"].sources
    assert (passages.turns, passages.corpus_source, passages.language) == ("language", text.name, "en")
    assert {source.type for source in recipe.stages["messages"].sources} == {"package", "tasks"}
    assert recipe.stages["messages"].corpus is None


def test_own_text_takes_the_place_of_the_sources(tmp_path):
    from stages import STAGES as REAL

    own = tmp_path / "own"
    own.mkdir()
    (own / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 20)
    text = "name: t\nstages:\n  clean: {kind: clean, sources: []}\n"
    recipe = load_recipe(write_recipe(tmp_path, text), [], REAL, own)
    assert [source.type for source in recipe.stages["clean"].sources] == ["files"]
    with pytest.raises(ConfigError, match="--data"):
        load_recipe(write_recipe(tmp_path, text), [], REAL, tmp_path / "absent")


def test_the_committed_schema_is_that_of_the_code():
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), "run `make schema`"


def test_the_schema_discriminates_stages_by_kind_and_forbids_unknown_keys():
    schema = recipe_schema(STAGES)
    (stages,) = schema["properties"]["stages"]["patternProperties"].values()
    assert stages["discriminator"]["propertyName"] == "kind"
    assert schema["additionalProperties"] is False
    assert "from" in schema["$defs"]["TrainConfig"]["properties"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_each_shipped_recipe_is_valid_and_names_the_schema(path):
    recipe = load_recipe(path)
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json")
    assert recipe.stages


def test_brackets_without_end_are_one_line_and_no_recursion():
    with pytest.raises(ValueError, match="layers must have at most 128 brackets; got 3000"):
        expand_pattern("(" * 3000 + "mamba2" + ")" * 3000)


def test_a_key_with_a_slash_or_a_dash_can_be_set():
    document = parse("stages: {train: {mixture: {hi/-: 1, en/science: 2}}}")
    apply_overrides(document, ["train.mixture.hi/-=0", "train.mixture.en/science=3"], ["stages"])
    assert document.faults == []
    assert document.data["stages"]["train"]["mixture"] == {"hi/-": 0, "en/science": 3}
