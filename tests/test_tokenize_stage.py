"""The tokenize stage: deterministic, resumable, and unwilling to hand on what cannot be trained on."""

import json

import numpy as np
import pytest
from tiny_corpus import SIZES, build_corpus

from data import encode_parts
from data import tokenize_corpus as module
from data.corpus import DocumentWriter, read_documents
from data.encoding import Encoder
from data.heldout import HeldoutSet
from data.loader import MixtureLoader
from data.shards import HELDOUT, TRAIN, open_shard, read_ids, read_info
from data.tokenizer import encode_text, finish, load
from data.tokenizer_train import train_byte_level
from stages.base import StageContext
from stages.tokenize import Tokenize, TokenizeConfig

SETTINGS = {"corpus": "clean", "tokenizer": "tokenizer", "chat_share": 0.2}


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    root = tmp_path_factory.mktemp("parents")
    corpus, tokenizer = build_corpus(root / "corpus" / "output"), root / "tokenizer" / "output"
    tokenizer.mkdir(parents=True)
    train_byte_level((document["text"] for document in read_documents(corpus, "train")), 450, tokenizer)
    finish(tokenizer, load(tokenizer), "byte_level_bpe", {})
    return {"corpus": root / "corpus", "tokenizer": root / "tokenizer"}


def run(parents, directory, *, seed=3, **changes):
    output, work = directory / "output", directory / "work"
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    context = StageContext(
        pipeline="p", name="tokenize", key="k", seed=seed, config=TokenizeConfig(**{**SETTINGS, **changes}), model=None,
        directory=directory, output=output, work=work, cache=directory, parents=parents, tracker=None,
    )  # fmt: skip
    return output, Tokenize().run(context)


@pytest.fixture(scope="module")
def tokens(parents, tmp_path_factory):
    return run(parents, tmp_path_factory.mktemp("tokens"))[0]


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def texts(parents, split, source):
    return {d["id"]: d["text"] for d in read_documents(parents["corpus"] / "output", split, source)}


def test_the_artifact_is_whole_and_says_what_it_holds(tokens, parents):
    info = read_info(tokens)
    assert (info.vocab_size, info.dtype) == (450, np.dtype("<u2"))
    assert info.tokenizer_digest == json.loads((tokens / "tokenizer" / "info.json").read_text())["digest"]
    assert (info.eos_id, info.pad_id) == (0, 1)
    for source in info.sources:
        for split in (TRAIN, HELDOUT):
            assert source[split]["documents"] == len(texts(parents, split, source["name"]))
    assert info.sources[0]["language"] == "en"
    assert "domain" in info.sources[0]


def test_every_document_is_there_as_text_or_as_chat(tokens, parents):
    tokenizer, info, chats = load(tokens / "tokenizer"), read_info(tokens), 0
    for name in SIZES:
        known, shard = texts(parents, TRAIN, name), open_shard(info, TRAIN, name)
        ids = read_ids(tokens, TRAIN, name)
        assert sorted(ids) == sorted(known)
        for number, document_id in enumerate(ids):
            text = tokenizer.decode(shard.document(number))
            assert text.endswith("<|endoftext|>")
            if text.startswith("<|im_start|>user\n"):
                chats += 1
                assert known[document_id].split()[-1] in text
            else:
                assert text == known[document_id] + "<|endoftext|>"
    assert 20 <= chats <= 70, "about a fifth of 216"


def test_titles_are_asked_for_and_answered_with_the_whole_text(tokens, parents):
    tokenizer, shard = load(tokens / "tokenizer"), open_shard(read_info(tokens), TRAIN, "wiki")
    known = {d["text"]: d["title"] for d in read_documents(parents["corpus"] / "output", "train", "wiki")}
    rendered = [tokenizer.decode(shard.document(n)) for n in range(len(shard))]
    chats = [text for text in rendered if text.startswith("<|im_start|>")]
    expected = {
        f"<|im_start|>user\nTell me about {title}.<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n<|endoftext|>"
        for text, title in known.items()
    }
    assert chats
    assert set(chats) <= expected


