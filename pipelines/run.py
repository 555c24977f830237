"""The operator's one command: a recipe's stages, run, planned or looked at.

    deepspeed pipelines/run.py --stage pretrain      one stage; data stages that it needs are run or reused
    python pipelines/run.py --all                    every stage that is left, each in its own processes
    python pipelines/run.py --plan                   keys, what is stale and why, parameters, FLOPs, memory, disk
    python pipelines/run.py --status                 state, step, loss, age of the last checkpoint

Exit codes: 0 done or already done, 2 a fault in the recipe or the command, 85 saved and to be started again, 1 failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
KERNEL_CACHE = ROOT / ".cache" / "kernels"
MAX_RANKS = 100_000
MAX_PRICE = 1_000_000

if __name__ == "__main__":
    # For a script Python looks in its own folder first, where the rooms are not found and our modules shadow others.
    sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node
    from pipelines.graph import Registry
    from stages.base import Fault
    from stages.runtime.lifecycle import Surroundings


def main(argv: Sequence[str] | None = None, stages: Registry | None = None) -> int:
    """Do what the command line says and return the exit code; ``stages`` stands in for the registry in tests."""
    from pipelines.environment import fault

    if missing := fault(sys.argv):
        print(missing, file=sys.stderr)
        return 2
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        return _act(options, _registry(stages))
    except ValueError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        if _speaks():
            print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output (head, a pager) has seen enough; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class CommandError(ValueError):
    """A command line that means nothing."""


class Parser(argparse.ArgumentParser):
    """A parser whose faults are one line, and which takes no shortened options."""

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(
            prog=program,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but options that there are not are named first, each with the nearest one that there is."""
        from pipelines.suggest import listed, options_in

        words = [word.partition("=")[0] for word in (sys.argv[1:] if args is None else args)]
        unknown = [word for word in options_in(words) if word not in self._option_string_actions]
        if unknown:
            known = [option.lstrip("-") for option in self._option_string_actions if option not in ("-h", "--help")]
            self.error(f"unknown {listed(unknown, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ``CommandError`` in place of printing the usage."""
        raise CommandError(f"{message}; see --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; what the deepspeed launcher adds (``--local_rank``) is taken out.

    Raises:
        CommandError: for unknown options and combinations that mean nothing.
    """
    options = _parser().parse_args(without_local_rank(argv))
    _check_combination(options)
    return options


def option_rows() -> list[tuple[str, str]]:
    """Every option as written (``--stage NAME``) with its help, for the README."""
    rows = []
    for action in _parser()._actions:
        if action.option_strings != ["-h", "--help"]:
            value = f" {action.metavar}" if action.metavar else ""
            rows.append((action.option_strings[0] + value, action.help or ""))
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = Parser("run.py", __doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--stage", action="append", metavar="NAME", help="run this stage alone, after the data stages that it needs"
    )
    mode.add_argument("--all", action="store_true", help="run every stage that is left, in order")
    mode.add_argument("--plan", action="store_true", help="show keys, reasons and costs; nothing runs")
    mode.add_argument("--status", action="store_true", help="show what the artifacts say of themselves")
    mode.add_argument("--sync", action="store_true", help="replay metrics and lineage of --runs into W&B")
    add_recipe_options(parser, "recipe")
    parser.add_argument(
        "--override-gate", action="append", default=[], metavar="STAGE[:METRIC]",
        help="go on past a closed gate of this evaluate stage, on record",
    )  # fmt: skip
    kernels = parser.add_argument_group("kernels")
    kernels.add_argument(
        "--require-fast-kernels", action="store_true",
        help="refuse a training stage with a layer that no kernel tested for the device takes",
    )  # fmt: skip
    kernels.add_argument("--warm-up", action="store_true", help="with --stage: compile and tune kernels, train nothing")
    kernels.add_argument(
        "--cache-dir", type=Path, default=KERNEL_CACHE, metavar="DIR",
        help="where compiled and tuned kernels are kept (.cache/kernels)",
    )  # fmt: skip
    limits = parser.add_argument_group("with --all")
    limits.add_argument("--from", dest="first", metavar="NAME", help="leave out the stages that do not depend on it")
    limits.add_argument("--until", dest="last", metavar="NAME", help="stop after this stage")
    limits.add_argument("--num_gpus", type=int, metavar="N", help="processes a training stage; also for --plan")
    parser.add_argument("--price_per_gpu_hour", type=float, metavar="X", help="--plan: what an hour of one GPU costs")
    parser.add_argument("--json", action="store_true", help="--plan and --status as JSON")
    return parser


def add_recipe_options(parser: Parser, title: str = "recipe, as given to run.py") -> None:
    """The options by which every command finds the artifacts that ``run.py`` made with the same ones."""
    recipe = parser.add_argument_group(title)
    recipe.add_argument("--pipeline", type=Path, metavar="FILE", help="recipe (pipelines/recipes/default.yaml)")
    recipe.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="set a value, such as pretrain.lr=3e-4"
    )
    recipe.add_argument("--data", type=Path, metavar="DIR", help="clean this folder's text instead of the sources")
    recipe.add_argument("--runs", type=Path, default=ROOT / "runs", metavar="DIR", help="where artifacts lie (runs)")


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """``argv`` without ``--local_rank=N`` or ``--local_rank N``, which launchers add; the environment says the same."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip and re.fullmatch(r"-?\d+", word):
            skip = False
            continue
        skip = word in ("--local_rank", "--local-rank")
        if not skip and not re.fullmatch(r"--local[_-]rank=.*", word):
            kept.append(word)
    return kept


def _check_combination(options: argparse.Namespace) -> None:
    if (options.first or options.last) and not options.all:
        raise CommandError("--from and --until belong to --all; see --help")
    if options.warm_up and not options.stage:
        raise CommandError("--warm-up belongs to --stage; see --help")
    if options.require_fast_kernels and not (options.all or options.stage):
        raise CommandError("--require-fast-kernels belongs to --all and --stage; see --help")
    if options.num_gpus is not None and not (options.all or options.plan):
        raise CommandError("--num_gpus belongs to --all and --plan; with --stage give it to deepspeed, before run.py")
    if options.override_gate and not (options.all or options.stage):
        raise CommandError("--override-gate belongs to --all and --stage; see --help")
    if options.num_gpus is not None and not 1 <= options.num_gpus <= MAX_RANKS:
        raise CommandError(f"--num_gpus must be from 1 to {MAX_RANKS}; got {options.num_gpus}; set the devices to use")
    price = options.price_per_gpu_hour
    if price is not None and not options.plan:
        raise CommandError("--price_per_gpu_hour belongs to --plan; see --help")
    if price is not None and not 0 <= price <= MAX_PRICE:
        raise CommandError(f"--price_per_gpu_hour must be a number from 0 to {MAX_PRICE}; got {price}; set a price")
    if options.json and not (options.plan or options.status):
        raise CommandError("--json belongs to --plan and --status; see --help")


def _act(options: argparse.Namespace, stages: Registry) -> int:
    from stages.runtime.distributed import world_size

    if options.sync:
        from stages.runtime.sync import sync

        lines = sync(options.runs.absolute())
        print("\n".join(lines))
        return 1 if any(": FAILED, " in line for line in lines) else 0
    try:
        ranks = world_size()
    except ValueError as error:
        raise CommandError(str(error)) from error
    if ranks > 1 and "MASTER_ADDR" not in os.environ:
        raise CommandError(f"WORLD_SIZE is {ranks} but MASTER_ADDR is not set; start through the launcher")
    if ranks > 1 and not options.stage:
        raise CommandError("only --stage runs under a launcher; start --all, --plan and --status with python")
    chain = _chain(options, stages)
    if options.status:
        from pipelines.show import show_status

        return show_status(chain, options)
    _require_writable(options.runs)
    if options.plan:
        from pipelines.show import show_plan

        return show_plan(chain, options)
    from stages.runtime.console import without_readers

    with without_readers():
        return _run(chain, options)


def _run(chain: Chain, options: argparse.Namespace) -> int:
    if options.all:
        return _run_all(chain, options)
    _settle_kernels(chain, [chain.nodes[name] for name in options.stage], options)
    if options.warm_up:
        from pipelines.warm_up import warm

        return warm(chain, options.stage)
    from pipelines.single import run_stages

    said = options.override_gate
    return run_stages(chain, options.stage, _surroundings(chain), lambda node: command_line(node, options), said)


def _settle_kernels(chain: Chain, nodes: Sequence[Node], options: argparse.Namespace) -> None:
    from stages.runtime.kernel_cache import use_kernel_cache

    use_kernel_cache(options.cache_dir.absolute())
    if options.require_fast_kernels:
        from pipelines.fast_kernels import refuse_slow

        refuse_slow(chain, nodes)


def _require_writable(runs: Path) -> None:
    """Refuse a folder in which nothing could be made; nothing is left there."""
    there = runs.absolute()
    try:
        while not there.exists():
            there = there.parent
        # What the permissions say is not all: a file system may be read-only, or none to keep files in.
        Path(tempfile.mkdtemp(prefix=".writable-", dir=there)).rmdir()
    except NotADirectoryError:
        fault = f"{there} is no folder"
    except OSError as error:
        fault = f"{there} cannot be written ({error.strerror})"
    else:
        return
    raise CommandError(f"--runs must be a folder that can be written; got {runs}: {fault}; name another")


def _registry(stages: Registry | None) -> Registry:
    if stages is None:
        from stages import STAGES

        return STAGES
    return stages


def _chain(options: argparse.Namespace, stages: Registry) -> Chain:
    from pipelines.loading import load_chain
    from pipelines.suggest import suggestion
    from stages.base import ConfigError, Fault

    runs = options.runs.absolute()
    chain = load_chain(options.pipeline, options.set, runs, stages, options.data, lambda chain: _early(chain, options))
    recipe = chain.recipe
    named = {"--stage": options.stage or [], "--from": [options.first], "--until": [options.last]}
    faults = [
        Fault(flag, f"must name a stage of {recipe.name}; got {name!r}; {suggestion(name, recipe.stages, 'stage')}")
        for flag, names in named.items()
        for name in names
        if name is not None and name not in recipe.stages
    ]
    if options.override_gate:
        from pipelines.gates_run import override_faults

        faults += override_faults(chain, options.override_gate)
    if faults:
        raise ConfigError(faults)
    if len(options.stage or []) > 1:
        _refuse_training(chain, options.stage)
    return chain


def _early(chain: Chain, options: argparse.Namespace) -> list[Fault]:
    """What a plan, or a run of the whole chain, would refuse besides the faults that are found already."""
    from pipelines.preflight import early_faults

    whole = options.plan or (options.all and not (options.first or options.last))
    return early_faults(chain, chain, options.num_gpus, None) if whole else []


def _refuse_training(chain: Chain, names: list[str]) -> None:
    training = [name for name in names if chain.nodes[name].stage.launched]
    if training:
        raise CommandError(
            f"--stage may be given several times for stages that do not train; got {training[0]}, which does"
        )


def _run_all(chain: Chain, options: argparse.Namespace) -> int:
    from pipelines.contamination import contamination_notes
    from pipelines.gates_run import handed_on
    from pipelines.launch import run_all
    from pipelines.preflight import early_faults, refuse, shorter_faults
    from pipelines.show import write_report
    from stages.runtime.artifact import has_gpu

    chosen = chain.selection(options.first, options.last)
    refuse([*shorter_faults(chain, chosen), *early_faults(chain, chosen, options.num_gpus, has_gpu())])
    _settle_kernels(chain, chosen, options)
    for note in contamination_notes(chain):
        print(f"note: {note}", flush=True)
    return run_all(
        chain,
        chosen,
        lambda nodes: stages_argv(nodes, options, handed_on(chain, nodes, options.override_gate)),
        lambda node: command_line(node, options),
        finish=lambda: write_report(chain),
        overrides=options.override_gate,
    )


def _surroundings(chain: Chain) -> Surroundings:
    from stages.runtime.lifecycle import Surroundings

    tracking = chain.recipe.tracking
    return Surroundings(ROOT / ".cache", tracking.wandb, tracking.project, tracking.entity)


def stages_argv(nodes: Sequence[Node], options: argparse.Namespace, overrides: Sequence[str] = ()) -> list[str]:
    """The command by which ``--all`` runs a training stage, under the deepspeed launcher, or others, in Python."""
    from pipelines.launch import launcher_argv

    script = ROOT / "pipelines" / "run.py"
    start = launcher_argv(script, options.num_gpus) if nodes[0].stage.launched else [sys.executable, str(script)]
    names = [word for node in nodes for word in ("--stage", node.name)]
    names += [word for gate in overrides for word in ("--override-gate", gate)]
    names += ["--require-fast-kernels"] if options.require_fast_kernels else []
    names += ["--cache-dir", str(options.cache_dir.absolute())]
    return [*start, *names, *_recipe_options(options), "--runs", str(options.runs.absolute())]


def command_line(node: Node, options: argparse.Namespace) -> str:
    """The command that a person would type to run ``node``'s stage, on one line, without secrets."""
    from stages.runtime.scrub import scrub_argv

    runs = [] if options.runs == ROOT / "runs" else ["--runs", str(options.runs)]
    start = ["deepspeed" if node.stage.launched else "python", "pipelines/run.py", "--stage", node.name]
    return shlex.join(scrub_argv([*start, *_recipe_options(options), *runs]))


def _recipe_options(options: argparse.Namespace) -> list[str]:
    pipeline = [] if options.pipeline is None else ["--pipeline", str(options.pipeline)]
    data = [] if options.data is None else ["--data", str(options.data)]
    return [*pipeline, *(word for setting in options.set for word in ("--set", setting)), *data]


def _refuse(error: ValueError) -> int:
    """One line a fault, on rank 0 alone; a ``ValueError`` of any other kind is no fault of the user's, and goes on."""
    from stages.base import EXIT_CONFIG, ConfigError
    from stages.runtime.artifact import ArtifactError
    from stages.runtime.scrub import environment_secrets, scrub_text

    lines = [str(fault) for fault in error.faults] if isinstance(error, ConfigError) else [str(error)]
    if isinstance(error, ConfigError | ArtifactError | CommandError):
        if _speaks():
            secrets = environment_secrets()
            print("\n".join(scrub_text(" ".join(line.split()), secrets) for line in lines), file=sys.stderr)
        return EXIT_CONFIG
    raise error


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
