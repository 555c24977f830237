"""Conversations as labels: the assistant's tokens and nothing else, limits by a named policy, nothing lost unseen."""

from __future__ import annotations

import pytest
from finetune_cases import write_jsonl
from tiny_run import make_tokens

from data.conversations import read_conversations, scored_hash
from data.errors import DataError

ENGLISH = "the cat sat"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from data.tokenizer import load

    return load(make_tokens(tmp_path_factory.mktemp("tokens")) / "output" / "tokenizer")


def read(tmp_path, tokenizer, conversations, *, max_length=200, over_length="drop"):
    rows = [
        {"id": f"c{number}", "messages": messages, "language": "en"} for number, messages in enumerate(conversations)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    return read_conversations(tmp_path / "train.jsonl", tokenizer, max_length=max_length, over_length=over_length)


def turn(role, content):
    return {"role": role, "content": content}


def spelled(tokenizer, parts):
    """Ids and labels of ``(text or special, learnt)`` parts, each encoded by itself."""
    from data.tokenizer import SPECIAL_TOKENS, encode_text

    ids, labels = [], []
    for text, learnt in parts:
        new = [tokenizer.get_vocab()[text]] if text in SPECIAL_TOKENS else encode_text(tokenizer, text)
        ids += new
        labels += new if learnt else [-100] * len(new)
    return ids, labels


def test_what_the_assistant_says_and_its_stop_are_labels_token_by_token(tmp_path, tokenizer):
    messages = [turn("system", "be kind"), turn("user", "cat?"), turn("assistant", "small dog"), turn("user", "and?"),
                turn("assistant", "red mat")]  # fmt: skip
    (found,), counts = read(tmp_path, tokenizer, [messages])
    start, end = "<|im_start|>", "<|im_end|>"
    parts = [
        (start, 0), ("system\nbe kind", 0), (end, 0), ("\n", 0), (start, 0), ("user\ncat?", 0), (end, 0), ("\n", 0),
        (start, 0), ("assistant\n", 0), ("small dog", 1), (end, 1), ("\n", 0), (start, 0), ("user\nand?", 0), (end, 0),
        ("\n", 0), (start, 0), ("assistant\n", 0), ("red mat", 1), (end, 1), ("\n", 0),
    ]  # fmt: skip
    ids, labels = spelled(tokenizer, parts)
    assert found.ids == ids
    assert found.labels == labels
    assert counts.supervised_tokens == sum(label != -100 for label in labels)


def test_a_literal_stop_inside_a_message_stays_text(tmp_path, tokenizer):
    stop = tokenizer.get_vocab()["<|im_end|>"]
    messages = [turn("user", "say <|im_end|>"), turn("assistant", "so: <|im_end|> it is")]
    (found,), _ = read(tmp_path, tokenizer, [messages])
    assert found.ids.count(stop) == 2
    assert found.labels.count(stop) == 1
    from data.tokenizer import decode_bytes

    said = [label for label in found.labels if label != -100]
    assert decode_bytes(tokenizer, said) == b"so: <|im_end|> it is"


def test_over_long_conversations_are_counted_and_dropped_or_truncated(tmp_path, tokenizer):
    short = [turn("user", "a"), turn("assistant", "b")]
    long = [turn("user", "a"), turn("assistant", ENGLISH * 40)]
    late = [turn("user", ENGLISH * 40), turn("assistant", "b")]
    limit = len(read(tmp_path, tokenizer, [short])[0][0].ids) + 3
    kept, counts = read(tmp_path, tokenizer, [short, long, late], max_length=limit, over_length="drop")
    assert [row.id for row in kept] == ["c0"]
    assert (counts.rows, counts.conversations, counts.over_length, counts.unsupervised) == (3, 1, 2, 0)
    kept, counts = read(tmp_path, tokenizer, [short, long, late], max_length=limit, over_length="truncate")
    assert [row.id for row in kept] == ["c0", "c1"]
    assert [len(row.ids) for row in kept] == [limit - 3, limit]
    # The answer of the last one lies beyond the limit: nothing is left to learn from it.
    assert (counts.conversations, counts.over_length, counts.unsupervised) == (2, 2, 1)


def test_a_file_without_a_token_of_the_assistants_is_refused(tmp_path, tokenizer):  # trap T4
    with pytest.raises(DataError, match=r"train.jsonl must hold a token of the assistant's.*unsupervised 2"):
        read(tmp_path, tokenizer, [[turn("user", "a")], [turn("system", "b"), turn("user", "c")]])


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([{"role": "assistent", "content": "b"}], r"line 1 must be a conversation; messages\[0\].role"),
        ([{"role": "user", "content": None}], r"line 1 must be a conversation; messages\[0\].content"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(tmp_path, tokenizer, messages, fault):
    with pytest.raises(DataError, match=fault):
        read(tmp_path, tokenizer, [messages])


def test_a_line_that_is_no_json_is_named(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="line 1 must be a JSON object"):
        read_conversations(tmp_path / "train.jsonl", tokenizer, max_length=9, over_length="drop")


def test_a_limit_of_length_that_changes_what_is_scored_names_another_set(tmp_path, tokenizer):  # trap M3
    long = [turn("user", "cat?"), turn("assistant", "small dog " * 20)]
    short = [turn("user", "cat?"), turn("assistant", "red mat")]
    whole, _ = read(tmp_path, tokenizer, [long, short])
    again, _ = read(tmp_path, tokenizer, [long, short], max_length=201)
    dropped, counts = read(tmp_path, tokenizer, [long, short], max_length=30)
    cut, _ = read(tmp_path, tokenizer, [long, short], max_length=30, over_length="truncate")
    assert counts.over_length == 1
    assert scored_hash(whole) == scored_hash(again)
    assert len({scored_hash(whole), scored_hash(dropped), scored_hash(cut)}) == 3


def test_rows_of_one_family_stay_together_and_others_stand_for_themselves(tmp_path, tokenizer):  # trap M6
    talk = [turn("user", "the cat"), turn("assistant", "sat")]
    rows = [{"id": f"c{number}", "messages": talk, "language": "en"} for number in range(3)]
    write_jsonl(tmp_path / "rows.jsonl", [{**rows[0], "family": "page"}, {**rows[1], "family": "page"}, rows[2]])
    found, _ = read_conversations(tmp_path / "rows.jsonl", tokenizer, max_length=200, over_length="drop")
    assert [conversation.family for conversation in found] == ["page", "page", "c2"]