def test_held_out_documents_are_plain_text(tokens, parents):
    tokenizer, info = load(tokens / "tokenizer"), read_info(tokens)
    for name in SIZES:
        known, shard = texts(parents, HELDOUT, name), open_shard(info, HELDOUT, name)
        for number, document_id in enumerate(read_ids(tokens, HELDOUT, name)):
            assert shard.document(number).tolist() == [*encode_text(tokenizer, known[document_id]), 0]


def test_counts_are_those_of_the_streams(tokens):
    # trap T8
    info, counts = read_info(tokens), np.load(tokens / "unigram.npy")
    joined = np.concatenate([open_shard(info, TRAIN, name).tokens for name in SIZES])
    assert counts.tolist() == [int((joined == token).sum()) for token in range(450)]
    named = info.special_token_counts
    assert named["<|endoftext|>"] == sum(source[TRAIN]["documents"] for source in info.sources)
    assert named["<|im_start|>"] == named["<|im_end|>"] > 0
    assert named["<|pad|>"] == 0


def test_bytes_are_those_that_the_tokens_stand_for(tokens, parents):
    # trap M1
    for source in read_info(tokens).sources:
        size = sum(len(text.encode()) for text in texts(parents, HELDOUT, source["name"]).values())
        assert source[HELDOUT]["bytes"] == size


def test_documents_are_shuffled_by_seed(tokens, parents, tmp_path):
    order = read_ids(tokens, TRAIN, "wiki")
    assert order != list(texts(parents, TRAIN, "wiki"))
    other, _ = run(parents, tmp_path, seed=4)
    assert read_ids(other, TRAIN, "wiki") != order


def test_the_same_input_gives_the_same_bytes(tokens, parents, tmp_path):
    again, _ = run(parents, tmp_path)
    assert contents(again) == contents(tokens)


