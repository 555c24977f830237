"""Variants' scores side by side, and which differences are more than noise.

    python pipelines/compare.py dpo dpo-ipo                    the first is the baseline
    python pipelines/compare.py sft grpo --metric reasoning    scores of this name or family alone; repeatable
    python pipelines/compare.py dpo dpo-ipo --html FILE        a page as well; --json prints JSON instead

A variant is a model stage that `evaluate` stages of the recipe name as `from`, or one such evaluate stage. Verdicts are
of the paired bootstrap's 95% interval of the difference, each score on its own. Exit codes: 0, 2 for a fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # For a script Python looks in its own folder first, where the rooms are not found and our modules shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipelines.command import Parser, add_recipe_options, guarded, load_chain, run_command

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node
    from pipelines.comparison import Comparison, Row
    from pipelines.graph import Registry
    from pipelines.scores import Evaluation
    from pipelines.staleness import Standing


def main(argv: Sequence[str] | None = None, stages: Registry | None = None) -> int:
    """Compare and return the exit code; ``stages`` stands in for the registry in tests."""
    return guarded(lambda: _compare(parse(sys.argv[1:] if argv is None else argv), stages))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options.

    Raises:
        ConfigError: for fewer than two variants, or one named twice.
    """
    parser = Parser("compare.py", __doc__)
    parser.add_argument("variants", nargs="+", metavar="NAME", help="model stages, or evaluate stages; at least two")
    add_recipe_options(parser)
    parser.add_argument("--metric", action="append", default=[], metavar="NAME", help="bpb/de, bpb or '*/de'")
    parser.add_argument("--no-samples", action="store_true", help="leave out what the variants said")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    options = parser.parse_args(argv)
    names = options.variants
    if len(set(names)) < max(2, len(names)):
        from stages.base import ConfigError, Fault

        message = f"must be at least two different stages; got {' '.join(names)}; name what to compare"
        raise ConfigError(Fault("NAME", message))
    return options


def _compare(options: argparse.Namespace, stages: Registry | None) -> int:
    import json

    from pipelines.comparison import compare, plain

    found = compare(evaluations(load_chain(options, stages), options), options.metric)
    if options.html is not None:
        from pipelines.compare_page import write_page

        write_page(found, options.html)
    if options.json:
        print(json.dumps(plain(found), indent=1, ensure_ascii=False))
        return 0
    print("\n".join(score_lines(found)))
    if not options.no_samples:
        print("\n".join(sample_lines(found)))
    if options.html is not None:
        print(f"\nwritten: {options.html}")
    return 0


def evaluations(chain: Chain, options: argparse.Namespace) -> dict[str, list[Evaluation]]:
    """The finished evaluations of each variant.

    Raises:
        ConfigError: naming each variant that is unknown or not evaluated, with the nearest name or the command.
    """
    from pipelines.scores import read_evaluation
    from stages.base import ConfigError

    faults, found = [], {}
    for name in options.variants:
        try:
            nodes = _evaluating(chain, name, options)
        except ConfigError as error:
            faults += error.faults
        else:
            found[name] = [read_evaluation(node.name, node.job.directory) for node in nodes]
    if faults:
        raise ConfigError(faults)
    return found


def _evaluating(chain: Chain, name: str, options: argparse.Namespace) -> list[Node]:
    """The finished evaluate stages of the variant ``name``."""
    from pipelines.scores import SCORED, evaluators
    from pipelines.staleness import standing
    from pipelines.suggest import suggestion
    from stages.base import ConfigError, Fault

    known = [node.name for node in chain if node.stage.produces in (SCORED, "model")]
    if name not in known:
        near = suggestion(name, known, "model or evaluate stage")
        raise ConfigError(
            Fault("NAME", f"must be a model or evaluate stage of {chain.recipe.name}; got {name!r}; {near}")
        )
    nodes = [chain.nodes[name]] if chain.nodes[name].stage.produces == SCORED else evaluators(chain, name)
    if not nodes:
        message = f"{name} must have an evaluate stage; none has `from: {name}`; add one to the recipe"
        raise ConfigError(Fault("NAME", message))
    standings = [(node, standing(node)) for node in nodes]
    faults = [
        Fault("NAME", f"{name} must be evaluated; {_standing(node, found)}; run: {run_command(node, options)}")
        for node, found in standings
        if not found.done
    ]
    if faults:
        raise ConfigError(faults)
    return nodes


def _standing(node: Node, found: Standing) -> str:
    return f"{node.name} is {found.state} ({'; '.join(found.reasons)})"


def score_lines(comparison: Comparison) -> list[str]:
    """The scores for a terminal: one line a score and variant beyond the first."""
    from pipelines.table import table

    baseline, *others = comparison.variants
    headers = ["score", "unit", "n", baseline, "variant", "its score", "difference", "verdict"]
    rows = [cells for row in comparison.rows for cells in _cells(row, others)]
    lines = table(headers, rows) if rows else ["no score is in every variant"]
    for name, having in comparison.partial.items():
        lines.append(f"{name}: only in {', '.join(having) or 'none'}")
    note = "Difference: variant minus baseline, 95% interval of the paired bootstrap, each score on its own;"
    return [*lines, "", f"{note} of 20 scores one may stand outside by chance."]


def _cells(row: Row, others: Sequence[str]) -> list[list[str]]:
    from pipelines.report_format import interval_text, score_text

    first = row.scores[0]
    cells = []
    for name, score, found in zip(others, row.scores[1:], row.differences, strict=True):
        apart = "-" if found.value is None else f"{found.value:+.4g} {interval_text(found.interval, '+.3g')}".rstrip()
        count = f"{first.n} {first.n_unit}"
        cells.append([first.name, first.unit, count, score_text(first), name, score_text(score), apart, found.verdict])
    return cells


def sample_lines(comparison: Comparison) -> list[str]:
    """What the variants said, in columns."""
    from pipelines.report_format import decoding_text, prompt_text
    from pipelines.terminal import columns, terminal_width, wrapped

    width, lines = terminal_width(), []
    for each in comparison.samples:
        how = decoding_text(each.decoding)
        lines += ["", f"{each.name} ({how})" if how else each.name, *wrapped(prompt_text(each.prompt), width)]
        texts = ["(not asked)" if sample is None else str(sample.get("completion", "")) for sample in each.samples]
        lines += columns(comparison.variants, texts, width)
    return lines


if __name__ == "__main__":
    sys.exit(main())
