"""The pipeline as one page: `runs/<pipeline>/report/index.html`, from the artifacts' JSON files alone.

    python pipelines/report.py                       the default recipe; the same --pipeline, --set, --runs as run.py

Lineage, curves, every score by stage with n and interval, variants, samples, parity; "not run" where nothing ran. The
page holds all that it shows, loads nothing and needs no script. Exit codes: 0, 2 for a fault in recipe or command.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":
    # For a script Python looks in its own folder first, where the rooms are not found and our modules shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipelines.command import Parser, add_recipe_options, guarded, load_chain

if TYPE_CHECKING:
    from pipelines.chain import Chain
    from pipelines.graph import Registry
    from pipelines.report_read import StageView


def main(argv: Sequence[str] | None = None, stages: Registry | None = None) -> int:
    """Write the report and return the exit code; ``stages`` stands in for the registry in tests."""
    return guarded(lambda: _report(sys.argv[1:] if argv is None else argv, stages))


def _report(argv: Sequence[str], stages: Registry | None) -> int:
    from pipelines.gates import judged
    from stages.runtime.artifact import shown

    chain = load_chain(parse(argv), stages)
    path, is_new = refresh_report(chain)
    for line in judged(chain)[1]:
        print(f"note: {line}", file=sys.stderr)
    print(shown(path) if is_new else f"{shown(path)} (up to date)")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = Parser("report.py", __doc__)
    add_recipe_options(parser)
    return parser.parse_args(argv)


def write_report(chain: Chain) -> Path:
    """Write the report of ``chain`` as its artifacts stand now, whatever is missing, and return its path."""
    return refresh_report(chain)[0]


def refresh_report(chain: Chain) -> tuple[Path, bool]:
    """The report's path, and whether it was written: it is left alone where nothing that it shows has changed."""
    from pipelines import page
    from stages.runtime.artifact import now

    path = chain.runs / chain.recipe.name / "report" / "index.html"
    found = _read(chain)
    mark = f"<!-- made of {_digest(chain, found)} -->\n"
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace").endswith(mark):
        return path, False
    page.write(path, _text(chain, found, now()) + mark)
    return path, True


def report_text(chain: Chain, made_at: str) -> str:
    """The page; the same artifacts and ``made_at`` give the same text."""
    return _text(chain, _read(chain), made_at)


class _Found(NamedTuple):
    """All that the page is made of, as it was read."""

    stages: list[StageView]
    gates: list[Any]
    gate_notices: list[str]


def _read(chain: Chain) -> _Found:
    from pipelines.report_evaluation import gates
    from pipelines.report_read import read_stages

    return _Found(read_stages(chain), *gates(chain))


def _digest(chain: Chain, found: _Found) -> str:
    """SHA-256 of what was read and of the program that shows it."""
    plain = [[dataclasses.asdict(one) for one in (*found.stages, *found.gates)], found.gate_notices]
    content = json.dumps([chain.recipe.name, chain.recipe.seed, plain], sort_keys=True, default=str)
    hashed = hashlib.sha256(content.encode("utf-8", "replace"))
    folder = Path(__file__).resolve().parent
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".py", ".html", ".css")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def _text(chain: Chain, found: _Found, made_at: str) -> str:
    from pipelines import page
    from pipelines.report_charts import SHOWN

    return page.render("report_page.html", page=_page(chain, found), made_at=made_at, shown=SHOWN)


def _page(chain: Chain, found: _Found) -> dict[str, Any]:
    from pipelines import report_evaluation as evaluation
    from pipelines import report_sections as sections
    from pipelines.report_graph import lineage_svg

    stages = found.stages
    sample_names, samples = sections.samples(stages)
    scores = sections.score_table(stages)
    programs = evaluation.programs(scores)
    return {
        "pipeline": chain.recipe.name,
        "seed": chain.recipe.seed,
        "done": sum(stage.done for stage in stages),
        "stages": [sections.stage_section(stage) for stage in stages],
        "graph": lineage_svg(stages),
        "facts": sections.facts(stages),
        "scores": scores,
        "main_rows": evaluation.main_rows(scores),
        "part_rows": evaluation.part_rows(scores),
        "margins": evaluation.margins(scores),
        "refusals": evaluation.refusals(scores),
        "needles": evaluation.needles(scores),
        "programs": programs,
        "walls": evaluation.walls(programs),
        "gates": found.gates,
        "gate_notices": found.gate_notices,
        "variants": sections.variants(stages),
        "samples": samples,
        "sample_names": sample_names,
        "parity": sections.parity(stages),
        "exports": [stage.name for stage in stages if stage.produces == "export"],
        "licences": sections.licences(stages),
    }


if __name__ == "__main__":
    sys.exit(main())
