"""One YAML file a pipeline, read into a typed, frozen ``Recipe``; all that is wrong with it is reported at once.

``python -m pipelines.recipe --write-schema`` writes ``recipes/schema.json``, which editors use for completion.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast

from pydantic import ConfigDict, Field, PrivateAttr, create_model

from model.spec import ModelSpec
from pipelines.credentials import remove_secrets
from pipelines.document import Document, Place, dotted, parse, place_of
from pipelines.graph import PlacedFault, Registry, graph_faults, is_path
from pipelines.mending import Mended, common, mended, without_echoes
from pipelines.overrides import apply_overrides
from pipelines.own_text import use_own_text
from pipelines.suggest import suggestion
from pipelines.validation import shown, validate
from stages.base import EXIT_DONE, EXIT_FAILED, ConfigError, Fault, Section, Stage, StageConfig

RECIPES = Path(__file__).resolve().parent / "recipes"
DEFAULT = RECIPES / "default.yaml"
SCHEMA = RECIPES / "schema.json"
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
MAX_STAGES = 100


class TrackingConfig(Section):
    """Where the run is mirrored; ``metrics.jsonl`` beside every artifact is the truth in any case."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """``auto`` is online when the environment holds a key and offline otherwise."""
    project: str = Field(default="pedigree", min_length=1, max_length=128)
    """W&B project."""
    entity: str | None = None
    """W&B user or team; none takes the account's default."""


class RecipeHead(Section):
    """What a recipe says beside its stages."""

    name: str = Field(pattern=NAME)
    """Name of the pipeline; its artifacts lie in ``runs/<name>/``."""
    seed: int = Field(default=17, ge=0, lt=2**32)
    """The one seed from which every stage's randomness derives."""
    model: ModelSpec | None = None
    """The model that the recipe's training stages build; may be absent when none does."""
    tracking: TrackingConfig = TrackingConfig()
    """Mirroring of metrics; not part of any key."""


class Recipe(RecipeHead):
    """A validated recipe; ``stages`` holds each stage's own config type by the stage's name, in the file's order."""

    model_config = ConfigDict(serialize_by_alias=True)

    stages: dict[str, StageConfig]
    """The stages by name; ``kind`` says which config a stage has."""

    _document: Document = PrivateAttr(default_factory=Document)

    def fault(self, path: str, message: str) -> Fault:
        """A fault at a path as ``--set`` names it, with the line of the file that it comes from."""
        place = place_of(path)
        place = ("stages", *place) if place and place[0] in self.stages else place
        return Fault(dotted(place), message, self._document.line(place))


class RecipeError(ConfigError):
    """What is wrong with a recipe by itself.

    ``mended`` is the recipe with other values in place of the faulty ones, as unlike one another as may be: what is
    wrong with the chain of every one of them is wrong whatever they become. Stages that cannot be mended are left out,
    and those that go on from them; ``whole`` says that none is.
    """

    def __init__(self, faults: list[Fault], mended: Sequence[Recipe] = (), whole: bool = False) -> None:
        super().__init__(ordered(faults))
        self.mended, self.whole = mended, whole


def ordered(faults: Sequence[Fault]) -> list[Fault]:
    """Faults by line, those without one first."""
    return sorted(faults, key=lambda fault: (fault.line or 0, fault.path))


def load_recipe(
    path: Path, overrides: Sequence[str] = (), stages: Registry | None = None, data: Path | None = None
) -> Recipe:
    """The recipe in ``path`` after ``overrides`` (``pretrain.lr=3e-4``), checked as a whole.

    ``data`` is a folder of one's own text that takes the place of every ``clean`` stage's sources.

    Raises:
        ConfigError: with every fault found, ordered by line; a ``RecipeError`` where the text could be read.
    """
    registry = _registry(stages)
    document = parse(_text(path))
    if not document.faults and not isinstance(document.data, dict):
        # What it holds is not repeated: the file may be none of ours, and hold secrets.
        found = document.data
        got = {"NoneType": "nothing", "str": "text", "list": "a list"}.get(type(found).__name__, "a number")
        document.faults.append(((), Fault("recipe", f"must be a mapping of fields; got {got}; start with `name:`", 1)))
    if not isinstance(document.data, dict):
        raise ConfigError([fault for _, fault in document.faults])
    apply_overrides(document, list(overrides), list(RecipeHead.model_fields))
    if data is not None:
        use_own_text(document, data)
    remove_secrets(document)
    return _validated(document, registry)


