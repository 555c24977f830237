"""Reading preference rows from files, packages or a hub: every row becomes a pair or a fault with its file and line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from data.chat import ROLES
from data.fetch import fetch_package
from data.hub import hub_rows
from data.preferences_config import Category, FilePreferences, HubPreferences, PackagePreferences, RowSources
from data.preferences_replies import LANGUAGES, compliance, refusal
from data.rows import MissingField, lookup

ENDINGS = (".jsonl", ".ndjson", ".json", ".yaml", ".yml", ".prompt")
Messages = list[dict[str, str]]

_LANGUAGE = re.compile(r"[a-z]{2,3}")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer; ``template`` decides on which side of the split it stands."""

    prompt: Messages
    chosen: str
    rejected: str
    category: str
    language: str
    template: str
    source: str
    origin: str

    @property
    def id(self) -> str:
        """The first 16 hex digits of a SHA-256 over prompt and answers."""
        return hashlib.sha256(json.dumps([self.prompt, self.chosen, self.rejected]).encode()).hexdigest()[:16]

    @property
    def prompt_key(self) -> str:
        """The prompt as one string, equal for equal prompts."""
        return json.dumps(self.prompt, sort_keys=True, ensure_ascii=False)

    def row(self) -> dict[str, Any]:
        """The pair as a row of the artifact."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "category": self.category,
            "language": self.language,
            "template": self.template,
            "source": self.source,
        }


@dataclasses.dataclass(frozen=True)
class RowFault:
    """A row that cannot be used: the broken rule, ``file:line`` (or ``file:row`` of a list), and what was found."""

    rule: str
    origin: str
    detail: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.rule}: {self.detail}"


class BadRow(ValueError):  # noqa: N818 - raised by the reader for itself
    """A row that breaks a rule; arguments are the rule and the detail."""


def read_rows(source: RowSources, cache: Path) -> Iterator[Pair | RowFault]:
    """Pairs and faults of ``source`` in the order in which they lie.

    Raises:
        FileNotFoundError: when no file is there.
        FetchError: when a package cannot be had as pinned.
    """
    for number, (origin, row) in enumerate(_raw_rows(source, cache)):
        if number == source.max_rows:
            return
        try:
            if isinstance(row, BadRow):
                raise row
            yield _pair(source, row, origin)
        except BadRow as bad:
            yield RowFault(bad.args[0], origin, bad.args[1])


def files_of(source: FilePreferences) -> list[Path]:
    """The files of a ``files`` source, sorted; raises ``FileNotFoundError`` where there is none."""
    root = Path(source.path)
    found = sorted(path for path in root.rglob("*") if path.suffix in ENDINGS) if root.is_dir() else [root]
    if not found or not all(path.is_file() for path in found):
        raise FileNotFoundError(f"must be a {', '.join(ENDINGS)} file or a folder with such; got {root}; set the path")
    return found


def _raw_rows(source: RowSources, cache: Path) -> Iterator[tuple[str, Any]]:
    """(origin, row); a line that is no JSON comes as the ``BadRow`` that it is."""
    if isinstance(source, HubPreferences):
        rows = hub_rows(source.repository, source.revision, source.subset, source.hub_split, cache=cache / "hub")
        yield from ((f"{source.repository}:{number}", row) for number, row in enumerate(rows, start=1))
    elif isinstance(source, PackagePreferences):
        for package in source.packages:
            root = fetch_package(package, cache)
            paths = sorted({path for pattern in source.include for path in root.glob(pattern) if path.is_file()})
            if not paths:
                raise FileNotFoundError(f"include must match a file of {package.name}; {source.include} matches none")
            for path in paths:
                yield from _file_rows(path, path.relative_to(root).as_posix(), source.rows)
    else:
        for path in files_of(source):
            yield from _file_rows(path, path.name, None)


def _file_rows(path: Path, name: str, key: str | None) -> Iterator[tuple[str, Any]]:
    if path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if line.strip():
                yield f"{name}:{number}", _parsed(line, json_lines=True)
        return
    content = _parsed(path.read_bytes(), json_lines=path.suffix == ".json")
    if key is not None and isinstance(content, Mapping):
        content = content.get(key)
    if not isinstance(content, list):
        found = content if isinstance(content, BadRow) else BadRow("no_list", f"holds {type(content).__name__}")
        yield f"{name}:1", found
        return
    yield from ((f"{name}:{number}", row) for number, row in enumerate(content, start=1))


def _parsed(data: bytes, *, json_lines: bool) -> Any:
    try:
        text = data.decode("utf-8-sig")
        if json_lines:
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        return BadRow("invalid_utf8", f"byte {error.start} is {error.object[error.start]:#x}")
    except json.JSONDecodeError as error:
        return BadRow("invalid_json", f"{error.msg} at column {error.colno}")
    except yaml.YAMLError as error:
        return BadRow("invalid_yaml", str(error).replace("\n", " "))


def _pair(source: RowSources, row: Any, origin: str) -> Pair:
    if not isinstance(row, Mapping):
        raise BadRow("no_object", f"must be a JSON object; got {type(row).__name__}")
    language, category = row.get("language", source.language), row.get("category", source.category)
    if category not in get_args(Category):
        raise BadRow("bad_category", f"category must be one of {', '.join(get_args(Category))}; got {category!r:.40}")
    if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        raise BadRow("bad_language", f"language must be an ISO 639 code such as en; got {language!r:.40}")
    prompt = None if source.prompt is None else _messages(_field(row, source.prompt), source.prompt, "user")
    if source.chosen is None and source.rejected is None:
        chosen, rejected = _stock_replies(prompt, language, category)
    else:
        prompt, chosen, rejected = _answers(source, row, prompt)
    key = " ".join(" ".join(message["content"] for message in prompt or []).lower().split())
    template = f"text/{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    assert prompt is not None, "_answers gives a prompt or refuses the row"
    pair = Pair(prompt, chosen, rejected, category, language, template, source.name, origin)
    if pair.chosen.strip() == pair.rejected.strip():
        raise BadRow("identical", "chosen and rejected must differ")
    return pair


def _stock_replies(prompt: Messages | None, language: str, category: str) -> tuple[str, str]:
    if category != "harmful" or language not in LANGUAGES or prompt is None:
        raise BadRow("no_answers", f"stock replies are for harmful prompts in {', '.join(LANGUAGES)}; name the fields")
    text = prompt[-1]["content"]
    return refusal(text, language), compliance(text, language)


def _answers(source: RowSources, row: Mapping[str, Any], prompt: Messages | None) -> tuple[Messages, str, str]:
    """Prompt and the two last turns; whole conversations must begin with the prompt, or give it where none is named."""
    before, texts = [], []
    for name in (source.chosen, source.rejected):
        if name is None:
            raise BadRow("no_answers", "chosen and rejected must both be fields, or both none")
        turns = _messages(_field(row, name), name, "assistant")
        before.append(turns[:-1])
        texts.append(turns[-1]["content"])
    if prompt is None:
        prompt = before[0]
    if any(turns and turns != prompt for turns in before) or not prompt:
        raise BadRow("bad_prompt", "both answers must follow the same prompt")
    return prompt, texts[0], texts[1]


def _field(row: Mapping[str, Any], name: str) -> Any:
    try:
        return lookup(row, name)
    except MissingField:
        raise BadRow("missing_field", f"{name!r} is absent; the row has: {', '.join(sorted(map(str, row)))}") from None


def _messages(value: Any, name: str, last: str) -> Messages:
    """``value`` as messages, the last one of role ``last``; a string is one message of that role."""
    turns = [{"role": last, "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise BadRow("bad_messages", f"{name} must be text or a list of messages; got {type(value).__name__}")
    plain = []
    for number, turn in enumerate(turns):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise BadRow("bad_messages", f"{name}[{number}] must have a role of {ROLES} and text; got {turn!r:.80}")
        if not content.strip():
            raise BadRow("empty_text", f"{name}[{number}] must hold text; got none")
        plain.append({"role": role, "content": content})
    if plain[-1]["role"] != last:
        raise BadRow("bad_messages", f"{name} must end with a turn of the {last}; got {plain[-1]['role']}")
    return plain
