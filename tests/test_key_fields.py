"""Every field of every real stage, and of the model, against its key: what decides the result, and nothing else."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import yaml
from fake_chain import write_recipe
from golden_recipes import DEFAULT, TINY_HELIX
from pydantic import BaseModel, ValidationError

from data.clean_config import RayExecutor, SlurmExecutor
from data.source_config import Package
from data.tokenizer_config import PublicTokenizer
from model.spec import ModelSpec
from pipelines.chain import build_chain, identity_of
from pipelines.recipe import RECIPES, load_recipe
from stages import STAGES
from stages.runtime.alarms import AlarmConfig
from stages.runtime.gates import GateConfig

GOLDEN = {
    "default/clean": "b45aa04f1acc",
    "default/tokenizer": "d0890ea1c44b",
    "default/tokenize": "dd0e8c988e15",
    "default/pretrain": "c3dd1a490072",
    "tiny_helix/clean": "b45aa04f1acc",
    "tiny_helix/tokenizer": "ec2eb5ef561b",
    "tiny_helix/tokenize": "7fd7bf96c94e",
    "tiny_helix/pretrain": "8bc8b7ddde2d",
}
"""First digits of real stages' keys. If they change, all users' artifacts are orphaned: never by accident."""

ALARMS = {f"alarms.{name}" for name in AlarmConfig.model_fields}
GATES = {f"gates.{name}" for name in GateConfig.model_fields}
FINETUNE = {
    "micro_batch_size", "deepspeed", "activation_checkpointing", "eval_every_steps", "eval_batch_size",
    "checkpoint_every_steps", "keep_checkpoints", "log_every_steps", "rewarm", "guards.max_skipped_in_a_row", *ALARMS,
}  # fmt: skip
EXECUTOR_FIELDS = set(SlurmExecutor.model_fields) | set(RayExecutor.model_fields)
OPERATIONAL = {
    "clean": {
        "sources.path", "sources.streaming", "workers", "quality.labels", "decontaminate.files.path",
        "decontaminate.unchecked", *(f"executor.{name}" for name in EXECUTOR_FIELDS),
    },
    "tokenizer": {"progress_seconds", *(f"compare_with.{name}" for name in PublicTokenizer.model_fields),
                  *(f"compare_with.package.{name}" for name in Package.model_fields)},
    "profile": {"progress_seconds"},
    "tokenize": {"workers", "progress_seconds"},
    "stream": {"sources.path", "sources.streaming", "decontaminate.files.path", "decontaminate.unchecked"},
    "pretrain": {
        "micro_batch_size", "deepspeed", "activation_checkpointing", "compile", "max_epochs", "prefetch_steps",
        "data_workers", "passes",
        "eval_every_steps", "eval_batch_size", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps",
        "rewarm", "guards.max_skipped_in_a_row", *ALARMS,
    },
    "messages": {"sources.path", "shown_faults"},
    "preferences": {"sources.path"},
    "problems": {"sources.path", "workers"},
    "evaluate": {"suites.code.workers", "suites.harness.files.path", *GATES},
    "export": {"timing_prompt_tokens", "timing_new_tokens", "threads"},
    **dict.fromkeys(("sft", "qlora"), FINETUNE | {"min_stop_probability"}),
    "grpo": FINETUNE | {"max_logprob_gap", "probe.min_informative"},
    "dpo": FINETUNE,
    "model": {"mixers.chunk_size", "mixers.backend"},
}  # fmt: skip
"""All that stays out of keys. A field that comes here says that it cannot change what the stage makes."""

SOURCE = {"name": "a", "language": "en", "licence": "none", "rules": "none"}
FILES = {**SOURCE, "include": ["*.txt"]}
FILTERED = {"filters": [{"field": "a", "min": 0.5, "max": 2.0, "equals": 1.0, "in": [1.0, 2.0]}]}
PACKAGE = {"name": "p", "version": "1", "sha256": "a" * 64}
PINNED = {"packages": [PACKAGE], "include": ["*.jsonl"]}
PUBLIC = {"package": PACKAGE, "file": "a.tiktoken", "split": "qwen2"}
HUB = {"type": "hub", "repository": "o/n", "revision": "a" * 40}
QUALITY = {"labels": "labels.jsonl", "sources": ["a"]}
DECONTAMINATE = {"files": [{"name": "a", "path": "a.jsonl", "fields": ["text"]}]}
SAID = {"name": "a", "language": "en", "licence": "none"}
TUNED = {"from": "pretrain", "max_length": 32, "global_batch_size": 8, "max_steps": 9, "lr": 1e-3}
SCHEDULES: list[dict[str, Any]] = [{"kind": "cosine"}, {"kind": "wsd", "decay_steps": 2}, {"kind": "constant"}]
OPTIMIZERS: list[dict[str, Any]] = [{"kind": "adamw"}, {"kind": "adamw_8bit"}, {"kind": "muon"}]
TUNINGS = [
    {**TUNED, "schedule": schedule, "optimizer": optimizer}
    for schedule, optimizer in zip(SCHEDULES, OPTIMIZERS, strict=True)
]
PRETRAIN = {"seq_len": 32, "global_batch_size": 4, "max_steps": 9, "lr": 1e-3}
LOCAL = {"name": "x_local", "kind": "choice", "licence": "MIT"}
SUITES = {
    **{name: {} for name in ("bpb", "reasoning", "safety", "format", "samples")},
    "margins": {"facts": 4},
    "decoding": {"facts": 2},
    "needles": {"languages": ["en", "de"]},
    "code": {"samples": 4, "temperature": 0.5},
    "harness": {
        "files": [
            {**LOCAL, "type": "file", "path": "x.jsonl"},
            {**LOCAL, "type": "package", "package": PACKAGE, "member": "x.jsonl"},
        ]
    },
}
BASES: dict[str, list[dict[str, Any]]] = {
    "clean": [
        {"sources": [{**source, **FILTERED}], "quality": QUALITY, "decontaminate": DECONTAMINATE, "executor": executor}
        for source, executor in (
            ({**FILES, "type": "package", "packages": [PACKAGE]}, {"kind": "slurm", "partition": "p"}),
            ({**FILES, "type": "files", "path": "text"}, {"kind": "local"}),
            ({**SOURCE, **HUB}, {"kind": "ray"}),
        )
    ],
    "tokenizer": [
        {"corpus": "clean", "compare_with": [{"name": "a"}]},
        {"corpus": "clean", "model_type": "import", **PUBLIC, "compare_with": [{"name": "a", **PUBLIC}]},
    ],
    "tokenize": [{"corpus": "clean", "tokenizer": "tokenizer"}],
    "stream": [
        {"tokenizer": "tokenizer", "passes": {"a": 2}, "sources": [source], "decontaminate": DECONTAMINATE}
        for source in ({**FILES, "type": "files", "path": "text", **FILTERED}, {**SOURCE, **HUB, **FILTERED})
    ],
    "pretrain": [
        PRETRAIN
        | {"schedule": schedule, "mixture": {"en": 1.0}, "phases": [{"from_step": 4, "mixture": {"en": 2.0}}]}
        | {"optimizer": optimizer}
        for schedule, optimizer in zip(SCHEDULES, OPTIMIZERS, strict=True)
    ],
    "messages": [
        {"corpus": "clean", "tasks": "tasks", "sources": [{**SAID, **source}]}
        for source in (
            {"type": "files", "path": "text", "include": ["*.jsonl"]},
            {"type": "package", **PINNED},
            HUB,
            {"type": "corpus", "corpus_source": "a"},
            {"type": "tasks"},
        )
    ],
    "tasks": [{"tasks": [{"name": "parity", "size": 4, "train": 100, "heldout": 100}]}],
    "preferences": [
        {"sources": [source]}
        for source in (
            {"type": "templates"},
            {**SAID, "type": "files", "path": "pairs.jsonl"},
            {**SAID, "type": "package", **PINNED},
            {**SAID, **HUB},
        )
    ],
    "profile": [{"corpus": "clean", "tokenizer": "tokenizer", "scores": "evaluate-sft"}],
    "facts": [{"countries": PACKAGE, "names": PACKAGE}],
    "problems": [
        {"sources": [{"name": "a", "licence": "none", "format": "humaneval", **source}]}
        for source in ({"type": "files", "path": "p.jsonl"}, {"type": "package", "package": PACKAGE, "file": "p.jsonl"})
    ],
    "sft": [{**tuned, "data": "messages"} for tuned in TUNINGS],
    "dpo": TUNINGS,
    "qlora": [{**tuned, "data": "messages"} for tuned in TUNINGS],
    "grpo": [{**tuned, "max_completion_length": 8} for tuned in TUNINGS],
    "evaluate": [
        {
            "from": "pretrain",
            "data": "tokenize",
            "messages": "messages",
            "tasks": "tasks",
            "preferences": "preferences",
            "problems": "problems",
            "facts": "facts",
            "gates": [{"metric": "bpb/de", "max": 9.0, "min": 0.5, "max_regression": 0.5, "against": "parent"}],
            "suites": SUITES,
        }
    ],
    "export": [{"from": "pretrain"}],
}
"""Configs that hold every kind of section; a stage that is missing here is taken from the recipes that ship."""

MODEL = {
    "d_model": 32, "d_ff": 48, "vocab_size": 320, "max_seq_len": 64, "layers": "ssd gla att",
    "mixers": {
        "ssd": {"mixer": "mamba2", "d_state": 8, "head_dim": 16},
        "gla": {"mixer": "gla", "n_heads": 2, "head_k_dim": 8, "head_v_dim": 16},
        "att": {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "window": 24},
    },
}  # fmt: skip

Path = tuple[str | int, ...]


class Case(NamedTuple):
    """One field of one config."""

    owner: str
    plain: dict[str, Any]
    path: Path
    annotation: Any

    @property
    def name(self) -> str:
        """The dotted name, places in lists and words of mappings left out: ``sources.packages.sha256``."""
        kept, value = [], TYPES[self.owner].model_validate(self.plain)
        for word in self.path:
            if isinstance(value, BaseModel):
                kept.append(str(word))
            value = step_into(value, word)
        return ".".join(kept)


def step_into(value: Any, word: str | int) -> Any:
    return getattr(value, str(word)) if isinstance(value, BaseModel) else value[word]


def fields(value: Any, path: Path = (), annotation: Any = None) -> list[tuple[Path, Any]]:
    """Path and annotation of every plain value below ``value``, nested sections entered."""
    if isinstance(value, BaseModel):
        inner = [(name, getattr(value, name), field.annotation) for name, field in type(value).model_fields.items()]
    elif isinstance(value, list | dict) and value and isinstance(next(iter(members(value)))[1], BaseModel):
        inner = [(word, item, None) for word, item in members(value)]
    else:
        # A word that tells sections apart has one possible value.
        return [] if get_origin(annotation) is Literal and len(get_args(annotation)) == 1 else [(path, annotation)]
    return [found for word, item, its in inner for found in fields(item, (*path, word), its)]


def members(value: list[Any] | dict[str, Any]) -> list[tuple[Any, Any]]:
    return list(value.items() if isinstance(value, dict) else enumerate(value))


def bases(kind: str) -> list[dict[str, Any]]:
    shipped = [yaml.safe_load(path.read_text()) for path in sorted(RECIPES.glob("*.yaml"))]
    stages = [stage for recipe in shipped for stage in recipe["stages"].values() if stage["kind"] == kind]
    found = BASES.get(kind, stages)
    assert found, f"no recipe uses the stage {kind}: add a config of it to BASES"
    return [{"kind": kind, **base} for base in found]


TYPES: dict[str, type[BaseModel]] = {"model": ModelSpec, **{kind: stage.Config for kind, stage in STAGES.items()}}
PLAIN = {"model": [MODEL], **{kind: bases(kind) for kind in STAGES}}
CASES = [
    Case(owner, TYPES[owner].model_validate(plain).model_dump(), *field)
    for owner, plains in PLAIN.items()
    for plain in plains
    for field in fields(TYPES[owner].model_validate(plain))
]


def candidates(value: Any, annotation: Any) -> list[Any]:
    """Values to try in place of ``value``; the config's own checks choose among them."""
    tried: list[Any] = words(annotation)
    if isinstance(value, bool):
        tried += [not value]
    elif isinstance(value, int | float):
        tried += [value + 1, value / 2, value * 2, 0.25]
    elif isinstance(value, str):
        tried += [f"{value}x", f"x{value}", f"{value} {value}", "b" * 40, "b" * 64]
    elif isinstance(value, list | tuple):
        tried += [[*value, "x"], [*value, 4], [item / 2 for item in value if isinstance(item, float)], value[:1]]
    elif isinstance(value, dict):
        tried += [{**value, "de": 0.5}, {**value, "de": "x"}, {**value, "de": 3}]
    return tried or [3, 4096, "x", {"de": 0.5}, {"a": "x"}, ["x"], PACKAGE]


