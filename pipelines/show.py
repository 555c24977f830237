"""What ``run.py`` shows in place of running, and the report that it leaves behind."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.chain import Chain


def show_plan(chain: Chain, options: argparse.Namespace) -> int:
    """Print what ``--plan`` shows; returns the exit code.

    Raises:
        ConfigError: for what a run would refuse on any device.
    """
    from pipelines.plan import plan, plan_lines
    from pipelines.preflight import refuse_early

    refuse_early(chain, chain, options.num_gpus, None)
    found = plan(chain, options.num_gpus or 1, options.price_per_gpu_hour)
    _print(found, plan_lines(found), options.json)
    return 0


def show_status(chain: Chain, options: argparse.Namespace) -> int:
    """Print what ``--status`` shows; returns the exit code.

    Raises:
        ConfigError: where ``--runs`` is no folder.
    """
    from pipelines.folder import refuse_no_folder
    from pipelines.run import ROOT
    from pipelines.status import status, status_lines
    from pipelines.table import terminal_width

    refuse_no_folder(options.runs, ROOT / "runs")
    entries = status(chain)
    _print(entries, status_lines(entries, terminal_width()), options.json)
    return 0


def _print(data: object, lines: list[str], as_json: bool) -> None:
    import json

    print(json.dumps(data, indent=1) if as_json else "\n".join(lines))


def write_report(chain: Chain) -> None:
    """Write the report and say where; what goes wrong with it is one line and changes no exit code."""
    from stages.runtime.artifact import shown
    from stages.runtime.scrub import environment_secrets, scrub_text

    try:
        from pipelines.report import refresh_report

        path, is_new = refresh_report(chain)
        print(f"report: {shown(path)}{'' if is_new else ' (up to date)'}", flush=True)
    except (Exception, SystemExit) as error:
        said = " ".join(f"the report could not be written: {type(error).__name__}: {error}".split())
        print(scrub_text(said, environment_secrets()), file=sys.stderr, flush=True)
