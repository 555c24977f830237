"""Comparing variants: paired intervals that mean what they say, sets that must be one, verdicts that know noise."""

import dataclasses
import io
import json
import random
import statistics
import sys

import numpy as np
import pytest
from report_chain import HOSTILE, RECIPE, STAGES, make_chain, run_chain

from pipelines.compare import main
from pipelines.comparison import beside, mismatches
from pipelines.paired import CONFIDENCE, difference, expanded_tail, paired_interval, student_t
from pipelines.report_sections import _verdict
from pipelines.scores import Items, Score, read_evaluation


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compare")
    chain = make_chain(directory)
    run_chain(chain, *(node.name for node in chain if node.name not in ("judge-base", "ship")))
    return directory


@pytest.fixture
def compare(home, capsys):
    def run(*argv, text=RECIPE):
        (home / "toy.yaml").write_text(text, encoding="utf-8")
        code = main([*argv, "--pipeline", str(home / "toy.yaml"), "--runs", str(home / "runs")], STAGES)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def ratio(numerator, denominator=None):
    ids = [str(number) for number in range(len(numerator))]
    return Items(ids, list(numerator), list(denominator or [1.0] * len(ids)))


def score(items, better="higher", **changes):
    value = sum(items.numerator) / sum(items.denominator)
    plain = {
        "name": "s/x", "suite": "s", "value": value, "unit": "share", "better": better, "n": len(items.ids),
        "n_unit": "items", "interval": None, "set_hash": "h", "suite_version": 1, "method": "", "decoding": None,
        "settings": {}, "items": items,
    }  # fmt: skip
    return Score(**(plain | changes))


def test_the_interval_is_that_of_a_bootstrap_written_out_in_loops():
    draws = random.Random(5)
    weights = [draws.uniform(1, 9) for _ in range(40)]
    left = [weight * draws.gauss(2, 0.3) for weight in weights]
    right = [value - weight * draws.gauss(0.1, 0.2) for value, weight in zip(left, weights, strict=True)]
    found = []
    for _ in range(4000):
        rows = [draws.randrange(40) for _ in range(40)]
        total = sum(weights[row] for row in rows)
        found.append((sum(right[row] for row in rows) - sum(left[row] for row in rows)) / total)
    found.sort()
    tail = expanded_tail(40)
    low, high = paired_interval(ratio(left, weights), ratio(right, weights))
    # Two bootstraps of 4,000 draws place a 2.5% quantile within some 0.06 standard errors of one another.
    spread = statistics.stdev(found)
    assert abs(low - found[round(tail * 4000)]) < 0.25 * spread
    assert abs(high - found[round((1 - tail) * 4000)]) < 0.25 * spread


@pytest.mark.parametrize(("freedom", "expected"), [(5, 2.5706), (19, 2.0930), (100, 1.9840)])
def test_students_t_is_the_tables(freedom, expected):
    assert student_t((1 + CONFIDENCE) / 2, freedom) == pytest.approx(expected, abs=3e-3)


def test_of_pairs_without_a_difference_few_are_called_different():  # trap M6
    draws, called, pairs = np.random.default_rng(1), 0, 300
    for _ in range(pairs):
        shared, noise = draws.normal(size=60), draws.normal(size=(2, 60))
        verdict = difference(score(ratio(shared + noise[0])), score(ratio(shared + noise[1]))).verdict
        called += verdict != "within noise"
    # 5% of 300 is 15 with a standard deviation of 3.8: 27 is three of them above.
    assert called <= 27


def test_a_difference_of_two_standard_errors_is_found_as_often_as_theory_says():
    draws, found, pairs, count = np.random.default_rng(2), 0, 300, 60
    for _ in range(pairs):
        noise = draws.normal(size=count)
        shared = draws.normal(size=count)
        shift = 2 / count**0.5
        found += difference(score(ratio(shared)), score(ratio(shared + noise + shift))).verdict == "better"
    # P(z > 1.96 - 2) is 0.516; 300 draws have a standard deviation of 2.9%.
    assert 0.516 - 3 * 0.029 < found / pairs < 0.516 + 3 * 0.029


@pytest.mark.parametrize(
    ("better", "shift", "verdict"),
    [("higher", 1, "better"), ("higher", -1, "worse"), ("lower", 1, "worse"), ("lower", -1, "better"),
     ("none", 1, "higher"), ("none", -1, "lower"), ("higher", 0, "within noise")],
)  # fmt: skip
def test_the_verdict_follows_the_direction_of_the_score(better, shift, verdict):
    draws = random.Random(3)
    left = [draws.random() for _ in range(50)]
    right = [value + shift + (draws.random() - 0.5) * 0.1 for value in left]
    assert difference(score(ratio(left), better), score(ratio(right), better)).verdict == verdict


def test_items_are_paired_by_name_whatever_their_order():
    left = ratio([draw / 7 for draw in range(30)])
    right = Items(left.ids[::-1], [value + 1 for value in left.numerator[::-1]], left.denominator)
    found = difference(score(left), score(right))
    assert found.interval == pytest.approx((1, 1))


def test_few_items_get_no_verdict():
    assert difference(score(ratio([0.0] * 5)), score(ratio([1.0] * 5))).verdict == "too few items"


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_model_that_gives_no_numbers_is_never_better(better):
    left, right = ratio([1.0] * 50), ratio([1.0] * 49 + [float("nan")])
    assert difference(score(left, better), score(right, better)).verdict == "not a number"


