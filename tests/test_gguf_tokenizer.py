"""llama.cpp gives the ids of our three kinds of tokenizer on real, adversarial and random text."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from export_cases import chimera, random_model, save_gguf
from tiny_bpe import pruned_tokenizer
from tiny_corpus import WORDS, document_text

from data.bpe import PATTERNS
from data.chat import CHAT_TEMPLATE
from data.tokenizer import PROBES, SPACE_SYMBOL, SPECIAL_TOKENS, encode_texts, load
from data.tokenizer_train import SPLIT_PATTERN, train_byte_level, train_sentencepiece
from model.export import vocabulary as vocabulary_room
from model.export.llama_cpp import LlamaCpp
from model.export.vocabulary import CONTROL, UNUSED, USER_DEFINED, read_vocabulary, vocabulary_faults

LANGUAGES = ("en", "de", "hi", "code")
ADVERSARIAL = [
    *PROBES,
    "क्षिं नुक़्ता ड़ ड़ आँख १२३ ।॥",
    "क्\u200d \u200dक \u200c \u2060 a\u0301\u0302\u0303 \u1e69 \u0308a",
    "👩🏽\u200d🚀👩\u200d\u2764\ufe0f\u200d💋\u200d👨 🇩🇪🇮🇳 1\ufe0f\u20e3",
    "I'M they'RE I\u2019m don'T 'sS ''s 's's \u017fs 'lL",
    "  a   b\t\tc \n\n\n d\r\n\r\ne \u00a0f\u2003g\u3000h\u2028i\u0085j ",
    "x=1;y+=2//z...!!!??##\n    def f(self): return {'a':[1,2]}\n\tif a:\r\n",
    "123 4567 \u0663\u0664 \u00b2\u00b3 \u2167 \u00bd 1,000.50 3e-7",
    "你好世界 こんにちは 안녕 مرحبا שלום สวัสดี",
    "<|im_start|><|im_end|> <|endoftext|><|pad|> <|im_start|>user\n<s></s><unk>[unused0]<0x41>",
    "a" * 700, " " * 300, "\n" * 65, "ा" * 40, "aB" * 200, "'" * 30, "\t \t \t", "",
]  # fmt: skip
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz    \n\t.,'ABCDES019",
    "अआकखगतनमरसहािीुेंँ़्\u200d\u200c  ।\n",
    " '\r\n\t\u00a0\u200b\u2028.,!#<|>_-=äöüß\u017f\u0130\u01310a",
    "👨\u200d👩\ufe0f🏽\u0301\u0308\u0327\u2764\u20e3 a1",
)


def fuzz(count: int, seed: int) -> list[str]:
    """Random strings: of one alphabet, of all and known words, and of any character that UTF-8 has."""
    drawn, texts = random.Random(seed), []
    words = [word for language in LANGUAGES for word in WORDS[language]]
    for number in range(count):
        length = drawn.randrange(1, 60)
        if number % 6 < 4:
            texts.append("".join(drawn.choices(ALPHABETS[number % 6], k=length)))
        elif number % 6 == 4:
            texts.append("".join(drawn.choices([*"".join(ALPHABETS), *words], k=length)))
        else:
            points = (drawn.choice((0x80, 0x600, 0xA00, 0x3000, 0x10000, 0x110000)) for _ in range(length))
            characters = (chr(drawn.randrange(limit)) for limit in points)
            texts.append("".join(c for c in characters if not 0xD800 <= ord(c) < 0xE000))
    return texts


def real_texts(count: int) -> list[str]:
    drawn = random.Random(1)
    return [document_text(drawn, LANGUAGES[number % 4]) for number in range(count)]


def train(kind: str, directory) -> None:
    if kind == "byte level":
        train_byte_level(real_texts(300), 700, directory)
    elif kind == "pruned":
        pruned_tokenizer(real_texts(300), 430, directory)
    else:
        train_sentencepiece(real_texts(300), 700, directory, [2, 4])


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", "pruned"])
def both(request, tmp_path_factory):
    """A tokenizer and llama.cpp with a file that holds its vocabulary."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train(request.param, directory)
    vocabulary = read_vocabulary(directory)
    path = save_gguf(directory / "a.gguf", random_model(chimera(vocab_size=800)), vocabulary, "f16")
    with LlamaCpp(path, context_tokens=64, threads=1) as other:
        yield load(directory), other, vocabulary


