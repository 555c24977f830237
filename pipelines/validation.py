"""Pydantic's errors as faults of the recipe: place, line, rule, value received, nearest valid name (TRAPS T7)."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from model.spec import UNFIT
from pipelines.credentials import is_secret_value
from pipelines.document import Document, Place, dotted
from pipelines.suggest import suggestion
from stages.base import Fault

M = TypeVar("M", bound=BaseModel)
PlacedFault = tuple[Place, Fault]


def validate(section: type[M], raw: Any, place: Place, document: Document) -> tuple[M | None, list[PlacedFault]]:
    """``raw`` as a ``section``, or None with every fault; ``place`` is where ``raw`` stands in the document.

    Strict: no text is taken for a number and no bool for an int. JSON's types are the measure, so that a list may
    become a tuple and text a path.
    """
    try:
        return section.model_validate_json(json.dumps(raw), strict=True), []
    except ValidationError as error:
        return None, _faults(section, raw, place, document, error)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """What is wrong at one place: a field whose value does not do, or a name that is none.

    ``names`` are the words that may stand there: values of the field, or fields beside the unknown one.
    """

    unknown: bool
    names: list[str]


def wrong_places(section: type[BaseModel], raw: Any) -> dict[Place, Wrong]:
    """Where ``raw`` is no ``section``, by place below it; empty where it is one."""
    try:
        section.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        return {
            place: wrong for item in error.errors(include_url=False) for place, wrong in [_wrong(section, raw, item)]
        }
    return {}


def _wrong(section: type[BaseModel], raw: Any, item: Any) -> tuple[Place, Wrong]:
    place, context = _place_in(raw, item["loc"], item["type"]), item.get("ctx", {})
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        place = (*place, str(context["discriminator"]).strip("'"))
    if item["type"] == "extra_forbidden":
        return place, Wrong(True, _names(section, raw, place[:-1]))
    choices = str(context.get("expected") or context.get("expected_tags") or "")
    return place, Wrong(False, _quoted(choices) if choices else [])


def shown(value: Any) -> str:
    """A value for one line of a message: short, and never a credential."""
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list) and len(value) > 4:
        return f"a list of {len(value)}"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    if is_secret_value(text):
        return "a value that is not repeated here"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _faults(section: type[BaseModel], raw: Any, place: Place, document: Document, error: ValidationError) -> Any:
    found: dict[Place, list[str]] = {}
    tagged: set[Place] = set()
    unfit: list[tuple[Place, str]] = []
    for item in error.errors(include_url=False, include_context=True):
        inner = _place_in(raw, item["loc"], item["type"])
        if item["type"] == UNFIT:
            unfit.append((inner, item["msg"]))
            continue
        if len(inner) < len(item["loc"]):
            tagged.add(inner)
        if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            inner = (*inner, str(item["ctx"]["discriminator"]).strip("'"))
        found.setdefault(inner, [])
        message = _message(section, raw, inner, dict(item))
        if message not in found[inner]:
            found[inner].append(message)
    # Of a union's members all complain; the one that got deepest is the one that was meant.
    deepest = [
        inner
        for inner in found
        if not (inner in tagged and any(other[: len(inner)] == inner and other != inner for other in found))
    ]
    faults = [_fault((*place, *inner), _joined(found[inner]), document) for inner in deepest]
    return faults + [_fault((*place, *inner), message, document) for inner, message in unfit]


def _fault(place: Place, message: str, document: Document) -> PlacedFault:
    return place, Fault(dotted(place), message, document.line(place))


def _joined(messages: list[str]) -> str:
    """``must be a; got x`` and ``must be b; got x`` as ``must be a, or must be b; got x``."""
    if len(messages) == 1:
        return messages[0]
    rules = [message.partition("; got ")[0] for message in messages]
    return f"{', or '.join(rules)}; got {messages[0].partition('; got ')[2]}"


def _place_in(raw: Any, loc: Place, kind: str) -> Place:
    """Pydantic's location without the names of union members that it inserts.

    Such a name may also be a key of the data (``{type: text, text: ...}``), so of all ways to read the location the
    fullest one is taken that explains its last part.
    """
    return max(_readings(raw, loc, kind in ("missing", UNFIT)), key=lambda place: (place[-1:] == loc[-1:], len(place)))


def _readings(raw: Any, loc: Place, missing: bool) -> Iterator[Place]:
    if not loc:
        yield ()
        return
    part, rest = loc[0], loc[1:]
    in_list = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
    if in_list or (isinstance(raw, dict) and part in raw):
        for place in _readings(raw[part], rest, missing):
            yield (part, *place)
    elif missing and not rest:
        yield (part,)
    yield from _readings(raw, rest, missing)


def _message(section: type[BaseModel], raw: Any, place: Place, item: dict[str, Any]) -> str:
    kind, context, got = item["type"], item.get("ctx", {}), shown(item["input"])
    if kind == "missing":
        return "is required and absent; set it"
    if kind == "extra_forbidden":
        names = _names(section, raw, place[:-1])
        return f"is not a field; got {got}; {suggestion(str(place[-1]), names, 'field')}"
    if kind == "union_tag_not_found":
        return "is required and absent; set which kind it is"
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        valid = _quoted(context.get("expected") or context.get("expected_tags", ""))
        value = item["input"] if kind != "union_tag_invalid" else context["tag"]
        near = suggestion(str(value), valid, "value")
        must = f"must be one of {', '.join(valid)}; got {shown(value)}"
        return f"{must}; {near}" if near.startswith("did") else f"{must}; set one of them"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a mapping of fields; got {got}; write its fields indented below it"
    rule = item["msg"].replace("Input should be", "must be").replace("should ", "must ").replace("String", "text")
    hint = _hint(kind, item["input"], context)
    return f"{rule[0].lower()}{rule[1:]}; got {got}{hint}"


def _hint(kind: str, value: Any, context: dict[str, Any]) -> str:
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; set {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return "; write it as a plain number, without quotes, underscores or units"
    if kind == "bool_type":
        return "; set true or false"
    for bound in ("ge", "le"):
        if bound in context:
            return f"; set {context[bound]} or {'more' if bound == 'ge' else 'less'}"
    if "gt" in context or "lt" in context:
        return f"; set a {'larger' if 'gt' in context else 'smaller'} value"
    return "; set another value"


def _quoted(expected: str) -> list[str]:
    """The names in pydantic's ``'a', 'b' or 'c'``."""
    return expected.replace(" or ", ", ").replace("'", "").split(", ")


