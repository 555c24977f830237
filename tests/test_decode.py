"""Decoding from a cache: the same as running everything at every step (traps K4, K5, K6)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_cases import CASES, Case, recompute, relative_gap, tiny_model, tokens, tolerance
from torch import Tensor

from model.cache import HybridCache, KVState, RecurrentState
from model.decode import Sampling, draw, generate

SUBJECTS = [*CASES, None]
each_subject = pytest.mark.parametrize("case", SUBJECTS, ids=[*map(str, CASES), "all_in_one_model"])
TIME = 40


def fed(model: Any, ids: Tensor, pieces: list[int], **kwargs: Any) -> tuple[Tensor, HybridCache]:
    """Logits of all tokens, given to the model in ``pieces``."""
    cache = kwargs.pop("cache", None) or HybridCache()
    logits = []
    with torch.no_grad():
        for piece in ids.split(pieces, 1):
            logits.append(model(piece, past_key_values=cache, **kwargs).logits)
    return torch.cat(logits, 1), cache


@each_subject
@pytest.mark.parametrize(
    "pieces",
    [[1] * TIME, [17, *[1] * 23], [7, 13, *[1] * 20], [1, 38, 1], [3, 20, 17]],
    ids=["steps", "prefill_then_steps", "chunked_prefill_then_steps", "step_chunk_step", "chunks"],
)
def test_any_way_of_feeding_a_cache_equals_the_full_forward(case: Case | None, pieces: list[int]) -> None:  # trap K5
    model, ids = tiny_model(case, torch.float64), tokens(2, TIME)
    with torch.no_grad():
        full = model(ids).logits
    assert relative_gap(fed(model, ids, pieces)[0], full) < tolerance(torch.float64, TIME)


@pytest.mark.parametrize("fault", ["positions", "conv", "mixer_state", "keys"])
def test_decoding_test_notices_a_lost_part_of_the_cache(fault: str) -> None:  # trap K5
    model, ids = tiny_model(), tokens(1, TIME)
    with torch.no_grad():
        full = model(ids).logits[:, -1:]
    _, cache = fed(model, ids[:, :-1], [TIME - 1])
    if fault == "positions":
        cache.tokens = torch.zeros(1, dtype=torch.long)
    for state in cache.layers.values():
        if isinstance(value := getattr(state, fault, None), Tensor) and fault != "positions":
            setattr(state, fault, torch.zeros_like(value))
    with torch.no_grad():
        assert relative_gap(model(ids[:, -1:], past_key_values=cache).logits, full) > 1e-3


@each_subject
def test_left_padded_batch_decodes_as_each_prompt_alone(case: Case | None) -> None:  # trap K4
    model = tiny_model(case)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 1, 7)]
    together = generate(model, prompts, max_new_tokens=12)
    chunked = generate(model, prompts, max_new_tokens=12, prefill_chunk_size=4)
    alone = [generate(model, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert [row.tokens for row in together] == [row.tokens for row in alone]
    assert [row.tokens for row in chunked] == [row.tokens for row in alone]


@each_subject
def test_greedy_decoding_equals_full_forwards_and_transformers_generate(case: Case | None) -> None:  # trap K5
    model = tiny_model(case)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 9)]
    ours = [row.tokens for row in generate(model, prompts, max_new_tokens=10)]
    for prompt, got in zip(prompts, ours, strict=True):
        row = list(prompt)
        with torch.no_grad():
            for _ in range(10):
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        assert got == row[len(prompt) :]
    padded = torch.tensor([[1] * 4 + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    theirs = model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert theirs[:, 9:].tolist() == ours


def test_transformers_generate_without_a_cache_and_with_beams() -> None:
    model, ids = tiny_model(), tokens(2, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(plain, model.generate(ids, **settings))
    beams = [model.generate(ids, num_beams=3, use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*beams), "a reordered cache follows its beams"
    chunked = model.generate(ids, past_key_values=HybridCache(), prefill_chunk_size=2, **settings)
    assert torch.equal(plain, chunked)


def test_generation_stops_at_an_end_token_and_keeps_it() -> None:
    model, prompts = tiny_model(), [[5, 6, 7], [9, 8]]
    free = generate(model, prompts, max_new_tokens=8)
    end = free[0].tokens[3]
    stopped = generate(model, prompts, max_new_tokens=8, eos_token_ids=[end])
    for before, after in zip(free, stopped, strict=True):
        length = before.tokens.index(end) + 1 if end in before.tokens else 8
        assert after.tokens == before.tokens[:length]
        assert len(after.logprobs) == length
        assert after.finished is (end in before.tokens)
    assert stopped[0].finished


def test_logprobs_are_those_of_the_full_forward_at_the_sampling_temperature() -> None:
    model, prompt = tiny_model(), [5, 6, 7]
    sampling, generator = Sampling(temperature=0.7, top_p=0.9), torch.Generator().manual_seed(4)
    row = generate(model, [prompt], max_new_tokens=9, sampling=sampling, generator=generator)[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + row.tokens])).logits[0, 2:-1]
    wanted = torch.log_softmax(logits / 0.7, -1).gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(row.logprobs), wanted, atol=1e-4)


def test_sampling_is_reproduced_by_its_generator_and_by_nothing_else() -> None:
    model = tiny_model()
    settings: dict[str, Any] = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.5)}
    rows = [
        generate(model, [[5, 6]], generator=torch.Generator().manual_seed(seed), **settings)[0].tokens
        for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]
    state = torch.get_rng_state()
    generate(model, [[5, 6]], generator=torch.Generator().manual_seed(1), **settings)
    assert torch.equal(state, torch.get_rng_state())


def test_draw_follows_the_distribution_and_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw(logits, Sampling(temperature=1.0), generator)[0], minlength=4) / 20_000
    # Four standard deviations of a share of n = 20,000 draws.
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=4 * 0.5 / 20_000**0.5)
    # 0.5 is short of 0.7, 0.5 + 0.3 is not: two tokens, 5/8 and 3/8.
    kept = torch.bincount(draw(logits, Sampling(temperature=1.0, top_p=0.7), generator)[0], minlength=4) / 20_000
    assert torch.allclose(kept, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=4 * 0.5 / 20_000**0.5)
    assert kept[2:].sum() == 0


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([], Sampling(), "prompts must be"),
        ([[3], []], Sampling(), "prompts must be"),
        ([[61]], Sampling(), "ids from 0 to 60; got 61"),
        ([[-1]], Sampling(), "got -1"),
        ([[3]], Sampling(temperature=1.0), "generator must be given"),
    ],
)
def test_impossible_requests_are_refused(prompts: list[list[int]], sampling: Sampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), prompts, max_new_tokens=1, sampling=sampling)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"field {next(iter(wrong))} must be"):
        Sampling(**wrong)


def test_window_keeps_its_last_tokens_and_the_global_ones_alone() -> None:
    case = next(case for case in CASES if case.name == "attention-window_globals")
    model, ids = tiny_model(case), tokens(1, 500)
    _, cache = fed(model, ids, [100, *[1] * 400])
    state = cache.layers[0]
    assert isinstance(state, KVState)
    assert state.keys is not None
    assert state.keys.shape[2] <= 64, "the window is 5: memory does not grow with the sequence"
    keys, _, positions = state._view(1)
    assert positions[0].tolist() == [0, 1, 495, 496, 497, 498, 499]
    assert keys.shape[2] == 7


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16_weights", "autocast"])
def test_states_are_fp32_whatever_the_model_computes_in(weights: torch.dtype) -> None:  # trap K6
    model, ids = tiny_model(dtype=weights), tokens(2, 21)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        logits, cache = fed(model, ids, [20, 1])
    states = [state.mixer_state for state in cache.layers.values() if isinstance(state, RecurrentState)]
    assert len(states) == 4
    assert {state.dtype for state in states if state is not None} == {torch.float32}
    assert logits.dtype == torch.bfloat16


def test_bf16_states_drift_and_are_not_the_default() -> None:  # trap K6
    spec = next(case.spec for case in CASES if case.name == "gla")
    model = tiny_model(Case("gla", spec))
    for block in model.model.layers:
        torch.nn.init.constant_(block.mixer.gate_bias, 6.0)  # long memories
    ids = tokens(1, 160)
    exact = last_state(fed(tiny_copy(model), ids, [160])[1])
    gaps = {}
    for dtype in (None, torch.bfloat16):
        cache = HybridCache(dtype)
        fed(model, ids, [1] * 160, cache=cache)
        gaps[dtype] = relative_gap(last_state(cache).double(), exact)
    assert gaps[None] < tolerance(torch.float32, 160)
    # Each of 160 roundings to eight bits adds its share; a state that were rounded once would be off by 2**-9.
    assert gaps[torch.bfloat16] > 2**-9 > 50 * gaps[None]


def last_state(cache: HybridCache) -> Tensor:
    state = cache.layers[0]
    assert isinstance(state, RecurrentState)
    assert state.mixer_state is not None
    return state.mixer_state


def tiny_copy(model: Any) -> Any:
    return copy.deepcopy(model).double()


def test_cache_refuses_to_forget() -> None:
    model = tiny_model()
    _, cache = fed(model, tokens(1, 9), [9])
    cache.crop(9)
    with pytest.raises(ValueError, match="at least the 9 columns seen; got 5"):
        cache.crop(5)
    assert cache.get_seq_length() == 9
    assert cache.is_croppable is False


def test_rows_of_a_cache_can_be_chosen_and_repeated() -> None:
    model, ids = tiny_model(), tokens(3, 12)
    with torch.no_grad():
        full = model(ids).logits[:, -1:]
    for change, rows in (("batch_select_indices", [2, 0]), ("batch_repeat_interleave", [0, 0, 1, 1, 2, 2])):
        _, cache = fed(model, ids[:, :-1], [11])
        getattr(cache, change)(torch.tensor(rows) if change == "batch_select_indices" else 2)
        with torch.no_grad():
            got = model(ids[rows, -1:], past_key_values=cache).logits
        assert relative_gap(got, full[rows]) < tolerance(torch.float32, 12)


def test_other_caches_and_caches_under_recomputation_are_refused() -> None:
    model, ids = tiny_model(), tokens(1, 4)
    with pytest.raises(ValueError, match="past_key_values must be a HybridCache; got list"):
        model(ids, past_key_values=[])
    with pytest.raises(ValueError, match="cache_implementation must be none"):
        model.generate(ids, max_new_tokens=1, cache_implementation="static")
    before = generate(model, [[5, 6, 7]], max_new_tokens=5)
    recompute(model)
    model.train()
    assert generate(model, [[5, 6, 7]], max_new_tokens=5) == before, "rollouts in the middle of training are fine"
    with pytest.raises(ValueError, match="use_cache must be false under activation checkpointing"):
        model(ids, use_cache=True)
