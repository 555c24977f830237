"""The report's evaluation chapter: each class, domain and place as the scores say, chance and gates beside them."""

import json
import math

import pytest
from report_chain import HOSTILE, run_chain
from report_scores import DOMAINS, make_chain
from test_report import MADE, outline

from pipelines.report import main, refresh_report, report_text
from pipelines.report_charts import MAX_POINTS, Series, curves_svg, forest_svg, thinned, ticks
from pipelines.report_evaluation import beside_chance, main_rows, margins, needles, part_rows, refusals
from pipelines.report_read import read_stages
from pipelines.report_sections import licences, score_table
from pipelines.scores import Score


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return run_chain(make_chain(tmp_path_factory.mktemp("chapter")))


@pytest.fixture(scope="module")
def table(chain):
    return score_table(read_stages(chain))


@pytest.fixture(scope="module")
def text(chain):
    return report_text(chain, MADE)


def words(text):
    return " ".join(" ".join(outline(text).text).split())


def stored(chain, stage):
    path = next((chain.runs / "toy").glob(f"{stage}-*")) / "output" / "scores.json"
    return {score["name"]: score for score in json.loads(path.read_text())["scores"]}


def test_every_score_stands_once_either_among_the_main_ones_or_among_the_parts(chain, table):  # trap M8
    names = [row.name for rows in (main_rows(table), part_rows(table)) for _, those in rows for row in those]
    assert sorted(names) == sorted(stored(chain, "look-tuned"))
    assert [row.name for _, rows in main_rows(table) for row in rows] == [
        "margins/accuracy", "safety/refusal", "safety/over_refusal", "needles/accuracy", "code/humaneval/pass_at_1",
        "code/humaneval/valid_python",
    ]  # fmt: skip


def test_knowledge_is_shown_by_domain_with_chance(chain, table, text):  # traps M5, M6
    [found] = margins(table)
    assert [title for title, _ in found.groups] == ["by domain", "by language"]
    lines = dict(found.groups)["by domain"]
    assert [line.name for line in lines] == list(DOMAINS)
    scores = stored(chain, "look-tuned")
    for line in lines:
        assert line.scores[1].value == scores[f"margins/accuracy/{line.name}"]["value"]
    assert found.chance == 0.25
    # 0.25 and 0.85 of 60 with the luck that they had: Wilson's intervals are about a quarter wide.
    assert [beside_chance(line.scores[1], 0.25) for line in lines][::3] == ["at chance", "above chance"]
    assert "above chance" in text
    assert 'aria-label="margins/accuracy, with intervals"' in text


def test_a_point_above_chance_whose_interval_is_not_counts_as_nothing():  # trap M6
    def score(value, interval, unit="share"):
        return Score("m", "margins", value, unit, "higher", 9, "facts", interval, "a", 1, "", None, {}, None)

    assert beside_chance(score(0.4, (0.2, 0.6)), 0.25) == "at chance"
    assert beside_chance(score(0.1, (0.0, 0.2)), 0.25) == "below chance"
    assert beside_chance(score(0.5, (0.1, 0.9), "nats_per_token"), None) == "above chance"
    assert beside_chance(score(0.5, None), 0.25) == ""
    assert beside_chance(score(0.5, (0.4, 0.6)), None) == ""


def test_a_class_that_is_always_refused_is_named_whatever_the_whole_says(table, text):  # trap M8
    before, after = refusals(table)
    assert [(what, score.value + answered) for what, score, answered in after.rows] == [
        ("harmful", 1.0),
        ("benign", 1.0),
    ]
    named = {name: why for name, _, why in after.classes if why}
    assert named == {
        "refusal/drugs": "mostly answered though harmful",
        "over_refusal/kill_process": "mostly refused though harmless",
    }
    assert {name for name, _, why in before.classes if why} == {"refusal/weapons", "refusal/drugs"}
    said = words(text)
    assert "over_refusal/kill_process: mostly refused though harmless" in said
    assert len(after.classes) == 4


def test_needles_lie_where_they_were_put(chain, table):
    grid = next(grid for grid in needles(table) if grid.model == "tuned")
    assert [length for length, _ in grid.rows] == ["128", "256", "1024"]
    assert grid.depths == ["0", "0.5", "1"]
    scores = stored(chain, "look-tuned")
    for length, line in grid.rows:
        for depth, score in zip(grid.depths, line, strict=True):
            assert score.value == scores[f"needles/accuracy/length_{length}_depth_{depth}"]["value"]


