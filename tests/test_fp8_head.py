"""The head whose gradients run in 8 bits, on the CPU, where its products are computed from the same numbers in fp32."""

import pytest
import torch
from tiny_run import spec
from torch.nn import functional

from model import activations, cost, fp8, projections
from model.config import HybridConfig
from model.lm import HybridForCausalLM
from model.loss import IGNORED, LMHead
from model.presets import preset


def drawn(*shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def heads(weight):
    """The same head, plain and in 8 bits."""
    found = []
    for kind in (LMHead, fp8.Float8LMHead):
        head = LMHead(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            head.weight.copy_(weight)
        head.__class__ = kind
        found.append(head)
    return found


def loss_and_gradients(head, hidden, targets, scale=1.0):
    hidden = hidden.clone().requires_grad_()
    head.weight.grad = None
    total = head(hidden, targets)
    (scale * total).backward()
    return total.detach(), hidden.grad, head.weight.grad


def targets_of(n_tokens, vocab_size):
    goals = torch.randint(0, vocab_size, (n_tokens,), generator=torch.Generator().manual_seed(n_tokens))
    goals[::5] = IGNORED
    return goals


def exact_errors(logits, goals):
    """softmax - one-hot in float64, zero where nothing is scored."""
    one_hot = functional.one_hot(goals.clamp(min=0), logits.shape[1])
    return (torch.softmax(logits.double(), -1) - one_hot) * (goals != IGNORED)[:, None]


def representable(n_tokens):
    """Numbers of which 8 bits hold every one: eight words that score alike, so p is 1/8 and p - 1 is -7/8."""
    generator = torch.Generator().manual_seed(n_tokens)
    values = torch.tensor([-1.75, -1.0, -0.5, 0.25, 1.5, 1.75])
    hidden, weight = (values[torch.randint(0, 6, shape, generator=generator)] for shape in ((n_tokens, 32), (8, 32)))
    weight[:, :16] = weight[0, :16]
    hidden[:, 16:] = 0.0
    # The largest is 448 / 256 everywhere, so that scales are powers of two.
    hidden[:, 3] = weight[:, 20] = 1.75
    return hidden, weight


@pytest.mark.parametrize("n_tokens", [64, 41])
def test_representable_numbers_give_exact_gradients(n_tokens):
    hidden, weight = representable(n_tokens)
    goals = targets_of(n_tokens, 8)
    total, d_hidden, d_weight = loss_and_gradients(heads(weight)[1], hidden, goals, scale=0.5)
    errors = exact_errors(torch.zeros(n_tokens, 8), goals)
    assert total.item() == pytest.approx((goals != IGNORED).sum().item() * 3 * torch.tensor(2.0).log().item())
    assert torch.equal(d_hidden.double(), 0.5 * errors @ weight.double())
    assert torch.equal(d_weight.double(), 0.5 * errors.T @ hidden.double())


def test_chunks_and_stretches_of_them_give_what_one_gives(monkeypatch):
    hidden, weight = representable(200)
    goals = targets_of(200, 8)
    head = heads(weight)[1]
    whole = loss_and_gradients(head, hidden, goals)
    monkeypatch.setattr(fp8, "TILE", 16)
    monkeypatch.setattr(fp8, "FEWEST_ELEMENTS", 40 * 8)
    seen, real = [], fp8._errors
    monkeypatch.setattr(fp8, "_errors", lambda *given: seen.append((given[0].shape[0], given[2].shape)) or real(*given))
    for turned, shapes in (
        (40 * 8, [(48, (8, 48))] * 4 + [(8, (8, 16))]),
        (100 * 8, [(48, (8, 48))] * 4 + [(8, (8, 16))]),
    ):
        monkeypatch.setitem(fp8.TURNED_ELEMENTS, "cpu", turned)
        seen.clear()
        for got, expected in zip(loss_and_gradients(head, hidden, goals), whole, strict=True):
            # The loss alone is a sum of rounded numbers.
            assert torch.allclose(got, expected, rtol=1e-6, atol=0)
        assert seen == shapes


@pytest.mark.parametrize("vocab_size", [48, 43])
def test_gradients_are_as_near_as_8_bits_allow_and_lean_to_no_side(vocab_size):
    hidden, weight, goals = drawn(333, 64), drawn(vocab_size, 64, scale=0.3), targets_of(333, vocab_size)
    plain, head = heads(weight)
    total, d_hidden, d_weight = loss_and_gradients(head, hidden, goals)
    assert torch.equal(total, loss_and_gradients(plain, hidden, goals)[0]), "the loss is that of the plain head"
    errors = exact_errors(hidden.double() @ weight.double().T, goals)
    # Half a step of two bits after the first, and of three; what is smaller than the smallest normal number is nothing.
    most = 2.0**-3 + 2.0**-4 + 2.0**-7
    for got, left, right in ((d_hidden, errors, weight), (d_weight, errors.T, hidden)):
        exact, bound = left @ right.double(), most * (left.abs() @ right.double().abs())
        assert ((got - exact).abs() <= bound + 1e-4).all()
        assert 1e-3 < (got - exact).norm() / exact.norm() < 2.0**-4
        # Rounding to the nearest leans by the square of a step of 2**-2 over twelve, and not by a step.
        assert abs(((got - exact) * exact.sign()).sum() / exact.abs().sum()) < 1e-2
    assert not d_hidden[goals == IGNORED].any()


def test_small_probabilities_of_a_large_vocabulary_are_not_lost():
    logits = torch.zeros(16, 4096)
    logits[:, 0] = 28 * torch.tensor(2.0).log()
    turned = torch.empty(4096, 16, dtype=fp8.BACKWARD)
    _, narrow = fp8._errors(logits, torch.zeros(16, dtype=torch.long), turned)
    p = torch.softmax(logits.double(), -1)[0, 1]
    assert p < torch.finfo(fp8.BACKWARD).smallest_normal * 2**-12, "the format by itself would not hold it"
    assert abs(narrow[0, 1].double() / fp8.ERROR_SCALE / p - 1) <= 2.0**-3


def test_nan_is_not_hidden_and_magnitudes_of_the_loss_do_not_matter():
    hidden, goals = drawn(32, 64), targets_of(32, 48)
    head = heads(drawn(48, 64, scale=0.3))[1]
    small, plain = (loss_and_gradients(head, hidden, goals, scale)[1:] for scale in (2.0**-40, 1.0))
    for got, expected in zip(small, plain, strict=True):
        assert torch.equal(got * 2.0**40, expected)
    hidden[7, 3] = float("nan")
    total, d_hidden, d_weight = loss_and_gradients(head, hidden, goals)
    assert total.isnan()
    assert d_hidden.isnan().any(1).nonzero().flatten().tolist() == [7]
    assert d_weight.isnan().any()


def test_without_gradients_and_with_a_frozen_weight_it_is_the_head_it_was():
    hidden, goals = drawn(20, 64), targets_of(20, 48)
    plain, head = heads(drawn(48, 64, scale=0.3))
    assert torch.equal(head(hidden), plain(hidden))
    with torch.no_grad():
        assert torch.equal(head(hidden, goals), plain(hidden, goals))
    found = []
    for one in (plain, head):
        one.weight.requires_grad_(False)
        rows = hidden.clone().requires_grad_()
        one(rows, goals).backward()
        found.append(rows.grad)
    assert torch.equal(*found)


def test_autocast_decides_the_dtype_of_logits_and_the_weights_gradient_stays_wide():
    plain, head = heads(drawn(48, 64, scale=0.3))
    with torch.autocast("cpu", torch.bfloat16):
        (total, _, gradient), (expected, *_) = (
            loss_and_gradients(one, drawn(32, 64), targets_of(32, 48)) for one in (head, plain)
        )
    assert torch.equal(total, expected)
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_kept_casts_are_used_until_they_are_dropped():
    head, hidden, goals = heads(drawn(48, 64, scale=0.3))[1], drawn(32, 64), targets_of(32, 48)
    expected = loss_and_gradients(head, hidden, goals)
    fp8.keep_casts(head, torch.float32)
    for got, one in zip(loss_and_gradients(head, hidden, goals), expected, strict=True):
        assert torch.equal(got, one)
    head.kept = tuple(2 * part if part.dim() == 0 else part for part in head.kept)
    assert torch.equal(loss_and_gradients(head, hidden, goals)[1], 2 * expected[1]), "the cast that was kept"
    fp8.drop_casts(head)
    assert torch.equal(loss_and_gradients(head, hidden, goals)[1], expected[1])


def test_conversion_takes_a_large_head_and_leaves_a_small_one():
    for vocab_size, kind in ((2048, fp8.Float8LMHead), (1023, LMHead)):
        model = torch.nn.ModuleDict({"lm_head": LMHead(1024, vocab_size)})
        assert fp8.convert_to_fp8(model) == ["lm_head"] * (kind is fp8.Float8LMHead)
        assert type(model["lm_head"]) is kind
        assert list(model.state_dict()) == ["lm_head.weight"]
        assert projections.fp8_fits(1024, vocab_size) == (kind is fp8.Float8LMHead)


def test_a_tied_weight_has_the_gradients_of_both_its_uses(monkeypatch):
    monkeypatch.setattr(fp8, "SMALLEST", 16)
    ids = torch.randint(2, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for tied in (True, False):
        torch.manual_seed(3)
        shape = spec().model_copy(update={"tie_embeddings": tied})
        model = HybridForCausalLM(HybridConfig.from_spec(shape, eos_token_id=0, pad_token_id=1)).float()
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        assert "lm_head" in fp8.convert_to_fp8(model)
        model(input_ids=ids, labels=ids, return_logits=False, use_cache=False).loss.backward()
        weights = {id(weight): weight for weight in (model.lm_head.weight, model.model.embed_tokens.weight)}
        assert len(weights) == 1 + (not tied)
        found[tied] = sum(weight.grad for weight in weights.values())
    assert torch.allclose(found[True], found[False], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("n_tokens", "vocab_size"), [(65536, 200_000), (32768, 50_304), (32768, 65_536), (4000, 10_003), (16, 1024)]
)
def test_chunks_are_whole_tiles_within_the_limits(n_tokens, vocab_size):
    rows = torch.empty(n_tokens, 1, device="meta")
    limits = {"meta": 2**30}, {"meta": 2**31}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "LOGIT_ELEMENTS", limits[0])
        patch.setattr(fp8, "TURNED_ELEMENTS", limits[1])
        size, stretch = fp8._head_tokens(rows, vocab_size)
    assert size % 128 == 0
    assert stretch % size == 0
    # Rounding to whole tiles may take a tile more.
    assert (size - 128) * vocab_size < 2**30
    assert (stretch - size) * vocab_size < 2**31
    assert -(-n_tokens // size) <= -(-n_tokens * vocab_size // 2**30) + 1


def test_the_plan_counts_a_stretch_of_errors_in_place_of_a_second_chunk(monkeypatch):
    facts = {"precision": "fp8", "path": cost.Path(kernels=True, residual="bf16")}
    model = preset("hybrid_1b3")
    found = cost.activation_bytes(model, 4096, 8, False, **facts)
    monkeypatch.setattr(activations, "fp8_fits", lambda inputs, n: n != 50304 and projections.fp8_fits(inputs, n))
    plain = cost.activation_bytes(model, 4096, 8, False, **facts)
    # 32,768 tokens of 50,304 logits are one stretch, 1 byte each; a chunk, half of it, has 2 + 1 bytes a logit; the
    # head is there in bf16 and in 8 bits. Else a chunk of 2**29 has 2 + 2, and the head is there in bf16 and fp32.
    logits, head = 32768 * 50304, 50304 * 2048
    assert found - plain == (logits + 3 * logits // 2 + 3 * head) - (4 * 2**29 + 6 * head)


def test_the_plan_counts_the_sum_that_a_second_stretch_is_added_to():
    spec = preset("helix_900m")
    one, two = (activations._fp8_loss_bytes(spec, tokens) for tokens in (10_737, 2 * 10_737))  # 2**31 / 200,000
    assert two - one == pytest.approx(4 * 200_000 * 1280, rel=1e-3)
