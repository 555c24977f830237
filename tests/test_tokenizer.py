"""Tokenizers: nothing is lost, nothing becomes special, ids equal the native library's."""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import build_corpus

from data import sample as sampling
from data.corpus import read_documents
from data.sample import sample_texts
from data.tokenizer import (
    PROBES,
    SPECIAL_TOKENS,
    audit,
    check_specials,
    decode_bytes,
    directory_digest,
    encode_text,
    encode_texts,
    finish,
    load,
    special_ids,
    token_byte_strings,
)
from data.tokenizer_import import import_tokenizer
from data.tokenizer_train import SPLIT_PATTERN, train_byte_level, train_sentencepiece
from model.spec import ModelSpec
from stages.base import StageContext
from stages.tokenizer import Tokenizer, TokenizerConfig

KINDS = ("byte_level", "sentencepiece", "import")
VOCAB = 500
ALPHABET = [
    *"ab cde  \n\t\r019<|>_é▁\u00a0", "हि", "न्", "\u200d", "\u200c", "\u093c", "😀", "👍🏽", "\x00", "\x1b",
    "ß", "e\u0301", "    ", "aaaa", "the ", "नदी", "\r\n", "\ufeff", "\u2028", "\U0010ffff", "<unk>", "<0x0A>",
    *SPECIAL_TOKENS,
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def texts(corpus):
    return [document["text"] for document in read_documents(corpus, "train")]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A byte-level tokenizer of somebody else: NFC, a prefix token, other specials and one of ours."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<bos>", "<|im_start|>")])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return save_foreign(backend, tmp_path_factory.mktemp("foreign"))


def save_foreign(backend, directory: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>").save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def directories(texts, foreign, tmp_path_factory):
    result = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    train_byte_level(iter(texts), VOCAB, result["byte_level"])
    train_sentencepiece(iter(texts), VOCAB, result["sentencepiece"], [4, 8])
    import_tokenizer(str(foreign), None, result["import"])
    for kind, directory in result.items():
        finish(directory, load(directory), kind, {})
    return result


@pytest.fixture(params=KINDS)
def tokenizer(directories, request):
    return load(directories[request.param])


def fuzz(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(0, 60))) for _ in range(count)]


def adversarial() -> list[str]:
    long_line = "x y" * 20_000 + " " * 3_000 + "नदी" * 2_000
    characters = "".join(chr(point) for point in range(0x3000) if unicodedata.category(chr(point)) != "Cs")
    return [*PROBES, *fuzz(300), long_line, characters, ""]


def test_text_comes_back_exactly(tokenizer):
    for text in adversarial():
        ids = encode_text(tokenizer, text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert decode_bytes(tokenizer, ids) == text.encode()


def test_text_never_becomes_a_special_token(tokenizer):
    specials = set(check_specials(tokenizer).values())
    for text in adversarial():
        assert not specials & set(encode_text(tokenizer, text))


def test_the_literal_would_be_special_without_care(tokenizer):
    assert tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] == [
        check_specials(tokenizer)["<|im_start|>"]
    ]
    assert len(encode_text(tokenizer, "<|im_start|>")) > 1
    assert tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] == [
        check_specials(tokenizer)["<|im_start|>"]
    ]


def test_byte_counts_add_up_to_the_text(tokenizer, directories):
    # trap M1
    kind = next(kind for kind in KINDS if str(directories[kind]) == tokenizer.name_or_path)
    token_bytes = np.load(directories[kind] / "token_bytes.npy")
    assert token_bytes.dtype == np.uint16
    assert len(token_bytes) == max(tokenizer.get_vocab().values()) + 1
    for text in adversarial():
        assert int(token_bytes[encode_text(tokenizer, text)].sum()) == len(text.encode())
    assert (token_bytes[list(check_specials(tokenizer).values())] == 0).all()


def test_each_whole_tokens_bytes_are_what_the_library_decodes(tokenizer):
    # trap M1: an independent reading of the table, token by token
    specials = set(tokenizer.all_special_ids)
    for token, raw in enumerate(token_byte_strings(tokenizer)):
        decoded = tokenizer.decode([token])
        if token not in specials and decoded not in ("<unk>", "<bos>") and "\ufffd" not in decoded:
            assert raw == decoded.encode(), token


def test_batches_equal_single_encodings(tokenizer):
    texts = fuzz(40, seed=5)
    assert encode_texts(tokenizer, texts) == [encode_text(tokenizer, text) for text in texts]


def test_a_lone_surrogate_is_refused_naming_the_place(tokenizer):
    with pytest.raises(ValueError, match=r"text 1 must be valid Unicode; got the lone surrogate '\\ud800' at 2"):
        encode_texts(tokenizer, ["good", "ab\ud800"])


