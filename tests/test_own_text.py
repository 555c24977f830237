"""`--data DIR`: what is taken and what is left out is named, and too little text is refused before anything runs."""

import gzip
import json
import os

import pytest
from fake_chain import write_recipe

from data.own_text import MIN_DOCUMENTS, NAMED, read_directory
from data.sources import SourceError
from pipelines.run import main
from stages import STAGES

SENTENCE = "The harbour lay still while ship number {} took the tide and left for the north. "
RECIPE = """name: t
stages:
  clean: {kind: clean, sources: []}
  tokenizer: {kind: tokenizer, corpus: clean, model_type: byte_level_bpe, vocab_size: 512}
  tokenize: {kind: tokenize, corpus: clean, tokenizer: tokenizer, chat_share: 0.1}
"""


@pytest.fixture
def plan(tmp_path, capsys):
    def run(*argv):
        path = write_recipe(tmp_path, RECIPE)
        folder = tmp_path / "own"
        code = main(["--plan", "--pipeline", str(path), "--data", str(folder), "--runs", str(tmp_path), *argv], STAGES)
        return code, capsys.readouterr().err

    (tmp_path / "own").mkdir()
    return run


def texts(folder, count):
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(SENTENCE.format(number) * 4)


def odd(folder):
    """One file of each kind that nothing can be read from, with the reason."""
    (folder / "blank.md").write_text(" \n\n\t\n")
    (folder / "code.py").write_text("x = 1\n")
    (folder / "empty.txt").touch()
    (folder / "latin1.txt").write_bytes("Über den Fluß".encode("latin-1"))
    (folder / "nothing.jsonl").write_text("[1]\nno json\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "rows.jsonl").write_text('{"titel": "a", "inhalt": "b"}\n')
    (folder / "void.jsonl").write_text('{"text": null}\n{"text": "  "}\n')
    (folder / "zero.txt").write_bytes(b"a\0b" * 99)
    (folder / "torn.jsonl").write_text('{"text": "a"}\n{torn\n{"txt": 3}\n{"text": 4}\n')
    (folder / "gone.txt").symlink_to("nowhere.txt")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.txt")
    (folder / ".hidden").touch()
    return {
        "gone.txt": "a link to what is not there, nowhere.txt",
        "blank.md": "holds nothing but blanks",
        "code.py": f"1 document of its kind, a source needs {MIN_DOCUMENTS}",
        "empty.txt": "empty",
        "latin1.txt": "not UTF-8: byte 0xdc",
        "nothing.jsonl": "holds no rows",
        "picture.png": "not of a kind that is read",
        "pipe.txt": "not a regular file",
        "round": "a link",
        "rows.jsonl": "no field text, content, document, body; its fields: titel, inhalt",
        "torn.jsonl": f"1 document of its kind, a source needs {MIN_DOCUMENTS}",
        "void.jsonl": "nothing in the field text",
        "zero.txt": "not text: it holds zero bytes",
    }


def test_a_link_to_nowhere_is_named_with_its_target_before_all_that_is_left_out(tmp_path):
    texts(tmp_path, 4)
    for number in range(20):
        (tmp_path / f"a{number}.png").touch()
    (tmp_path / "z.txt").symlink_to("/no/disk/z.txt")
    said = read_directory(tmp_path).lines(tmp_path)[1]
    assert said.startswith("left out: z.txt (a link to what is not there, /no/disk/z.txt), a0.png (not of a kind")


def test_what_holds_no_text_becomes_no_source_and_is_named_with_the_reason(tmp_path):
    texts(tmp_path, 4)
    reasons = odd(tmp_path)
    own = read_directory(tmp_path)
    assert own.left_out == reasons
    assert [(source["name"], source["include"]) for source in own.sources] == [
        ("own-text-en", ["000.txt", "001.txt", "002.txt", "003.txt"])
    ]
    assert (own.documents, own.files) == ({"own-text-en": 4}, {"own-text-en": 4})
    assert own.text_bytes == 4 * len(SENTENCE.format(1) * 4)


def test_damaged_files_are_all_told_at_once(plan, tmp_path):
    own = tmp_path / "own"
    texts(own, 4)
    # One that ends within, which shows when it is read through, and two that do not begin as they should.
    (own / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": os.urandom(9999).hex()}).encode())[:5000])
    (own / "c.txt.gz").write_bytes(b"no archive")
    (own / "a.parquet").write_bytes(b"")
    code, err = plan()
    assert code == 2
    said = [line.partition("; fetch")[0] for line in err.splitlines() if "damaged" in line]
    assert len(said) == 1
    head, files = said[0].split(" damaged files: ")
    assert head.endswith(f"{own} holds 3")
    assert [part.split(" (")[0] for part in files.split("), ")] == ["a.parquet", "b.jsonl.gz", "c.txt.gz"]
    assert "after " in files.split("), ")[1]


def test_of_many_damaged_files_some_are_named_and_the_rest_counted(tmp_path):
    for number in range(NAMED + 3):
        (tmp_path / f"{number:02}.parquet").write_bytes(b"no")
    with pytest.raises(
        SourceError, match=rf"holds {NAMED + 3} damaged files: 00\.parquet \(.*, and 3 more; fetch them"
    ):
        read_directory(tmp_path)


def test_documents_are_counted_as_they_will_be_read(tmp_path):
    (tmp_path / "notes.md").write_text("One paragraph.\n\n\n \nAnother.\n\nA third.\n\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": SENTENCE.format(n)}) + "\n" for n in range(5)))
    assert read_directory(tmp_path).documents == {"own-collection-en": 3, "own-rows-en": 5}


