"""The conversation: what was said, the commands, answers as they come, and what Ctrl-C stops."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from pipelines.chat_models import ContextFull, End, Message, Settings, Speaker
from pipelines.terminal import columns, harmless, terminal_width

Show = Callable[[str], None]

HELP = """\
/reset         forget the conversation
/system TEXT   set the system message and start anew; without TEXT show it
/help          this list
/exit          end (as Ctrl-D does); a message that begins with / is written //"""

_NOTES: dict[End, str] = {
    "stop": "",
    "length": "; cut at --max-new-tokens",
    "context": "; cut where the model's max_seq_len ends, /reset starts anew",
}

YOU = "you"


@dataclasses.dataclass
class Voice:
    """A speaker and the conversation as it went with this one."""

    speaker: Speaker
    messages: list[Message] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a speaker said; ``note`` is the line about it, and ``said`` whether there was room to say anything."""

    text: str
    note: str
    said: bool = True


class Session:
    """Reads lines and answers them; who says what goes to stdout, everything else to stderr."""

    def __init__(self, speakers: Sequence[Speaker], settings: Settings, system: str | None, interactive: bool) -> None:
        self.voices = [Voice(speaker) for speaker in speakers]
        self.settings, self.system, self.interactive = settings, system, interactive
        self._restart()

    def run(self, lines: Iterable[str]) -> None:
        """Answer every line until they end or one says ``/exit``; what was not typed at a prompt is repeated."""
        for line in lines:
            line = line.rstrip("\n").strip()
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
            elif line:
                text = line[1:] if line.startswith("//") else line
                if not self.interactive:
                    print(f"{YOU}> {harmless(text)}", flush=True)
                self._round(text)

    def _command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "/reset":
            self._restart()
            _tell("the conversation is forgotten")
        elif word == "/system" and rest.strip():
            self.system = rest.strip()
            self._restart()
            _tell("system message set; the conversation starts anew")
        elif word == "/system":
            _tell(f"system message: {harmless(self.system)}" if self.system else "there is no system message")
        else:
            _tell(HELP if word == "/help" else f"{harmless(word)} is no command; there are:\n{HELP}")

    def _restart(self) -> None:
        for voice in self.voices:
            voice.messages[:] = [{"role": "system", "content": self.system}] if self.system else []
            voice.speaker.forget()

    def _round(self, text: str) -> None:
        if len(self.voices) == 1:
            self._alone(self.voices[0], text)
        else:
            self._together(text)

    def _alone(self, voice: Voice, text: str) -> None:
        print(f"{voice.speaker.label}> ", end="", flush=True)
        answer = self._ask(voice, text, lambda part: print(part, end="", flush=True))
        print(flush=True)
        _tell(answer.note)

    def _together(self, text: str) -> None:
        answers: list[Answer] = []
        before = [list(voice.messages) for voice in self.voices]
        for voice in self.voices:
            answers.append(self._ask(voice, text, lambda _: None))
            if answers[-1].note.endswith("stopped"):
                self._take_back(before)
                break
        heads = [voice.speaker.label for voice in self.voices[: len(answers)]]
        texts = [answer.text if answer.said else f"({answer.note})" for answer in answers]
        print("\n".join(columns(heads, texts, terminal_width())), flush=True)
        for head, answer in zip(heads, answers, strict=True):
            _tell(f"{head}: {answer.note}")

    def _take_back(self, before: Sequence[list[Message]]) -> None:
        """Forget a round that not all have answered: models in different conversations do not compare."""
        for voice, messages in zip(self.voices, before, strict=True):
            voice.messages[:] = messages
            voice.speaker.forget()
        _tell("stopped: none of the models keeps this question")

    def _ask(self, voice: Voice, text: str, show: Show) -> Answer:
        question: Message = {"role": "user", "content": text}
        timer, parts, end = Timer(), [], None
        stopped = False
        try:
            for delta in voice.speaker.answer([*voice.messages, question], self.settings):
                timer.tick(delta.tokens)
                parts.append(delta.text)
                show(delta.text)
                end = delta.end
        except KeyboardInterrupt:
            stopped = True
            voice.speaker.forget()
        except ContextFull as full:
            return Answer("", f"not sent: {full}; /reset starts anew, or ask more briefly", said=False)
        said = "".join(parts)
        if said or not stopped:
            voice.messages += [question, {"role": "assistant", "content": said}]
        note = "; stopped" if stopped else _NOTES.get(end or "stop", "")
        return Answer(said, timer.line() + ("; the answer is empty" if not said and not stopped else "") + note)


class Timer:
    """Tokens, their rate after the first one, and the wait for that one, which is the prompt's."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = self._last = self._start
        self._tokens = 0

    def tick(self, tokens: int) -> None:
        """``tokens`` are there by now."""
        self._last = time.perf_counter()
        if not self._tokens:
            self._first = self._last
        self._tokens = tokens

    def line(self) -> str:
        """``12 tokens, 98.1 tokens/s, first after 0.05 s``."""
        plural = "" if self._tokens == 1 else "s"
        if self._tokens < 2 or self._last == self._first:
            return f"{self._tokens} token{plural} in {self._last - self._start:.2f} s"
        rate = (self._tokens - 1) / (self._last - self._first)
        return f"{self._tokens} tokens, {rate:.1f} tokens/s, first after {self._first - self._start:.2f} s"


def typed_lines() -> Iterator[str]:
    """Lines from the keyboard with a prompt; Ctrl-C drops the line that is being written, Ctrl-D ends."""
    import readline  # noqa: F401 - gives ``input`` its editing and history

    while True:
        try:
            yield input(f"{YOU}> ")
        except KeyboardInterrupt:
            _tell("\n/exit or Ctrl-D ends")
        except EOFError:
            print()
            return


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
