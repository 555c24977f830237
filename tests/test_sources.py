"""Readers: what becomes a document, what is named as bad input, what pins a source. No network."""

import gzip
import json
import struct
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from data.catalogs import message_documents, read_catalog
from data.own_text import read_directory, sources_from_directory
from data.rows import MissingField, render_row
from data.source_config import FilesSource, Source
from data.sources import SourceError, read_source, source_revision

SOURCE = TypeAdapter(Source)
ENGLISH = "The weather was fine when the ship left the harbour, and nobody on board expected the storm. " * 3
GERMAN = "Das Wetter war schön, als das Schiff den Hafen verließ, und niemand an Bord erwartete den Sturm. " * 3


def files_source(path: Path, **fields):
    base = {"type": "files", "name": "own", "language": "en", "licence": "own", "rules": "prose", "include": ["**/*"]}
    return SOURCE.validate_python(base | {"path": str(path)} | fields)


def read(source, cache: Path = Path("unused")):
    return list(read_source(source, cache))


def test_a_medqa_row_renders_question_options_and_answer():
    row = {"question": "Which vitamin?", "options": {"A": "A", "B": "C"}, "answer_idx": "B", "meta": {"step": 1}}
    template = "{question}\n{options}\nAnswer: {answer_idx} (step {meta.step}, {braces kept})"
    assert render_row(template, row) == "Which vitamin?\nA. A\nB. C\nAnswer: B (step 1, {braces kept})"
    as_list = row | {"options": [{"key": "A", "value": "A"}, {"key": "B", "value": "C"}]}
    assert render_row("{options}", as_list) == "A. A\nB. C"
    assert render_row("{options}", {"options": ["x", "y"]}) == "A. x\nB. y"
    with pytest.raises(MissingField):
        render_row("{meta.year}", row)


def test_a_template_cannot_reach_attributes():
    with pytest.raises(MissingField):
        render_row("{text.__class__}", {"text": "abc"})


def test_bad_lines_of_jsonl_cost_one_document_each_and_are_named(tmp_path):
    good = json.dumps({"text": "schön", "n": 1}, ensure_ascii=False).encode()
    lines = [good, b"{broken", b'{"text": "\xff"}', b"", b'{"other": 1}', b"[1]", good]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents = read(files_source(tmp_path))
    assert [(d.text, d.fault, d.origin) for d in documents] == [
        ("schön", None, "a.jsonl:1"),
        ("", "invalid_json", "a.jsonl:2"),
        ("", "invalid_utf8", "a.jsonl:3"),
        ("", "bad_row", "a.jsonl:5"),
        ("", "bad_row", "a.jsonl:6"),
        ("schön", None, "a.jsonl:7"),
    ]


def test_a_row_whose_text_is_no_text_is_a_bad_row(tmp_path):
    rows = ["good", 5, 0.5, True, ["a", "b"], {"a": "b"}, None, "again"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in rows))
    documents = read(files_source(tmp_path))
    assert [d.fault for d in documents] == [None, *["bad_row"] * 5, None, None]
    assert documents[1].detail == "text holds int 5, not text"
    # Beside other fields a number is a part of the text.
    assert [d.fault for d in read(files_source(tmp_path, template="Score: {text}"))] == [None] * len(rows)


def test_a_template_that_names_a_field_of_numbers_is_refused_by_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 5, "text": "x"}\n')
    message = (
        r"must give text; got '\{id\}', of which a\.jsonl:1 says: id holds int 5, not text; name a field that holds"
    )
    with pytest.raises(SourceError, match=message) as caught:
        read(files_source(tmp_path, template="{id}"))
    assert caught.value.field == "template"


def test_a_template_that_does_not_fit_the_first_row_says_what_the_row_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "url": "y"}\n')
    with pytest.raises(SourceError, match=r"refers to 'text', which a\.jsonl:1 lacks; it has: content, url") as caught:
        read(files_source(tmp_path))
    assert caught.value.field == "template"
    with pytest.raises(SourceError) as caught:
        read(files_source(tmp_path, template="{content}", title="headline"))
    assert caught.value.field == "title"


