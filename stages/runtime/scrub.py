"""Keeps secrets out of what a run records (TRAPS O6): they come from the environment and never reach the disk.

Three things count as a secret: a value whose name says so (``api_key``), a string shaped like a known kind of key
(``hf_...``, ``user:password@`` in a URL), and any occurrence of what an environment variable with such a name holds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

REDACTED = "[redacted]"
SHORTEST_SECRET = 8
"""Shorter environment values are no secrets worth the name, and replacing them everywhere would garble the record."""

SECRET_NAME = re.compile(
    r"(^|_)(api_?key|(access|private|secret|signing|encryption)_key|secrets?|password|passwd|passphrase|credentials?"
    r"|(auth|access|api|bearer|hf|hub|refresh|github|gitlab|wandb|session|secret|personal)_?token)$|^(token|auth)$",
    re.IGNORECASE,
)
"""Of config fields and flags: ``eos_token`` and ``max_tokens`` are words of this field and no secrets."""
SECRET_VARIABLE = re.compile(
    r"(_|^)(TOKEN|PASSWD|CREDENTIALS?)$|SECRET|PASSWORD|PASSPHRASE|API_?KEY|(ACCESS|PRIVATE)_KEY$"
)
SECRET_SHAPE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|wandb_v\d_\w{20,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(-----END [A-Z ]*PRIVATE KEY-----)?"
)
URL_PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/@\s:]*:[^/@\s]+@", re.IGNORECASE)
FLAG = re.compile(r"^--?(?P<name>[A-Za-z][\w.-]*)(?P<value>=.*)?$", re.DOTALL)


def is_secret_name(name: str) -> bool:
    """Whether a field, flag or variable of this name holds a secret: ``hf_token`` does, ``max_tokens`` does not."""
    return SECRET_NAME.search(name.rpartition(".")[2].replace("-", "_")) is not None


def environment_secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values of the environment's variables that are secrets by name, the longest first."""
    pairs = (os.environ if environment is None else environment).items()
    found = {value for name, value in pairs if SECRET_VARIABLE.search(name.upper()) and len(value) >= SHORTEST_SECRET}
    return sorted(found, key=len, reverse=True)


def scrub_text(text: str, secrets: Iterable[str]) -> str:
    """``text`` without the given secrets, known shapes of keys, and passwords in URLs."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = SECRET_SHAPE.sub(REDACTED, text)
    return URL_PASSWORD.sub(rf"\g<scheme>{REDACTED}@", text)


def scrub(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """Plain data without secrets, at every depth, ready to be written; keys of mappings stay."""
    known = environment_secrets() if secrets is None else list(secrets)
    if isinstance(value, str):
        return scrub_text(value, known)
    if isinstance(value, Mapping):
        return {
            key: REDACTED if is_secret_name(str(key)) and isinstance(item, str) and item else scrub(item, known)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub(item, known) for item in value]
    return value


def scrub_argv(argv: Iterable[str], secrets: Iterable[str] | None = None) -> list[str]:
    """A command line without secrets: ``--api-key X``, ``--api-key=X`` and ``--set a.token=X`` lose their X."""
    known = environment_secrets() if secrets is None else list(secrets)
    kept: list[str] = []
    hide_next = False
    for word in argv:
        flag = FLAG.match(word)
        name, separator, _ = word.lstrip("-").partition("=")
        if hide_next and not flag:
            kept.append(REDACTED)
        elif separator and is_secret_name(name):
            kept.append(word.partition("=")[0] + "=" + REDACTED)
        else:
            kept.append(scrub_text(word, known))
        hide_next = flag is not None and not separator and is_secret_name(name)
    return kept
