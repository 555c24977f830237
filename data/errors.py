"""What this room says of input that does not fit; any other ``ValueError`` from here is a failure of the program."""

from __future__ import annotations


class DataError(ValueError):
    """What the user gave does not fit: a setting, a text, a tokenizer. The message says what must hold and the way out.

    ``faults`` holds each as (field, message); the field is empty where the message names what it is about.
    """

    def __init__(self, faults: str | list[tuple[str, str]]) -> None:
        # Exceptions are rebuilt from their arguments when they cross from a worker process.
        self.faults = [("", faults)] if isinstance(faults, str) else list(faults)
        super().__init__(faults)

    def __str__(self) -> str:
        return "; ".join(f"{field} {message}".strip() for field, message in self.faults)