def test_one_text_file_is_one_document_and_keeps_its_white_space(tmp_path):  # trap T12
    code = 'def f():\n    """Doc."""\n\n\n    return 1\n'
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/a.py").write_text(code)
    (tmp_path / "pkg/latin.py").write_bytes("# schön".encode("latin-1"))
    first, second = read(files_source(tmp_path, include=["**/*.py"]))
    assert (first.text, first.title, first.fault) == (code, "pkg/a.py", None)
    assert (second.text, second.fault) == ("", "invalid_utf8")


def test_documents_between_blank_lines(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("\n\none\ntwo\n \n\nthree")
    documents = read(files_source(tmp_path, split="blank_line"))
    assert [(d.text, d.origin) for d in documents] == [("one\ntwo", "a.txt.gz:3"), ("three", "a.txt.gz:7")]


def test_a_json_file_is_a_list_or_a_mapping_of_rows(tmp_path):
    (tmp_path / "a.json").write_text('{"x": {"t": "one"}, "y": {"t": "two"}}')
    (tmp_path / "b.json").write_text('[{"t": "three"}]')
    (tmp_path / "c.json").write_text('{"t": "four"}')
    (tmp_path / "d.json").write_text("{")
    documents = read(files_source(tmp_path, template="{t}"))
    assert [d.text for d in documents] == ["one", "two", "three", "four", ""]
    assert documents[-1].fault == "invalid_json"


PO = r"""
msgid ""
msgstr "Project-Id-Version: x\n"

#: a.py:1
msgid "Save \"all\""
msgstr ""
"Alles \"hier\"\n"
"sichern"

#, fuzzy, python-format
msgid "Guess"
msgstr "Geraten"

msgctxt "menu"
msgid "Open"
msgstr "Öffnen"
#, python-format
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

msgid "Untranslated"
msgstr ""

msgid "OK"
msgstr "OK"

#~ msgid "Old"
#~ msgstr "Alt"
"""


def test_a_catalog_gives_reviewed_translations_only(tmp_path):
    (tmp_path / "a.po").write_text(PO)
    assert list(read_catalog(tmp_path / "a.po")) == [
        ('Save "all"', 'Alles "hier"\nsichern'),
        ("Open", "Öffnen"),
        ("%d file", "%d Dateien"),
    ]


def compiled(pairs: list[tuple[bytes, bytes]], order: str) -> bytes:
    """A ``.mo`` file after the GNU gettext manual, section 10.3."""
    count, header = len(pairs), 28
    tables, strings, start = [b"", b""], b"", header + 16 * count
    for side in (0, 1):
        for pair in pairs:
            tables[side] += struct.pack(f"{order}2I", len(pair[side]), start + len(strings))
            strings += pair[side] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, header, header + 8 * count, 0, start)
    return head + tables[0] + tables[1] + strings


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_compiled_catalog_reads_like_its_source(tmp_path, order):
    pairs = [(b"", b"header"), (b"menu\x04Open", "Öffnen".encode()), (b"%d file\0%d files", b"%d Datei\0%d Dateien")]
    (tmp_path / "a.mo").write_bytes(compiled(pairs, order))
    assert list(read_catalog(tmp_path / "a.mo")) == [("Open", "Öffnen"), ("%d file", "%d Dateien")]


def test_a_broken_catalog_is_a_fault_not_a_crash(tmp_path):
    (tmp_path / "a.mo").write_bytes(b"no catalog, but long enough to look")
    (tmp_path / "b.po").write_bytes(b'msgid "a"\nmsgstr "\xff"\n')
    assert [d.fault for d in read(files_source(tmp_path))] == ["invalid_catalog", "invalid_utf8"]


def test_messages_are_gathered_in_order_without_repeats_and_short_ones():
    messages = ["eins zwei drei", "kurz", "vier\nfünf sechs", "eins zwei drei", "sieben acht neun"]
    assert list(message_documents(messages, min_words=3, document_bytes=20)) == [
        "eins zwei drei\nvier fünf sechs",
        "sieben acht neun",
    ]


FINEWEB_ROW = {
    "text": "A page about rivers.",
    "id": "<urn:uuid:1>",
    "dump": "CC-MAIN-2024-10",
    "url": "https://example.org/rivers",
    "language": "en",
    "language_score": 0.97,
    "token_count": 5,
    "score": 3.1,
    "int_score": 3,
}


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_a_local_parquet_file_of_the_fineweb_edu_schema(tmp_path):
    write_parquet(tmp_path / "000_00000.parquet", [FINEWEB_ROW, FINEWEB_ROW | {"text": "Another page."}])
    documents = read(files_source(tmp_path, title="url"))
    assert [(d.text, d.title) for d in documents] == [
        ("A page about rivers.", "https://example.org/rivers"),
        ("Another page.", "https://example.org/rivers"),
    ]