def differing(tokenizer, other, texts: list[str]) -> list[str]:
    # SentencePiece writes a space as this symbol, and our own encoding alone tells the two apart.
    if SPACE_SYMBOL in tokenizer.get_vocab():
        texts = [text for text in texts if SPACE_SYMBOL not in text]
    ids = encode_texts(tokenizer, texts)
    return [text for text, wanted in zip(texts, ids, strict=True) if other.tokenize(text) != wanted]


def test_real_text_has_the_same_ids(both):
    assert differing(*both[:2], real_texts(300)) == []


def test_text_that_tokenizers_trip_over_has_the_same_ids(both):
    assert differing(*both[:2], ADVERSARIAL) == []


def test_random_text_has_the_same_ids(both):
    assert differing(*both[:2], fuzz(4000, 7)) == []


def test_specials_are_parsed_only_where_asked(both):
    tokenizer, other, _ = both
    for name in SPECIAL_TOKENS:
        assert other.tokenize(name, parse_special=True) == [tokenizer.get_vocab()[name]]
        assert tokenizer.get_vocab()[name] not in other.tokenize(name)


def test_generation_ends_at_the_end_of_a_turn_and_of_a_text(both):
    tokenizer, other, vocabulary = both
    ends = {token for token in range(other.vocab_size) if other.ends_generation(token)}
    assert ends == {tokenizer.get_vocab()[name] for name in ("<|endoftext|>", "<|im_end|>")}
    assert vocabulary.chat_template == CHAT_TEMPLATE


def test_types_of_tokens(both):
    vocabulary = both[2]
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert {types[name] for name in SPECIAL_TOKENS} == {CONTROL}
    if vocabulary.model == "llama":
        assert [types[name] for name in ("<unk>", "<0x0A>", "\n", SPACE_SYMBOL * 4)] == [
            2,
            6,
            USER_DEFINED,
            USER_DEFINED,
        ]
    padded = vocabulary.padded(len(vocabulary.tokens) + 3)
    assert padded.types[-3:] == [UNUSED] * 3
    assert len(set(padded.tokens)) == len(padded.tokens)


def test_the_regex_is_the_one_that_tokenizers_are_trained_with():
    assert vocabulary_room.SPLIT_PATTERN == SPLIT_PATTERN
    assert {name: pattern for pattern, name in vocabulary_room.PRES.items()} == PATTERNS


def changed(directory, change) -> list[str]:
    path = directory / "tokenizer.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    return vocabulary_faults(directory)


REFUSED = {
    "another regex": (
        lambda facts: facts["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\w+|\s+"}),
        "must split text by the regex that llama.cpp calls qwen35 or qwen2",
    ),
    "a normaliser": (lambda facts: facts.update(normalizer={"type": "NFC"}), "must not normalise; got NFC"),
    "a prefix space": (
        lambda facts: facts["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "must not put a space before the text",
    ),
    "unigram": (lambda facts: facts["model"].update(type="Unigram"), "must be BPE for GGUF; got Unigram"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_tokenizers_that_llama_cpp_cannot_reproduce_are_refused(reason, tmp_path):
    train("byte level", tmp_path)
    change, message = REFUSED[reason]
    (fault,) = changed(tmp_path, change)
    assert message in fault


@pytest.mark.parametrize(("kind", "pre"), [("byte level", "gpt-2"), ("byte level", "qwen2"), ("pruned", "qwen35")])
def test_another_regex_would_have_been_seen(kind, pre, tmp_path):
    train(kind, tmp_path)
    vocabulary = dataclasses.replace(read_vocabulary(tmp_path), pre=pre)
    path = save_gguf(tmp_path / "a.gguf", random_model(chimera(vocab_size=800)), vocabulary, "f16")
    with LlamaCpp(path, context_tokens=64, threads=1) as other:
        assert len(differing(load(tmp_path), other, fuzz(1000, 7))) > 50
