"""Fertility: figures worked out by hand, on tokenizers small enough to see through."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
from test_tokenizer_prune import hand_made
from tiny_corpus import build_corpus

from data.bpe import QWEN2_PATTERN, QWEN35_PATTERN, read_gguf, spell, to_backend
from data.fertility import language_texts, measure_fertility, measure_texts, table
from data.public_tokenizers import open_public
from data.source_config import Package
from data.tokenizer import load
from data.tokenizer_config import PublicTokenizer
from data.tokenizer_train import train_sentencepiece

ROOT = Path(__file__).resolve().parents[1]


def tokenizer_of(*merges: tuple[bytes, bytes], pattern: str = QWEN35_PATTERN):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=to_backend(hand_made(list(merges), pattern)))


def test_bytes_tokens_and_split_words_are_counted():
    # "ab" is one token, " ab" two that cut outside the word, "abc" and " xy" are cut inside.
    figures = measure_texts(tokenizer_of((b"a", b"b")), ["ab ab", "abc xy1"])
    assert figures == {
        "documents": 2, "bytes": 12, "tokens": 3 + 6, "words": 4, "words_with_marks": 0,
        "bytes_per_token": round(12 / 9, 4), "tokens_per_word": 2.25, "words_split": 0.5, "byte_tokens": 0.0,
        "words_cut_at_mark": None, "words_cut_at_mark_by_rule": None, "lost_bytes": 0,
    }  # fmt: skip


def test_a_space_that_a_token_begins_with_splits_no_word():
    figures = measure_texts(tokenizer_of((b"a", b"b"), (b" ", b"ab")), ["ab ab ab"])
    assert (figures["tokens"], figures["words"], figures["words_split"]) == (3, 3, 0.0)


def test_parts_of_characters_are_byte_tokens():
    # "é" is two bytes, each a token of its own; merged they are one whole character.
    assert measure_texts(tokenizer_of(), ["é1"])["byte_tokens"] == pytest.approx(2 / 3, abs=1e-6)
    assert measure_texts(tokenizer_of((b"\xc3", b"\xa9")), ["é1"])["byte_tokens"] == 0


NA, VIRAMA, I_SIGN, TA = "न".encode(), "\u094d".encode(), "\u093f".encode(), "त".encode()


def whole(*characters: bytes) -> list[tuple[bytes, bytes]]:
    """Merges that make each three-byte character one token."""
    made = {}
    for one in characters:
        made[one[:1], one[1:2]] = made[one[:2], one[2:]] = None
    return list(made)


def test_a_token_that_begins_with_a_mark_cuts_its_word_at_the_matra():
    # नि, तत and न: the first has a mark and is cut before it; the second is cut between letters.
    figures = measure_texts(tokenizer_of(*whole(NA, I_SIGN, TA)), ["नि तत न"])
    assert (figures["words"], figures["words_with_marks"]) == (3, 1)
    assert figures["words_cut_at_mark"] == 1.0
    assert figures["words_split"] == pytest.approx(2 / 3, abs=1e-6)


def test_a_syllable_that_stays_whole_is_not_cut():
    joined = measure_texts(tokenizer_of(*whole(NA, I_SIGN, TA), (NA, I_SIGN)), ["नित"])
    assert joined["words_cut_at_mark"] == 0.0
    assert joined["words_split"] == 1.0


def test_cuts_by_the_split_rule_are_told_from_those_for_want_of_vocabulary():
    # नि: Qwen2's rule keeps letters only, so that no vocabulary joins the sign; Qwen3.5's keeps the mark, and what cuts
    # the word there is a vocabulary without the merge. "न ि" holds a sign by itself, which nothing cuts from a letter.
    texts, merges = ["नि तत नि न ि"], whole(NA, I_SIGN, TA)
    found = {}
    for rule, joins in itertools.product(("qwen2", "qwen35"), (False, True)):
        pattern = QWEN2_PATTERN if rule == "qwen2" else QWEN35_PATTERN
        made = tokenizer_of(*merges, *[(NA, I_SIGN)] * joins, pattern=pattern)
        figures = measure_texts(made, texts)
        assert figures["words_with_marks"] == 3
        found[rule, joins] = (figures["words_cut_at_mark_by_rule"], figures["words_cut_at_mark"])
    cut = pytest.approx(2 / 3, abs=1e-6)
    assert found == {("qwen2", False): (cut, cut), ("qwen2", True): (cut, cut),
                     ("qwen35", False): (0.0, cut), ("qwen35", True): (0.0, 0.0)}  # fmt: skip


def test_the_line_about_matras_says_what_is_measured_and_of_how_many_words():
    rows = {"hi": measure_texts(tokenizer_of(*whole(NA, I_SIGN, TA)), ["नि तत नि न"])}
    rows["en"] = measure_texts(tokenizer_of(), ["ab"])
    *_, last = table({"this": rows})
    assert last == (
        "hi, this: of 2 words with a matra or another mark the split rule cuts 0.0% at one, and tokens cut 100.0%: "
        "what the rule leaves whole is cut for want of vocabulary"
    )


def test_a_cut_inside_a_marks_bytes_counts_too():
    # The letter joins the first two bytes of the mark: the token ends inside the mark.
    merges = [*whole(NA), (VIRAMA[:1], VIRAMA[1:2]), (NA, VIRAMA[:2])]
    assert measure_texts(tokenizer_of(*merges), ["न्"])["words_cut_at_mark"] == 1.0


def test_a_word_after_a_cut_one_is_not_cut_itself():
    figures = measure_texts(tokenizer_of(*whole(NA, I_SIGN), (NA, I_SIGN)), ["न्नि नि नि"])
    assert (figures["words_with_marks"], figures["words_cut_at_mark"]) == (3, pytest.approx(1 / 3, abs=1e-6))


def test_a_mark_that_begins_a_word_is_no_cut():
    figures = measure_texts(tokenizer_of(*whole(NA, I_SIGN)), ["न ि"])
    assert (figures["words_with_marks"], figures["words_cut_at_mark"]) == (1, 0.0)


def test_joiners_stand_inside_words():
    assert measure_texts(tokenizer_of(), ["क्\u200dष क्\u200cष"])["words"] == 2


def test_characters_of_all_widths_keep_their_places():
    merges = [(b"a", b"b")]
    assert measure_texts(tokenizer_of(*merges), ["é नदी 😀 ab"])["words_split"] == pytest.approx(2 / 3, abs=1e-6)


def test_bytes_spelled_by_fallback_are_byte_tokens(tmp_path):
    train_sentencepiece(["ab ab abab"] * 20, 268, tmp_path)
    loaded = load(tmp_path)
    figures = measure_texts(loaded, ["ab\r"])
    pieces = loaded.convert_ids_to_tokens(loaded("ab\r", add_special_tokens=False)["input_ids"])
    assert pieces[-1] == "<0x0D>"
    assert figures["byte_tokens"] == pytest.approx(1 / len(pieces), abs=1e-6)


def test_what_a_tokenizer_loses_is_counted():
    from data.tokenizer_prune import subset

    bpe = hand_made([])
    lacking = to_backend(subset(bpe, [number for number in range(256) if number != ord("b")]))
    from transformers import PreTrainedTokenizerFast

    figures = measure_texts(PreTrainedTokenizerFast(tokenizer_object=lacking), ["abc", "aa"])
    assert (figures["lost_bytes"], figures["bytes"], figures["words"]) == (1, 5, 1)


def test_held_out_text_is_measured_its_sources_in_turn(tmp_path):
    corpus = build_corpus(tmp_path)
    texts = language_texts(corpus, 10**6)
    report = measure_fertility(tokenizer_of(), corpus)
    for language, figures in report.items():
        assert figures["bytes"] == sum(len(text.encode()) for text in texts[language])
        assert figures["bytes_per_token"] == 1.0
    assert len(language_texts(corpus, 1)["en"]) == 1
    lines = table({"mine": report})
    assert [line.split()[0] for line in lines] == ["language", "code", "de", "en", "hi", "hi,"]
    assert lines[0].split()[:2] == ["language", "tokenizer"]


def write_gguf_vocabulary(path: Path, bpe, pre: str, extra: str) -> Path:
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    tokens = [extra, *(spell(token) for token in bpe.tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * len(bpe.tokens)])
    writer.add_token_merges([f"{spell(bpe.tokens[left])} {spell(bpe.tokens[right])}" for left, right, _ in bpe.merges])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_vocabulary_inside_a_gguf_file_is_measured_like_any(tmp_path):
    bpe = hand_made([(b"a", b"b"), (b"ab", b"c")])
    folder = tmp_path / "packages" / "p-1-aaaaaaaa"
    folder.mkdir(parents=True)
    write_gguf_vocabulary(folder / "a.gguf", bpe, "smollm", "<|im_start|>")
    found = read_gguf(folder / "a.gguf")
    assert (found.tokens, found.merges) == (bpe.tokens, bpe.merges)
    origin = PublicTokenizer(name="a", package=Package(name="p", version="1", sha256="a" * 64), file="a.gguf")
    figures = measure_texts(open_public(origin, tmp_path), ["abc12"])
    assert figures["tokens"] == 3, "digits stand alone"


def test_a_gguf_file_of_an_unknown_split_is_refused(tmp_path):
    path = write_gguf_vocabulary(tmp_path / "a.gguf", hand_made([]), "llama-bpe", "<s>")
    with pytest.raises(ValueError, match="must cut text as qwen2, qwen35, smollm; got 'llama-bpe'"):
        read_gguf(path)


def test_the_benchmark_writes_a_row_a_tokenizer_and_language(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("fertility", "record"):
        sys.modules.pop(name, None)
    import fertility

    corpus = build_corpus(tmp_path / "corpus")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train_sentencepiece([text for texts in language_texts(corpus, 10**6).values() for text in texts], 400, folder)
    result = tmp_path / "result.json"
    arguments = ["--corpus", str(corpus), "--ours", f"mine={folder}", "--public", "--result", str(result)]
    assert fertility.main(arguments) == 0
    rows = json.loads(result.read_text())["rows"]
    assert [(row["tokenizer"], row["language"]) for row in rows] == [
        ("mine", language) for language in ("code", "de", "en", "hi")
    ]
    assert all(row["bytes_per_s"] > 0 and row["vocab_size"] == 400 for row in rows)
    assert "mine 400" in capsys.readouterr().out


def test_the_documented_table_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("fertility", "record"):
        sys.modules.pop(name, None)
    import fertility

    rows = json.loads((ROOT / "benchmarks" / "results" / "fertility.json").read_text())["rows"]
    text = (ROOT / "docs" / "data.md").read_text()
    assert fertility.markdown(rows) in text
    hindi = next(row for row in rows if row["language"] == "hi")
    assert f"hi {hindi['documents']:,} documents, {hindi['bytes'] / 1e6:.2f} MB, {hindi['words']:,} words" in text


def test_where_the_rule_itself_cuts_at_matras_no_vocabulary_is_blamed():
    figures = measure_texts(tokenizer_of(*whole(NA, I_SIGN, TA), pattern=QWEN2_PATTERN), ["नि तत नि न"])
    whole_words = measure_texts(tokenizer_of(*whole(NA, I_SIGN, TA), (NA, I_SIGN)), ["नि तत नि न"])
    *_, ruled, uncut = table({"a": {"hi": figures}, "b": {"hi": whole_words}})
    assert ruled.endswith(
        "cuts 100.0% at one, and tokens cut 100.0%: the split rule itself cuts at marks, which no vocabulary mends"
    )
    assert uncut.endswith("cuts 0.0% at one, and tokens cut 0.0%")
