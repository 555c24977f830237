"""The report: one file that shows what the JSON files say, whatever a model wrote into them and whatever is missing."""

import json
import re
from html.parser import HTMLParser

import pytest
from report_chain import HOSTILE, RECIPE, STAGES, make_chain, run_chain

from pipelines import page
from pipelines.report import main, report_text, write_report
from pipelines.report_charts import curves_svg, grouped
from pipelines.report_graph import INLET, LANE, lineage_svg, rails
from pipelines.report_read import read_stages

MADE = "2026-01-01T00:00:00+00:00"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """Elements and attributes of a page, and whether every element is closed."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.attributes, self.text = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def outline(text):
    found = Outline()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return run_chain(make_chain(tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def text(chain):
    return report_text(chain, MADE)


def test_the_command_writes_the_page_beside_the_artifacts(tmp_path, capsys):
    chain = make_chain(tmp_path)
    path = chain.runs / "toy" / "report" / "index.html"
    chain.runs.mkdir()
    assert main(["--pipeline", str(chain.runs.parent / "toy.yaml"), "--runs", str(chain.runs)], STAGES) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_same_artifacts_give_the_same_page(chain, text):
    assert report_text(chain, MADE) == text


def test_the_page_loads_nothing_and_runs_nothing(text):
    found = outline(text)
    assert not found.elements & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    targets = [value for name, value in found.attributes if name in ("href", "src", "xlink:href", "action")]
    assert [target for target in targets if not target.startswith("#")] == []
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert not re.search(r"@import|url\((?!#)", text)


def test_what_a_model_wrote_is_shown_as_text(text):
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4
    assert any(HOSTILE in part for part in outline(text).text)
    assert "\x1b" not in text


def test_every_score_stands_with_value_interval_n_and_its_standing_to_the_parent(chain, text):  # trap M6
    scores = next((chain.runs / "toy").glob("judge-tuned-*")) / "output" / "scores.json"
    first = json.loads(scores.read_text())["scores"][0]
    words = " ".join(" ".join(outline(text).text).split())
    low, high = first["interval"]
    assert f"{first['value']:.4g} [{low:.3g}, {high:.3g}] n = 200 documents" in words
    assert "▲ better" in words
    assert "within noise" in words


def test_variants_of_one_parent_are_compared(text):
    assert "<h3>left / right</h3>" in text
    assert "left (baseline)" in text


def test_a_parity_table_shows_what_passed(text):
    words = " ".join(" ".join(outline(text).text).split())
    assert "max logit difference" in words
    assert "3.0 MiB" in words
    assert "granite , not run: windows are not in that architecture" in words


def test_where_nothing_ran_the_page_says_so(tmp_path):
    words = " ".join(outline(report_text(make_chain(tmp_path), MADE)).text)
    assert "0 of 11 stages done" in words
    assert words.count("not run") > 11 + 4


def test_a_failed_stage_is_shown_with_its_error_and_its_curves(tmp_path):
    broken = make_chain(
        tmp_path, RECIPE.replace("data: pairs, from: base, quality: 0.3", "data: pairs, from: base, ending: error")
    )
    words = report_text(run_chain(broken, "text", "base", "pairs", "tuned"), MADE)
    assert "RuntimeError: loss is not finite &lt;script&gt;" in words
    assert words.count("loss_nats_per_token over steps") == 2
    assert HOSTILE not in words


def overwrite(path, text):
    """Other content of the same size: what a file holds is not looked at before it is read."""
    size = path.stat().st_size
    assert len(text) <= size, "the artifact would be called damaged"
    path.write_text(text.ljust(size))


def test_files_that_cannot_be_read_become_notices(tmp_path):
    chain = run_chain(make_chain(tmp_path), "text", "base", "pairs", "judge-base")
    folders = {path.name.rpartition("-")[0]: path for path in (chain.runs / "toy").iterdir()}
    metrics = folders["base"] / "metrics.jsonl"
    metrics.write_text("<b>no JSON</b>\n" + metrics.read_text())
    overwrite(folders["judge-base"] / "output" / "scores.json", '{"scores": [3]}')
    (folders["text"] / "lineage.json").write_text("[")
    half = '{"inputs": [{"name": "x"}], "outputs": []}'
    (folders["pairs"] / "lineage.json").write_text(half)
    words = report_text(chain, MADE)
    assert "line 1 must be a JSON row" in words
    assert "scores.json has another SHA-256 than the manifest" in words
    assert f"{folders['text'] / 'lineage.json'} cannot be read" in words
    assert f"{folders['pairs'] / 'lineage.json'} must give inputs.0 its type, path, digest, metadata" in words
    assert "<b>no JSON" not in words


def test_an_old_page_stands_until_the_new_one_is_whole(tmp_path, monkeypatch):
    chain = make_chain(tmp_path)
    path = write_report(chain)
    before = path.read_bytes()
    run_chain(chain, "text")
    monkeypatch.setattr(page, "render", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(chain)
    assert path.read_bytes() == before
    assert [found.name for found in path.parent.iterdir()] == ["index.html"]


def test_every_edge_of_the_lineage_is_drawn_and_no_rails_overlap(chain):
    stages = read_stages(chain)
    drawn = rails(stages)
    edges = {(stages[rail.row].name, stages[child].name) for rail in drawn for child in rail.children}
    assert edges == {(parent, stage.name) for stage in stages for parent in stage.parents.values()}
    spans = [(rail.lane, rail.row, max(rail.children)) for rail in drawn]
    for lane, first, last in spans:
        assert not [1 for other, start, _ in spans if other == lane and first < start <= last]
    svg = lineage_svg(stages)
    assert svg.count("<circle") == len(edges)
    assert LANE > 0 > INLET


def test_curves_leave_out_what_is_no_number_and_what_only_counts():
    rows = [
        {"event": "train", "step": step, "time": "t", "loss": 1.0 / step, "skipped_steps": 0, "note": "x",
         "bad": float("nan"), "ok": True}
        for step in (1, 2, 3)
    ]  # fmt: skip
    rows += [{"event": "eval", "step": 3, "time": "t", "bpb/de": 2.0}]
    found = grouped(rows)
    assert list(found) == ["loss"]
    assert found["loss"][0].values == [1.0, 0.5, 1 / 3]


def test_a_name_with_dollars_and_brackets_is_drawn_as_it_is():
    rows = [{"event": "train", "step": step, "rewards/$x_<b>": 1.0, "rewards/_y": 2.0} for step in (1, 2)]
    svg = curves_svg("rewards", grouped(rows)["rewards"], [1])
    assert "$x_&lt;b&gt;" in svg
    assert "<b>" not in svg
    assert 'aria-label="rewards over steps"' in svg


def test_a_sets_change_is_marked_and_gets_no_verdict(tmp_path):  # trap M3
    other = RECIPE.replace(
        "from: tuned, data: pairs, quality: 0.3}", f"from: tuned, data: pairs, set_hash: {'b' * 64}}}"
    )
    names = ("text", "base", "pairs", "tuned", "judge-base", "judge-tuned")
    words = report_text(run_chain(make_chain(tmp_path, other), *names), MADE)
    assert words.count("other set: bbbbbbbb") == 3
    assert "▲" not in words


def test_on_a_phone_every_value_of_a_row_stands_under_its_columns_name(text):
    tables = re.findall(r'<table class="stacked">(.*?)</table>', text, re.DOTALL)
    assert len(tables) >= 2, "scores by stage, and a comparison of variants"
    for table in tables:
        names = re.findall(r"<th>(.*?)</th>", table)[1:]
        rows = [re.findall(r'<td class="value" data-of="(.*?)">', row) for row in table.split("<tr>")]
        assert {tuple(row) for row in rows if row} == {tuple(names)}
        assert len(re.findall('<td class="value"', table)) == sum(map(len, rows))
    narrow = re.search(r"@media screen and \(max-width: (\d+)px\) \{(.*?)\n\}", text, re.DOTALL)
    assert int(narrow[1]) >= 390
    assert re.search(r"\.stacked tr \{ display: grid; grid-template-columns: repeat\(auto-fill, ", narrow[2])
    assert ".stacked td[data-of]::before { content: attr(data-of); display: block;" in narrow[2]