def test_specials_lead_the_trained_vocabularies(directories):
    for kind in ("byte_level", "sentencepiece"):
        assert special_ids(directories[kind]) == {name: number for number, name in enumerate(SPECIAL_TOKENS)}


def test_sentencepiece_ids_equal_the_native_librarys(directories, texts):
    import sentencepiece

    native = sentencepiece.SentencePieceProcessor(model_file=str(directories["sentencepiece"] / "tokenizer.model"))
    loaded = load(directories["sentencepiece"])
    for text in [*texts, *adversarial()]:
        if "▁" not in text:  # natively lost: it comes back as a space
            assert encode_text(loaded, text) == native.encode(text), text[:200]
    for text in texts:
        assert loaded(text)["input_ids"] == native.encode(text)


def test_byte_level_ids_equal_the_native_librarys(directories, texts):
    from tokenizers import Tokenizer as Native

    native = Native.from_file(str(directories["byte_level"] / "tokenizer.json"))
    native.encode_special_tokens = True
    loaded = load(directories["byte_level"])
    for text in [*texts, *adversarial()]:
        assert encode_text(loaded, text) == native.encode(text, add_special_tokens=False).ids


def test_newline_tab_and_indentation_are_pieces(directories):
    loaded = load(directories["sentencepiece"])
    pieces = loaded.convert_ids_to_tokens(encode_text(loaded, "\n\t        if"))
    assert pieces[:3] == ["\n", "\t", "▁" * 8]


def test_hindi_words_are_not_cut_at_their_marks(directories):
    splitter = load(directories["byte_level"]).backend_tokenizer.pre_tokenizer
    text = "हिन्दी की मात्राएँ ज़रूर"
    cut = [text[first:last] for _, (first, last) in splitter.pre_tokenize_str(text)]
    assert cut == ["हिन्दी", " की", " मात्राएँ", " ज़रूर"]
    facts = json.loads((directories["byte_level"] / "tokenizer.json").read_text())
    assert facts["normalizer"] is None
    assert facts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == SPLIT_PATTERN


@pytest.mark.parametrize("train", [train_byte_level, train_sentencepiece])
def test_the_same_texts_give_the_same_files(train, texts, tmp_path):
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train(iter(texts), 450, tmp_path / name)
        digests.append(directory_digest(tmp_path / name))
    assert digests[0] == digests[1]


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size must fit the sampled text; got 5000"):
        train_sentencepiece(["a few words"], 5000, tmp_path)


def test_import_keeps_ids_and_appends_what_is_missing(directories, foreign):
    imported, original = load(directories["import"]), json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = imported.get_vocab()
    for name, token in original["model"]["vocab"].items():
        assert vocabulary[name] == token
    assert [vocabulary[name] for name in ("<bos>", "<|im_start|>", "<tool>")] == [256, 257, 258]
    assert sorted(vocabulary[name] for name in SPECIAL_TOKENS) == [257, 259, 260, 261]
    assert imported("a")["input_ids"] == encode_text(imported, "a"), "no prefix token"
    audit(imported, ["e\u0301", "a <tool> b"])