def test_without_items_nothing_is_called_better():
    bare = dataclasses.replace(score(ratio([0.0] * 50)), items=None)
    assert difference(bare, score(ratio([1.0] * 50))).verdict == "not paired"


@pytest.mark.parametrize("change", [{"decoding": {"max_new_tokens": 8}}, {"settings": {"seq_len": 64}}])
def test_scores_that_were_measured_otherwise_get_no_verdict_in_the_report(change):  # trap M3
    left, right = score(ratio([0.0] * 50)), score(ratio([1.0] * 50))
    assert _verdict(left, right) == "better"
    assert _verdict(left, dataclasses.replace(right, **change)) is None


def test_another_precision_is_another_measurement(tmp_path):  # trap M3
    found = []
    for precision in ("fp32", "bf16"):
        output = tmp_path / precision / "output"
        output.mkdir(parents=True)
        entry = {"name": "bpb/de", "suite": "bpb", "value": 1.0, "unit": "bits_per_byte", "n": 9, "set_hash": "h"}
        content = {"scores": [entry], "settings": {"precision": precision}}
        (output / "scores.json").write_text(json.dumps(content))
        found += read_evaluation("judge", output.parent).scores
    (fault,) = mismatches(("left", "right"), found)
    assert "must be measured with the same settings" in fault.message
    assert "bf16" in fault.message


def test_samples_of_another_decoding_do_not_stand_beside_each_other():
    one, other = ({"id": "a", "prompt": [], "decoding": {"temperature": t}, "completion": str(t)} for t in (0, 1))
    assert [each.samples for each in beside([[one], [other]])] == [[one, None], [None, other]]


def test_the_table_has_each_score_with_n_interval_and_verdict_and_no_average(compare):  # traps M5 M6 M8
    code, out, _ = compare("left", "right", "--no-samples")
    lines = {line.split()[0]: line for line in out.splitlines() if "/" in line.split(" ")[0]}
    assert code == 0
    assert set(lines) == {"bpb/de", "reasoning/add", "safety/over_refusal"}
    assert lines["bpb/de"].endswith("better")
    assert lines["safety/over_refusal"].endswith("within noise")
    assert "200 documents" in lines["bpb/de"]
    assert "bits_per_byte" in lines["bpb/de"]


def test_scores_of_different_sets_are_refused_by_name(compare, home, capsys):  # trap M3
    text = RECIPE.replace("word: right", f"word: right, set_hash: {'b' * 64}")
    run_chain(make_chain(home, text), "judge-right")
    capsys.readouterr()
    code, out, err = compare("left", "right", text=text)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 3
    assert "bpb/de: must be measured with the same set; left has aaaaaaaaaaaa, right has bbbbbbbbbbbb" in err


def test_json_holds_what_the_table_shows(compare):
    found = json.loads(compare("left", "right", "--json", "--metric", "bpb")[1])
    (row,) = found["scores"]
    apart = row["differences"]["right"]
    assert (row["name"], apart["verdict"], apart["n"]) == ("bpb/de", "better", 200)
    expected = row["values"]["right"]["value"] - row["values"]["left"]["value"]
    assert apart["value"] == pytest.approx(expected)
    assert apart["interval"][0] < expected < apart["interval"][1]
    assert found["samples"][0]["samples"][1]["completion"].startswith("A cat is right.")


def test_samples_stand_beside_each_other(compare, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = compare("left", "right")[1]
    assert "en-cat/greedy (greedy)\nWhat is a cat?\n" in out
    assert any("A cat is left." in line and "A cat is right." in line for line in out.splitlines())
    assert "\x1b" not in out


def test_the_page_shows_model_output_as_text(compare, tmp_path):
    page = tmp_path / "page.html"
    assert compare("left", "right", "--html", str(page))[0] == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert HOSTILE not in text
    assert "within noise" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["left", "rihgt"], "got 'rihgt'; did you mean 'right'?"),
        (["left", "left"], "must be at least two different stages"),
        (["base", "left"], "base must be evaluated; judge-base is stale (never run); run: python"),
        (["left", "right", "--metric", "bqb/de"], "--metric: must name one of their scores; got 'bqb/de'; did you"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_and_exit_code_2(compare, argv, words):
    code, out, err = compare(*argv)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert words in err


def test_a_terminal_that_lacks_the_characters_gets_question_marks(compare, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert compare("left", "right")[0] == 0
    narrow.flush()
    assert b"A cat is left." in narrow.buffer.getvalue()
    assert "भारत".encode() not in narrow.buffer.getvalue()


@pytest.mark.parametrize("place", ["", "toy.yaml/page.html"])
def test_a_page_that_cannot_be_written_is_one_line(compare, home, place):
    code, _, err = compare("left", "right", "--html", str(home / place))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "cannot be written" in err


def test_a_model_that_nothing_evaluates_says_what_to_add(compare):
    text = RECIPE.replace("  judge-left: {kind: judge, from: left, data: pairs, quality: 0.3, word: left}\n", "")
    assert "none has `from: left`; add one to the recipe" in compare("left", "right", text=text)[2]


def test_evaluate_stages_themselves_can_be_named(compare):
    assert compare("judge-left", "judge-right", "--no-samples")[1].count("better") == 2
