"""The suites by name; a new one is one file here, its section in ``config`` and one line below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from stages.runtime.suites import (
    bpb,
    code,
    decoding,
    format,
    harness,
    margins,
    needles,
    reasoning,
    safety,
    samples,
)
from stages.runtime.suites.bench import Bench
from stages.runtime.suites.scores import SuiteResult


class Suite(NamedTuple):
    """How a suite is run; ``version`` and ``Evaluate.code_version`` are raised when a model would get another score.

    ``check`` raises ``ConfigError`` for what ``run`` would refuse, and is asked of every suite before any is run.
    """

    run: Callable[[Bench, Any], SuiteResult]
    version: int
    check: Callable[[Bench, Any], None] | None = None


SUITES: dict[str, Suite] = {
    "bpb": Suite(bpb.run, bpb.VERSION, bpb.check),
    "margins": Suite(margins.run, margins.VERSION),
    "reasoning": Suite(reasoning.run, reasoning.VERSION),
    "safety": Suite(safety.run, safety.VERSION),
    "decoding": Suite(decoding.run, decoding.VERSION),
    "format": Suite(format.run, format.VERSION),
    "needles": Suite(needles.run, needles.VERSION, needles.check),
    "samples": Suite(samples.run, samples.VERSION),
    "code": Suite(code.run, code.VERSION),
    "harness": Suite(harness.run, harness.VERSION, harness.check),
}
