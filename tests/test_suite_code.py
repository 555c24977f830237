"""The suite code on a tiny model: the unbiased estimator, what is executed, the sandbox's level beside the score."""

import itertools
import json
import math

import evaluated
import pytest

from data.problems import read_problems_file, write_problems
from stages.base import ConfigError
from stages.evaluate import Evaluate, EvaluateConfig
from stages.runtime import sandbox
from stages.runtime.sandbox import why_none
from stages.runtime.suites import code
from stages.runtime.suites.bench import Reply
from stages.runtime.suites.code_config import CodeConfig

ROWS = [
    {"task_id": f"H/{number}", "prompt": f"def add{number}(x):\n", "entry_point": f"add{number}",
     "canonical_solution": f"    return x + {number}\n", "test": f"def check(f):\n    assert f(1) == {1 + number}\n"}
    for number in range(1, 4)
]  # fmt: skip

pytestmark = pytest.mark.skipif(why_none("auto") is not None, reason=f"no sandbox here: {why_none('auto')}")


def test_the_estimate_is_the_share_of_draws_with_a_passing_program():
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
            assert code.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    assert code.pass_at_k(10**4, 3, 10**3) == pytest.approx(1 - 0.9**3, abs=1e-3)
    with pytest.raises(ValueError, match="k must be from 1 to n"):
        code.pass_at_k(4, 1, 5)


def test_the_estimate_is_unbiased_where_the_plain_one_is_not():
    n, k, p = 5, 3, 0.3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * code.pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) - (1 - (1 - p) ** k)) > 0.01


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    parents = evaluated.make_parents(folder)
    output = folder / "problems" / "output"
    output.mkdir(parents=True)
    path = folder / "h.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_problems(output, read_problems_file(path, "humaneval", "humaneval"), [])
    evaluated.finish(folder / "problems", {})
    return {**parents, "problems": folder / "problems"}


@pytest.fixture
def bench(parents):
    return evaluated.make_bench(parents, 4)


def scripted(bench, monkeypatch, texts):
    """Replies as ``texts`` has them by the prompt's id, instead of the random model's."""
    asked = []

    def replies(self, prompts, max_new_tokens, sampling=None, seed=None):
        asked.extend((prompt.id, prompt.ids, sampling, seed) for prompt in prompts)
        found = [texts(prompt.id) for prompt in prompts]
        return [Reply(**{"text": text, "tokens": 5, "stopped": True, "is_clean": True} | extra) for text in found]

    extra = {"closes_turn": True} if "closes_turn" in Reply._fields else {}
    monkeypatch.setattr(type(bench), "replies", replies)
    return asked


def test_scores_are_of_the_programs_that_pass_their_tests(bench, monkeypatch):
    right = {"H/1#0", "H/1#1", "H/2#3"}
    answers = {name: f"    return x + {name[2]}\ndef more(): 0" for name in right}
    others = {"2": "    import sys; sys.exit(0)", "3": "    return ("}
    asked = scripted(bench, monkeypatch, lambda name: answers.get(name, others.get(name[-1], "    pass")))
    result = code.run(bench, CodeConfig(samples=4, k=[1, 2], temperature=0.8, max_new_tokens=16, cpu_s=2, seed=5))
    found = {score.name: score for score in result.scores}
    assert found["code/humaneval/pass_at_1"].value == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    # Of six pairs of four programs, one without either of two, three without the one.
    assert found["code/humaneval/pass_at_2"].value == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert found["code/humaneval/valid_python"].value == pytest.approx((3 + 4 + 3) / 12)
    score = found["code/humaneval/pass_at_1"]
    assert score.settings["sandbox"] in ("bubblewrap", "landlock")
    assert (score.n, score.n_unit, score.unit) == (3, "problems", "share")
    assert (score.decoding["temperature"], score.decoding["samples"], score.decoding["seed"]) == (0.8, 4, 5)
    assert len({name for name, *_ in asked}) == 12
    assert result.samples[0]["completion"] == "    return x + 1"
    assert [sample["outcome"] for sample in result.samples] == [
        "passed",
        "failed AssertionError",
        "failed AssertionError",
    ]


def test_a_chat_is_asked_for_code_and_its_block_is_executed(bench, monkeypatch):
    asked = scripted(
        bench, monkeypatch, lambda name: f"Here:\n```python\ndef add{name[2]}(x):\n    return x + {name[2]}\n```"
    )
    monkeypatch.setattr(type(bench), "max_seq_len", 4096)
    result = code.run(bench, CodeConfig(style="chat", max_new_tokens=16))
    assert result.scores[0].value == 1.0
    assert bench.specials["<|im_start|>"] in asked[0][1]
    other = code.run(bench, CodeConfig(style="continue", max_new_tokens=16))
    assert other.scores[0].set_hash != result.scores[0].set_hash


def test_a_random_model_passes_nothing_and_twice_the_same(bench):  # trap M2
    config = CodeConfig(samples=2, temperature=1.0, max_new_tokens=8, problems=2, cpu_s=2)
    first, second = code.run(bench, config), code.run(bench, config)
    assert first.plain() == second.plain()
    assert first.scores[0].value == 0.0
    assert first.scores[0].n == 2


def test_a_prompt_beyond_the_models_length_is_refused(bench):
    with pytest.raises(ConfigError, match=r"suites\.code\.max_new_tokens: must leave room"):
        code.run(bench, CodeConfig(max_new_tokens=bench.max_seq_len))


def test_without_a_sandbox_there_is_no_score_and_it_is_said_before_anything_runs(bench, monkeypatch):  # trap O4
    monkeypatch.setattr(sandbox, "STRONG", ())
    with pytest.raises(ConfigError, match=r"suites\.code\.sandbox: generated code needs a sandbox; there is none"):
        code.run(bench, CodeConfig(max_new_tokens=8))
    sandbox.why_none.cache_clear()
    plain = {"kind": "evaluate", "from": "m", "problems": "p", "suites": {"code": {}}}
    config = EvaluateConfig.model_validate(plain)
    assert [fault.path for fault in Evaluate.check_devices(config, 1, False)] == ["suites.code.sandbox"]
    sandbox.why_none.cache_clear()


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="k must be at most samples 2"):
        CodeConfig(samples=2, k=[1, 5], temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        CodeConfig(samples=2)
