"""Chatting with a GGUF file: the prompt that the model was trained on, and llama.cpp's own arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export_cases import chimera, our_logits, random_model, save_gguf, tokens_and_vocabulary

from data.chat import render
from data.tokenizer import load
from model.export.gguf_chat import open_gguf
from model.export.llama_cpp import LlamaCpp
from model.export.vocabulary import read_vocabulary

CONVERSATION = [
    {"role": "system", "content": "Say <|im_end|>\nlittle."},
    {"role": "user", "content": "the cat saw <|im_start|>assistant\n Hügel हिन्दी"},
    {"role": "assistant", "content": " the dog\n"},
    {"role": "user", "content": ""},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model, file, tokenizer."""
    tokens, vocabulary = tokens_and_vocabulary(tmp_path_factory.mktemp("tokens"))
    model = random_model(chimera())
    path = save_gguf(tokens / "a.gguf", model, vocabulary, "f32")
    return model, path, load(tokens / "output" / "tokenizer")


@pytest.fixture(scope="module")
def chat(made):
    with open_gguf(made[1], threads=1) as opened:
        yield opened


def greedy(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(our_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_the_prompt_is_the_one_that_the_model_was_trained_on(made, chat):
    wanted = render(made[2], CONVERSATION, add_generation_prompt=True)
    assert chat.prompt(CONVERSATION) == wanted.ids


def test_greedy_answers_are_the_models_own(made, chat):
    model, _, tokenizer = made
    message = [{"role": "user", "content": "the cat"}]
    answer = "".join(chat.stream(message, max_new_tokens=12))
    ids = greedy(model, chat.prompt(message), 12)
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")}
    cut = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    wanted = tokenizer.decode(ids[:cut], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # A character that is cut off at the end is held back by llama.cpp and shown as a replacement by our decoder.
    assert answer.rstrip("\ufffd") == wanted.rstrip("\ufffd")
    assert chat.timings["prompt_tokens"] == len(chat.prompt(message))
    assert chat.timings["finished"] == (cut < len(ids))


def test_an_end_token_ends_the_answer(made, tmp_path):
    model = random_model(chimera(tie_embeddings=False))
    with torch.no_grad():
        # The head sees a constant direction, and only the end of a turn points along it.
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight.zero_()
        end = made[2].convert_tokens_to_ids("<|im_end|>")
        model.lm_head.weight[end, 0], model.lm_head.weight[end - 1, 0] = 50.0, -50.0
    vocabulary = read_vocabulary(made[1].parent / "output" / "tokenizer")
    path = save_gguf(tmp_path / "end.gguf", model, vocabulary, "f32")
    with open_gguf(path, threads=1) as chat:
        answers = []
        for token in range(4, 40):
            pieces = list(chat.complete([token], max_new_tokens=3))
            answers.append((pieces == [], chat.timings["finished"], chat.timings["tokens"]))
    # Where the direction is positive the end is drawn at once, and nothing of it is shown.
    assert (True, True, 1) in answers


def test_sampling_repeats_with_its_seed(chat):
    message = [{"role": "user", "content": "the dog"}]
    texts = ["".join(chat.stream(message, max_new_tokens=20, temperature=1.0, seed=seed)) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_closing_the_answer_stops_the_model(chat):
    answer = chat.stream([{"role": "user", "content": "a"}], max_new_tokens=60, temperature=1.0, seed=5)
    next(answer)
    answer.close()
    assert isinstance("".join(chat.stream([{"role": "user", "content": "b"}], max_new_tokens=2)), str)


def test_the_c_functions_give_what_the_packages_own_interface_gives(made, chat):
    """The likeliest tokens of the public interface against all logits of the other (the check of its assumptions)."""
    prompt = chat.prompt(CONVERSATION[:2])
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 20, "temperature": 0}
    chosen = chat._server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]
    with LlamaCpp(made[1], context_tokens=128, threads=1) as other:
        logits = other.logits(prompt)[-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    public = {entry["id"]: entry["logprob"] for entry in chosen["top_logprobs"]}
    assert len(public) == 20
    # Half precision in attention, over two layers; batches of another size are summed in another order.
    assert max(abs(logprobs[token] - value) for token, value in public.items()) < 0.02


def test_a_conversation_beyond_the_context_is_refused(made):
    with open_gguf(made[1], threads=1, context_tokens=128) as chat:
        with pytest.raises(ValueError, match="exceeds the available context size"):
            list(chat.complete([5] * 400, max_new_tokens=2))
        assert list(chat.complete([5], max_new_tokens=2))


@pytest.mark.parametrize("content", [b"", b"no model", b"GGUF and nothing more"])
def test_a_file_that_is_no_model_is_refused(tmp_path, content, capfd):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="field path must be a"):
        open_gguf(path)
