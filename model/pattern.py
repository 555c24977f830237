"""The pattern language of a model's layers: ``(3*mamba2 1*gated)*6``. No torch here.

A pattern is a sequence of words and bracketed groups, each repeated by a count on either side of ``*``. Reading goes on
after a mistake, so that all that is wrong with a pattern is told at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_LAYERS = 512
MAX_BRACKETS = MAX_LAYERS // 4

_TOKEN = re.compile(r"\d+|[A-Za-z_]\w*|\S")
_EXAMPLE = "write for example '(3*mamba2 1*attention)*6'"


def is_word(text: str) -> bool:
    """Whether ``text`` can name a mixer in a pattern."""
    return re.fullmatch(r"[A-Za-z_]\w*", text) is not None


def expand_pattern(pattern: str) -> list[str]:
    """The words that a layer pattern stands for.

    ``"(2*a 1*b)*2"`` gives ``["a", "a", "b", "a", "a", "b"]``. Counts may stand on either side of ``*``.

    Raises:
        ValueError: with every mistake, if the pattern does not parse, is empty, or has more than ``MAX_LAYERS`` layers.
    """
    words, faults = read_pattern(pattern)
    if faults:
        raise ValueError("; ".join(f"layers {fault}" for fault in faults))
    return words


def read_pattern(pattern: str) -> tuple[list[str], list[str]]:
    """The words of a pattern, and what is wrong with it; with a mistake they are those that it names, each once."""
    reader = _Reader(pattern, _TOKEN.findall(pattern))
    words = reader.read()
    named = list(dict.fromkeys(token for token in reader.tokens if is_word(token)))
    return (named if reader.faults else words), list(dict.fromkeys(reader.faults))


@dataclass
class _Reader:
    """Reads tokens left to right; ``faults`` gathers what is wrong, each with the way out."""

    pattern: str
    tokens: list[str]
    faults: list[str] = field(default_factory=list)
    at: int = 0

    def read(self) -> list[str]:
        brackets = self.tokens.count("(")
        if brackets > MAX_BRACKETS:
            self.faults.append(f"must have at most {MAX_BRACKETS} brackets; got {brackets}; write fewer")
            return []
        words = self._sequence()
        while self._next() == ")":
            self._fault("must open each bracket that it closes", "remove the ')' or open it")
            self.at += 1
            words += self._sequence()
        if not words and not self.faults:
            self.faults.append(f"must name at least one layer; got {self._shown()}; {_EXAMPLE}")
        return words

    def _sequence(self) -> list[str]:
        """Items up to a closing bracket or the end."""
        words: list[str] = []
        while self._next() not in ("", ")"):
            words = self._within(words + self._item())
        return words

    def _item(self) -> list[str]:
        count = self._count_before()
        token = self._next()
        if token == "(":
            self.at += 1
            group = self._sequence()
            self._close()
        elif is_word(token):
            self.at += 1
            group = [token]
        else:
            return self._misplaced(token)
        return self._repeated(group, count * self._count_after())

    def _count_before(self) -> int:
        if not self._next().isdigit():
            return 1
        count = self._number()
        if self._next() == "*":
            self.at += 1
        else:
            self._fault(f"must have '*' after the count {count}", f"write {count}*name")
        return count

    def _count_after(self) -> int:
        if self._next() != "*":
            return 1
        self.at += 1
        if not self._next().isdigit():
            self._fault("must have a count after '*'", "write name*2")
            return 1
        return self._number()

    def _number(self) -> int:
        digits = self.tokens[self.at]
        self.at += 1
        # Python converts no more than some thousand digits.
        return int(digits) if len(digits) <= 9 else MAX_LAYERS + 1

    def _repeated(self, group: list[str], count: int) -> list[str]:
        if count < 1:
            self._fault("must repeat by 1 or more", "set the count, or remove what it repeats")
            return group
        if len(group) * count > MAX_LAYERS:
            self._too_many()
            return group
        return group * count

    def _within(self, words: list[str]) -> list[str]:
        if len(words) > MAX_LAYERS:
            self._too_many()
        return words[:MAX_LAYERS]

    def _too_many(self) -> None:
        self._fault(f"must give 1 to {MAX_LAYERS} layers", "repeat less")

    def _close(self) -> None:
        if self._next() == ")":
            self.at += 1
        else:
            self._fault("must close each bracket that it opens", "add a ')'")

    def _misplaced(self, token: str) -> list[str]:
        if token in ("", ")"):
            self._fault("must repeat a mixer's name or a group", "name one after the count")
        else:
            self._fault(f"must have a mixer's name or '(' where {token!r} stands", "remove it")
            self.at += 1
        return []

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _fault(self, rule: str, way_out: str) -> None:
        self.faults.append(f"{rule}; got {self._shown()}; {way_out}")

    def _shown(self) -> str:
        return repr(self.pattern if len(self.pattern) <= 60 else f"{self.pattern[:57]}...")
