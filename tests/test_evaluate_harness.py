"""lm-evaluation-harness asks our model: its likelihoods are ours, local tasks are named so, n and error given."""

import json
import math
import re

import evaluated
import pytest
from evaluated import FACTS, evaluate, make_bench, slow_nats

from data.rewards import extract_answer
from data.tokenizer import encode_text
from stages.runtime.suites.bench import greedy
from stages.runtime.suites.config import HarnessConfig
from stages.runtime.suites.harness import mean_items, tasks_task


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    return evaluated.make_parents(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def bench(parents):
    return make_bench(parents, 4)


def cheapest(bench, by_length: bool) -> list[float]:
    """Which facts' right ending is likeliest, in all or for its characters, one sequence at a time."""
    end, right = bench.specials["<|endoftext|>"], []
    for fact in FACTS:
        costs = []
        for ending in (fact["correct"], *fact["distractors"]):
            first = 1 + len(encode_text(bench.tokenizer, fact["prompt"]))
            whole = [end, *encode_text(bench.tokenizer, f"{fact['prompt']} {ending}")]
            costs.append(sum(slow_nats(bench, whole, first)) / (len(ending) if by_length else 1))
        right.append(float(costs[0] == min(costs)))
    return right


def test_local_tasks_give_our_likelihoods_with_n_and_standard_error(parents, bench, tmp_path):  # trap M6
    changes = {"suites": {"harness": {"local": ["facts_local", "tasks_local"], "max_new_tokens": 4}}}
    changes |= dict.fromkeys(("data", "messages", "preferences"))
    _, output = evaluate(tmp_path, parents, **changes)
    scores = {score["name"]: score for score in json.loads((output / "scores.json").read_text())["scores"]}
    assert set(scores) == {
        "harness/facts_local/acc", "harness/facts_local/acc_norm", "harness/tasks_local/exact_match",
    }  # fmt: skip
    items = json.loads((output / "items.json").read_text())
    for name, by_length in (("acc", False), ("acc_norm", True)):
        score, right = scores[f"harness/facts_local/{name}"], cheapest(bench, by_length)
        assert items[score["items"]]["ids"] == [fact["id"] for fact in FACTS]
        assert items[score["items"]]["numerator"] == right
        assert score["value"] == pytest.approx(sum(right) / 3)
        # The standard error of a mean from the sample's variance.
        share = sum(right) / 3
        error = float(score["method"].rpartition("standard error ")[2])
        assert error == pytest.approx(math.sqrt(share * (1 - share) / 2), rel=1e-5)
        # Nothing of the model may be among the settings, or no two models could be compared.
        assert set(score["settings"]) == {"lm_eval"}
    exact = scores["harness/tasks_local/exact_match"]
    assert (exact["n"], exact["value"], exact["decoding"]) == (24, 0.0, greedy(4))


@pytest.mark.parametrize(
    "text", ["1 + 1 = 2. Answer: 2", "Answer: 3. No! Answer: 2\n", "Answer: 2\nso", "2", "Answer:"]
)
def test_the_harness_takes_the_answer_that_we_take(parents, bench, text):
    step = tasks_task(bench, HarnessConfig())["filter_list"][0]["filter"][0]
    found = re.findall(step["regex_pattern"], text)
    assert (found[step["group_select"]] if found else None) == extract_answer(text)


def test_only_a_mean_of_its_questions_is_paired():  # trap M7
    samples = [{"doc": {"id": str(n)}, "doc_id": n, "perplexity": value} for n, value in enumerate((-1.0, -2.0))]
    assert mean_items(samples, "perplexity", math.exp(1.5)) is None
    assert mean_items(samples, "perplexity", -1.5).ids == ["0", "1"]
    assert mean_items([{"doc": {}, "doc_id": 0, "f1": (1, 0)}], "f1", 0.5) is None


def test_texts_are_scored_whole_and_replies_cut_at_until(bench):
    from lm_eval.api.instance import Instance

    from stages.runtime.suites.harness_model import HarnessModel

    def requests(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=one, idx=n) for n, one in enumerate(arguments)]

    model, end = HarnessModel(bench), bench.specials["<|endoftext|>"]
    text = "the cat sat on a red mat"
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert total == pytest.approx(-sum(slow_nats(bench, [end, *encode_text(bench.tokenizer, text)], 1)), abs=1e-4)
    long = "the cat sat on the old hill " * 12
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(long,)]))
    assert math.isfinite(total)
    ((nats, _), (empty, _)) = model.loglikelihood(requests("loglikelihood", [(long, "mat"), ("", "the cat")]))
    assert nats < 0
    assert empty == pytest.approx(-sum(slow_nats(bench, [end, *encode_text(bench.tokenizer, "the cat")], 1)), abs=1e-4)
    asked = [("the", {"until": [], "max_gen_toks": 6}), ("the", {"until": [], "max_gen_toks": 6, "as_chat": True})]
    whole, chat = model.generate_until(requests("generate_until", asked))
    assert whole != chat
    stop = whole[2]
    (cut,) = model.generate_until(requests("generate_until", [("the", {"until": [stop], "max_gen_toks": 6})]))
    assert cut == whole.partition(stop)[0]
