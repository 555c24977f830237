"""Comparing variants: sets that must be one, scores side by side and never averaged, what the models said."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paired_scores import score
from report_chain import HOSTILE, RECIPE, STAGES, make_chain, run_chain

from pipelines.compare import main, score_lines
from pipelines.compare_wandb import COLUMNS, difference_rows, suite_lines
from pipelines.comparison import UnlikeError, beside, mismatches
from pipelines.comparison import compare as compare_all
from pipelines.report_sections import _verdict
from pipelines.scores import Evaluation, Items, Score, read_evaluation

TESTS = Path(__file__).resolve().parent


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


def test_where_the_variants_counted_another_part_of_the_items_both_counts_are_shown():
    found = [score(ratio([1.0] * 8), name="s/x", n=n, n_unit="replies") for n in (4, 8)]
    given = {name: [Evaluation("judge", Path(), 0.95, [one], [], {})] for name, one in zip("ab", found, strict=True)}
    assert "  4 / 8 replies  " in score_lines(compare_all(given))[2]
    given["b"] = given["a"]
    assert "  4 replies  " in score_lines(compare_all(given))[2]


def test_scores_of_different_sets_are_refused_by_name(compare, home, capsys):  # trap M3
    text = RECIPE.replace("word: right", f"word: right, set_hash: {'b' * 64}")
    run_chain(make_chain(home, text), "judge-right")
    capsys.readouterr()
    code, out, err = compare("left", "right", text=text)
    assert (code, out) == (2, "")
    first, *_, last = err.splitlines()
    # One line a suite, and what to do.
    assert [line.split(":")[0] for line in err.splitlines()] == ["bpb", "reasoning", "safety", "compare"]
    assert "must be measured alike to be compared; set aaaaaaaaaaaa (200 documents) in left, bbbbbbbbbbbb (200" in first
    assert "--verbose lists every score" in last
    assert compare("left", "right", "--metric", "nothing", text=text)[0] == 2
    every = compare("left", "right", "--verbose", text=text)[2].splitlines()
    assert "bpb/de: must be measured with the same set; left has aaaaaaaaaaaa" in every[0]
    assert len(every) == 3


def test_a_refusal_of_many_scores_is_a_line_a_suite_with_what_differs_and_ten_lines_at_most():  # trap M3
    def score(name, **changes):
        plain = {
            "suite": name.partition("/")[0], "value": 1.0, "unit": "share", "better": "higher", "n": 20,
            "n_unit": "documents", "interval": (0.0, 2.0), "set_hash": "a" * 64, "suite_version": 1, "method": "",
            "decoding": None, "settings": {"precision": "fp32", "seq_len": 256}, "items": None,
        }  # fmt: skip
        return Score(name, **plain | changes)

    def evaluation(**changes):
        names = [f"suite{number}/{part}" for number in range(12) for part in ("all", "de", "en")]
        return [Evaluation("judge", Path(), 0.95, [score(name, **changes) for name in names], [], {})]

    other = {"set_hash": "b" * 64, "n": 40, "settings": {"precision": "fp32", "seq_len": 128}}
    with pytest.raises(UnlikeError) as caught:
        compare_all({"left": evaluation(), "right": evaluation(**other)})
    lines = [str(fault) for fault in caught.value.faults]
    assert len(lines) <= 10
    assert lines[0] == (
        "suite0: 3 scores, such as suite0/all, must be measured alike to be compared; "
        "set aaaaaaaaaaaa (20 documents) in left, bbbbbbbbbbbb (40 documents) in right; "
        "settings seq_len 256 in left, seq_len 128 in right"
    )
    assert lines[-1].startswith("compare: 4 more suites or variants differ; --verbose lists every score")
    assert len(caught.value.every) == 2 * 36


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
    lines = compare("judge-left", "judge-right", "--no-samples")[1].splitlines()
    assert len([line for line in lines if line.endswith("better")]) == 2


FAMILIES = RECIPE.replace("word: left", "word: left, families: 20").replace("word: right", "word: right, families: 20")


def test_items_of_one_family_are_counted_as_what_they_are(compare, home, capsys):  # trap M6
    run_chain(make_chain(home, FAMILIES), "judge-left", "judge-right")
    capsys.readouterr()
    found = json.loads(compare("left", "right", "--json", "--metric", "bpb", text=FAMILIES)[1])
    assert found["scores"][0]["differences"]["right"]["families"] == 20
    assert "200 documents in 20 families" in compare("left", "right", "--no-samples", text=FAMILIES)[1]


def test_scores_stand_by_what_they_measure(compare, tmp_path):  # trap M5
    lines = compare("left", "right", "--no-samples")[1].splitlines()
    assert [line for line in lines if line.startswith("-- ")] == ["-- bpb", "-- reasoning", "-- safety"]
    assert lines[lines.index("-- safety") + 1].startswith("safety/over_refusal")
    page = tmp_path / "page.html"
    compare("left", "right", "--html", str(page))
    assert page.read_text(encoding="utf-8").count('<tr class="suite">') == 3


def test_an_evaluation_of_another_recipe_is_named_by_its_path(compare, home):
    (path,) = (home / "runs" / "toy").glob("judge-tuned-*")
    code, out, _ = compare("judge-right", str(path), "--no-samples")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("bpb/de")]
    assert path.name in line
    assert line.endswith("worse")


@pytest.mark.parametrize("name", ["./nowhere", "pairs"])
def test_a_path_that_is_no_evaluation_is_one_line(compare, home, name):
    path = name if name.startswith(".") else str(next((home / "runs" / "toy").glob(f"{name}-*")))
    code, out, err = compare("left", path)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "must be the directory of a finished evaluation" in err


def test_a_recipe_that_tracks_nothing_logs_no_comparison(compare):
    code, _, err = compare("left", "right", "--no-samples", "--wandb")
    assert code == 2
    assert "--wandb: needs W&B; the recipe says tracking.wandb: disabled" in err


LOGGED = """
import sys
from report_chain import STAGES
from pipelines.compare import main
sys.exit(main(sys.argv[1:], STAGES))
"""


def test_offline_both_tables_are_recorded_without_secrets_and_the_report_is_said_to_be_missing(home):  # trap O6
    (home / "toy.yaml").write_text(RECIPE, encoding="utf-8")
    argv = ["left", "right", "--no-samples", "--wandb", "--set", "tracking.wandb=offline"]
    argv += ["--pipeline", str(home / "toy.yaml"), "--runs", str(home / "runs")]
    # What a model said may be anything: here a word of its answers is a secret of the environment.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", LOGGED, *argv], env={**env, "PLANTED_SECRET": "A cat is right"}, text=True,
        capture_output=True, check=True, cwd=home,
    )  # fmt: skip
    assert "recorded offline in runs/toy/compare; a Report is made online alone" in done.stdout
    tables = {path.name.partition("_")[0]: path for path in (home / "runs" / "toy" / "compare").rglob("*.table.json")}
    differences, samples = (json.loads(tables[name].read_bytes()) for name in ("differences", "samples"))
    rows = [dict(zip(differences["columns"], row, strict=True)) for row in differences["data"]]
    (row,) = [row for row in rows if row["score"] == "bpb/de"]
    assert (row["baseline"], row["variant"], row["verdict"]) == ("left", "right", "better")
    assert (row["baseline_n"], row["variant_n"], row["n_unit"]) == (200, 200, "documents")
    assert row["low"] < row["difference"] < row["high"] < 0
    assert samples["columns"] == ["sample", "prompt", "decoding", "said by left", "said by right"]
    (english,) = [row for row in samples["data"] if row[0] == "en-cat/greedy"]
    assert english[1:3] == ["What is a cat?", str({"temperature": 0, "top_p": 1, "seed": 17, "max_new_tokens": 64})]
    assert english[3].startswith("A cat is left.")
    assert "A cat is right" not in english[4]


def test_the_online_tables_show_what_either_side_counted():
    values = {"left": {"n": 40, "n_unit": "items", "value": 0.5}, "right": {"n": 31, "n_unit": "items", "value": 0.25}}
    apart = {"right": {"value": -0.25, "interval": [-0.5, 0.1], "families": 31, "verdict": "within noise"}}
    score = {"name": "format/stop", "suite": "format", "unit": "share", "better": "higher", "set_hash": "a"}
    content = {
        "baseline": "left",
        "variants": ["left", "right"],
        "scores": [score | {"values": values, "differences": apart}],
    }
    row = dict(zip(COLUMNS, difference_rows(content)[0], strict=True))
    assert (row["baseline_n"], row["baseline_value"], row["variant_n"], row["value"]) == (40, 0.5, 31, 0.25)
    assert "40 / 31" in "\n".join(suite_lines(content, "format"))


def artifact(home, name):
    return make_chain(home, RECIPE).nodes[name].job.directory


@pytest.fixture
def damaged(home):
    """An evaluation's output to damage, put back afterwards."""
    output = artifact(home, "judge-right") / "output"
    shutil.copytree(output, home / "whole")
    yield output
    shutil.rmtree(output)
    (home / "whole").rename(output)


