"""Packed documents and padding: nothing leaks, however the boundaries are described (traps K3 and K4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import CASES, Case, layout_of, packed_ids, relative_gap, tiny_model, tokens, tolerance
from torch import Tensor
from transformers import DataCollatorWithFlattening

from model import boundaries
from model.boundaries import Layout

LENGTHS = [5, 18, 1, 9]
SUBJECTS = [*CASES, None]
SUBJECT_IDS = [*map(str, CASES), "all_in_one_model"]
each_subject = pytest.mark.parametrize("case", SUBJECTS, ids=SUBJECT_IDS)
each_backend = pytest.mark.parametrize("backend", ["torch", "reference"])


def model_on(backend: str, case: Case | None, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(case, dtype)
    for block in model.model.layers:
        block.mixer.use_backend(backend)
    return model


def embeds_logits_grad(model: Any, ids: Tensor, document: slice, described: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Logits of one document, and the gradient of their fixed combination by every input of the row."""
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **described).logits[:, document]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((logits * weights).sum(), embeds)
    return logits.detach(), gradient


@each_subject
@each_backend
def test_no_document_feels_another(case: Case | None, backend: str) -> None:  # trap K3
    model = model_on(backend, case)
    ids = tokens(1, sum(LENGTHS))
    described = {"seq_idx": packed_ids(LENGTHS)}
    start = 0
    for length in LENGTHS:
        document = slice(start, start + length)
        other = tokens(1, sum(LENGTHS), seed=9)
        other[:, document] = ids[:, document]
        before, after = (embeds_logits_grad(model, row, document, described) for row in (ids, other))
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
        outside = torch.ones(sum(LENGTHS), dtype=torch.bool)
        outside[document] = False
        assert before[1][:, outside].abs().max() == 0
        assert before[1][:, document].abs().max() > 0
        start += length


PAD_BETWEEN = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 1]])
"""Mask of two documents of four tokens with one token between them that belongs to neither."""
NEITHER_JOINED = {
    "seq_idx_across_padding": {
        "seq_idx": torch.tensor([[0, 0, 0, 0, -1, 1, 1, 1, 1]]), "attention_mask": PAD_BETWEEN,
    },
    "position_ids_across_padding": {
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3]]), "attention_mask": PAD_BETWEEN,
    },
    "seq_idx_that_comes_back": {"seq_idx": torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0, 0]])},
}  # fmt: skip


@each_subject
@each_backend
@pytest.mark.parametrize("described", NEITHER_JOINED.values(), ids=NEITHER_JOINED.keys())
def test_no_document_feels_another_across_what_lies_between(
    case: Case | None, backend: str, described: dict[str, Tensor]
) -> None:  # trap K3
    model, ids = model_on(backend, case), tokens(1, 9)
    for document in (slice(0, 4), slice(5, 9)):
        other = tokens(1, 9, seed=9)
        other[:, document] = ids[:, document]
        before, after = (embeds_logits_grad(model, row, document, described) for row in (ids, other))
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
        outside = torch.ones(9, dtype=torch.bool)
        outside[document] = False
        assert before[1][:, outside].abs().max() == 0
        assert before[1][:, document].abs().max() > 0


@each_subject
@pytest.mark.parametrize("described", NEITHER_JOINED.values(), ids=NEITHER_JOINED.keys())
def test_documents_apart_give_what_each_gives_alone(case: Case | None, described: dict[str, Tensor]) -> None:
    model, ids = model_on("torch", case, torch.float64), tokens(1, 9)
    with torch.no_grad():
        together = model(ids, **described).logits
        for document in (slice(0, 4), slice(5, 9)):
            alone = model(ids[:, document]).logits
            assert relative_gap(together[:, document], alone) < tolerance(torch.float64, 9)


