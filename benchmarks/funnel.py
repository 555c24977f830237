"""What the clean stage keeps of a corpus of one's own, by source and rule, and what it costs on one core.

    python benchmarks/funnel.py --clean clean.yaml

``clean.yaml`` holds the fields of a ``clean`` stage (``sources``, ``decontaminate``, ...). The stage runs in this
process alone, so that the processor's clock has all of it; a step's seconds are those until the next one's line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, table, write_result

READING = "reading"
"""What comes before the first line of the log that begins a step."""
_STEP = re.compile(r"\[[\d. ]+ s\] (form and rules|exact duplicates|near duplicates|held-out split)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--clean", type=Path, required=True, help="YAML with the fields of a clean stage")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where packages lie")
    parser.add_argument("--output", type=Path, help="keep the corpus in this new folder")
    parser.add_argument("--result", type=Path, default=RESULTS / "funnel.json")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = arguments.output or Path(scratch) / "corpus"
        config, steps = cleaned(arguments.clean, corpus, Path(scratch), arguments.cache)
        report = json.loads((corpus / "report.json").read_text(encoding="utf-8"))
    rows = [row(source, found) for source, found in zip(config.sources, report["funnel"], strict=True)]
    megabytes = sum(one["megabytes"] for one in rows)
    costs = {name: {"seconds": round(s, 1), "megabytes_per_s": round(megabytes / s, 2)} for name, s in steps.items()}
    print(table([{name: value for name, value in one.items() if not isinstance(value, dict)} for one in rows]))
    print(table([{"step": name, **cost} for name, cost in costs.items()]))
    settings = config.model_dump(mode="json", exclude={"sources", "decontaminate", "kind"}, exclude_defaults=True)
    settings["decontamination"] = report["decontamination"]
    write_result(arguments.result, rows, settings | {"megabytes": round(megabytes, 2), "steps": costs})
    return 0


def cleaned(path: Path, corpus: Path, scratch: Path, cache: Path) -> tuple[Any, dict[str, float]]:
    """The stage's configuration, and the seconds of processor time of its steps and of all; the corpus lies behind."""
    import yaml

    from stages.base import StageContext
    from stages.clean import Clean

    config = Clean.Config.model_validate({"kind": "clean", **yaml.safe_load(path.read_text(encoding="utf-8"))})
    if faults := Clean.check(config, None):
        raise SystemExit("\n".join(map(str, faults)))
    context = StageContext(
        pipeline="funnel", name="clean", key="", seed=0, config=config, model=None, directory=scratch, output=corpus,
        work=scratch / "work", cache=cache, parents={}, tracker=None,
    )  # fmt: skip
    clock = _Clock(sys.stdout)
    with contextlib.redirect_stdout(clock):
        Clean().run(context)
    return config, clock.seconds()


class _Clock(io.TextIOBase):
    """Passes a log on and notes the processor's time at which its steps begin."""

    def __init__(self, target: Any) -> None:
        self._target, self._begun = target, [(READING, time.process_time())]

    def write(self, text: str) -> int:
        if found := _STEP.match(text):
            self._begun.append((found[1], time.process_time()))
        return int(self._target.write(text))

    def seconds(self) -> dict[str, float]:
        """Of each step and of all together."""
        times = [*(at for _, at in self._begun), time.process_time()]
        each = {name: times[place + 1] - times[place] for place, (name, _) in enumerate(self._begun)}
        return each | {"all": times[-1] - times[0]}


def row(source: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The funnel of one source in numbers."""
    from data.clean_page import survivors

    left = {f"left_after_{step}".replace(" ", "_"): count for step, count in survivors(found)[1:-1]}
    dropped = {rule: tally["documents"] for rule, tally in found["dropped"].items()}
    return {
        "source": source.name, "language": source.language, "rules": source.rules,
        "read": found["read"]["documents"], "megabytes": round(found["read"]["bytes"] / 1e6, 2), **left,
        "kept": found["train"]["documents"] + found["heldout"]["documents"],
        "heldout": found["heldout"]["documents"], "heldout_overlap": dropped.get("heldout_overlap", 0),
        "dropped": dropped, "altered": found["altered"],
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
