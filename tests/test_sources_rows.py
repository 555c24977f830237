"""Choosing rows and naming data sets: filters, entries of the catalogue, local copies of the same schema."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from source_rows import (
    fineweb_2_repository,
    fineweb_edu,
    fineweb_edu_repository,
    medqa_repository,
    wikipedia_repository,
    write_jsonl,
    write_parquet,
)

from data.catalogue import ENTRIES
from data.rows import MissingField, objection, render_row
from data.source_config import FilesSource, HubSource, RowFilter, Source
from data.sources import SourceError, check_files, read_source
from pipelines.recipe import load_recipe, recipe_schema
from stages.base import ConfigError

SOURCE = TypeAdapter(Source)
SAID = {"type": "files", "name": "own", "language": "en", "licence": "own", "rules": "none", "include": ["**/*"]}


def read(plain: dict) -> list:
    return list(read_source(SOURCE.validate_python(plain), Path("unused")))


def refused(condition: dict, value: object) -> str | None:
    found = objection([RowFilter.model_validate({"field": "x", **condition})], {"x": value})
    return found and found[1]


@pytest.mark.parametrize(
    ("condition", "passes", "fails"),
    [
        ({"min": 3}, [3, 3.0, 10], [2.999, None, "4", True, float("nan")]),
        ({"max": 0.5}, [0.5, -1], [0.51, float("nan"), [0]]),
        ({"min": 1, "max": 2}, [1, 1.5, 2], [0.9, 2.1]),
        ({"equals": "en"}, ["en"], ["EN", "english", None, ["en"]]),
        ({"equals": True}, [True], [1, "true", False]),
        ({"equals": 0}, [0, 0.0], [False, None, ""]),
        ({"in": ["mit", 2]}, ["mit", 2], ["MIT", 3, None, True]),
    ],
)
def test_a_filter_lets_through_what_it_says_and_nothing_like_it(condition, passes, fails):
    assert [refused(condition, value) for value in passes] == [None] * len(passes)
    assert all(refused(condition, value) for value in fails)


def test_all_filters_must_hold_and_the_first_that_does_not_is_named():
    filters = [RowFilter(field="meta.score", min=3), RowFilter(field="language", in_=["de"])]
    assert objection(filters, {"meta": {"score": 3}, "language": "de"}) is None
    assert objection(filters, {"meta": {"score": 2}, "language": "en"}) == ("filter_meta_score", "2 is below 3")
    assert objection(filters, {"meta": {"score": 4}, "language": "en"}) == ("filter_language", "'en' is none of 1")
    with pytest.raises(MissingField, match=r"meta\.score"):
        objection(filters, {"meta": {}, "language": "de"})


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({}, "must set at least one condition"),
        ({"min": 3, "max": 2}, "must have min at most max; got 3 and 2"),
        ({"in": []}, "at least 1 item"),
        ({"least": 3}, "not permitted"),
    ],
)
def test_a_filter_that_asks_nothing_or_the_impossible_is_refused(condition, message):
    with pytest.raises(ValidationError, match=message):
        RowFilter.model_validate({"field": "score", **condition})


def test_rows_that_a_filter_refuses_are_counted_with_their_origin_and_reason(tmp_path):
    rows = [fineweb_edu(n, score) for n, score in enumerate([2.5, 3.5, 4.5])]
    rows[2]["score"] = None
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "no score at all"}])
    documents = read(SAID | {"path": str(tmp_path), "filters": [{"field": "score", "min": 3}]})
    assert [(d.origin, d.fault, d.detail) for d in documents] == [
        ("a.jsonl:1", "filter_score", "2.5 is below 3"),
        ("a.jsonl:2", None, ""),
        ("a.jsonl:3", "filter_score", "has no value"),
        ("a.jsonl:4", "bad_row", "lacks score"),
    ]


def test_a_filter_on_a_field_that_the_rows_do_not_have_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"text": "x", "lang": "en"}])
    with pytest.raises(
        SourceError, match=r"refers to 'language', which a\.parquet:1 lacks; it has: lang, text"
    ) as caught:
        read(SAID | {"path": str(tmp_path), "filters": [{"field": "language", "equals": "en"}]})
    assert caught.value.field == "filters"


def test_filters_on_text_files_are_refused_before_anything_runs(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b")
    source = SOURCE.validate_python(SAID | {"path": str(tmp_path), "filters": [{"field": "x", "min": 1}]})
    with pytest.raises(SourceError, match=r"must be left out where files hold no rows; got a\.txt\.gz") as caught:
        check_files(source)
    assert caught.value.field == "filters"


def test_parquet_columns_that_nothing_refers_to_are_not_read(tmp_path, monkeypatch):
    from pyarrow import parquet

    asked = []
    real = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda self, **how: asked.append(how["columns"]) or real(self, **how)
    )
    write_parquet(tmp_path / "a.parquet", [fineweb_edu(1, 3.0)])
    (document,) = read(SAID | {"path": str(tmp_path), "filters": [{"field": "int_score", "min": 3}], "title": "url"})
    assert (document.text, document.title) == ("Page 1 about rivers.", "https://example.org/1")
    assert asked == [["text", "int_score", "url"]]


def test_text_in_a_binary_column_is_text_and_bad_bytes_are_counted(tmp_path):
    assert render_row("{text}", {"text": "schön".encode()}) == "schön"
    write_parquet(tmp_path / "a.parquet", [{"text": "schön".encode()}, {"text": b"\xff"}])
    assert [(d.text, d.fault) for d in read(SAID | {"path": str(tmp_path)})] == [("schön", None), ("", "invalid_utf8")]


REPOSITORIES = {"fineweb-edu": fineweb_edu_repository, "fineweb2-de": fineweb_2_repository, "medqa": medqa_repository}
REPOSITORIES |= {"wikipedia-de": wikipedia_repository, "fineweb2-hi": fineweb_2_repository}
INSIDE = {"fineweb-edu": "sample/100BT", "fineweb2-de": "data/deu_Latn", "fineweb2-hi": "data/hin_Deva"}
INSIDE |= {"medqa": ".", "wikipedia-de": "20231101.de"}
FIRST = {
    "fineweb-edu": (8, "Page 0 about rivers."),
    "fineweb2-de": (2, "Ein Fluss im Süden."),
    "fineweb2-hi": (2, "एक छोटी नदी।"),
    "medqa": (2, "Question 1?\nA. Iron\nB. Zinc\nAnswer: B. Zinc"),
    "wikipedia-de": (2, "Place 1\n\nA town."),
}


@pytest.mark.parametrize("entry", REPOSITORIES)
def test_an_entry_reads_ones_own_copy_of_its_files_and_no_test_split(entry, tmp_path):
    folder = REPOSITORIES[entry](tmp_path) / INSIDE[entry]
    source = SOURCE.validate_python({"entry": entry, "path": str(folder)})
    assert isinstance(source, FilesSource)
    check_files(source)
    documents = read({"entry": entry, "path": str(folder)})
    assert (len(documents), documents[0].text) == FIRST[entry]
    assert not any(document.fault for document in documents)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_a_whole_pinned_source_of_the_hub(entry):
    source = SOURCE.validate_python({"entry": entry})
    assert isinstance(source, HubSource)
    assert (source.name, len(source.revision)) == (entry, 40)
    assert source.domain
    assert SOURCE.validate_python(source.model_dump()) == source


def test_what_a_recipe_says_beside_an_entry_comes_first():
    plain = {"entry": "fineweb-edu", "name": "edu", "domain": "science", "subset": "sample-10BT", "max_documents": 5}
    source = SOURCE.validate_python(plain)
    assert (source.name, source.domain, source.subset, source.max_documents) == ("edu", "science", "sample-10BT", 5)
    assert source.repository == "HuggingFaceFW/fineweb-edu"


RECIPE = """name: edu
stages:
  clean:
    kind: clean
    sources:
      - {{entry: {entry}, filters: [{{field: int_score, {condition}: 3}}]}}
