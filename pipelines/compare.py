"""Variants' scores side by side, and which differences are more than noise.

    python pipelines/compare.py dpo dpo-ipo                    the first is the baseline
    python pipelines/compare.py sft grpo --metric reasoning    scores of this name or family alone; repeatable
    python pipelines/compare.py dpo dpo-ipo --html FILE        a page as well; --json prints JSON instead
    python pipelines/compare.py dpo dpo-ipo --wandb            Tables in W&B as well, a Report where it is online

A variant is a model stage that `evaluate` stages of the recipe name as `from`, one such evaluate stage, or the path
(with a slash) of a finished evaluation's artifact, of whatever recipe. Verdicts are of the paired bootstrap's 95%
interval of the difference, each score on its own. Exit codes: 0, 2 for a fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
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
    from pipelines.scores import Evaluation, Score
    from pipelines.staleness import Standing
    from stages.base import Fault

NOTE = (
    "Difference: variant minus baseline, 95% interval of the paired bootstrap, items of one family drawn together;",
    "each score on its own: of 20 scores one may stand outside by chance.",
)


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
    parser.add_argument("--verbose", action="store_true", help="where sets differ, a line for every score")
    parser.add_argument("--no-samples", action="store_true", help="leave out what the variants said")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.add_argument("--wandb", action="store_true", help="log Tables to W&B, as the recipe's tracking says")
    options = parser.parse_args(argv)
    names = options.variants
    if options.json and options.wandb:
        from pipelines.command import CommandError

        raise CommandError("--json prints JSON alone; give --wandb in a call of its own")
    if len(set(names)) < max(2, len(names)):
        from stages.base import ConfigError, Fault

        message = f"must be at least two different stages; got {' '.join(names)}; name what to compare"
        raise ConfigError(Fault("NAME", message))
    return options


def _compare(options: argparse.Namespace, stages: Registry | None) -> int:
    import json

    from pipelines.comparison import UnlikeError, compare, plain
    from stages.base import ConfigError

    chain = load_chain(options, stages)
    try:
        those = evaluations(chain, options)
        _tell_damage(those)
        found = compare(those, options.metric)
    except UnlikeError as error:
        raise ConfigError(error.every if options.verbose else error.faults) from error
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
    if options.wandb:
        from pipelines.compare_wandb import log_comparison

        folder = chain.runs / chain.recipe.name / "compare"
        print("\n".join(log_comparison(found, chain.recipe.name, chain.recipe.tracking, folder)))
    return 0


def _tell_damage(those: Mapping[str, Sequence[Evaluation]]) -> None:
    """Say whose gates nobody can read any more: the scores are whole, what was let pass is not known."""
    from pipelines.gates_record import damage

    for directory in dict.fromkeys(one.directory for each in those.values() for one in each):
        if said := damage(directory):
            print(f"note: {said}", file=sys.stderr)


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
            places = _elsewhere(name) if "/" in name else _evaluating(chain, name, options)
        except ConfigError as error:
            faults += error.faults
        else:
            found[Path(name).name] = [read_evaluation(stage, directory) for stage, directory in places]
    if not faults and len(found) < len(options.variants):
        faults.append(_fault(f"must be artifacts of different names; got {' '.join(options.variants)}"))
    faults += [] if faults else _same_twice(found)
    if faults:
        raise ConfigError(faults)
    return found


def _same_twice(found: Mapping[str, Sequence[Evaluation]]) -> list[Fault]:
    """Variants that are one evaluation under two names: their difference is no finding, and would be shown as one."""
    seen: dict[tuple[Path, ...], str] = {}
    faults = []
    for name, those in found.items():
        first = seen.setdefault(tuple(one.directory.resolve() for one in those), name)
        if first != name:
            faults.append(_fault(f"must be different evaluations; {first} and {name} are the same one; leave one out"))
    return faults


def _fault(message: str) -> Fault:
    from stages.base import Fault

    return Fault("NAME", message)


def _elsewhere(name: str) -> list[tuple[str, Path]]:
    """The evaluation in the artifact directory ``name``, of whatever recipe."""
    from pipelines.scores import SCORES
    from stages.base import ConfigError
    from stages.runtime.artifact import read_record

    directory = Path(name)
    record = read_record(directory)
    if record is None or record["state"] != "done" or not (directory / "output" / SCORES).is_file():
        state = "no artifact is there" if record is None else f"{record.get('kind')}, {record['state']}"
        way = "set runs/<pipeline>/<evaluation>-<key>"
        if record is None and read_record(directory.parent) is not None:
            way = f"set the artifact itself, {directory.parent}"
        raise ConfigError(_fault(f"must be the directory of a finished evaluation; got {name} ({state}); {way}"))
    return [(str(record["stage"]), directory)]


def _evaluating(chain: Chain, name: str, options: argparse.Namespace) -> list[tuple[str, Path]]:
    """The finished evaluate stages of the variant ``name`` and where they lie."""
    from pipelines.scores import SCORED, evaluators
    from pipelines.staleness import standing
    from pipelines.suggest import suggestion
    from stages.base import ConfigError

    known = [node.name for node in chain if node.stage.produces in (SCORED, "model")]
    if name not in known:
        near = suggestion(name, known, "model or evaluate stage")
        message = f"must be a model or evaluate stage of {chain.recipe.name}, or a path; got {name!r}; {near}"
        raise ConfigError(_fault(message))
    nodes = [chain.nodes[name]] if chain.nodes[name].stage.produces == SCORED else evaluators(chain, name)
    if not nodes:
        raise ConfigError(_fault(f"{name} must have an evaluate stage; none has `from: {name}`; add one to the recipe"))
    standings = [(node, standing(node)) for node in nodes]
    faults = [
        _fault(f"{name} must be evaluated; {_standing(node, found)}; run: {run_command(node, options)}")
        for node, found in standings
        if not found.done
    ]
    if faults:
        raise ConfigError(faults)
    return [(node.name, node.job.directory) for node in nodes]


def _standing(node: Node, found: Standing) -> str:
    return f"{node.name} is {found.state} ({'; '.join(found.reasons)})"


def score_lines(comparison: Comparison) -> list[str]:
    """The scores for a terminal, by suite: one line a score and variant beyond the first."""
    from pipelines.table import table

    baseline, *others = comparison.variants
    headers = ["score", "unit", "n", baseline, "variant", "its score", "difference", "verdict"]
    suites = comparison.by_suite()
    counts = [len(rows) * len(others) for rows in suites.values()]
    cells = [each for rows in suites.values() for row in rows for each in _cells(row, others)]
    head, *lines = table(headers, cells)
    shown = [head]
    for suite, count in zip(suites, counts, strict=True):
        shown += [f"-- {suite}", *lines[:count]]
        lines = lines[count:]
    shown = shown if suites else ["no score is in every variant"]
    shown += _partial_lines(comparison)
    return [*shown, "", *verdict_lines(comparison), *NOTE]


def verdict_lines(comparison: Comparison) -> list[str]:
    """What each variant is better and worse in, by name, and how many scores say neither."""
    baseline, *others = comparison.variants
    lines = []
    for place, name in enumerate(others):
        by_verdict: dict[str, list[str]] = {}
        for row in comparison.rows:
            by_verdict.setdefault(row.differences[place].verdict, []).append(row.name)
        told = [
            f"{verdict} in {', '.join(by_verdict.pop(verdict))}"
            for verdict in ("better", "worse", "higher", "lower")
            if verdict in by_verdict
        ]
        rest = [f"{len(names)} {verdict}" for verdict, names in by_verdict.items()]
        lines.append(f"{name} against {baseline}: {'; '.join([*told, ', '.join(rest)] if rest else told)}")
    return lines


def _partial_lines(comparison: Comparison) -> list[str]:
    """Scores that some variants lack, a line for those that are in the same ones."""
    groups: dict[str, list[str]] = {}
    for name, having in comparison.partial.items():
        groups.setdefault(", ".join(having) or "none", []).append(name)
    return [f"only in {having}: {', '.join(names)}" for having, names in groups.items()]


def _cells(row: Row, others: Sequence[str]) -> list[list[str]]:
    from pipelines.report_format import interval_text, score_text

    first = row.scores[0]
    cells = []
    for name, score, found in zip(others, row.scores[1:], row.differences, strict=True):
        apart = "-" if found.value is None else f"{found.value:+.4g} {interval_text(found.interval, '+.3g')}".rstrip()
        facts = [first.name, first.unit, _counted(first, score), score_text(first)]
        cells.append([*facts, name, score_text(score), apart, found.verdict])
    return cells


def _counted(first: Score, score: Score) -> str:
    """What both counted, ``4 / 8 replies`` where the baseline counted fewer of the same items."""
    return score.counted if first.n == score.n else f"{first.n:,} / {score.counted}"


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