def recipe_type(stages: Registry | None = None) -> type[Recipe]:
    """``Recipe`` with its stages typed as the union of the registered configs, discriminated on ``kind``."""
    configs = tuple(stage.Config for stage in _registry(stages).values())
    union: Any = configs[0]
    if len(configs) > 1:
        any_of: Any = Union
        union = Annotated[any_of[configs], Field(discriminator="kind")]
    description = Recipe.model_fields["stages"].description
    field = (dict[Annotated[str, Field(pattern=NAME)], union], Field(min_length=1, description=description))
    return cast(type[Recipe], create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, stages=field))


def recipe_schema(stages: Registry | None = None) -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = recipe_type(stages).model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The text of ``schema.json``."""
    return json.dumps(recipe_schema(), indent=1, sort_keys=True) + "\n"


def _registry(stages: Registry | None) -> Registry:
    if stages is None:
        from stages import STAGES

        return STAGES
    return stages


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        there = ", ".join(sorted(found.name for found in RECIPES.glob("*.yaml"))) or "none"
        message = f"must be a recipe's file; got {path}, which is not there; in {RECIPES} there are {there}"
        raise ConfigError(Fault("--pipeline", message)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(Fault("recipe", f"must be UTF-8 text; got byte {error.object[error.start]:#x}")) from error
    except OSError as error:
        raise ConfigError(Fault("--pipeline", f"must be a readable file; got {path}: {error.strerror}")) from error


def _validated(document: Document, registry: Registry) -> Recipe:
    data: dict[str, Any] = document.data
    head, faults = validate(RecipeHead, {key: data[key] for key in data if key != "stages"}, (), document)
    faults = [_naming_stages(placed) for placed in faults]
    raw, more = _sections(data.get("stages"), document)
    faults += more
    known: dict[str, type[Stage]] = {}
    for name, section in raw.items():
        if message := _kind_fault(name, section, registry):
            faults.append(_at(document, ("stages", name, "kind"), message))
        else:
            known[name] = registry[section["kind"]]
    configs: dict[str, Mended] = {}
    for name, stage in known.items():
        config, found = validate(stage.Config, raw[name], ("stages", name), document)
        configs[name] = mended(stage.Config, raw[name]) if config is None else Mended([config])
        faults += found
    tied = graph_faults(document, known, raw)
    faults += tied
    refused = [dotted(place) for place, _ in faults]
    faults += _checks(document, known, configs, _model(data), refused)
    if faults or document.faults or head is None:
        apart = {place[1] for place, _ in tied}
        apart |= {place[1] for place, _ in more if len(place) > 1}
        fitting = {name: found for name, found in configs.items() if found.configs and name not in apart}
        made = _mended(document, head, fitting, registry)
        whole = all(list(recipe.stages) == list(raw) for recipe in made)
        raise RecipeError([fault for _, fault in _without_echoes(document.faults, faults)], made, whole)
    return _recipe(document, head, {name: found.configs[0] for name, found in configs.items()}, recipe_type(registry))


def _recipe(document: Document, head: RecipeHead, configs: Mapping[str, Any], type_: type[Recipe]) -> Recipe:
    recipe = type_(**{name: getattr(head, name) for name in RecipeHead.model_fields}, stages=dict(configs))
    recipe._document = document
    return recipe


def _mended(
    document: Document, head: RecipeHead | None, configs: Mapping[str, Mended], registry: Registry
) -> list[Recipe]:
    """The recipe with the first, the second and the last of each stage's ``configs``; none of a faulty ``--set``.

    What it was to mend, nobody knows.
    """
    if any(fault.line is None for _, fault in document.faults):
        return []
    head = head or RecipeHead(name="unnamed", model=_model(document.data))
    most = max((len(found.configs) for found in configs.values()), default=0)
    made_up = {name for name, found in configs.items() if found.made_up}
    made = []
    for number in sorted({0, min(1, most - 1), most - 1} if most else ()):
        chosen = {name: found.configs[number % len(found.configs)] for name, found in configs.items()}
        chosen = _with_parents(chosen, made_up, registry)
        if chosen:
            made.append(_recipe(document, head, chosen, recipe_type(registry)))
    return made


def _with_parents(configs: Mapping[str, Any], made_up: set[str], registry: Registry) -> dict[str, Any]:
    """``configs`` without those that go on, near or far, from a stage that is not among them, or is made up."""
    kept = dict(configs)
    while lost := [one for one, config in kept.items() if not set(_parents(config, registry)) <= kept.keys() - made_up]:
        for name in lost:
            del kept[name]
    return kept


def _parents(config: Any, registry: Registry) -> list[str]:
    given = [getattr(config, field) for field in registry[config.kind].inputs]
    return [parent for parent in given if parent is not None and not is_path(parent)]


def _naming_stages(placed: PlacedFault) -> PlacedFault:
    """The head is validated without its stages, so ``stagse`` must still find its way home."""
    place, fault = placed
    near = suggestion(str(place[-1]) if place else "", ["stages"], "field")
    if len(place) == 1 and "is not a field" in fault.message and near.startswith("did"):
        fault = dataclasses.replace(fault, message=f"{fault.message.rpartition('; ')[0]}; {near}")
    return place, fault


def _sections(stages: Any, document: Document) -> tuple[dict[str, dict[str, Any]], list[PlacedFault]]:
    """The stage sections with valid names, and what is wrong with the others."""
    if not isinstance(stages, dict) or not stages or len(stages) > MAX_STAGES:
        got = "nothing" if stages is None else shown(stages)
        message = f"must map 1 to {MAX_STAGES} names to their stages; got {got}; write `clean:` with its fields below"
        return {}, [_at(document, ("stages",), message)]
    faults = []
    for name, raw in stages.items():
        if fault := _name_fault(name):
            faults.append(_at(document, ("stages", name), fault))
        if not isinstance(raw, dict):
            got = shown(raw)
            message = f"must be a mapping of fields; got {got}; write `kind:` and its fields indented below it"
            faults.append(_at(document, ("stages", name), message))
    return {name: raw for name, raw in stages.items() if isinstance(raw, dict)}, faults


def _name_fault(name: str) -> str | None:
    if not re.fullmatch(NAME, name):
        return (
            f"must be a name of at most 64 lower-case letters, digits, - and _; got {shown(name)}; rename the stage "
            "(names become directories)"
        )
    if name in Recipe.model_fields:
        return f"must differ from the recipe's own fields, or --set could not tell them apart; rename it {name}-stage"
    return None


def _kind_fault(name: str, raw: dict[str, Any], registry: Registry) -> str | None:
    kinds = ", ".join(registry)
    if "kind" not in raw:
        return f"is required and absent; set one of {kinds}; {suggestion(name, registry, 'kind')}"
    if not isinstance(raw["kind"], str) or raw["kind"] not in registry:
        near = suggestion(str(raw["kind"]), registry, "kind")
        return f"must be one of {kinds}; got {shown(raw['kind'])}; {near}"
    return None


def _model(data: dict[str, Any]) -> ModelSpec | None:
    try:
        return ModelSpec.model_validate(data.get("model"))
    except ValueError:
        return None


def _checks(
    document: Document,
    known: dict[str, type[Stage]],
    configs: dict[str, Mended],
    model: ModelSpec | None,
    refused: Sequence[str],
) -> list[PlacedFault]:
    """Faults that stages find between fields, and a model section that is needed and absent.

    With a faulty model section a stage looks over its own fields alone, and of a stage with faulty fields that is told
    which is wrong whatever they become, so that nothing hides anything.
    """
    faults = []
    users = [name for name, stage in known.items() if stage.uses_model]
    if users and document.data.get("model") is None:
        faults.append(_at(document, ("model",), f"is required by {', '.join(users)} and absent; write the section"))
    for name, stage in known.items():
        own = [path.removeprefix(f"{name}.") for path in refused if path.startswith(f"{name}.")]
        for fault in common(_checked(stage, config, model) for config in configs[name].configs):
            place = place_of(fault.path)
            if without_echoes([Fault(dotted(place), "")], own):
                faults.append(_at(document, ("stages", name, *place), fault.message))
    return faults


def _checked(stage: type[Stage], config: Any, model: ModelSpec | None) -> list[Fault]:
    try:
        return stage.check(config, model)
    except ConfigError as error:
        return error.faults


def _at(document: Document, place: Place, message: str) -> PlacedFault:
    return place, Fault(dotted(place), message, document.line(place))


def _without_echoes(refused: list[PlacedFault], found: list[PlacedFault]) -> list[PlacedFault]:
    """All faults but those that only follow from a value that was refused already and taken out."""
    places = [place for place, _ in refused]
    return refused + [(place, fault) for place, fault in found if place not in places]


def main(argv: list[str] | None = None) -> int:
    """Write the schema anew, or say whether the committed one is up to date."""
    parser = argparse.ArgumentParser(description="The recipe's JSON Schema.", allow_abbrev=False)
    parser.add_argument("--write-schema", action="store_true", help=f"write {SCHEMA.name} instead of comparing it")
    if parser.parse_args(argv).write_schema:
        SCHEMA.write_text(schema_text(), encoding="utf-8")
        return EXIT_DONE
    same = SCHEMA.is_file() and SCHEMA.read_text(encoding="utf-8") == schema_text()
    print(f"{SCHEMA.name} is {'up to date' if same else 'out of date; run make schema'}")
    return EXIT_DONE if same else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
