"""What the commands beside ``run.py`` share: its parser and recipe options, the chain they name, faults on one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipelines import environment
from pipelines.run import ROOT, CommandError, Parser, add_recipe_options, command_line

__all__ = ["CommandError", "Parser", "add_recipe_options", "guarded", "load_chain", "run_command"]

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node
    from pipelines.graph import Registry


def load_chain(options: argparse.Namespace, stages: Registry | None = None) -> Chain:
    """The chain that ``options`` name.

    Raises:
        ConfigError: for a fault in the recipe, and for artifacts looked for where no folder is.
    """
    from pipelines import loading
    from pipelines.folder import refuse_no_folder

    refuse_no_folder(options.runs, ROOT / "runs")
    if stages is None:
        from stages import STAGES

        stages = STAGES
    return loading.load_chain(options.pipeline, options.set, options.runs.absolute(), stages, options.data)


def run_command(node: Node, options: argparse.Namespace) -> str:
    """The command that a person would type to run ``node``'s stage."""
    return command_line(node, options)


def guarded(act: Callable[[], int]) -> int:
    """``act``'s exit code; 2 and a line on stderr for each fault of the user's, 1 when interrupted."""
    if missing := environment.fault(sys.argv):
        print(missing, file=sys.stderr)
        return 2
    from data.errors import DataError
    from stages.base import EXIT_CONFIG, EXIT_FAILED, ConfigError
    from stages.runtime.artifact import ArtifactError
    from stages.runtime.manifest import CheckpointError

    _any_text_passes()
    try:
        return act()
    except ConfigError as error:
        return _tell([str(fault).removeprefix(": ") for fault in error.faults], EXIT_CONFIG)
    except (CommandError, ArtifactError, CheckpointError, DataError) as error:
        return _tell([str(error)], EXIT_CONFIG)
    except KeyboardInterrupt:
        return _tell(["interrupted"], EXIT_FAILED)
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _any_text_passes() -> None:
    """Whatever the locale: bytes that are no UTF-8 come in, and characters that the terminal lacks go out, as ``?``."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _tell(lines: Sequence[str], code: int) -> int:
    from stages.runtime.scrub import environment_secrets, scrub_text

    secrets = environment_secrets()
    print("\n".join(scrub_text(" ".join(line.split()), secrets) for line in lines), file=sys.stderr)
    return code