def test_importing_a_tokenizer_that_loses_text_is_refused(foreign, tmp_path):
    from tokenizers import Tokenizer as Native
    from tokenizers import normalizers

    backend = Native.from_file(str(foreign / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    import_tokenizer(str(save_foreign(backend, tmp_path / "source")), None, tmp_path)
    with pytest.raises(ValueError, match="import one without normalisation"):
        audit(load(tmp_path))


def test_importing_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source must be a tokenizer that AutoTokenizer loads"):
        import_tokenizer(str(tmp_path), None, tmp_path)


def test_loading_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        load(tmp_path)


def test_a_tokenizer_without_our_specials_is_refused(foreign):
    with pytest.raises(ValueError, match=r"must hold <\|endoftext\|> as a special token"):
        load(foreign)


def test_sampling_streams_and_stops_at_its_budget(corpus, monkeypatch):
    read = []
    monkeypatch.setattr(sampling, "read_documents", lambda *a: (read.append(1) or d for d in read_documents(*a)))
    settings = {"max_bytes": 8_000, "language_shares": None, "seed": 1}
    stream = sample_texts(corpus, **settings)
    next(stream)
    assert len(read) < 60, "a document is given out before the rest is read"
    total = sum(len(text.encode()) for text in sample_texts(corpus, **settings))
    assert 5_000 < total < 12_000
    assert list(sample_texts(corpus, **settings)) == list(sample_texts(corpus, **settings))


def test_sampling_follows_language_shares(corpus):
    shares = {"en": 1, "de": 1, "hi": 1, "code": 1}
    size = dict.fromkeys(shares, 0)
    language = {document["text"]: document["language"] for document in read_documents(corpus, "train")}
    for text in sample_texts(corpus, max_bytes=12_000, language_shares=shares, seed=1):
        size[language[text]] += len(text.encode())
    assert all(1_500 < count < 4_500 for count in size.values()), size


def test_sampling_refuses_shares_of_other_languages(corpus):
    with pytest.raises(ValueError, match="language_shares must name exactly"):
        next(sample_texts(corpus, max_bytes=1000, language_shares={"en": 1, "fr": 1}, seed=0))


def run_stage(config, corpus, tmp_path):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "output").symlink_to(corpus)
    output = tmp_path / "output"
    output.mkdir()
    context = StageContext(
        pipeline="p", name="tokenizer", key="k", seed=3, config=config, model=None, directory=tmp_path, output=output,
        work=tmp_path / "work", cache=tmp_path, parents={"corpus": tmp_path / "parent"}, tracker=None,
    )  # fmt: skip
    return Tokenizer().run(context), output


def test_a_vocabulary_that_the_text_cannot_fill_is_warned_of(corpus, tmp_path, capsys):
    result, output = run_stage(TokenizerConfig(corpus="clean", vocab_size=200_000), corpus, tmp_path)
    made = len(load(output))
    assert made < 200_000
    first = result.summary[0]
    assert first.startswith(f"WARNING: vocab_size asks for 200,000 ids, and the sampled text gave {made:,}: ")
    assert f"set vocab_size to {made}, raise max_sample_bytes, or" in first
    assert f"tokenizer: {first}\n" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", ["byte_level_bpe", "sentencepiece_bpe", "import"])
def test_the_stage_reports_bytes_a_token_by_language(model_type, corpus, foreign, tmp_path):
    extra = {"source": str(foreign)} if model_type == "import" else {"vocab_size": 450}
    config = TokenizerConfig(corpus="clean", model_type=model_type, **extra)
    assert Tokenizer.check(config, None) == []
    result, output = run_stage(config, corpus, tmp_path)
    info, loaded = json.loads((output / "info.json").read_text()), load(output)
    german = [d["text"] for d in read_documents(corpus, "heldout", "netz")]
    expected = sum(len(t.encode()) for t in german) / sum(len(encode_text(loaded, t)) for t in german)
    assert info["fertility"]["de"]["bytes_per_token"] == pytest.approx(expected, abs=1e-4)
    assert not any("WARNING" in line for line in result.summary)
    assert result.metrics["bytes_per_token_de"] == info["fertility"]["de"]["bytes_per_token"]
    assert set(info["fertility"]) == {"en", "de", "hi", "code"}
    assert info["digest"] == directory_digest(output)
    assert sum(line.startswith(("en", "de", "hi", "code")) for line in result.summary) >= 4
    assert any("split rule cuts" in line for line in result.summary)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"vocab_size": None}, "vocab_size"),
        ({"source": "somewhere"}, "source"),
        ({"indentation_runs": [4]}, "indentation_runs"),
        ({"language_shares": {"en": -1.0}}, "language_shares.en"),
        ({"model_type": "import"}, "source"),
        ({"model_type": "import", "source": "org/name", "vocab_size": None}, "revision"),
        ({"model_type": "import", "source": "org/name", "revision": "main", "vocab_size": None}, "revision"),
        ({"model_type": "import", "source": "org/name", "revision": "a" * 40}, "vocab_size"),
    ],
)
def test_faults_name_the_field(changes, path):
    config = TokenizerConfig(**{"corpus": "clean", "vocab_size": 400, **changes})
    assert path in [fault.path for fault in Tokenizer.check(config, None)]


def test_a_vocabulary_larger_than_the_model_is_a_fault():
    # trap K10
    model = ModelSpec(
        d_model=32, d_ff=64, vocab_size=400, max_seq_len=64, layers="1*a",
        mixers={"a": {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16}},
    )  # fmt: skip
    config = TokenizerConfig(corpus="clean", vocab_size=400)
    assert Tokenizer.check(config, model) == []
    faults = Tokenizer.check(config.model_copy(update={"vocab_size": 401}), model)
    assert [fault.path for fault in faults] == ["vocab_size"]


def test_an_imported_directorys_content_is_its_revision(foreign, tmp_path):
    config = TokenizerConfig(corpus="clean", model_type="import", source=str(foreign))
    assert Tokenizer.source_revisions(config) == {str(foreign): directory_digest(foreign)}
    pinned = TokenizerConfig(corpus="clean", model_type="import", source="org/name", revision="b" * 40)
    assert Tokenizer.source_revisions(pinned) == {"org/name": "b" * 40}
    assert Tokenizer.source_revisions(TokenizerConfig(corpus="clean", vocab_size=400)) == {}
