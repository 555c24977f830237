"""Passages of documents with the question which language they are in."""

from __future__ import annotations

from data.language_turns import NAMES, QUESTION, name_language

TEXT = " ".join(f"word{number}" for number in range(100))


def passages(*arguments, **document):
    found = name_language({"language": "en", "text": TEXT} | document, *arguments)
    assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in found)
    assert {turns[0]["content"].rpartition("\n\n")[2] for turns in found} <= {QUESTION}
    return [turns[0]["content"].rpartition("\n\n")[0] for turns in found]


def test_passages_are_whole_words_of_different_parts_within_the_bytes():
    found = passages(40, 4)
    assert len(found) == 4
    words = [word for passage in found for word in passage.split()]
    assert len(set(words)) == len(words)
    assert set(words) <= set(TEXT.split())
    assert all(len(passage.encode()) <= 40 for passage in found)
    assert TEXT.index(found[0]) < TEXT.index(found[1]) < TEXT.index(found[2])


def test_bytes_count_as_utf8():
    hindi = " ".join(["हिन्दी"] * 50)
    assert passages(40, 1, text=hindi, language="hi") == ["हिन्दी हिन्दी"]


def test_the_answer_is_the_language_and_an_unknown_one_gives_nothing():
    for language, name in NAMES.items():
        assert name_language({"language": language, "text": TEXT}, 40)[0][1]["content"] == name
    assert passages(40, 3, language="fr") == []


def test_equal_passages_come_once_and_a_word_that_does_not_fit_gives_none():
    assert passages(40, 5, text="same " * 200) == ["same same same same same same same same"]
    assert passages(10, 1, text="x" * 50) == []
    assert passages(40, 1, text="ok") == ["ok"]
