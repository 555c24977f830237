"""What a model says in a chat: the very tokens of our decoding, whole characters, its own end, nothing but text."""

import pytest
import torch
from export_cases import chimera, random_model, save_gguf, tokens_and_vocabulary
from report_chain import write_model

from data.chat import render
from data.tokenizer import END_OF_TEXT, IM_END, check_specials, load
from model.cache import HybridCache
from model.decode import Sampling, generate, stream
from pipelines.chat_models import Checkpoint, ContextFull, Delta, Gguf, Settings, TextStream, load_checkpoint
from pipelines.chat_session import Session
from pipelines.terminal import columns, harmless, wrapped
from stages.runtime.manifest import CheckpointError, write_manifest

ASK = [{"role": "user", "content": "the cat"}]
GREEDY = Settings(0.0, 1.0, 12, 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    write_model(found)
    write_manifest(found)
    return found


@pytest.fixture
def speaker(directory):
    return Checkpoint("tiny", directory)


def interrupt(*_):
    raise KeyboardInterrupt


def said(deltas):
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("sampling", [None, Sampling(0.9, 0.8)])
def test_streaming_draws_what_generate_draws(directory, sampling):
    model, ids = load_checkpoint(directory), [5, 9, 200, 31]
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    whole = generate(model, [ids], max_new_tokens=15, sampling=sampling, generator=draws[0], prefill_chunk_size=3)
    parts = stream(model, ids, max_new_tokens=15, sampling=sampling, generator=draws[1], prefill_chunk_size=2)
    assert list(parts) == whole[0].tokens


def test_a_cache_of_an_earlier_turn_changes_nothing(directory):  # trap K5
    model, ids, cache = load_checkpoint(directory), [5, 9, 200, 31], HybridCache()
    first = list(stream(model, ids, max_new_tokens=6, cache=cache))
    longer = [*ids, *first, 7, 8, 9]
    assert cache.columns == len(ids) + 5
    assert list(stream(model, longer, max_new_tokens=6, cache=cache)) == list(stream(model, longer, max_new_tokens=6))
    with pytest.raises(ValueError, match="field cache must hold fewer"):
        next(stream(model, ids, max_new_tokens=6, cache=cache))


def test_streaming_ends_with_the_end_token(directory):
    model, ids = load_checkpoint(directory), [5, 9, 200, 31]
    free = list(stream(model, ids, max_new_tokens=6))
    assert list(stream(model, ids, max_new_tokens=6, eos_token_ids={free[0]})) == free[:1]


def test_an_answer_is_the_decoding_of_the_rendered_conversation(directory, speaker):
    tokenizer = load(directory)
    prompt = render(tokenizer, ASK, add_generation_prompt=True).ids
    ends = [check_specials(tokenizer)[name] for name in (IM_END, END_OF_TEXT)]
    (expected,) = generate(load_checkpoint(directory), [prompt], max_new_tokens=12, eos_token_ids=ends)
    deltas = list(speaker.answer(ASK, GREEDY))
    assert said(deltas) == harmless(tokenizer.decode(expected.tokens, skip_special_tokens=True))
    assert (deltas[-1].tokens, deltas[-1].end) == (len(expected.tokens), "stop" if expected.finished else "length")


def test_a_second_turn_answers_as_a_fresh_speaker_would(directory, speaker):  # trap K5
    first = said(speaker.answer(ASK, GREEDY))
    talk = [*ASK, {"role": "assistant", "content": first}, {"role": "user", "content": "hi"}]
    assert said(speaker.answer(talk, GREEDY)) == said(Checkpoint("fresh", directory).answer(talk, GREEDY))


def test_an_answer_that_was_broken_off_leaves_no_torn_cache(directory, speaker):
    first = said(speaker.answer(ASK, GREEDY))
    talk = [*ASK, {"role": "assistant", "content": first}, {"role": "user", "content": "hi"}]
    hook = speaker._model.model.layers[-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(speaker.answer(talk, GREEDY))
    hook.remove()
    assert speaker._cache is None
    assert said(speaker.answer(talk, GREEDY)) == said(Checkpoint("fresh", directory).answer(talk, GREEDY))


def test_another_conversation_does_not_continue_the_last_one(directory, speaker):
    assert said(speaker.answer(ASK, GREEDY))
    other = [{"role": "user", "content": "small dog run over the old hill and saw one red mat and the dog"}]
    assert said(speaker.answer(other, GREEDY)) == said(Checkpoint("fresh", directory).answer(other, GREEDY))


def test_the_end_of_a_turn_is_not_shown_and_ends_the_answer(speaker):  # trap T8
    first = next(iter(speaker._tokens(render(speaker._tokenizer, ASK, add_generation_prompt=True).ids, GREEDY, 1, 1)))
    speaker.forget()
    speaker._ends = {first}
    assert list(speaker.answer(ASK, GREEDY)) == [Delta("", 1, "stop")]


def test_an_answer_ends_where_max_seq_len_does(directory, speaker):
    speaker._ends = set()
    last = list(speaker.answer(ASK, Settings(0.0, 1.0, 256, 1)))[-1]
    prompt = render(load(directory), ASK, add_generation_prompt=True).ids
    assert (last.tokens, last.end) == (64 - len(prompt), "context")


def test_a_prompt_that_fills_the_model_is_refused_before_the_first_token(speaker):
    with pytest.raises(ContextFull, match="the model holds 64"):
        speaker.answer([{"role": "user", "content": "cat " * 80}], GREEDY)


def test_a_character_is_shown_when_its_last_byte_has_come():
    text, stream_ = "है 👍ß", TextStream()
    parts = [stream_.feed(bytes([byte])) for byte in text.encode()]
    assert "".join(parts) == text
    assert parts[:3] == ["", "", "ह"]


def test_bytes_that_break_off_become_one_replacement_character():
    stream_ = TextStream()
    assert stream_.feed("ह".encode()[:2]) + stream_.feed(b"", final=True) == "\ufffd"


def test_nothing_that_commands_a_terminal_passes():
    assert harmless("a\x1b[2Jb\x07\x9bc\r\nd\te\u202ef") == "a\ufffd[2Jb\ufffd\ufffdc\nd\te\ufffdf"


HINDI = "भारत की राजधानी नई दिल्ली है, और क्षत्रिय विद्यार्थी कृष्ण ने संस्कृत में श्रीमद्भगवद्गीता पढ़ी।"


@pytest.mark.parametrize("width", [40, 63, 100])
def test_columns_fit_the_terminal_and_lose_nothing(width):
    # A cell a base character or spacing vowel sign and none a combining one, counted apart from the library.
    import unicodedata

    def cells(line):
        return sum(unicodedata.category(c) not in ("Mn", "Cf", "Me") for c in line)

    lines = columns(["left", "right"], [HINDI, "plain words " * 9], width)
    assert max(map(cells, lines)) <= width + 6  # a conjunct is drawn in fewer cells than it has letters
    assert "".join(line.split(" │ ")[0] for line in lines[2:]).replace(" ", "") == HINDI.replace(" ", "")
    places = {line.index("│") for line in columns(["a", "b"], ["x" * 50, "y " * 40], width)}
    assert places == {(width - 3) // 2 + 1}


def test_a_syllable_is_never_torn_apart():
    # क्ष is three code points of one cluster, की is a letter with its vowel sign.
    for line in wrapped("क्षक्षकीकीकी" * 4, 5):
        assert line[0] in "कक्ष"
        assert not line.endswith("\u094d")


def test_a_narrow_terminal_gets_answers_below_one_another():
    assert columns(["a", "b"], ["one", "two"], 20) == ["[a]", "one", "[b]", "two"]


class Breaking:
    """A speaker who is interrupted after two words, then speaks in full."""

    label = "tiny"

    def __init__(self):
        self.asked = []

    def about(self):
        return ""

    def answer(self, messages, settings):
        self.asked.append(list(messages))
        yield Delta("one ", 1)
        yield Delta("two", 2)
        if len(self.asked) == 1:
            raise KeyboardInterrupt
        yield Delta("", 3, "stop")

    def forget(self):
        pass

    def close(self):
        pass


def test_what_was_said_before_an_interruption_stays_in_the_conversation(capsys):
    speaker = Breaking()
    Session([speaker], GREEDY, "be kind", False).run(["a\n", "b\n"])
    assert [message["content"] for message in speaker.asked[1]] == ["be kind", "a", "one two", "b"]
    out, err = capsys.readouterr()
    assert out == f"you> a\n{speaker.label}> one two\nyou> b\n{speaker.label}> one two\n"
    assert "; stopped" in err.splitlines()[0]


def test_an_interruption_leaves_compared_models_in_one_conversation(capsys):
    one, other = Breaking(), Breaking()
    other.asked.append([])  # this one is never interrupted
    Session([one, other], GREEDY, None, False).run(["a\n", "b\n"])
    assert [message["content"] for message in one.asked[1]] == ["b"]
    assert one.asked[1] == other.asked[1]
    assert "none of the models keeps this question" in capsys.readouterr().err


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    _, vocabulary = tokens_and_vocabulary(folder)
    return save_gguf(folder / "tiny.gguf", random_model(chimera()), vocabulary, "f16")


def test_a_gguf_file_chats_and_its_room_ends_where_its_metadata_says(gguf_file):
    speaker = Gguf(gguf_file)
    try:
        limit = chimera().max_seq_len
        assert speaker.about().endswith(f"up to {limit} tokens")
        first, again = ([*speaker.answer(ASK, GREEDY)] for _ in range(2))
        assert said(first) == said(again)
        assert first[-1].end in ("stop", "length")
        assert 1 <= first[-1].tokens <= GREEDY.max_new_tokens
        with pytest.raises(ContextFull, match=f"the model holds {limit}"):
            speaker.answer([{"role": "user", "content": "cat " * limit}], GREEDY)
        broken = speaker.answer(ASK, GREEDY)
        next(broken)
        broken.close()
        assert said(speaker.answer(ASK, GREEDY)) == said(first)
        speaker._limit = 1 << 20
        with pytest.raises(CheckpointError, match=r"tiny cannot take this conversation: .*context size"):
            list(speaker.answer([{"role": "user", "content": "cat " * limit}], GREEDY))
    finally:
        speaker.close()
