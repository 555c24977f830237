"""Pruning a published byte-level BPE: merges closed, ids remapped, bytes intact, text cut as before where it can be."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from test_tokenizer import adversarial, run_stage
from tiny_bpe import pruned_tokenizer, published, write_ranks
from tiny_corpus import WORDS, build_corpus, document_text

from data import bpe as room
from data.bpe import QWEN2_PATTERN, ByteLevelBPE, from_facts, read_ranks, split_by, to_backend
from data.public_tokenizers import origin_faults, read_bpe, revision
from data.source_config import Package
from data.tokenizer import SPECIAL_TOKENS, audit, decode_bytes, encode_text, load, special_ids
from data.tokenizer_config import PublicTokenizer
from data.tokenizer_prune import SOURCE_IDS_FILE, choose, count_use, subset, train_pruned
from stages.tokenizer import Tokenizer, TokenizerConfig

LANGUAGES = ("en", "de", "hi", "code")
VOCAB = 400


@pytest.fixture(scope="module")
def texts():
    drawn = random.Random(4)
    return [document_text(drawn, LANGUAGES[number % 4]) for number in range(200)]


@pytest.fixture(scope="module")
def source(texts):
    return published(texts, 2000)


@pytest.fixture(scope="module")
def directory(source, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    train_pruned(source, texts, VOCAB, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load(directory)


def hand_made(merges: list[tuple[bytes, bytes]], pattern: str = QWEN2_PATTERN) -> ByteLevelBPE:
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    ids = {token: number for number, token in enumerate(tokens)}
    triples = tuple((ids[left], ids[right], ids[left + right]) for left, right in merges)
    return ByteLevelBPE(tuple(tokens), triples, split_by(pattern))


def test_the_least_used_leaf_goes_first_and_its_uses_pass_to_its_parts():
    # ab=256, abc=257, xy=258, abcd=259. Counts: abcd 5, abc 0, ab 2, xy 6.
    bpe = hand_made([(b"a", b"b"), (b"ab", b"c"), (b"x", b"y"), (b"abc", b"d")])
    counts = np.zeros(260, np.int64)
    counts[[256, 258, 259]] = 2, 6, 5
    kept = [set(choose(bpe, counts, room).tolist()) - set(range(256)) for room in (259, 258, 257, 256)]
    # abcd (5) is the least used leaf: abc cannot go before it, though nothing uses abc itself. Then abc has 5, ab still
    # 2 but a user; xy (6) outlives abc (5), whose uses then make ab 7, so that xy goes before ab.
    assert kept == [{256, 257, 258}, {256, 258}, {256}, set()]


def test_of_equally_used_tokens_the_later_merged_one_goes_first():
    bpe = hand_made([(b"a", b"b"), (b"c", b"d")])
    assert choose(bpe, np.zeros(258, np.int64), 257).tolist()[256:] == [256]


def test_merges_are_closed_and_ids_leave_no_gap(directory, source):
    facts = json.loads((directory / "tokenizer.json").read_text())
    vocabulary, made = facts["model"]["vocab"], {left + right for left, right in facts["model"]["merges"]}
    assert sorted(vocabulary.values()) == list(range(VOCAB))
    assert all({left, right, left + right} <= set(vocabulary) for left, right in facts["model"]["merges"])
    merged = set(vocabulary) - set(SPECIAL_TOKENS) - {room.spell(bytes([byte])) for byte in range(256)}
    assert merged == made, "every merged token can be made"
    assert {room.spell(bytes([byte])) for byte in range(256)} <= set(vocabulary)
    order = [room.spell(token) for token in source.tokens]
    kept = [token for token in vocabulary if token not in SPECIAL_TOKENS]
    assert kept == sorted(kept, key=order.index), "the source's order"


def test_specials_lead_and_the_map_gives_the_sources_ids(directory, source, tokenizer):
    assert special_ids_of(directory) == {name: number for number, name in enumerate(SPECIAL_TOKENS)}
    source_ids = np.load(directory / SOURCE_IDS_FILE)
    assert source_ids[:4].tolist() == [-1] * 4
    names = tokenizer.convert_ids_to_tokens(list(range(4, VOCAB)))
    assert names == [room.spell(source.tokens[old]) for old in source_ids[4:]]


def special_ids_of(directory):
    facts = json.loads((directory / "tokenizer.json").read_text())
    return {token["content"]: token["id"] for token in facts["added_tokens"]}


def test_text_whose_tokens_are_all_kept_is_cut_as_before(directory, source, tokenizer, texts):
    before, source_ids = to_backend(source), np.load(directory / SOURCE_IDS_FILE)
    new = {int(old): number for number, old in enumerate(source_ids) if old >= 0}
    words = sorted({word for language in LANGUAGES for word in WORDS[language]})
    same = changed = 0
    for text in [*texts, *words, *(f" {word}" for word in words)]:
        ids = before.encode(text, add_special_tokens=False).ids
        if set(ids) <= set(new):
            assert encode_text(tokenizer, text) == [new[old] for old in ids]
            same += 1
        else:
            changed += 1
    assert same > 10
    assert changed > 10


def test_nothing_is_lost_and_nothing_is_out_of_range(tokenizer):
    for text in adversarial():
        ids = encode_text(tokenizer, text)
        assert decode_bytes(tokenizer, ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert all(4 <= token < VOCAB for token in ids)
    audit(tokenizer)


def test_bytes_of_no_text_survive_a_tokenizer_of_bytes_alone(source, texts, tmp_path):
    train_pruned(source, texts, 260, tmp_path)
    ids = encode_text(load(tmp_path), "नदी \U0010ffff")
    assert [token - 4 for token in ids] == [source.tokens.index(bytes([byte])) for byte in "नदी \U0010ffff".encode()]


def test_use_is_counted_by_the_whole_vocabulary(source, texts):
    backend, expected = to_backend(source), np.zeros(len(source.tokens), np.int64)
    for text in texts:
        for token in backend.encode(text, add_special_tokens=False).ids:
            expected[token] += 1
    assert (count_use(source, iter(texts)) == expected).all()


def test_what_a_text_uses_is_kept_for_it(source):
    drawn = random.Random(9)
    counts = {name: count_use(source, [document_text(drawn, name) for _ in range(60)]) for name in ("hi", "de")}
    kept = {name: choose(source, counts[name], 330) for name in counts}
    for name, other in (("hi", "de"), ("de", "hi")):
        assert counts[name][kept[name]].sum() > 1.5 * counts[name][kept[other]].sum()


def test_the_same_texts_prune_to_the_same_files(source, texts, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train_pruned(source, iter(texts), VOCAB, tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json", SOURCE_IDS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_ranks_are_read_back_to_the_merges_that_they_came_from(source, tmp_path):
    found = read_ranks(write_ranks(source, tmp_path / "a.tiktoken"), QWEN2_PATTERN)
    assert found.tokens == source.tokens
    assert found.merges == source.merges
    assert found.pre_tokenizer == source.pre_tokenizer


def test_ranks_give_the_ids_that_tiktoken_gives(source, texts, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: rank for rank, token in enumerate(source.tokens)}
    native = tiktoken.Encoding("tiny", pat_str=QWEN2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = to_backend(read_ranks(write_ranks(source, tmp_path / "a.tiktoken"), QWEN2_PATTERN))
    for text in [*texts, *adversarial()]:
        assert ours.encode(text, add_special_tokens=False).ids == native.encode_ordinary(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("QQ== 0\nnonsense\n", "line 2 does not"),
        ("QQ== 0\nQg== 2\n", "must skip no rank"),
        ("QQ== 0\nQUI= 1\nQg== 2\n", "rank 1 is not"),
        ("QQ== 0\nQUFB 1\n", "rank 1 is not"),
    ],
)
def test_damaged_ranks_are_refused(content, message, tmp_path):
    path = tmp_path / "a.tiktoken"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_ranks(path, QWEN2_PATTERN)


def facts_of(source):
    return json.loads(to_backend(source, SPECIAL_TOKENS).to_str())


def test_a_tokenizer_json_is_read_without_its_specials(source):
    found = from_facts(facts_of(source), "a")
    assert found.tokens == source.tokens
    assert found.merges == source.merges


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts["model"].update(ignore_merges=True), "applies its merges"),
        (lambda facts: facts.update(pre_tokenizer=None), "byte-level BPE"),
        (lambda facts: facts.update(normalizer={"type": "Lowercase"}), "must not change text; got the normaliser"),
        (lambda facts: facts["model"]["vocab"].update({"नदी": 9999}), "byte alphabet"),
    ],
)
def test_what_is_no_plain_byte_level_bpe_is_refused(source, change, message):
    facts = facts_of(source)
    change(facts)
    with pytest.raises(ValueError, match=message):
        from_facts(facts, "a")


def test_a_source_without_a_byte_is_refused(source):
    kept = [number for number, token in enumerate(source.tokens) if token != b"\xc0"]
    lacking = subset(source, np.array(kept))
    with pytest.raises(ValueError, match="must hold all 256 bytes; 1 are missing, such as 0xc0"):
        choose(lacking, np.zeros(len(lacking.tokens)), 300)


@pytest.mark.parametrize("vocab_size", [259, 100_000])
def test_a_size_that_leaves_nothing_to_choose_is_refused(source, texts, vocab_size, tmp_path):
    with pytest.raises(ValueError, match=rf"vocab_size must be in 260\.\.{len(source.tokens) + 3}"):
        train_pruned(source, texts, vocab_size, tmp_path)


PACKAGE = Package(name="ranks", version="1.0", sha256="a" * 64)


@pytest.fixture
def cache(source, tmp_path):
    """A cache in which the package lies already unpacked."""
    folder = tmp_path / "packages" / "ranks-1.0-aaaaaaaa" / "inside"
    folder.mkdir(parents=True)
    write_ranks(source, folder / "a.tiktoken")
    (folder / "tokenizer.json").write_text(json.dumps(facts_of(source)))
    return tmp_path


@pytest.mark.parametrize(("file", "split"), [("*/a.tiktoken", "qwen2"), ("*/tokenizer.json", None)])
def test_a_packages_tokenizer_is_found_by_its_glob(cache, source, file, split):
    origin = PublicTokenizer(name="a", package=PACKAGE, file=file, split=split)
    assert origin_faults(origin) == []
    assert read_bpe(origin, cache).merges == source.merges
    assert revision(origin) == {file: f"ranks==1.0:{'a' * 64}"}


def test_a_glob_that_matches_nothing_is_refused(cache):
    with pytest.raises(ValueError, match=r"file must match one file of ranks; '\*.json' matches 0"):
        read_bpe(PublicTokenizer(name="a", package=PACKAGE, file="*.json"), cache)


def test_the_stage_prunes_and_compares(cache, tmp_path):
    published_one = {"package": PACKAGE, "file": "*/a.tiktoken", "split": "qwen2"}
    config = TokenizerConfig(
        corpus="clean", model_type="pruned_bpe", vocab_size=VOCAB, **published_one,
        compare_with=[{"name": "whole", **published_one}],
    )  # fmt: skip
    assert Tokenizer.check(config, None) == []
    assert Tokenizer.source_revisions(config) == {"*/a.tiktoken": f"ranks==1.0:{'a' * 64}"}
    result, output = run_stage(config, build_corpus(tmp_path / "corpus"), tmp_path)
    info, report = (json.loads((output / name).read_text()) for name in ("info.json", "fertility.json"))
    assert info["vocab_size"] == VOCAB == result.metrics["vocab_size"]
    assert info["pruned"]["source_vocab_size"] > VOCAB
    assert 0 < info["pruned"]["kept_use"] < 1
    assert list(report) == ["this", "whole"]
    for language in LANGUAGES:
        assert report["this"][language]["bytes"] == report["whole"][language]["bytes"]
        assert report["this"][language]["tokens"] > report["whole"][language]["tokens"]
    assert special_ids(output) == {name: number for number, name in enumerate(SPECIAL_TOKENS)}


def test_an_imported_package_keeps_its_ids(cache, source, tmp_path):
    config = TokenizerConfig(corpus="clean", model_type="import", package=PACKAGE, file="*/a.tiktoken", split="qwen2")
    assert Tokenizer.check(config, None) == []
    _, output = run_stage(config, build_corpus(tmp_path / "corpus"), tmp_path)
    loaded = load(output)
    assert loaded.convert_ids_to_tokens([300, 400]) == [room.spell(source.tokens[number]) for number in (300, 400)]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, "source"),
        ({"package": PACKAGE}, "file"),
        ({"package": PACKAGE, "file": "a.tiktoken"}, "split"),
        ({"package": PACKAGE, "file": "a.json", "split": "qwen2"}, "split"),
        ({"package": PACKAGE, "file": "a.json", "source": "org/name"}, "source"),
        ({"source": "org/name"}, "revision"),
        ({"source": "org/name", "revision": "a" * 40, "file": "a.json"}, "file"),
        ({"package": PACKAGE, "file": "a.json", "vocab_size": None}, "vocab_size"),
        ({"compare_with": [{"name": "this", "source": "."}]}, "compare_with.0.name"),
        ({"compare_with": [{"name": "b"}]}, "compare_with.0.source"),
    ],
)  # fmt: skip
def test_faults_name_the_field(changes, path):
    config = TokenizerConfig(**{"corpus": "clean", "model_type": "pruned_bpe", "vocab_size": 400, **changes})
    assert path in [fault.path for fault in Tokenizer.check(config, None)]


def test_pruned_tokenizers_are_alike_whoever_made_them(texts, tmp_path):
    pruned_tokenizer(texts, VOCAB, tmp_path)
    assert load(tmp_path).vocab_size == VOCAB
