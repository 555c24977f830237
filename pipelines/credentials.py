"""Secrets have no place in recipes or arguments (TRAPS O6): what looks like one is refused and never repeated."""

from __future__ import annotations

import re
from typing import Any

from pipelines.document import Document, Place, dotted
from stages.base import Fault
from stages.runtime.scrub import environment_secrets, is_secret_name, scrub_text

_WAY_OUT = (
    "secrets come from the environment alone (WANDB_API_KEY, HF_TOKEN); remove it here, and renew it if it was real"
)
# A tracker's older keys are 40 hexadecimal digits, and so are the commits that pin a source; only tracking holds none.
_TRACKER_VALUE = re.compile(r"\b[0-9a-f]{40}\b")


def is_secret_value(text: str) -> bool:
    """Whether the text holds a secret of this environment, or has the shape of a credential of a common kind."""
    return scrub_text(text, environment_secrets()) != text


def remove_secrets(document: Document) -> None:
    """Take everything that looks like a secret out of ``document.data`` and add a fault for each, without its value."""
    _clean(document.data, (), document)


def _clean(value: Any, place: Place, document: Document) -> None:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        here = (*place, key)
        if isinstance(key, str) and is_secret_value(key):
            del value[key]
            _refuse(document, (*place, "..."), "has a key that looks like a credential")
        elif isinstance(key, str) and is_secret_name(key) and not isinstance(item, dict | list):
            del value[key]
            _refuse(document, here, "looks like a secret")
        elif isinstance(item, str) and _is_secret_at(item, here):
            value[key] = None
            _refuse(document, here, "has a value that looks like a credential")
        else:
            _clean(item, here, document)


def _is_secret_at(text: str, place: Place) -> bool:
    return is_secret_value(text) or (place[0] == "tracking" and _TRACKER_VALUE.search(text) is not None)


def _refuse(document: Document, place: Place, what: str) -> None:
    document.faults.append((place, Fault(dotted(place), f"{what}; {_WAY_OUT}", document.line(place))))
