"""Files as they come: compressed, damaged, huge, badly encoded. Memory is bounded and nothing is lost silently."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import TypeAdapter, ValidationError
from source_rows import write_jsonl, write_parquet

from data import compressed
from data.compressed import UnreadableFile, bounded_lines, read_bounded, read_chunks
from data.own_text import sources_from_directory
from data.source_config import Source
from data.sources import SourceError, check_files, matching_files, read_source, source_revision

SOURCE = TypeAdapter(Source)
MEGABYTE = 1_000_000
ROWS = [{"text": f"Line {number} of a file."} for number in range(3000)]
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def source(path: Path, **fields):
    base = {"type": "files", "name": "own", "language": "en", "licence": "own", "rules": "none", "include": ["**/*"]}
    return SOURCE.validate_python(base | {"path": str(path)} | fields)


def read(path: Path, **fields) -> list:
    return list(read_source(source(path, **fields), Path("unused")))


def said(path: Path, **fields) -> list[tuple]:
    return [(document.text, document.fault, document.origin) for document in read(path, **fields)]


@pytest.mark.parametrize("ending", PACK)
def test_a_compressed_file_reads_like_the_plain_one(tmp_path, ending):
    plain = write_jsonl(tmp_path / "plain/a.jsonl", ROWS).read_bytes()
    for folder, data in (
        ("packed", PACK[ending](plain)),
        ("members", PACK[ending](plain[:999]) + PACK[ending](plain[999:])),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"a.jsonl{ending}").write_bytes(data)
        texts = [document.text for document in read(tmp_path / folder)]
        assert texts == [row["text"] for row in ROWS]
    for name, text in (("b.txt", "one\n\ntwo"), ("c.json", '[{"text": "three"}]')):
        (tmp_path / "packed" / (name + ending)).write_bytes(PACK[ending](text.encode()))
    assert said(tmp_path / "packed", include=["b.*", "c.*"]) == [
        ("one\n\ntwo", None, f"b.txt{ending}"),
        ("three", None, f"c.json{ending}:1"),
    ]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("damage", ["truncated", "empty", "another kind"])
def test_a_damaged_archive_is_refused_in_one_line_that_names_it(tmp_path, ending, damage):
    whole = PACK[ending](write_jsonl(tmp_path / "plain.jsonl", ROWS).read_bytes())
    content = {"truncated": whole[: len(whole) // 2], "empty": b"", "another kind": b'{"text": "not packed"}\n'}[damage]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / f"a.jsonl{ending}").write_bytes(content)
    with pytest.raises(SourceError, match=rf"must name whole files; got a\.jsonl{ending}, which") as caught:
        read(folder)
    assert (caught.value.field, "\n" in str(caught.value)) == ("path", False)
    # Of a truncated file only reading tells; the others are refused before anything runs.
    if damage == "truncated":
        check_files(source(folder))
    else:
        with pytest.raises(SourceError, match=rf"must name whole files; got: a\.jsonl{ending} "):
            check_files(source(folder))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_a_flipped_byte_in_an_archive_is_refused(tmp_path, ending):
    data = bytearray(PACK[ending](write_jsonl(tmp_path / "plain.jsonl", ROWS).read_bytes()))
    data[len(data) // 2] ^= 0x55
    (tmp_path / f"a.jsonl{ending}").write_bytes(data)
    with pytest.raises(SourceError, match="cannot be read beyond its first"):
        read(tmp_path, include=["a.*"])


def test_how_far_a_broken_file_was_read_is_said(tmp_path):
    whole = write_jsonl(tmp_path / "a.jsonl", ROWS).read_bytes()
    half = whole[: len(whole) // 2].rsplit(b"\n", 1)[0] + b"\n"
    # A stream whose first member is whole and whose second broke off.
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(half) + gzip.compress(whole)[:20])
    whole_lines = len(half.splitlines())
    with pytest.raises(SourceError, match=f"beyond its first {whole_lines} documents"):
        read(tmp_path, include=["*.gz"])


def test_truncated_parquet_is_refused_before_anything_runs_and_when_read(tmp_path):
    path = write_parquet(tmp_path / "b.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-30])
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    write_parquet(tmp_path / "a.parquet", ROWS)
    with pytest.raises(SourceError) as caught:
        check_files(source(tmp_path))
    assert "got: b.parquet is truncated: its last bytes are not a Parquet footer; c.parquet is truncated" in str(
        caught.value
    )
    with pytest.raises(SourceError, match=r"got b\.parquet, which cannot be read beyond its first 0 documents"):
        read(tmp_path)


def test_a_parquet_page_that_was_overwritten_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    data = bytearray(path.read_bytes())
    data[40:400] = bytes(360)
    path.write_bytes(data)
    check_files(source(tmp_path))
    with pytest.raises(SourceError, match=r"a\.parquet, which cannot be read beyond"):
        read(tmp_path)


def huge(path: Path, ending: str) -> Path:
    """Good lines around one of 100 MB."""
    before, after = b'{"text": "before"}\n', b'\n{"text": "after"}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    if not ending:
        with path.open("wb") as file:
            file.write(before)
            file.truncate(len(before) + 100 * MEGABYTE)
            file.seek(0, 2)
            file.write(after)
        return path
    packed = path.with_name(path.name + ending)
    packed.write_bytes(b"".join([PACK[ending](before), *[PACK[ending](bytes(MEGABYTE))] * 100, PACK[ending](after)]))
    return packed


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_line_of_100_megabytes_costs_one_document_and_no_memory(tmp_path, ending):
    huge(tmp_path / "a.jsonl", ending)
    tracemalloc.start()
    try:
        documents = read(tmp_path, max_document_bytes=MEGABYTE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(d.text, d.fault) for d in documents] == [("before", None), ("", "too_large"), ("after", None)]
    assert documents[1].detail == "100,000,000 bytes, more than max_document_bytes 1,000,000"
    assert peak < 10 * MEGABYTE


@pytest.mark.parametrize("split", ["file", "blank_line"])
def test_a_text_document_of_100_megabytes_is_counted_and_not_held(tmp_path, split):
    huge(tmp_path / "a.txt", "")
    tracemalloc.start()
    try:
        documents = read(tmp_path, max_document_bytes=MEGABYTE, split=split)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [document.fault for document in documents] == ["too_large"]
    assert peak < 10 * MEGABYTE


def test_many_short_lines_without_a_blank_one_are_not_held_either(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"short line\n" * 100_000 + b"\nlast\n")
    tracemalloc.start()
    try:
        documents = read(tmp_path, max_document_bytes=10_000, split="blank_line")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(d.text, d.fault) for d in documents] == [("", "too_large"), ("last", None)]
    assert documents[0].detail.startswith("1,099,999 bytes")
    assert peak < 4 * MEGABYTE


def test_the_limit_is_the_documents_own_bytes_to_the_byte(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "ü" * 500}, {"text": "ü" * 500 + "x"}])
    write_parquet(tmp_path / "b.parquet", [{"text": "x" * 1000}, {"text": "x" * 1001}])
    for name, text in (("c.txt", "x" * 1000), ("d.txt", "x" * 1001)):
        (tmp_path / name).write_text(text)
    assert [d.fault for d in read(tmp_path, include=["a.jsonl"], max_document_bytes=1020)] == [None, None]
    found = {d.origin: d.fault for d in read(tmp_path, include=["b.*", "*.txt"], max_document_bytes=1000)}
    assert found == {"b.parquet:1": None, "b.parquet:2": "too_large", "c.txt": None, "d.txt": "too_large"}
    rows = [{"text": "x" * 1001, "title": "t"}]
    write_jsonl(tmp_path / "e.jsonl", rows)
    assert [d.fault for d in read(tmp_path, include=["e.jsonl"], max_document_bytes=1000)] == ["too_large"]


def test_a_bad_byte_costs_the_document_that_holds_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\n\nbad \xff byte\nsecond line\n\n\xc2\xa0\nl\xc3\xa4st\r\n")
    documents = read(tmp_path, split="blank_line")
    assert [(d.text, d.fault, d.origin) for d in documents] == [
        ("first", None, "a.txt:1"),
        ("", "invalid_utf8", "a.txt:3"),
        ("läst\r", None, "a.txt:7"),
    ]
    assert documents[1].detail == "byte 0xff at 4"


def test_what_is_wrong_with_a_line_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x",}\n{"text": "\xff"}\n' + b"[" * 200_000 + b"\n")
    details = [(d.fault, d.detail) for d in read(tmp_path)]
    assert [fault for fault, _ in details] == ["invalid_json", "invalid_utf8", "invalid_json"]
    assert "at column 14" in details[0][1]
    assert details[1][1] == "byte 0xff at 10"
    assert details[2][1] == "nested too deeply"


def test_a_json_file_beyond_memory_is_refused_with_the_way_out(tmp_path, monkeypatch):
    from data import file_readers

    monkeypatch.setattr(file_readers, "MAX_JSON_BYTES", 30)
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:5]))
    with pytest.raises(SourceError, match="write it as JSONL"):
        read(tmp_path)


def slow_lines(data: bytes, limit: int) -> list[tuple[bytes | None, int]]:
    lines = data.split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    return [(line if len(line) <= limit else None, len(line)) for line in lines]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 4096])
def test_lines_do_not_depend_on_how_the_file_is_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(compressed.read_chunks, "__defaults__", (chunk,))
    for number, data in enumerate([b"", b"\n", b"a", b"a\n", b"\n\nab\n", b"abc\nabcd\nabcde\nab", b"abcdefghij\n\n"]):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(data)
        assert [tuple(line) for line in bounded_lines(path, 4)] == slow_lines(data, 4)
        assert b"".join(read_chunks(path)) == data
        assert read_bounded(path, 4) == (data if len(data) <= 4 else None)


def test_an_unreadable_file_says_why(tmp_path):
    with pytest.raises(UnreadableFile, match="after 0 bytes: No such file or directory"):
        list(read_chunks(tmp_path / "absent.txt"))


@pytest.mark.parametrize("pattern", ["**/*", "**/*.txt", "sub/*", "sub/gone.txt", "**/gone.txt"])
def test_a_link_to_nowhere_that_a_pattern_matches_is_refused_with_its_target(tmp_path, pattern):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "sub/gone.txt").symlink_to("/no/disk/gone.txt")
    with pytest.raises(SourceError, match=r"got sub/gone\.txt -> /no/disk/gone\.txt; mount the disk") as caught:
        matching_files(source(tmp_path, include=["a.txt", pattern]), tmp_path)
    assert caught.value.field == "path"
    for exclude in ("**/gone.txt", "sub", pattern if pattern.endswith("gone.txt") else "sub/gone.*"):
        kept = matching_files(source(tmp_path, include=["a.txt", pattern], exclude=[exclude]), tmp_path)
        assert kept == [tmp_path / "a.txt"]


def test_a_link_to_nowhere_that_no_pattern_matches_and_links_to_what_is_there_are_no_fault(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "here.txt").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    assert matching_files(source(tmp_path, include=["*.txt"]), tmp_path) == [tmp_path / "a.txt", tmp_path / "b.txt"]


def test_excluding_a_folder_leaves_out_all_in_it(tmp_path):
    for name in ("src/a.py", "src/.venv/lib/b.py", "node_modules/c/d.py", "src/test/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")

    def names(**fields):
        chosen = source(tmp_path, **fields)
        return [path.relative_to(tmp_path).as_posix() for path in matching_files(chosen, tmp_path)]

    code = {"include": ["**/*.py"], "language": "code", "rules": "code"}
    assert names(**code, exclude=["**/.*", "**/node_modules/**", "src/test"]) == ["src/a.py"]
    assert names(include=["src/**"]) == ["src/.venv/lib/b.py", "src/a.py", "src/test/e.py"]
    assert names(**code, exclude=["**/d.py", "**/.venv/**"]) == ["src/a.py", "src/test/e.py"]


@pytest.mark.parametrize("pattern", ["**.py", "src/**x/*.py", ""])
def test_a_pattern_that_python_versions_read_differently_is_refused(tmp_path, pattern):
    with pytest.raises(ValidationError, match=r"must have \*\* only as a whole folder's name"):
        source(tmp_path, include=[pattern])


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SourceError, match=r"must be readable; got .*a\.txt: Permission denied") as caught:
        source_revision(source(tmp_path))
    assert caught.value.field == "path"
    with pytest.raises(SourceError, match=r"Permission denied"):
        read(tmp_path)


@pytest.mark.parametrize("ending", PACK)
def test_ones_own_text_may_be_compressed_and_is_told_apart_by_what_is_inside(tmp_path, ending):
    english = "The weather was fine when the ship left the harbour, and nobody on board expected a storm. "
    for number in range(3):
        (tmp_path / f"tale{number}.txt{ending}").write_bytes(PACK[ending](english.encode() * 3))
        (tmp_path / f"rows{number}.jsonl{ending}").write_bytes(PACK[ending](json.dumps({"content": english}).encode()))
    found = {plain["name"]: plain for plain in sources_from_directory(tmp_path)}
    assert set(found) == {"own-text-en", "own-rows-en-content"}
    assert len(list(read_source(SOURCE.validate_python(found["own-rows-en-content"]), tmp_path))) == 3


def test_damaged_own_text_is_refused_with_its_path(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"\x1f\x8b and then nothing")
    with pytest.raises(SourceError, match=r"^/.*a\.txt\.gz is damaged \(after 0 bytes: .*\); fetch it again or move"):
        sources_from_directory(tmp_path)
    (tmp_path / "a.txt.gz").unlink()
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SourceError, match=r"b\.parquet is damaged \(is truncated"):
        sources_from_directory(tmp_path)


def test_a_flipped_byte_in_a_parquet_page_with_a_checksum_is_refused_by_name(tmp_path):
    path, plain = tmp_path / "a.parquet", {"compression": "none", "use_dictionary": False, "write_statistics": False}
    for has_checksums in (True, False):
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, write_page_checksum=has_checksums, **plain)
        path.write_bytes(path.read_bytes().replace(b"Line 7 of a file.", b"Line 8 of a file."))
        if has_checksums:
            with pytest.raises(SourceError, match=r"must name whole files; got a\.parquet, which .*CRC"):
                read(tmp_path)
            with pytest.raises(SourceError, match=r"^/.*a\.parquet is damaged \(.*CRC.*\); fetch it again or move it"):
                sources_from_directory(tmp_path)
    # Without them nothing tells; docs/sources.md says so.
    assert read(tmp_path)[7].text == "Line 8 of a file."


def test_an_archive_of_ones_own_rows_that_breaks_off_within_is_refused_by_name(tmp_path):
    whole = gzip.compress(
        b"".join(json.dumps({"text": f"{number} {os.urandom(99).hex()}"}).encode() + b"\n" for number in range(999))
    )
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        SourceError, match=r"a\.jsonl\.gz is damaged \(after [\d,]+ bytes: .*\); fetch it again or move it"
    ):
        sources_from_directory(tmp_path)
