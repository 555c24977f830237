"""The figures on cleaning in docs/data.md are those that the benchmarks wrote."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
LANGUAGES = {"German": "de", "English": "en", "Hindi": "hi"}


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_funnels_table_is_what_was_measured():
    rows = result("funnel")["rows"]
    table = DOCS[DOCS.index("| source | read | MB |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        asked = (
            row["read"], row["megabytes"], row["read"] - row["left_after_form_and_rules"],
            row["left_after_content"] - row["left_after_unique"], row["heldout_overlap"], row["kept"], row["heldout"],
        )  # fmt: skip
        assert [float(cell.replace(",", "")) for cell in line.split("|")[2:-1]] == list(asked), line


def test_the_corpus_is_of_the_size_and_speed_that_is_said():
    found = result("funnel")
    for word, language in LANGUAGES.items():
        size = sum(row["megabytes"] for row in found["rows"] if row["language"] == language)
        assert f"{word} ({size:.1f} MB" in DOCS
    assert found["settings"]["megabytes"] >= 50
    whole = found["settings"]["steps"]["all"]
    said = f"took {whole['seconds']:.0f} s of processor time, {whole['megabytes_per_s']:.2f} MB/s a core"
    assert said in DOCS


@pytest.mark.parametrize(
    ("first", "side", "part"),
    [
        ("web rules and language", "pedigree", "web rules, language"),
        ("form, rules and language in one pass", "pedigree", "all in one pass"),
        ("datatrove: the same with our splitter", "datatrove", "web rules, our splitter"),
        (r"datatrove: FineWeb", "datatrove", "web rules, its own splitter"),
    ],
)
def test_the_throughputs_are_what_was_measured(first, side, part):
    rows = result("cleaning")["rows"]
    speeds = [
        next(row["megabytes_per_s"] for row in rows if (row["text"], row["side"], row["part"]) == (text, side, part))
        for text in ("wiki-en", "ddtp-de", "lo-help-hi")
    ]
    row = re.search(rf"^\| {first}[^|]*\|(.*)\|$", DOCS, re.M)[1]
    assert [float(cell) for cell in row.split("|")] == speeds
