"""The pipeline as one page: `runs/<pipeline>/report/index.html`, from the artifacts' JSON files alone.

    python pipelines/report.py                       the default recipe; the same --pipeline, --set, --runs as run.py

Lineage, curves, every score by stage with n and interval, variants, samples, parity; "not run" where nothing ran. The
page holds all that it shows, loads nothing and needs no script. Exit codes: 0, 2 for a fault in recipe or command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # For a script Python looks in its own folder first, where the rooms are not found and our modules shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipelines.command import Parser, add_recipe_options, guarded, load_chain

if TYPE_CHECKING:
    from pipelines.chain import Chain
    from pipelines.graph import Registry


def main(argv: Sequence[str] | None = None, stages: Registry | None = None) -> int:
    """Write the report and return the exit code; ``stages`` stands in for the registry in tests."""
    return guarded(lambda: _report(sys.argv[1:] if argv is None else argv, stages))


def _report(argv: Sequence[str], stages: Registry | None) -> int:
    from stages.runtime.artifact import shown

    print(shown(write_report(load_chain(parse(argv), stages))))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = Parser("report.py", __doc__)
    add_recipe_options(parser)
    return parser.parse_args(argv)


def write_report(chain: Chain) -> Path:
    """Write the report of ``chain`` as its artifacts stand now, whatever is missing, and return its path."""
    from pipelines import page
    from stages.runtime.artifact import now

    path = chain.runs / chain.recipe.name / "report" / "index.html"
    page.write(path, report_text(chain, now()))
    return path


def report_text(chain: Chain, made_at: str) -> str:
    """The page; the same artifacts and ``made_at`` give the same text."""
    from pipelines import page
    from pipelines.report_charts import SHOWN

    return page.render("report_page.html", page=_page(chain), made_at=made_at, shown=SHOWN)


def _page(chain: Chain) -> dict[str, Any]:
    from pipelines import report_sections as sections
    from pipelines.report_graph import lineage_svg
    from pipelines.report_read import read_stages

    stages = read_stages(chain)
    sample_names, samples = sections.samples(stages)
    return {
        "pipeline": chain.recipe.name,
        "seed": chain.recipe.seed,
        "done": sum(stage.done for stage in stages),
        "stages": [sections.stage_section(stage) for stage in stages],
        "graph": lineage_svg(stages),
        "facts": sections.facts(stages),
        "scores": sections.score_table(stages),
        "variants": sections.variants(stages),
        "samples": samples,
        "sample_names": sample_names,
        "parity": sections.parity(stages),
        "exports": [stage.name for stage in stages if stage.produces == "export"],
        "licences": sections.licences(stages),
    }


if __name__ == "__main__":
    sys.exit(main())
