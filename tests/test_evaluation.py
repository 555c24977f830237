"""Bits per byte against an independent calculation; still generators; the same bits twice (TRAPS M1, M2)."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import SOURCES, documents, make_tokens, spec

from data.heldout import HeldoutSet
from data.tokenizer import encode_text, load
from model.config import HybridConfig
from model.lm import HybridForCausalLM
from stages.runtime import rng
from stages.runtime.evaluation import evaluate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens")) / "output"


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(5)
    model = HybridForCausalLM(HybridConfig.from_spec(spec(), eos_token_id=0, pad_token_id=1)).eval()
    return lambda **batch: model(**batch).logits


def test_bits_per_byte_are_bits_of_the_scored_tokens_over_their_own_bytes(tokens, scorer):  # trap M1
    found = evaluate(scorer, HeldoutSet(tokens), seq_len=160, rows=4, device=CPU)
    tokenizer = load(tokens / "tokenizer")
    for language in SOURCES:
        bits, n_bytes, scored = 0.0, 0, 0
        for text in documents(language, 12, 2):
            ids = encode_text(tokenizer, text)
            assert len(ids) <= 160
            logits = scorer(input_ids=torch.tensor([ids]))[0].double()
            log_probabilities = torch.log_softmax(logits, -1)
            bits -= sum(log_probabilities[t, ids[t + 1]].item() for t in range(len(ids) - 1)) / math.log(2)
            n_bytes += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
            scored += len(ids) - 1
        assert found.tokens[language] == scored
        assert found.n_bytes[language] == n_bytes
        # Log-softmax in fp32 over 320 entries is off by about 1e-6 of a nat a token.
        assert found.bpb(language) == pytest.approx(bits / n_bytes, rel=1e-5)
    whole = found.metrics()
    nats = sum(found.nats[name] for name in SOURCES)
    assert whole["bpb"] == pytest.approx(nats / math.log(2) / whole["scored_bytes"])
    assert whole["scored_tokens"] == sum(found.tokens[name] for name in SOURCES)


def test_a_uniform_model_needs_log2_of_the_vocabulary_a_token(tokens):
    found = evaluate(
        lambda input_ids, **_: torch.zeros(*input_ids.shape, 320), HeldoutSet(tokens), seq_len=16, rows=3, device=CPU
    )
    assert found.bpb() == pytest.approx(math.log2(320) * found.tokens["all"] / found.n_bytes["all"])


def test_two_evaluations_are_bit_identical_and_name_their_set(tokens, scorer):  # trap M2
    first, again = (evaluate(scorer, HeldoutSet(tokens), seq_len=32, rows=4, device=CPU) for _ in range(2))
    assert first == again
    assert first.metrics()["heldout_hash"] == HeldoutSet(tokens).hash


def test_evaluation_leaves_every_generator_as_it_found_it(tokens, scorer):  # trap M2
    def drawing(**batch):
        random.random()
        np.random.random()
        torch.rand(1)
        return scorer(**batch)

    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    rng.seed_all(11)
    random.gauss(0, 1)
    np.random.normal()
    state = rng.capture()
    expected = draw()
    rng.restore(state)
    evaluate(drawing, HeldoutSet(tokens), seq_len=32, rows=4, device=CPU)
    assert draw() == expected


def test_generators_come_back_when_the_model_fails(tokens):
    def failing(**_):
        torch.rand(1)
        raise RuntimeError("broken")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(failing, HeldoutSet(tokens), seq_len=32, rows=4, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_captured_states_survive_a_safetensors_file(tmp_path):  # trap O3
    rng.seed_all(4)
    random.gauss(0, 1)
    save_file(rng.capture(), tmp_path / "rng.safetensors")
    expected = random.gauss(0, 1), np.random.random(), torch.rand(1).item()
    rng.seed_all(5)
    rng.restore(load_file(tmp_path / "rng.safetensors"))
    assert (random.gauss(0, 1), np.random.random(), torch.rand(1).item()) == expected