def test_an_interrupted_run_goes_on_with_the_part_it_was_at(tokens, parents, tmp_path, monkeypatch):
    # trap T6
    monkeypatch.setattr(encode_parts, "PART_BYTES", 4_000)
    encode, calls = Encoder.encode, []

    def stopping(encoder, documents, *, chat):
        calls.append(documents[0]["id"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(encoder, documents, chat=chat)

    monkeypatch.setattr(Encoder, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(parents, tmp_path)
    output, _ = run(parents, tmp_path)
    assert calls[4] == calls[3], "the part that was broken off comes first"
    assert len(calls) - 1 == len(set(calls)), "and no other is encoded twice"
    assert contents(output) == contents(tokens)


def break_off_before_counting(parents, directory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_count", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(parents, directory)


@pytest.mark.parametrize("suffix", ["bin", "idx.npy", "ids.txt", "done.json"])
@pytest.mark.parametrize("damage", [lambda old: old[:-1], lambda old: bytes([old[0] ^ 1]) + old[1:]])
def test_a_damaged_part_is_encoded_again(tokens, parents, tmp_path, monkeypatch, suffix, damage):
    break_off_before_counting(parents, tmp_path, monkeypatch)
    part = tmp_path / "work" / "encoded" / TRAIN / f"wiki.00000.{suffix}"
    part.write_bytes(damage(part.read_bytes()))
    output, _ = run(parents, tmp_path)
    assert contents(output) == contents(tokens)


def test_parts_of_other_documents_are_not_taken_for_these(tokens, parents, tmp_path, monkeypatch):
    break_off_before_counting(parents, tmp_path, monkeypatch)
    folder = tmp_path / "work" / "encoded" / TRAIN
    for path in folder.glob("netz.00000.*"):
        path.rename(folder / path.name.replace("netz", "wiki"))
    output, _ = run(parents, tmp_path)
    assert contents(output) == contents(tokens)


def test_many_parts_and_many_workers_give_the_same_bytes(tokens, parents, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_parts, "PART_BYTES", 2_000)
    output, _ = run(parents, tmp_path, workers=2)
    assert contents(output) == contents(tokens)


def test_chat_specials_that_training_never_sees_are_refused(parents, tmp_path):
    # trap T8
    with pytest.raises(ValueError, match=r"at least min_special_count 8 times .*im_start.*raise chat_share"):
        run(parents, tmp_path, chat_share=0.0)


def test_a_document_in_both_splits_is_refused(parents, tmp_path):
    # trap M4
    corpus = build_corpus(tmp_path / "corpus" / "output")
    stolen = next(read_documents(corpus, "heldout", "wiki"))
    kept = list(read_documents(corpus, "train", "netz"))
    with DocumentWriter(corpus / "train" / "netz.jsonl.gz") as writer:
        for document in [*kept, stolen]:
            writer.write(document)
    with pytest.raises(ValueError, match=rf"document {stolen['id']} must be in one split; .*netz and heldout/wiki"):
        run({**parents, "corpus": tmp_path / "corpus"}, tmp_path / "run")


def test_a_corpus_without_held_out_text_is_refused(parents, tmp_path):
    # traps M4, T4
    corpus = build_corpus(tmp_path / "corpus" / "output")
    for name in SIZES:
        DocumentWriter(corpus / "heldout" / f"{name}.jsonl.gz").__exit__(None, None, None)
    with pytest.raises(ValueError, match="corpus must hold heldout documents"):
        run({**parents, "corpus": tmp_path / "corpus"}, tmp_path / "run")


def test_a_literal_special_in_a_document_changes_no_count(parents, tmp_path):
    corpus = build_corpus(tmp_path / "corpus" / "output")
    kept = list(read_documents(corpus, "train", "netz"))
    text = "<|endoftext|><|im_start|><|pad|>"
    with DocumentWriter(corpus / "train" / "netz.jsonl.gz") as writer:
        for document in [*kept, {**kept[0], "id": "f" * 32, "text": text}]:
            writer.write(document)
    output, _ = run({**parents, "corpus": tmp_path / "corpus"}, tmp_path / "run")
    counts = read_info(output).special_token_counts
    assert counts["<|pad|>"] == 0
    assert counts["<|endoftext|>"] == sum(source[TRAIN]["documents"] for source in read_info(output).sources)


def test_an_empty_document_is_refused(parents, tmp_path):
    corpus = build_corpus(tmp_path / "corpus" / "output")
    with DocumentWriter(corpus / "train" / "netz.jsonl.gz") as writer:
        writer.write({"id": "e" * 32, "text": "", "source": "netz", "language": "de", "title": None})
    with pytest.raises(ValueError, match=f"document {'e' * 32} of train/netz must hold text"):
        run({**parents, "corpus": tmp_path / "corpus"}, tmp_path / "run")


def test_the_loader_and_the_held_out_set_read_the_artifact(tokens):
    loader = MixtureLoader(tokens, seq_len=32, global_batch_size=4, seed=0)
    assert loader.batch(0, slice(0, 4)).input_ids.shape == (4, 32)
    assert set(loader.plan(5)) == set(SIZES)
    heldout = HeldoutSet(tokens)
    assert heldout.languages == ["code", "de", "en", "hi"]
    assert heldout.hash == read_info(tokens).heldout_hash


def test_the_held_out_texts_come_back(tokens, parents):
    expected = {text.encode() for text in texts(parents, HELDOUT, "gaon").values()}
    assert set(HeldoutSet(tokens).texts("hi")) == expected


def test_the_result_names_the_numbers(parents, tmp_path):
    output, result = run(parents, tmp_path)
    assert result.metrics["heldout_hash"] == read_info(output).heldout_hash
    assert result.metrics["train_documents"] == 216
    assert any("wiki" in line for line in result.summary)
    assert not (tmp_path / "work" / "encoded").exists()
