"""Preference optimisation on one CPU rank and on two, under ZeRO-1 and ZeRO-2: one result, within fp32's rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "dpo_ranks.py"
TOKENS = 4 * 2 * 64
BOUND = 2 * TOKENS * 2**-24
"""A step's loss and gradients are sums over at most ``TOKENS`` terms in some order: 2 n u (Higham 2002, section 4.2).

Four steps are short enough that errors of one step hardly grow in the next; a mean of means is off by 1e-2 and more.
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks") / "root"
    done = subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert set(seen["codes"].values()) == {0}, seen
    return seen


@pytest.mark.parametrize("name", ["one-by-four", "two-zero1", "two-zero2"])
def test_losses_margins_and_weights_do_not_depend_on_ranks_or_micro_batches(found, name):  # trap T2
    one, other = found["runs"]["one"], found["runs"][name]
    assert other["losses"] == pytest.approx(one["losses"], rel=BOUND)
    # A margin is a difference of sums of some hundred nats.
    assert other["margins"] == pytest.approx(one["margins"], abs=BOUND * 100)
    assert found["apart"][name] < BOUND


def test_every_rank_begins_at_the_parents_own_log_probabilities(found):
    assert {run["first_margin"] for run in found["runs"].values()} == {0.0}
    assert {run["margins"][0] for run in found["runs"].values()} == {0.0}
    assert found["runs"]["one"]["margins"][-1] > 0.5
