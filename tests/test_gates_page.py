"""What is said of a gate: better or worse by how much, on its line and on its page, and which items weigh most."""

import dataclasses

import pytest
import yaml
from report_chain import make_chain, run_chain

from pipelines.gates import Judgement, judge, line
from pipelines.gates_page import worst_items
from pipelines.gates_run import settle
from pipelines.scores import read_evaluation

BPB = "bpb/de"


def chain_with(directory, quality):
    """A chain that was run; ``judge-tuned`` has a gate on a regression, and the baseline's quality is 0.3."""
    gates = [{"metric": BPB, "max_regression": 0.01}]
    stages = {
        "text": {"kind": "gather", "sources": [{"name": "wiki"}]},
        "base": {"kind": "fit", "data": "text"},
        "tuned": {"kind": "fit", "data": "text", "from": "base"},
        "judge-base": {"kind": "judge", "from": "base", "data": "text", "quality": 0.3},
        "judge-tuned": {"kind": "judge", "from": "tuned", "data": "text", "quality": quality, "gates": gates},
    }
    head = {"name": "toy", "seed": 17, "tracking": {"wandb": "disabled"}}
    return run_chain(make_chain(directory, yaml.safe_dump({**head, "stages": stages}, sort_keys=False)))


def test_a_model_that_is_better_is_said_to_be_better_with_its_bounds_in_order():
    worse = Judgement("j", BPB, "max_regression", 0.1, "passed", "", False, 0.05854, (0.0225, 0.0882), "bits", 9)
    worse = dataclasses.replace(worse, families=9)
    better = dataclasses.replace(worse, value=-0.05854, interval=(-0.0882, -0.0225))
    tie = dataclasses.replace(worse, value=-0.01, interval=(-0.03, 0.005))
    assert worse.found == "worse by 0.05854 [0.0225, 0.0882] bits, n = 9 items"
    assert better.found == "better by 0.05854 [0.0225, 0.0882] bits, n = 9 items"
    assert tie.found == "better by 0.01 [-0.005, 0.03] bits, n = 9 items"
    assert better.found in line(better)
    # A score that is held against a bound is told as it is, also below 0.
    bound = dataclasses.replace(better, rule="max")
    assert bound.found == "-0.05854 [-0.0882, -0.0225] bits, n = 9 items"


def test_the_page_says_what_the_line_says(tmp_path):
    chain = chain_with(tmp_path, quality=0.4)
    assert settle(chain, chain.nodes["judge-tuned"])
    (found,) = judge(chain, chain.nodes["judge-tuned"])
    assert found.found.startswith("better by 0.")
    text = (chain.nodes["judge-tuned"].job.directory / "gates.html").read_text(encoding="utf-8")
    assert text.count(found.found) == 3, "in words, and twice as the drawing's name"
    assert "worse by" not in text


def test_the_items_of_the_page_add_to_the_difference_in_its_unit(tmp_path):
    chain = chain_with(tmp_path, quality=0.1)
    node = chain.nodes["judge-tuned"]
    settle(chain, node)
    text = (node.job.directory / "gates.html").read_text(encoding="utf-8")
    assert "<th>its share of the difference, bits_per_byte</th>" in text
    (found,) = judge(chain, node)
    evaluations = [read_evaluation(name, chain.nodes[name].job.directory) for name in ("judge-tuned", "judge-base")]
    items = worst_items(found, evaluations[0], evaluations[1:], most=1000)
    # All are a little worse here, up to noise: what they add is the difference itself.
    assert sum(item["share"] for item in items) == pytest.approx(found.value, rel=0.05)
