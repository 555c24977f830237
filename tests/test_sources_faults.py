"""Input that is wrong, through the whole clean stage: refused before it costs anything, or counted; one clear line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from clean_cases import clean, dropped, invented, report, source, texts, write_rows
from source_rows import write_jsonl, write_parquet

from data.corpus import read_documents, sources
from pipelines.run import main
from stages.base import ConfigError
from stages.clean import Clean

MEGABYTE = 1_000_000


def faults_of(*plain: dict) -> list[str]:
    config = Clean.Config.model_validate({"kind": "clean", "sources": list(plain)})
    return [f"{fault.path}: {fault.message}" for fault in Clean.check(config, None)]


def refusal(tmp_path: Path, *plain: dict, **fields) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        clean(tmp_path / "run", *plain, **fields)
    lines = [f"{fault.path}: {fault.message}" for fault in caught.value.faults]
    assert not any("\n" in line for line in lines)
    return lines


def test_every_faulty_source_is_named_at_once_before_anything_runs(tmp_path):
    write_rows(tmp_path / "good/a.jsonl", invented(30))
    (tmp_path / "cut").mkdir()
    path = write_parquet(tmp_path / "cut/a.parquet", [{"text": text} for text in invented(30)])
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.jsonl.zst").write_bytes(b"")
    found = faults_of(
        source(tmp_path / "good", "good"),
        source(tmp_path / "absent", "absent"),
        source(tmp_path / "cut", "cut"),
        source(tmp_path / "empty", "empty"),
        source(tmp_path / "good", "good"),
    )
    assert found == [
        "sources.0.name: must differ from the other sources' names; got 'good' 2 times; rename one",
        "sources.4.name: must differ from the other sources' names; got 'good' 2 times; rename one",
        f"sources.1.path: must be an existing folder or file; got {tmp_path}/absent; set it to where the text lies",
        "sources.2.path: must name whole files; got: a.parquet is truncated: its last bytes are not a Parquet footer; "
        "fetch them again or exclude them",
        "sources.3.path: must name whole files; got: a.jsonl.zst is empty; fetch them again or exclude them",
    ]


RECIPE = """name: faulty
stages:
  clean:
    kind: clean
    sources:
      - name: tales
        type: files
        language: en
        licence: own
        rules: prose
        language_threshold: 0
        path: {path}
        include: ["**/*"]
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "must be an existing folder or file; got "),
        ("one document", "source tales must keep at least 2 documents, one to train on and one to hold out; got 1 "),
        ("cut while read", "must name whole files; got a.jsonl.gz, which cannot be read beyond its first "),
    ],
)
def test_the_operator_sees_one_line_and_exit_code_2(tmp_path, capsys, fault, words):
    folder = tmp_path / "in"
    if fault != "missing":
        folder.mkdir()
    if fault == "one document":
        write_rows(folder / "a.jsonl", invented(1))
    if fault == "cut while read":
        rows = "".join(json.dumps({"text": text}) + "\n" for text in invented(200))
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode())[:-4000])
    path = tmp_path / "faulty.yaml"
    path.write_text(RECIPE.format(path=folder))
    assert main(["--stage", "clean", "--pipeline", str(path), "--runs", str(tmp_path / "runs")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert "clean.sources.0" in lines[0]
    assert words in lines[0]


def test_a_source_of_one_document_is_refused_and_of_two_is_split(tmp_path):
    write_rows(tmp_path / "one/a.jsonl", invented(1))
    (line,) = refusal(tmp_path, source(tmp_path / "one"))
    assert line.startswith("sources.0: source tales must keep at least 2 documents")
    write_rows(tmp_path / "two/a.jsonl", invented(2))
    corpus = clean(tmp_path / "two_run", source(tmp_path / "two"))
    assert (len(texts(corpus, "train")), len(texts(corpus, "heldout"))) == (1, 1)


def test_bad_lines_are_counted_by_rule_with_what_was_found(tmp_path):
    good = invented(40)
    write_rows(tmp_path / "in/a.jsonl", good[:-1])
    with (tmp_path / "in/b.jsonl").open("wb") as file:
        file.write(json.dumps({"text": good[-1]}).encode() + b"\n")
        file.write(b'{"text": "\xff"}\n{"text": \n{"other": 1}\n"text"\n{"text": 5}\n')
        file.truncate(file.tell() + 100 * MEGABYTE)
        file.seek(0, 2)
        file.write(b'\n{"text": "lone \\udc00 surrogate"}\n')
    corpus = clean(tmp_path / "run", source(tmp_path / "in", max_document_bytes=MEGABYTE))
    assert dropped(corpus) == {
        "bad_row": 3,
        "invalid_json": 1,
        "invalid_unicode": 1,
        "invalid_utf8": 1,
        "too_large": 1,
    }
    assert sorted(texts(corpus)) == sorted(good)
    found = {sample["rule"]: sample for sample in report(corpus)["samples"]}
    assert found["too_large"]["origin"] == "b.jsonl:7"
    assert found["too_large"]["detail"] == "100,000,000 bytes, more than max_document_bytes 1,000,000"
    assert found["invalid_utf8"]["detail"] == "byte 0xff at 10"
    (row,) = report(corpus)["funnel"]
    assert {rule: tally["bytes"] for rule, tally in row["dropped"].items()} == {
        "bad_row": len('{"other": 1}') + len('"text"') + len('{"text": 5}'),
        "invalid_json": len('{"text": '),
        "invalid_unicode": len("lone xxx surrogate"),
        "invalid_utf8": len('{"text": "x"}'),
        "too_large": 100 * MEGABYTE,
    }
    assert row["read"]["bytes"] == sum(len(text) for text in good) + sum(x["bytes"] for x in row["dropped"].values())


def test_files_that_cannot_be_used_count_with_their_bytes(tmp_path):
    folder = tmp_path / "in"
    write_rows(folder / "a.jsonl", invented(9))
    (folder / "b.txt").write_bytes(b"\xff" * 70)
    with gzip.open(folder / "c.txt.gz", "wb") as file:
        file.write(b"x" * 2 * MEGABYTE)
    (folder / "d.json").write_text("{")
    corpus = clean(tmp_path / "run", source(folder, max_document_bytes=MEGABYTE))
    (row,) = report(corpus)["funnel"]
    counted = {rule: tally["bytes"] for rule, tally in row["dropped"].items()}
    assert counted == {"invalid_json": 1, "invalid_utf8": 70, "too_large": 2 * MEGABYTE}


def test_rows_that_filters_leave_out_are_counted_by_the_field(tmp_path):
    rows = [{"text": text, "score": n % 4, "language_score": 0.9} for n, text in enumerate(invented(40))]
    rows[3]["language_score"] = 0.1
    write_jsonl(tmp_path / "in/a.jsonl", rows)
    filters = [{"field": "language_score", "min": 0.65}, {"field": "score", "min": 2}]
    corpus = clean(tmp_path / "run", source(tmp_path / "in", filters=filters, domain="science"))
    # Scores 2 and 3 are every second row: 20; one of them has the low language score.
    assert dropped(corpus) == {"filter_language_score": 1, "filter_score": 20}
    assert len(texts(corpus)) == 19
    assert sources(corpus)[0]["domain"] == "science"


@pytest.mark.parametrize(("value", "shown"), [("7", "'7' (text)"), (True, "True (bool)"), ([7], "[7] (list)")])
def test_a_filter_with_bounds_on_a_field_without_numbers_is_refused_before_anything_runs(tmp_path, value, shown):
    rows = [{"text": text, "score": value if n else None} for n, text in enumerate(invented(30))]
    write_jsonl(tmp_path / "in/a.jsonl", rows)
    filters = [{"field": "text", "in": [row["text"] for row in rows]}, {"field": "score", "min": 4}]
    faults = faults_of(source(tmp_path / "in", filters=filters))
    assert faults == [
        f"sources.0.filters.1.field: must be a number in the rows; got {shown} at a.jsonl:2, and no number in the "
        "first rows; make it a number in the file"
    ]


@pytest.mark.parametrize("number", [9, 1])
def test_one_number_among_the_first_rows_lets_a_filter_with_bounds_pass(tmp_path, number):
    rows = [{"text": text, "score": "n/a" if n != 5 else number} for n, text in enumerate(invented(30))]
    write_jsonl(tmp_path / "in/a.jsonl", rows)
    assert faults_of(source(tmp_path / "in", filters=[{"field": "score", "min": 4}])) == []


def test_a_source_that_a_filter_emptied_shows_what_one_row_held(tmp_path):
    rows = [{"text": text, "score": 1 if n == 0 else "7"} for n, text in enumerate(invented(60))]
    write_jsonl(tmp_path / "in/a.jsonl", rows[::-1][-19:] + rows[1:42])
    filters = [{"field": "score", "min": 4}]
    assert faults_of(source(tmp_path / "in", filters=filters)) == []
    (line,) = refusal(tmp_path, source(tmp_path / "in", filters=filters))
    assert "got 0 (dropped: filter_score 60), such as a.jsonl:1: '7' (text) is no number; give it" in line


def test_one_file_in_several_languages_is_split_language_by_language(tmp_path):  # trap M4
    rows = [{"text": text, "language": "en" if n % 4 else "de"} for n, text in enumerate(invented(120))]
    write_jsonl(tmp_path / "in/a.jsonl", rows)
    strata = [
        source(tmp_path / "in", name, language=name, filters=[{"field": "language", "equals": name}])
        for name in ("en", "de")
    ]
    corpus = clean(tmp_path / "run", *strata, heldout={"min_documents": 6})
    language_of = {row["text"]: row["language"] for row in rows}
    for name, count in (("en", 90), ("de", 30)):
        sides = {side: list(read_documents(corpus, side, name)) for side in ("train", "heldout")}
        assert all(language_of[one["text"]] == name for side in sides.values() for one in side)
        assert sum(map(len, sides.values())) == count
        assert len(sides["heldout"]) >= 6


def spaced(text: str) -> str:
    return text.replace(" ", "  ", 3)


def test_documents_that_other_sources_hold_too_are_counted_there(tmp_path):  # trap M4
    tales = invented(60)
    write_rows(tmp_path / "a/a.jsonl", tales)
    first = clean(tmp_path / "first", source(tmp_path / "a", "first"))
    heldout, train = texts(first, "heldout"), texts(first, "train")
    planted = [
        heldout[0],  # as it is
        heldout[1].upper(),  # in capitals
        spaced(heldout[2]),  # with other spaces
        f"{invented(1, seed=5)[0]} {heldout[3]} {invented(1, seed=6)[0]}",  # inside a longer text
        train[0],
    ]
    write_rows(tmp_path / "b/b.jsonl", [*planted, *invented(40, seed=9)])
    corpus = clean(tmp_path / "both", source(tmp_path / "a", "first"), source(tmp_path / "b", "second"))
    assert set(texts(corpus, "heldout")) >= set(heldout)
    lost = dropped(corpus, 1)
    assert sum(lost.values()) == len(planted)
    assert lost["duplicate_exact"] == 2
    assert lost["heldout_overlap"] >= 1
    held = {tuple(text.lower().strip(".").split()[i : i + 13]) for text in heldout for i in range(48)}
    for text in texts(corpus, "train"):
        words = text.lower().strip(".").split()
        assert not held & {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def test_a_source_made_of_the_held_out_text_is_refused_not_emptied(tmp_path):  # trap M4
    tales = invented(200)
    write_rows(tmp_path / "a/a.jsonl", tales)
    first = clean(tmp_path / "first", source(tmp_path / "a", "first"), heldout={"min_documents": 20})
    heldout = texts(first, "heldout")
    copies = [f"{before} {text}" for before, text in zip(invented(len(heldout), seed=7), heldout, strict=True)]
    write_rows(tmp_path / "b/b.jsonl", [*copies, *invented(10, seed=9)])
    both = [source(tmp_path / "a", "first"), source(tmp_path / "b", "second")]
    fields = {"heldout": {"min_documents": 4, "share": 0.1}, "dedup": {"near": False}}
    lines = refusal(tmp_path, *both, **fields)
    assert len(lines) == 1
    assert lines[0].startswith("heldout.max_overlap_share: must be at least the share of training documents")
    assert "of second share 13 words with held-out ones" in lines[0]
    fields["heldout"]["max_overlap_share"] = 1.0
    corpus = clean(tmp_path / "agreed", *both, **fields)
    assert dropped(corpus, 1)["heldout_overlap"] > 10
