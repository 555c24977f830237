"""What a row of conversations must be: OpenAI's chat messages, with the rule that a faulty one breaks."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from data.chat import ROLES

Message = dict[str, str]

RULES = {
    "invalid_utf8": "the line must be UTF-8",
    "invalid_json": "the line must be JSON",
    "too_large": "the line must be shorter than the reader's limit",
    "not_an_object": "the line must be a JSON object",
    "no_messages": "the object must have a list of messages",
    "empty_conversation": "the list must hold a message",
    "message_not_object": "each message must be an object with role and content",
    "wrong_role": f"role must be one of {', '.join(ROLES)}",
    "missing_content": "each message must have a content",
    "content_not_text": "content must be a string, or a list of text parts",
    "empty_content": "content must hold a visible character",
    "invalid_unicode": "content must be valid Unicode, without lone surrogates",
    "system_not_first": "a system message must be the first",
    "no_user_turn": "a user must speak",
    "no_assistant_turn": "an assistant must speak",
    "roles_repeat": "user and assistant must take turns, the user first",
    "ends_without_assistant": "the last message must be the assistant's",
    "duplicate": "the conversation must differ from those before it",
    "heldout_question": "the first question must not be a held-out one's",
    "beyond_heldout_share": "of the tasks' held-out questions only the split's share is shown",
    "beyond_max_rows": "only the source's max_rows conversations are kept",
    "no_title": "the document must have a title to be asked for",
    "unusable_document": "the document must give a question and an answer",
    "answer_too_long": "the first sentence must fit into max_answer_bytes",
    "invalid_yaml": "the file must be YAML with lists of lines under conversations",
}
"""What each rule asks for, by name; every row that is left out is counted under one of them."""


class MessagesFault(ValueError):  # noqa: N818 - one row's fault, counted and not raised to the user
    """A row that cannot be used; ``rule`` is a key of ``RULES``, ``message`` says what was found where in the row."""

    def __init__(self, rule: str, message: str = "") -> None:
        self.rule, self.message = rule, f"{RULES[rule]}; got {message}" if message else RULES[rule]
        super().__init__(self.message)


def checked(row: Any, field: str = "messages") -> list[Message]:
    """The conversation in ``row``: roles and NFC contents alone.

    Raises:
        MessagesFault: naming the first rule that the row breaks.
    """
    if not isinstance(row, Mapping):
        raise MessagesFault("not_an_object", type(row).__name__)
    messages = row.get(field)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise MessagesFault(
            "no_messages", f"{type(messages).__name__} in {field!r}, fields: {', '.join(map(str, row))}"
        )
    if not messages:
        raise MessagesFault("empty_conversation", "[]")
    conversation = [_message(number, message) for number, message in enumerate(messages)]
    _check_turns([message["role"] for message in conversation])
    return conversation


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise MessagesFault("message_not_object", f"{type(message).__name__} at messages[{number}]")
    role = message.get("role")
    if role not in ROLES:
        raise MessagesFault("wrong_role", f"{role!r} at messages[{number}]")
    content = _text(number, message.get("content"))
    if not content.strip():
        raise MessagesFault("empty_content", f"{content!r} at messages[{number}]")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise MessagesFault("invalid_unicode", f"{content[error.start]!r} at messages[{number}]") from None
    return {"role": role, "content": unicodedata.normalize("NFC", content)}


def _text(number: int, content: Any) -> str:
    if content is None:
        raise MessagesFault("missing_content", f"none at messages[{number}]")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts) or not parts:
        raise MessagesFault("content_not_text", f"{type(content).__name__} at messages[{number}]")
    return "".join(part["text"] for part in parts)


def _check_turns(roles: list[str]) -> None:
    if "system" in roles[1:]:
        raise MessagesFault("system_not_first", f"one at messages[{roles.index('system', 1)}]")
    for role in ("user", "assistant"):
        if role not in roles:
            raise MessagesFault(f"no_{role}_turn", f"roles {', '.join(roles)}")
    speakers = [role for role in roles if role in ("user", "assistant")]
    wrong = next((n for n, role in enumerate(speakers) if role != ("user", "assistant")[n % 2]), None)
    # A tool's answer stands between two turns of the assistant.
    if wrong is not None and "tool" not in roles:
        raise MessagesFault("roles_repeat", ", ".join(roles))
    if roles[-1] != "assistant":
        raise MessagesFault("ends_without_assistant", roles[-1])