@pytest.mark.parametrize("damage", ["flipped", "items.json", "samples.json"])
def test_scores_that_were_changed_or_lost_their_items_are_refused(compare, damaged, damage):
    if damage == "flipped":
        raw = bytearray((damaged / "scores.json").read_bytes())
        place = raw.index(b'"value": ') + len(b'"value": ')
        raw[place] ^= 1
        (damaged / "scores.json").write_bytes(raw)
    else:
        (damaged / damage).unlink()
    # A path is no way round it.
    for name in ("right", str(damaged.parent)):
        code, out, err = compare("left", name)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        said = "scores.json has another SHA-256" if damage == "flipped" else f"{damage} is missing"
        assert said in err


def test_one_evaluation_under_two_names_is_no_comparison(compare, home):
    for other in ("judge-left", str(artifact(home, "judge-left"))):
        code, out, err = compare("left", other)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"must be different evaluations; left and {Path(other).name} are the same one" in err


def test_the_folder_inside_an_artifact_is_answered_with_the_artifact(compare, home):
    directory = artifact(home, "judge-right")
    err = compare("left", str(directory / "output"))[2]
    assert f"set the artifact itself, {directory}" in err


def test_below_the_table_stand_the_verdicts_by_name_for_each_variant(compare):
    out = compare("left", "right", "tuned", "--no-samples")[1]
    (right,) = [line for line in out.splitlines() if line.startswith("right against left: ")]
    assert right == "right against left: better in bpb/de, reasoning/add; 1 within noise"
    assert any(line.startswith("tuned against left: ") for line in out.splitlines())