"""


def recipe(folder: Path, entry: str = "fineweb-edu", condition: str = "min") -> Path:
    path = folder / "edu.yaml"
    path.write_text(RECIPE.format(entry=entry, condition=condition))
    return path


def test_a_recipe_names_an_entry_and_its_key_holds_what_it_stands_for(tmp_path):
    loaded = load_recipe(recipe(tmp_path))
    (stage,) = loaded.stages.values()
    (source,) = stage.sources
    assert (source.repository, source.subset, source.filters[0].min) == (
        "HuggingFaceFW/fineweb-edu",
        "sample-100BT",
        3.0,
    )


def test_an_editor_takes_an_entry_for_a_source_and_knows_its_names(tmp_path):
    schema = recipe_schema()
    jsonschema.validate(yaml.safe_load(recipe(tmp_path).read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(recipe(tmp_path, entry="fineweb").read_text()), schema)


@pytest.mark.parametrize(
    ("fields", "path", "words"),
    [
        ({"entry": "fineweb"}, "clean.sources.0", "entry must be one of fineweb-edu, fineweb2-de"),
        ({"condition": "least"}, "clean.sources.0.filters.0.least", "is not a field; got 3"),
    ],
)
def test_a_fault_beside_an_entry_has_its_place_and_line(tmp_path, fields, path, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe(tmp_path, **fields))
    (fault,) = caught.value.faults
    assert fault.path.endswith(path)
    assert words in fault.message
    assert fault.line == 6