@each_subject
def test_leak_test_notices_a_model_that_forgets_boundaries(
    case: Case | None, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap K3
    monkeypatch.setattr(boundaries, "_documents", lambda *args: None)
    model, ids = model_on("torch", case), tokens(1, sum(LENGTHS))
    _, gradient = embeds_logits_grad(model, ids, slice(5, 23), {"seq_idx": packed_ids(LENGTHS)})
    assert gradient[:, :5].abs().max() > 1e-6


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("mamba2")], ids=str)
def test_leak_test_notices_a_convolution_that_forgets_boundaries(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap K3
    monkeypatch.setattr(Layout, "same_document", lambda self, shift: None)
    model, ids = model_on("torch", case), tokens(1, sum(LENGTHS))
    _, gradient = embeds_logits_grad(model, ids, slice(5, 23), {"seq_idx": packed_ids(LENGTHS)})
    assert gradient[:, :5].abs().max() > 1e-6


@each_subject
def test_packed_documents_give_what_each_gives_alone(case: Case | None) -> None:
    model, ids = model_on("torch", case, torch.float64), tokens(2, sum(LENGTHS))
    with torch.no_grad():
        packed = model(ids, seq_idx=packed_ids(LENGTHS, 2)).logits
        alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    assert relative_gap(packed, alone) < tolerance(torch.float64, sum(LENGTHS))


def test_every_description_of_the_boundaries_gives_the_same_logits() -> None:
    model, ids = tiny_model(), tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    edges = torch.tensor([0, 5, 23, 24, 33], dtype=torch.int32)
    described: list[dict[str, Any]] = [
        {"position_ids": positions},
        {"seq_idx": packed_ids(LENGTHS).int()},
        {"seq_idx": packed_ids(LENGTHS), "position_ids": positions},
        {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 18, "max_length_k": 18},
    ]
    with torch.no_grad():
        logits = [model(ids, **one).logits for one in described]
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_padding_free_collator_is_understood() -> None:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    documents = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    batch = collate([{"input_ids": document, "labels": document} for document in documents])
    model = tiny_model()
    with torch.no_grad():
        outputs = model(**batch)
        alone = torch.cat([model(torch.tensor([document])).logits for document in documents], 1)
        nll = torch.log_softmax(alone, -1)
    assert relative_gap(outputs.logits, alone) < tolerance(torch.float32, sum(LENGTHS))
    # Scored: within each document, every token but the first.
    wanted, start = [], 0
    for document in documents:
        wanted += [-nll[0, start + t, document[t + 1]] for t in range(len(document) - 1)]
        start += len(document)
    assert torch.allclose(outputs.loss, torch.stack(wanted).mean(), rtol=1e-5)


@each_subject
@each_backend
def test_padding_on_either_side_leaves_no_trace(case: Case | None, backend: str) -> None:  # trap K4
    model, ids = model_on(backend, case, torch.float64), tokens(1, 11)
    with torch.no_grad():
        alone = model(ids).logits
        for left, right in ((7, 0), (0, 7), (20, 3)):
            row = torch.cat([tokens(1, left, 5), ids, tokens(1, right, 6)], 1)
            mask = torch.tensor([[0] * left + [1] * 11 + [0] * right])
            padded = model(row, attention_mask=mask).logits
            assert torch.isfinite(padded).all()
            assert relative_gap(padded[:, left : left + 11], alone) < tolerance(torch.float64, 11)


@each_subject
def test_padding_test_notices_a_model_that_ignores_the_mask(
    case: Case | None, monkeypatch: pytest.MonkeyPatch
) -> None:  # trap K4
    monkeypatch.setattr(boundaries, "_valid", lambda *args: None)
    model, ids = model_on("torch", case), tokens(1, 11)
    row, mask = torch.cat([tokens(1, 2, 5), ids], 1), torch.tensor([[0] * 2 + [1] * 11])
    with torch.no_grad():
        assert relative_gap(model(row, attention_mask=mask).logits[:, 2:], model(ids).logits) > 1e-4


def test_padded_and_packed_rows_may_share_a_batch() -> None:
    model, row = tiny_model(dtype=torch.float64), tokens(2, 12)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    with torch.no_grad():
        together = model(row, attention_mask=mask, seq_idx=seq_idx).logits
        alone = [model(row[:1, :5]).logits, model(row[:1, 5:]).logits, model(row[1:, :9]).logits]
    got = [together[:1, :5], together[:1, 5:], together[1:, :9]]
    for mine, right in zip(got, alone, strict=True):
        assert relative_gap(mine, right) < tolerance(torch.float64, 12)


def test_attention_mask_by_hand() -> None:
    layout = layout_of(1, 6, seq_idx=torch.tensor([[0, 0, 0, 0, 1, 1]]))
    mask = layout.attention_mask(window=2, global_tokens=1)
    assert mask is not None
    # Window of two, and the first token of each document for all after it.
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    assert layout.attention_mask(window=2, global_tokens=1) is mask, "built once a forward"
    assert layout_of(1, 6).attention_mask(window=None, global_tokens=0) is None, "plain causality needs no mask"


def test_positions_restart_with_each_document_and_skip_padding() -> None:
    assert layout_of(1, 5, seq_idx=torch.tensor([[3, 3, 7, 7, 7]])).positions.tolist() == [[0, 1, 0, 1, 2]]
    padded = layout_of(1, 5, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    assert padded.positions.tolist() == [[0, 0, 0, 1, 2]]
    assert layout_of(1, 3, past=4, past_tokens=torch.tensor([4])).positions.tolist() == [[4, 5, 6]]


def test_documents_are_numbered_by_their_changes() -> None:
    layout = layout_of(1, 9, **NEITHER_JOINED["seq_idx_across_padding"])
    assert layout.doc_ids is not None
    assert layout.doc_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 3, 0, 1, 2, 3]]
    back = layout_of(1, 9, **NEITHER_JOINED["seq_idx_that_comes_back"])
    assert back.doc_ids is not None
    assert back.doc_ids.tolist() == [[0, 0, 0, 0, 1, 2, 2, 2, 2]]
    padded = {"seq_idx": torch.tensor([[5, 5, 5, 5, 3, 3]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    assert layout_of(1, 6, **padded).positions.tolist() == [[0, 0, 0, 1, 0, 1]], "padding takes no position"


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        ([6, 7, 8, 9], None),
        ([0, 0, 0, 1], [0, 0, 1, 1]),
        ([1, 1, 0, 1], [0, 0, 1, 1]),
        ([0, 1, 1, 1], [1, 1, 0, 0]),
        ([0, 1, 0, 2], [1, 1, 0, 1]),
        ([0, 1, 2, 3], [1, 1, 0, 1]),
    ],
    ids=["offset", "left_standing", "left_ones", "right", "hole_not_counted", "hole_counted"],
)
def test_positions_that_count_on_are_one_document(positions: list[int], mask: list[int] | None) -> None:
    described = {"position_ids": torch.tensor([positions])}
    if mask is not None:
        described["attention_mask"] = torch.tensor([mask])
    assert layout_of(1, 4, **described).doc_ids is None


def test_one_document_stays_one_across_its_padding() -> None:
    ids, mask = torch.tensor([[0, 0, -1, 0]]), torch.tensor([[1, 1, 0, 1]])
    assert layout_of(1, 4, seq_idx=ids, attention_mask=mask).doc_ids is None
    left = layout_of(1, 4, seq_idx=torch.tensor([[-1, -1, 0, 0]]), attention_mask=torch.tensor([[0, 0, 1, 1]]), past=0)
    assert left.doc_ids is None, "and so may go beside a cache"


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask must be"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask must be"),
        ({"position_ids": torch.zeros(3, 4)}, "position_ids must be"),
        ({"seq_idx": torch.zeros(1, 5)}, "seq_idx must be"),
        ({"cu_seq_lens": torch.tensor([0, 2, 5])}, "must run from 0 to the row's 4 tokens"),
        ({"cu_seq_lens": torch.tensor([1, 4])}, "must run from 0"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1]]), "past": 0}, "one document a row beside a cache"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 0]]), "past": 0}, "pad on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]]), "past": 0}, "pad on the left"),
        (
            {"attention_mask": torch.tensor([[0, 1, 1, 1]]), "past": 3, "past_tokens": torch.tensor([2])},
            "pad on the left",
        ),
    ],
)
def test_contradictory_descriptions_are_refused(described: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of(1, 4, **described)


def test_edges_of_queries_and_keys_must_agree() -> None:
    edges = {"cu_seq_lens_q": torch.tensor([0, 4, 8]), "cu_seq_lens_k": torch.tensor([0, 5, 8])}
    with pytest.raises(ValueError, match="cu_seq_lens_k must equal"):
        tiny_model()(tokens(1, 8), **edges)
