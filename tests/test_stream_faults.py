"""What is wrong with a stream's input is counted by rule or refused in one line; nothing crashes, nothing is silent."""

import gzip
import json

import pytest
from stream_cases import freeze, make_tokenizer, texts
from test_stream_decontaminate import stage_context

from data.documents import SourceError
from data.errors import DataError
from data.mixture import Mixture
from data.stream import StreamLoader
from stages.base import ConfigError
from stages.stream import Stream, StreamConfig

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


def rows(*contents) -> bytes:
    return b"".join(json.dumps({"text": content}).encode() + b"\n" for content in contents)


def source(folder, name="web-en", include="*", **fields):
    plain = {"type": "files", "licence": "none", "rules": "none", "language": "en", "include": [include]}
    return plain | {"name": name, "path": str(folder)} | fields


def one_pass(folder, name="web-en"):
    """What one lane leaves out of one pass, by rule."""
    stream = StreamLoader(folder / "output", seq_len=16, global_batch_size=1, seed=1, mixture=Mixture({name: 1.0}))
    lane = stream._open_lane(0).sources[name]
    while lane.row(1) is not None:
        pass
    return stream.report()[name]


def test_bad_bytes_rows_and_a_line_of_100_megabytes_are_counted_by_rule(tmp_path, tokenizer):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(rows(*texts("web-en")))
    with (folder / "b.jsonl").open("wb") as file:
        file.write(b'{"text": "\xff"}\n{"text": \n{"text": "lone \\udc00 surrogate"}\n')
        file.truncate(file.tell() + 100 * MEGABYTE)
        file.seek(0, 2)
        file.write(b"\n" + rows("first of its file", 5, ["no", "text"], " ") + b"[1]\n")
    frozen = freeze(tmp_path / "s", tokenizer, [source(folder, max_document_bytes=MEGABYTE)], lanes=1)
    left_out = one_pass(frozen)
    del left_out["held_out"]
    left_out.pop("overlaps_held_out", None)
    assert left_out == {
        "invalid_utf8": 1, "invalid_json": 1, "invalid_unicode": 1, "too_large": 1, "bad_row": 3, "empty": 1,
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["truncated", "flipped byte"])
def test_a_damaged_file_ends_the_freeze_or_the_run_that_comes_to_it_by_name(tmp_path, tokenizer, damage):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(rows(*texts("web-en")))
    content = bytearray(gzip.compress(rows(*(f"{text} again" for text in texts("web-en"))), 0))
    if damage == "truncated":
        del content[-300:]
    else:
        content[-12] ^= 1
    (folder / "b.jsonl.gz").write_bytes(content)
    line = (
        r"must name whole files; got b\.jsonl\.gz, which cannot be read beyond its first \d+ documents \(.*\); fetch it"
    )
    with pytest.raises(SourceError, match=line) as caught:
        freeze(tmp_path / "whole", tokenizer, [source(folder)], lanes=1)
    assert (caught.value.source, caught.value.field) == ("web-en", "path")
    # Fewer documents to hold out and to sample than the first file holds: the damage is behind them.
    frozen = freeze(tmp_path / "part", tokenizer, [source(folder)], lanes=1, heldout_documents=2, sample_documents=9)
    with pytest.raises(DataError, match=f"^data source web-en: path {line}"):
        one_pass(frozen)


def test_a_missing_source_is_named_before_anything_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    gone, none = source(tmp_path / "gone"), source(tmp_path / "empty", "none", "*.jsonl")
    found = [str(fault) for fault in Stream.check(StreamConfig(tokenizer="t", sources=[gone, none]), None)]
    assert found == [
        f"sources.0.path: must be an existing folder or file; got {tmp_path / 'gone'}; set it to where the text lies",
        f"sources.1.include: must match at least one file; got *.jsonl, which matches none under {tmp_path / 'empty'}",
    ]


def test_documents_that_two_sources_hold_are_counted_and_stay(tmp_path, tokenizer):
    for name, kept in (("one", slice(0, 60)), ("two", slice(40, 80))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(rows(*texts("web-en")[kept]))
    described = [source(tmp_path / "one", "one"), source(tmp_path / "two", "two")]
    result = Stream().run(stage_context(tmp_path / "run", tokenizer, described, tasks=None))
    assert result.metrics["shared_documents"] > 10
    told = (
        f"source two: {result.metrics['shared_documents']} of its documents read so far stand in an earlier source too"
    )
    assert f"{told}; a stream keeps both" in result.summary


def test_a_source_of_one_document_is_one_line_under_its_field(tmp_path, tokenizer):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_bytes(rows("only one"))
    with pytest.raises(DataError, match="source one must yield a document to hold out and one to train on; got"):
        Stream().run(stage_context(tmp_path / "run", tokenizer, [source(tmp_path / "text", "one")], tasks=None))


def test_a_damaged_file_is_the_stages_fault_by_its_path(tmp_path, tokenizer):
    (tmp_path / "text").mkdir()
    content = gzip.compress(rows(*texts("web-en")), 0)
    (tmp_path / "text/a.jsonl.gz").write_bytes(content[:-300])
    with pytest.raises(ConfigError, match=r"^sources\.0\.path: must name whole files; got a\.jsonl\.gz"):
        Stream().run(stage_context(tmp_path / "run", tokenizer, [source(tmp_path / "text")], tasks=None))
