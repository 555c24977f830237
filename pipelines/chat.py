"""Talk in the terminal with a finished stage's model, or with a GGUF file.

    python pipelines/chat.py                         the last finished model stage of the default recipe
    python pipelines/chat.py --stage sft             another one; also an artifact (sft-1a2b3c4d) or its directory
    python pipelines/chat.py --compare dpo dpo-ipo   two to four, side by side, drawn with the same seed
    python pipelines/chat.py --gguf FILE             a GGUF file by llama.cpp; without FILE the export stage's smallest
    echo "What is a cat?" | python pipelines/chat.py

Ctrl-C stops an answer, Ctrl-D or /exit ends; /reset, /system TEXT, /help. Exit codes: 0, 2 for a fault in the command.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # For a script Python looks in its own folder first, where the rooms are not found and our modules shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipelines.command import Parser, add_recipe_options, guarded, load_chain

if TYPE_CHECKING:
    from pipelines.chat_models import Speaker
    from pipelines.graph import Registry

MAX_COMPARED = 4


def main(argv: Sequence[str] | None = None, stages: Registry | None = None) -> int:
    """Chat until the input ends and return the exit code; ``stages`` stands in for the registry in tests."""
    return guarded(lambda: _chat(parse(sys.argv[1:] if argv is None else argv), stages))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options.

    Raises:
        CommandError: for what the parser refuses.
        ConfigError: with every value that is out of range.
    """
    options = _parser().parse_args(argv)
    faults = list(_faults(options))
    if faults:
        from stages.base import ConfigError, Fault

        raise ConfigError([Fault(path, message) for path, message in faults])
    return options


def _parser() -> Parser:
    parser = Parser("chat.py", __doc__)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--stage", metavar="NAME", help="model stage, artifact name or directory (the last finished one)")
    who.add_argument("--gguf", nargs="?", const="", metavar="FILE", help="GGUF file (the export stage's smallest)")
    who.add_argument("--compare", nargs="+", metavar="NAME", help="models side by side, named as for --stage")
    add_recipe_options(parser)
    how = parser.add_argument_group("answers")
    how.add_argument("--system", metavar="TEXT", help="system message")
    how.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 takes the likeliest token (0.7)")
    how.add_argument("--top-p", type=float, default=0.9, metavar="P", help="mass of the tokens that may be drawn (0.9)")
    how.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer in tokens (256)")
    how.add_argument("--seed", type=int, default=17, metavar="N", help="decides the draws, with the turn's number (17)")
    return parser


def _faults(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        yield "--temperature", f"must be a number of at least 0; got {options.temperature}; set 0 for the likeliest"
    if not 0 < options.top_p <= 1:
        yield "--top-p", f"must be above 0 and at most 1; got {options.top_p}; set 1 to keep every token"
    if not 1 <= options.max_new_tokens <= 1 << 20:
        yield "--max-new-tokens", f"must be from 1 to {1 << 20}; got {options.max_new_tokens}; set 256"
    if not 0 <= options.seed < 1 << 32:
        yield "--seed", f"must be from 0 to {(1 << 32) - 1}; got {options.seed}; set 17"
    if options.compare is not None and not 2 <= len(options.compare) <= MAX_COMPARED:
        names = " ".join(options.compare)
        yield "--compare", f"must name two to {MAX_COMPARED} models; got {names}; for one model use --stage"


def _chat(options: argparse.Namespace, stages: Registry | None) -> int:
    from pipelines.chat_choice import speakers
    from pipelines.chat_models import Settings
    from pipelines.chat_session import Session, typed_lines

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    found = speakers(options, lambda: load_chain(options, stages))
    try:
        settings = Settings(options.temperature, options.top_p, options.max_new_tokens, options.seed)
        system = options.system.encode("utf-8", "replace").decode() if options.system else None
        session = Session(found, settings, system, interactive)
        if interactive:
            print("Ctrl-C stops an answer; Ctrl-D or /exit ends; /help lists the rest", file=sys.stderr)
        session.run(typed_lines() if interactive else sys.stdin)
    finally:
        _close(found)
    return 0


def _close(found: Sequence[Speaker]) -> None:
    for speaker in found:
        speaker.close()


if __name__ == "__main__":
    sys.exit(main())
