"""The held-out set: frozen, scored once, and counted in the bytes of the scored tokens."""

import json
import lzma
import math

import numpy as np
import pytest
import torch
from tiny_corpus import build_tokens

from data.baselines import unigram_bits_per_byte, xz_bits_per_byte
from data.heldout import HeldoutSet

VOCAB = 50
LENGTHS = np.array([0, 0, *range(1, VOCAB - 1)], dtype=np.uint16)
HELDOUT = {"en-wiki": [[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [13, 14]], "de-netz": [[15], [16, 17, 18]]}


@pytest.fixture
def tokens(tmp_path):
    train = {"en-wiki": [[2, 2, 3]], "de-netz": [[4]]}
    return build_tokens(tmp_path, train, HELDOUT, vocab_size=VOCAB, token_bytes=LENGTHS.copy())


def scored(heldout, seq_len, rows=3):
    """(document, token, bytes) of each scored token."""
    result = []
    for batch in heldout.batches(seq_len, rows):
        for row, document in enumerate(batch.document):
            for place in np.flatnonzero(batch.scored[row].numpy()):
                token = int(batch.input_ids[row, place])
                result.append((document, token, int(batch.token_bytes[row, place])))
    return sorted(result)


@pytest.mark.parametrize("seq_len", [2, 3, 4, 5, 64])
def test_every_token_but_a_documents_first_is_scored_once_with_its_own_bytes(tokens, seq_len):
    # trap M1
    expected = [(0, t) for t in range(3, 13)] + [(1, 14), (3, 17), (3, 18)]
    assert scored(HeldoutSet(tokens), seq_len) == [(d, t, int(LENGTHS[t])) for d, t in expected]


def test_rows_hold_one_document_padded_on_the_right(tokens):
    heldout = HeldoutSet(tokens)
    batch = next(heldout.batches(5, 8))
    assert batch.input_ids[0].tolist() == [2, 3, 4, 5, 6]
    assert batch.input_ids.shape[1] == 5
    last = batch.document.index(1)
    assert batch.input_ids[last].tolist() == [13, 14, 1, 1, 1]
    assert batch.labels[last].tolist() == [-100, 14, -100, -100, -100]
    assert (batch.language[last], batch.source[last]) == ("en", "en-wiki")
    assert batch.position_ids[last].tolist() == [0, 1, 2, 3, 4]
    assert (batch.token_bytes[~batch.scored] == 0).all()
    assert not batch.scored[:, 0].any()


def test_later_windows_begin_with_the_last_token_of_the_one_before(tokens):
    rows = [row for batch in HeldoutSet(tokens).batches(5, 1) for row in batch.input_ids.tolist()]
    assert rows[:2] == [[2, 3, 4, 5, 6], [6, 7, 8, 9, 10]]
    assert [10, 11, 12, 1, 1] in rows


def test_the_number_of_rows_changes_nothing_that_is_scored(tokens):
    heldout = HeldoutSet(tokens)
    assert scored(heldout, 4, rows=1) == scored(heldout, 4, rows=7)


def test_two_readings_are_equal_and_leave_random_state_alone(tokens):
    # trap M2
    heldout = HeldoutSet(tokens)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (list(heldout.batches(4, 2)) for _ in range(2))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("name", ["en-wiki.bin", "en-wiki.ids.txt"])
def test_a_changed_set_is_refused(tokens, name):
    # traps M2, M3
    path = tokens / "heldout" / name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must hash to"):
        HeldoutSet(tokens)


def test_the_hash_depends_on_language_too(tokens):
    # trap M3
    facts = json.loads((tokens / "tokens.json").read_text())
    facts["sources"][0]["language"] = "fr"
    (tokens / "tokens.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="must hash to"):
        HeldoutSet(tokens)


def test_an_empty_set_is_refused(tmp_path):
    # trap T4
    build_tokens(tmp_path, {"aa": [[5]]})
    with pytest.raises(ValueError, match="must hold a document"):
        HeldoutSet(tmp_path)


@pytest.mark.parametrize(("seq_len", "rows"), [(1, 1), (2, 0)])
def test_absurd_sizes_are_refused(tokens, seq_len, rows):
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        next(HeldoutSet(tokens).batches(seq_len, rows))


def test_the_set_knows_its_languages_and_size(tokens):
    heldout = HeldoutSet(tokens)
    assert (heldout.languages, heldout.n_documents) == (["de", "en"], 4)


def test_unigram_bits_per_byte_by_hand(tokens):
    # trap M1
    counts = np.zeros(VOCAB, dtype=np.int64)
    counts[[3, 17]] = [10, 5]
    total = 15 + VOCAB
    german = -math.log2(6 / total) - math.log2(1 / total)
    english = -math.log2(11 / total) - 10 * math.log2(1 / total)
    german_bytes, english_bytes = 16 + 17, sum(range(2, 12)) + 13
    result = unigram_bits_per_byte(counts, HeldoutSet(tokens))
    assert result["de"] == pytest.approx(german / german_bytes)
    assert result["en"] == pytest.approx(english / english_bytes)
    assert result["all"] == pytest.approx((german + english) / (german_bytes + english_bytes))


def test_xz_counts_all_bytes():
    texts = ["größer " * 50, "हिन्दी " * 30]
    raw = "".join(text + "\n" for text in texts).encode()
    expected = 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
    assert xz_bits_per_byte(texts) == expected
    assert xz_bits_per_byte(text.encode() for text in texts) == expected
    with pytest.raises(ValueError, match="at least one text"):
        xz_bits_per_byte([])
