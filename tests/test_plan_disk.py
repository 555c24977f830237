"""The plan's word on the disk: what is known of the stages that are left, and of which of them nothing is."""

import re

import pytest

from pipelines.plan import plan_lines

FREE = 3 * 1024**3


def disk_line(*stages: tuple[str, str, int | None]) -> str:
    """The line of a plan of (name, state, disk_bytes)."""
    rows = [
        {"stage": name, "kind": "x", "parents": {}, "key": "0" * 64, "state": state, "reasons": [], "budget": None,
         "figures": {} if size is None else {"disk_bytes": size}}
        for name, state, size in stages
    ]  # fmt: skip
    plan = {"pipeline": "p", "runs": "runs", "devices": 1, "free_bytes": FREE, "stages": rows, "notes": []}
    (line,) = [line for line in plan_lines(plan) if line.startswith("disk:")]
    return line


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ([("clean", "new", None)], "disk: not known beforehand of clean, 3.0 GiB free"),
        (
            [("clean", "new", None), ("tokenizer", "new", None), ("pretrain", "new", 2048), ("sft", "done", 4096)],
            "disk: at least 2.0 KiB wanted by what is left, not known beforehand of clean, tokenizer, 3.0 GiB free",
        ),
        ([("clean", "done", None), ("pretrain", "done", 2048)], "disk: 3.0 GiB free"),
    ],
    ids=["unknown", "some", "nothing left"],
)
def test_no_size_is_told_that_nobody_knows(stages, line):
    assert disk_line(*stages) == line
    assert not re.search(r"\b0 B\b", line)