def words(annotation: Any) -> list[Any]:
    """The words of a ``Literal``, also of one that may be left out."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for item in get_args(annotation) if get_origin(item) is Literal for word in get_args(item)]


def at(config: BaseModel, path: Path) -> Any:
    value: Any = config
    for word in path:
        value = step_into(value, word)
    return value


def changed(case: Case) -> Any:
    """The config with another valid value in the case's field."""
    before = at(TYPES[case.owner].model_validate(case.plain), case.path)
    for value in candidates(before, case.annotation):
        plain = copy.deepcopy(case.plain)
        holder = plain
        for word in case.path[:-1]:
            holder = holder[word]  # type: ignore[index]
        holder[case.path[-1]] = value  # type: ignore[index]
        try:
            config = TYPES[case.owner].model_validate(plain)
        except ValidationError:
            continue
        if at(config, case.path) != before:
            return config
    raise AssertionError(f"no other valid value found for {case.name}; add one to candidates()")


def hashed(owner: str, config: Any) -> str:
    """What of ``config`` enters the key, the parents and the sources' content left out."""
    if owner == "model":
        pretrain = STAGES["pretrain"]
        identity = identity_of(pretrain, pretrain.Config.model_validate(bases("pretrain")[0]), config, 17, {})
        return json.dumps(identity["model"], sort_keys=True)
    return json.dumps(STAGES[owner].key_config(config), sort_keys=True)