def _names(section: type[BaseModel], raw: Any, place: Place) -> list[str]:
    """Valid field names of the section at ``place``."""
    kinds: list[Any] = [section]
    for part in place:
        kinds = [inner for kind in _members(kinds, raw) for inner in _inner(kind, part)]
        raw = raw[part]
    return [
        field.alias or name
        for kind in _members(kinds, raw)
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for name, field in kind.model_fields.items()
    ]


def _inner(kind: Any, part: str | int) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [field.annotation for name, field in kind.model_fields.items() if part in (name, field.alias)]
    arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
    return arguments[-1:]


def _members(kinds: list[Any], raw: Any) -> Iterator[Any]:
    """The types behind unions and annotations; of tagged sections only the one that ``raw`` chooses."""
    for kind in kinds:
        origin = get_origin(kind)
        if origin is Annotated:
            yield from _members([get_args(kind)[0]], raw)
        elif origin in (Union, types.UnionType):
            yield from _members(list(get_args(kind)), raw)
        elif not (isinstance(kind, type) and issubclass(kind, BaseModel)) or _chosen(kind, raw):
            yield kind


def _chosen(section: type[BaseModel], raw: Any) -> bool:
    tags = {name: field.annotation for name, field in section.model_fields.items() if name in ("kind", "mixer", "type")}
    return not any(
        get_origin(tag) is Literal and isinstance(raw, dict) and raw.get(name, get_args(tag)[0]) not in get_args(tag)
        for name, tag in tags.items()
    )