def test_a_large_folder_is_not_read_through(tmp_path, monkeypatch):
    texts(tmp_path, 4)
    monkeypatch.setattr("data.own_text.COUNTED_BYTES", 100)
    own = read_directory(tmp_path)
    assert (own.documents, own.text_bytes) == (None, 4 * len(SENTENCE.format(1) * 4))
    assert own.lines(tmp_path)[0].endswith(f"4 files, {own.text_bytes:,} bytes: own-text-en 4 files")


def test_the_operator_is_told_what_is_taken_and_what_is_not(plan, tmp_path):
    texts(tmp_path / "own", 60)
    reasons = odd(tmp_path / "own")
    code, err = plan()
    assert code == 0, err
    taken, left = err.splitlines()
    size = sum(len(SENTENCE.format(number)) * 4 for number in range(60))
    assert taken == f"--data: {tmp_path / 'own'}: 60 files, {size:,} bytes, 60 documents: own-text-en 60 files"
    named = [f"{file} ({why})" for file, why in reasons.items()]
    assert left == f"--data: left out: {', '.join(named[:8])}, and {len(named) - 8} more"


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (None, "--data: {} must be a folder".replace("{} ", "")),
        (lambda folder: None, "holds no text; files that are read: .c "),
        (lambda folder: (folder / "a.png").touch(), "holds no text; left out: a.png (not of a kind that is read); "),
        (lambda folder: texts(folder, 1), "left out: 000.txt (1 document of its kind, a source needs 3)"),
        (lambda folder: (folder / "a.txt.gz").write_bytes(b"\x1f\x8b"), "a.txt.gz is damaged"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line_with_the_flag_once(plan, tmp_path, fill, message):
    if fill is None:
        (tmp_path / "own").rmdir()
    else:
        fill(tmp_path / "own")
    code, err = plan()
    assert code == 2
    (line,) = [line for line in err.splitlines() if message in line]
    assert line.count("--data") == 1


def test_too_few_documents_for_the_chat_specials_are_refused_before_anything_runs(plan, tmp_path):
    texts(tmp_path / "own", 20)
    code, err = plan()
    assert code == 2
    assert "--data: must hold more documents: tokenize needs 8 of each chat special in the 0.1 of documents" in err
    assert "got 20 documents" in err
    assert "set tokenize.chat_share=0.8 or more" in err
    assert plan("--set", "tokenize.chat_share=0.8")[0] == 0


def test_too_little_text_for_the_steps_is_refused_before_anything_runs(tmp_path, capsys):
    texts(tmp_path, 200)
    size = sum(len(SENTENCE.format(number)) * 4 for number in range(200))
    assert size < 140 * 8 * 256 / 4
    assert main(["--plan", "--data", str(tmp_path), "--runs", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "the 140 steps of pretrain (8 x 256 tokens each) read at least 71,680 bytes at 4 passes; " in err
    assert f"got {size:,};" in err
    most = int(size * 4 / 2048)
    assert f"set pretrain.max_steps={most // 4} or so" in err


def test_only_one_rank_tells(plan, tmp_path, monkeypatch):
    texts(tmp_path / "own", 60)
    monkeypatch.setenv("RANK", "1")
    assert plan() == (0, "")