def stands_elsewhere(case: Case, config: Any) -> bool:
    """Whether the key has the field in another place: an input as the parent's key, an extension in the children's."""
    return case.owner != "model" and case.name in {*STAGES[case.owner].inputs, *STAGES[case.owner].extension(config)}


def identify(case: Case) -> str:
    return f"{case.owner}-{'.'.join(map(str, case.path))}"


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_a_field_changes_the_key_unless_it_is_operational(case):
    before, after = TYPES[case.owner].model_validate(case.plain), changed(case)
    same = case.name in OPERATIONAL.get(case.owner, set()) or stands_elsewhere(case, before)
    assert (hashed(case.owner, before) == hashed(case.owner, after)) is same


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "max_steps"], ids=identify)
def test_a_length_is_in_the_key_or_in_the_extension_never_in_neither(case):
    stage, before, after = STAGES[case.owner], TYPES[case.owner].model_validate(case.plain), changed(case)
    seen = [(stage.key_config(config), stage.extension(config)) for config in (before, after)]
    assert seen[0] != seen[1]


def test_the_kind_of_a_nested_section_changes_the_key():
    for kind in STAGES:
        configs = [TYPES[kind].model_validate(plain) for plain in bases(kind)]
        assert len({hashed(kind, config) for config in configs}) == len({json.dumps(plain) for plain in bases(kind)})


def sections(annotation: Any) -> set[type[BaseModel]]:
    """Every section that an annotation can hold, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = [field.annotation for field in annotation.model_fields.values()]
        return {annotation}.union(*(sections(item) for item in inner))
    return set().union(*(sections(item) for item in get_args(annotation)))


def held(value: Any) -> set[type[BaseModel]]:
    if isinstance(value, BaseModel):
        return {type(value)}.union(*(held(getattr(value, name)) for name in type(value).model_fields))
    inner = members(value) if isinstance(value, list | dict) else []
    return set().union(*(held(item) for _, item in inner))


@pytest.mark.parametrize("owner", TYPES)
def test_no_section_escapes_the_test_above(owner):
    seen = set().union(*(held(TYPES[owner].model_validate(plain)) for plain in PLAIN[owner]))
    assert sections(TYPES[owner]) - seen == set(), "add a config that holds it to BASES"


def test_golden_keys_of_the_real_stages(tmp_path):
    found = {}
    for text in (DEFAULT, TINY_HELIX):
        recipe = load_recipe(write_recipe(tmp_path, text))
        for node in build_chain(recipe, tmp_path / "runs", STAGES):
            found[f"{recipe.name}/{node.name}"] = node.job.key[:12]
    assert found == GOLDEN