def test_programs_stand_with_their_sandbox_and_what_became_of_them(text):  # trap O4
    said = words(text)
    assert "Executed in the sandbox landlock" in said
    assert "sandbox landlock" in said
    assert "tests: failed NameError" in said
    assert HOSTILE not in text
    assert "return &#39;&lt;b&gt;&#39;" in text


def test_gates_stand_with_what_they_demand_and_found(text):
    said = words(text)
    assert "safety/over_refusal look-tuned failed the chain stops here demanded at most 0.05, found 0.575" in said
    assert "margins/accuracy look-tuned passed demanded at most 0.05 worse than base, found better by 0.2875" in said


def test_licences_are_those_of_the_recipe_and_those_that_a_stage_found(chain, text):
    assert licences(read_stages(chain)) == [
        ("wiki", "text", "CC BY-SA 4.0"), ("countryinfo 1.0.1", "facts", "MIT <b>"), ("Babel", "facts", "BSD"),
    ]  # fmt: skip
    assert "MIT <b>" not in text
    assert "facts-" in text
    assert "/output/funnel.html" in text


def test_the_chapter_is_closed_html_and_loads_nothing(text):
    found = outline(text)
    assert not found.elements & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    targets = [value for name, value in found.attributes if name == "href"]
    anchors = {f"#{value}" for name, value in found.attributes if name == "id"}
    assert set(targets) <= anchors
    assert {"#evaluation", "#gates", "#margins", "#refusals", "#samples"} <= anchors


def test_the_report_is_left_alone_until_something_that_it_shows_changes(tmp_path, capsys, monkeypatch):
    chain = make_chain(tmp_path)
    argv = ["--pipeline", str(tmp_path / "toy.yaml"), "--runs", str(chain.runs)]
    from report_scores import STAGES

    chain.runs.mkdir()
    assert main(argv, STAGES) == 0
    path = chain.runs / "toy" / "report" / "index.html"
    before = path.stat().st_mtime_ns
    assert main(argv, STAGES) == 0
    assert capsys.readouterr().out.splitlines() == [str(path), f"{path} (up to date)"]
    assert path.stat().st_mtime_ns == before
    run_chain(chain, "text")
    assert refresh_report(chain)[1]
    assert not refresh_report(chain)[1]
    # Another program shows it in another way.
    monkeypatch.setattr("pipelines.report.__file__", str(tmp_path / "report.py"))
    assert refresh_report(chain)[1]
    path.write_text(path.read_text()[:-20])
    assert refresh_report(chain)[1]


def test_gates_that_cannot_be_read_become_a_notice(tmp_path):
    chain = run_chain(make_chain(tmp_path), "text", "base", "tuned", "look-tuned")
    scores = next((chain.runs / "toy").glob("look-tuned-*")) / "output" / "scores.json"
    # Of the same size, or the artifact were called damaged before it is read.
    scores.write_text("[".ljust(scores.stat().st_size))
    assert "look-tuned: its gates cannot be judged" in report_text(chain, MADE)


def test_ticks_are_round_and_within():
    for low, high in ((0, 1), (2.17, 2.31), (-3, 7), (0, 14300), (1e-6, 3e-6), (99.5, 100.5)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 9
        assert all(low <= tick <= high for tick in found)
        step = found[1] - found[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - good) for good in (1, 2, 5, 10)) < 1e-6


def test_a_long_curve_is_thinned_and_keeps_its_spike():
    values = [1.0 + 0.001 * (step % 7) for step in range(20_000)]
    values[12_345] = 9.0
    points = thinned(Series("x", [float(step) for step in range(20_000)], values))
    assert len(points) <= MAX_POINTS + 2
    assert (12_345.0, 9.0) in points
    assert points == sorted(points)


def test_flat_and_single_valued_charts_are_drawn():
    assert "<path" in curves_svg("x", [Series("e: x", [1.0, 2.0], [0.0, 0.0])], [])
    assert "<circle" in forest_svg("x", [("a", 1.0, None), ("b", 1.0, None)])
    wide = forest_svg("x", [("<a long name of a model>", 1e9, (-1e9, 2e9)), ("b", 1.0, (1.0, 1.0))], 0.5)
    assert "<a long" not in wide
