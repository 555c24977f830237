"""The held-out split as a rule about text: what decides a side, what does not, and what shares words with it."""

from __future__ import annotations

import random

import pytest
from clean_cases import invented

from data.corpus import document_id
from data.errors import DataError
from data.heldout_split import HeldoutIndex, choose_heldout, split_documents
from data.source_config import HeldoutConfig

Documents = list[tuple[str, str, str]]


def documents(source: str, texts: list[str]) -> Documents:
    return [(source, document_id(text), text) for text in texts]


def split(members: Documents, **fields):
    return split_documents(lambda: iter(members), HeldoutConfig(**fields))


def test_a_documents_side_does_not_depend_on_what_else_there_is_nor_on_the_order():
    tales, more = documents("tales", invented(400)), documents("more", invented(300, seed=2))
    alone = split(tales, share=0.1, min_documents=1).heldout
    both = [*more, *tales]
    random.Random(0).shuffle(both)
    # Half of the tales, in another order, among other sources: each keeps its side.
    half = {one for _, one, _ in tales[:200]}
    fewer = [member for member in both if member[0] == "more" or member[1] in half]
    assert split(both, share=0.1, min_documents=1).heldout & {one for _, one, _ in tales} == alone
    assert split(fewer, share=0.1, min_documents=1).heldout & half == alone & half
    assert 20 < len(alone) < 60


def test_every_stratum_gets_its_share_and_its_least():
    ids = {
        name: [document_id(f"{name} {n}") for n in range(count)]
        for name, count in (("en", 2000), ("de", 40), ("hi", 7))
    }
    chosen = choose_heldout(ids, HeldoutConfig(share=0.05, min_documents=10))
    counts = {name: len(chosen & set(members)) for name, members in ids.items()}
    assert 60 < counts["en"] < 140
    assert counts["de"] >= 10
    assert counts["hi"] == 3


def test_an_index_of_held_out_text_finds_shared_runs_and_only_those():
    heldout = invented(30)
    index = HeldoutIndex(13, heldout)
    runs = {tuple(text.strip(".").split()[i : i + 13]) for text in heldout for i in range(48)}
    assert len(index) == len(runs)
    words = heldout[4].strip(".").split()
    fresh = invented(3, seed=8)
    assert index.shared(fresh[0]) == ""
    assert index.shared(f"{fresh[0]} {' '.join(words[10:22])} {fresh[1]}") == ""  # twelve words
    found = index.shared(f"{fresh[0]} {' '.join(words[10:23]).upper()}, {fresh[1]}")
    assert found == " ".join(words[10:23])
    assert HeldoutIndex(13, []).shared(heldout[0]) == ""


def planted(copies: int, own: int) -> Documents:
    """A source of which ``copies`` documents hold one held-out document of ``tales`` each, and ``own`` do not."""
    tales = documents("tales", invented(600))
    heldout = split(tales, share=0.2, min_documents=1).heldout
    quoted = [text for _, one, text in tales if one in heldout][:copies]
    fresh = invented(copies, seed=3)
    # Their own hashes must lie on the training side, or they would be held out themselves.
    mixed = [f"{a} {b}" for a, b in zip(fresh, quoted, strict=True)]
    return [*tales, *documents("more", mixed), *documents("more", invented(own, seed=4))]


def test_an_overlap_up_to_the_bound_is_removed_and_beyond_it_refused():
    members = planted(60, 200)
    found = split(members, share=0.2, min_documents=1, max_overlap_share=0.5)
    removed = sum(1 for source, one, _ in members if source == "more" and one in found.overlapping)
    train = sum(1 for source, one, _ in members if source == "more" and one not in found.heldout)
    assert 20 < removed <= 60
    share = removed / train
    split(members, share=0.2, min_documents=1, max_overlap_share=share)
    with pytest.raises(DataError, match=rf"{removed} of {train} of more share 13 words") as caught:
        split(members, share=0.2, min_documents=1, max_overlap_share=share * 0.99)
    assert [field for field, _ in caught.value.faults] == ["heldout.max_overlap_share"]