def test_ones_own_files_are_pinned_by_content_not_by_place(tmp_path):
    revisions = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
        revisions.append(source_revision(files_source(tmp_path / folder)))
    assert revisions[0] == revisions[1]
    (tmp_path / "there/a.txt").write_text("other")
    assert source_revision(files_source(tmp_path / "there")) != revisions[0]
    (tmp_path / "here/a.txt").rename(tmp_path / "here/b.txt")
    assert source_revision(files_source(tmp_path / "here")) != revisions[0]


def test_a_missing_folder_and_a_pattern_without_files_are_one_line(tmp_path):
    with pytest.raises(SourceError, match=r"must be an existing folder or file; got .*nowhere") as caught:
        read(files_source(tmp_path / "nowhere"))
    assert (caught.value.field, "\n" in str(caught.value)) == ("path", False)
    with pytest.raises(SourceError, match=r"must match at least one file; got \*\.xyz") as caught:
        read(files_source(tmp_path, include=["*.xyz"]))
    assert caught.value.field == "include"


def test_a_link_that_cannot_be_followed_is_left_out_of_ones_own_text(tmp_path):
    (tmp_path / "notes.txt").write_text("A short note about the weather of last week.\n\nAnd more.\n\nAnd still more.")
    # No file has so long a name: looking fails, as it does where this user may not look.
    (tmp_path / "link.txt").symlink_to("x" * 300)
    assert [source["include"] for source in sources_from_directory(tmp_path)] == [["notes.txt"]]


def test_a_directory_of_ones_own_text_becomes_sources_that_read_all_of_it(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"en[{number}].txt").write_text(ENGLISH)
        (tmp_path / f"de{number}.md").write_text(GERMAN)
    (tmp_path / "rows.jsonl").write_text((json.dumps({"content": ENGLISH}) + "\n") * 3)
    for number in (1, 2, 3):
        (tmp_path / f"tool{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "big.txt").write_text(f"{ENGLISH}\n\n" * 800)
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    sources = [SOURCE.validate_python(config) for config in sources_from_directory(tmp_path)]
    assert {(s.name, s.language, s.rules, len(read(s))) for s in sources} == {
        ("own-text-en", "en", "prose", 3),
        ("own-text-de", "de", "prose", 3),
        ("own-rows-en-content", "en", "prose", 3),
        ("own-code", "code", "code", 3),
        ("own-collection-en", "en", "prose", 800),
    }


def test_a_directory_without_text_is_refused(tmp_path):
    with pytest.raises(SourceError, match="holds no text"):
        sources_from_directory(tmp_path)
    with pytest.raises(SourceError, match="must be a folder"):
        sources_from_directory(tmp_path / "absent")


def test_a_stray_file_is_no_source_of_its_own(tmp_path):
    for number in range(4):
        (tmp_path / f"english{number}.txt").write_text(f"The quick brown fox number {number} jumps over the lazy dog.")
    (tmp_path / "deutsch.txt").write_text("Der schnelle braune Fuchs springt über den faulen Hund am Fluss.", "utf-8")
    (tmp_path / "latin1.txt").write_bytes("Über den Fluß".encode("latin-1"))
    own = read_directory(tmp_path)
    (source,) = own.sources
    assert source["language"] == "en"
    assert source["include"] == ["deutsch.txt", *(f"english{number}.txt" for number in range(4))]
    assert own.left_out == {"latin1.txt": "not UTF-8: byte 0xdc"}


def test_one_file_is_a_collection_of_paragraphs(tmp_path):
    (tmp_path / "notes.md").write_text("One paragraph.\n\nAnother paragraph.\n\nA third.")
    (source,) = sources_from_directory(tmp_path)
    assert source["split"] == "blank_line"


@pytest.mark.parametrize("pattern", ["../../*", "/etc/*", "docs/../../*.txt"])
def test_a_pattern_cannot_leave_its_folder(pattern):
    plain = {"name": "own", "type": "files", "language": "en", "licence": "own", "rules": "prose", "path": "."}
    with pytest.raises(ValueError, match="must stay inside the source's folder"):
        FilesSource.model_validate(plain | {"include": [pattern]})
