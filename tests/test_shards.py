"""Shards: what is written is read, and damage is found."""

import dataclasses

import numpy as np
import pytest
from tiny_corpus import build_tokens

from data.shards import HELDOUT, TRAIN, open_shard, read_ids, read_info, token_dtype

DOCUMENTS = {"wiki": [[5, 6, 7], [8], [9, 59_999]], "netz": [[2, 3]]}


@pytest.fixture
def tokens(tmp_path):
    return build_tokens(tmp_path, DOCUMENTS, {"wiki": [[4, 4]]})


def test_documents_come_back_with_their_eos_and_ids(tokens):
    shard = open_shard(read_info(tokens), TRAIN, "wiki")
    assert [shard.document(n).tolist() for n in range(len(shard))] == [[5, 6, 7, 0], [8, 0], [9, 59_999, 0]]
    assert read_ids(tokens, TRAIN, "wiki") == ["wiki-train-0", "wiki-train-1", "wiki-train-2"]
    assert isinstance(shard.tokens, np.memmap)


def test_a_source_without_held_out_documents_opens_empty(tokens):
    assert len(open_shard(read_info(tokens), HELDOUT, "netz")) == 0


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_ids_are_as_narrow_as_the_vocabulary_allows(vocab_size, width):
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == width
    assert dtype.str[0] == "<"
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_wide_ids_survive(tmp_path):
    build_tokens(tmp_path, {"a": [[70_000, 5]]}, vocab_size=70_001)
    assert open_shard(read_info(tmp_path), TRAIN, "a").document(0).tolist() == [70_000, 5, 0]


@pytest.mark.parametrize("suffix", [".bin", ".idx.npy"])
def test_a_truncated_file_is_refused_at_opening_by_name(tokens, suffix):
    path = tokens / TRAIN / f"wiki{suffix}"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"wiki{suffix} must be"):
        open_shard(read_info(tokens), TRAIN, "wiki")


def test_a_folder_without_facts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokens\.json is missing"):
        read_info(tmp_path)


def test_damaged_facts_are_refused(tokens):
    (tokens / "tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a tokens artifact's facts"):
        read_info(tokens)


def test_an_unknown_source_is_refused(tokens):
    with pytest.raises(ValueError, match="source must be one of"):
        open_shard(read_info(tokens), TRAIN, "blog")


def test_a_model_with_too_few_rows_is_refused_when_they_meet(tokens):
    # trap K10
    info = read_info(tokens)
    info.check_model(60_000)
    with pytest.raises(ValueError, match=r"model.vocab_size must be at least the tokenizer's 60000; got 59999"):
        info.check_model(59_999)


@pytest.mark.parametrize("field", ["eos_id", "pad_id"])
def test_eos_and_pad_beyond_the_vocabulary_are_refused(tokens, field):
    # trap K10
    info = dataclasses.replace(read_info(tokens), **{field: 60_000})
    with pytest.raises(ValueError, match=f"{field} must be in 0..59999"):
        info.check_model(70_000)
