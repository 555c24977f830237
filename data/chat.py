"""The one chat format, ChatML, as a Jinja template, and its rendering into ids with the assistant's tokens marked."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.tokenizer import END_OF_TEXT, IM_END, SPECIAL_TOKENS, encode_text, token_byte_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""``<|im_start|>role\\ncontent<|im_end|>\\n`` a message; the assistant's content and its end are what is learned."""

ROLES = ("system", "user", "assistant", "tool")
REPLY_ENDS = (IM_END, END_OF_TEXT)
"""Tokens of which either ends a reply, wherever one is decoded, rewarded or scored: whoever serves the model stops at
both. That a turn is closed as the template has it, by the first of them, is another question, the template's."""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_SLOT = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")


class Rendered(NamedTuple):
    """A conversation in ids; ``assistant_mask`` has 1 where the assistant speaks, its ``<|im_end|>`` included."""

    ids: list[int]
    assistant_mask: list[int]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> Rendered:
    """Ids of a conversation by the tokenizer's template; a literal ``<|im_end|>`` inside a message stays text.

    The template is filled with slots in place of contents, so that the specials in its output are its own; the text
    between two specials is then encoded as one, as ``apply_chat_template`` would. A token that begins before the
    assistant's first character does not count as the assistant's.

    Raises:
        ValueError: if a message is not a role of ``ROLES`` with a string as content, or the template drops a content.
    """
    contents = [_content(number, message) for number, message in enumerate(messages)]
    roles = tuple(message["role"] for message in messages)
    template, learned = _fill(tokenizer.chat_template, roles, add_generation_prompt)
    if [int(slot) for slot in _SLOT.findall(template)] != list(range(len(contents))):
        raise ValueError(
            "chat_template must write every message once, in order; it does not; use the tokenizer stage's"
        )
    ids: list[int] = []
    mask: list[int] = []
    specials, place = tokenizer.added_tokens_encoder, 0
    for part in _SPECIAL.split(template):
        if part in SPECIAL_TOKENS:
            new_ids, flags = [specials[part]], [int(learned[place])]
        else:
            new_ids, flags = _encode_part(tokenizer, part, learned[place : place + len(part)], contents)
        ids += new_ids
        mask += flags
        place += len(part)
    return Rendered(ids, mask)


def _content(number: int, message: Mapping[str, str]) -> str:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{number}].role must be one of {ROLES}; got {role!r}; set one of them")
    if not isinstance(content, str):
        raise ValueError(f"messages[{number}].content must be a string; got {type(content).__name__}; pass text")
    return content


@functools.lru_cache(maxsize=1024)
def _fill(chat_template: str, roles: tuple[str, ...], prompt: bool) -> tuple[str, np.ndarray]:
    """The template's output with slots for contents, and a flag for each character: inside a generation block."""
    from transformers.utils.chat_template_utils import render_jinja_template

    slots = [{"role": role, "content": f"{_OPEN}{number}{_CLOSE}"} for number, role in enumerate(roles)]
    result: Any = render_jinja_template(
        conversations=[slots],
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
    )
    rendered, spans = result
    learned = np.zeros(len(rendered[0]), dtype=np.uint8)
    for first, last in spans[0]:
        learned[first:last] = 1
    return rendered[0], learned


def _encode_part(
    tokenizer: PreTrainedTokenizerBase, part: str, learned: np.ndarray, contents: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Ids of the text between two specials, slots filled in, and the flag of each id's first byte."""
    text, flags, end = "", [], 0
    for slot in _SLOT.finditer(part):
        before, content = part[end : slot.start()], contents[int(slot[1])]
        text += before + content
        flags += [np.repeat(learned[end : slot.start()], [len(c.encode()) for c in before])]
        flags += [np.full(len(content.encode()), learned[slot.start()])]
        end = slot.end()
    text += part[end:]
    flags += [np.repeat(learned[end:], [len(c.encode()) for c in part[end:]])]
    ids = encode_text(tokenizer, text)
    if not ids:
        return [], []
    table = token_byte_strings(tokenizer)
    lengths = [len(table[token]) for token in ids]
    starts = np.cumsum([0, *lengths[:-1]])
    return ids, np.concatenate(flags)[starts].tolist()
