"""What preference optimisation does without a trainer: ids of pairs, the reference cache, scores, config faults."""

import math

import numpy as np
import pytest
from finetune_cases import Case, make_inputs, spec
from tiny_preferences import pairs, preferences_data

from data.tokenizer import finish, load
from data.tokenizer_train import train_byte_level
from stages.dpo import Dpo
from stages.runtime.dpo_data import PAD_MULTIPLE, TokenPair, collator, tokenise
from stages.runtime.dpo_reference import BLOCK_PAIRS, ReferenceCache
from stages.runtime.dpo_scores import interval, scores

CASE = Case("stages.dpo:Dpo", preferences_data)


def dpo_config(**changes):
    plain = {"kind": "dpo", "from": "sft", "max_length": 64, "global_batch_size": 4, "max_steps": 3, "lr": 1e-4}
    return Dpo.Config.model_validate(plain | changes)


def pair(number, template="t", chosen=(1, 2), rejected=(3,)):
    return TokenPair(str(number), [5, 6], list(chosen), list(rejected), "harmful", "en", template)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(CASE, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def tokenizer(inputs):
    return load(inputs["from_"] / "output")


def test_answers_follow_the_generation_prompt_and_end_with_the_stop_token(tokenizer):  # trap T4
    row = pairs(1, 3, "x")[0]
    (found,) = tokenise(tokenizer, [row], 64).pairs
    text = row["prompt"][0]["content"]
    assert tokenizer.decode(found.prompt_ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found.chosen_ids) == row["chosen"][0]["content"] + "<|im_end|>"
    assert tokenizer.decode(found.rejected_ids) == row["rejected"][0]["content"] + "<|im_end|>"


def test_a_stop_token_written_in_an_answer_stays_text(tokenizer):
    row = pairs(1, 3, "x")[0] | {"chosen": [{"role": "assistant", "content": "a <|im_end|> b"}]}
    (found,) = tokenise(tokenizer, [row], 200).pairs
    assert found.chosen_ids.count(tokenizer.get_vocab()["<|im_end|>"]) == 1


def test_what_is_truncated_or_left_out_is_counted(tokenizer):
    row = pairs(1, 3, "x")[0]
    whole = tokenise(tokenizer, [row], 64).pairs[0]
    prompt, chosen = len(whole.prompt_ids), len(whole.chosen_ids)
    longer = row | {"rejected": [{"role": "assistant", "content": row["chosen"][0]["content"] + " and more"}]}
    cases = {
        "truncated_answers": (row, prompt + max(whole.lengths) - 1, 1),
        "long_prompts": (row, prompt, 0),
        "equal_answers": (longer, prompt + chosen - 1, 0),
    }
    for name, (given, length, kept) in cases.items():
        found = tokenise(tokenizer, [given], length)
        assert {key: count for key, count in found.counts.items() if count} == {name: 1}, name
        assert len(found.pairs) == kept
        assert all(len(one.prompt_ids) + max(one.lengths) <= length for one in found.pairs)


def test_an_answer_that_would_change_the_prompts_ids_is_left_out_and_counted(tmp_path):
    train_byte_level(["line\n\nline\n\nline"] * 50, 280, tmp_path)
    tokenizer = load(tmp_path)
    finish(tmp_path, tokenizer, "bpe", {})
    row = pairs(1, 3, "x")[0] | {"chosen": [{"role": "assistant", "content": "\nb"}]}
    found = tokenise(tokenizer, [row], 200)
    assert (found.pairs, found.counts["merged_prompts"]) == ([], 1)


def test_the_reference_is_computed_once_and_read_afterwards(tmp_path):
    members = [pair(number) for number in range(2 * BLOCK_PAIRS + 3)]
    asked = []

    def compute(block):
        asked.append([one.id for one in block])
        return np.array([[float(one.id), -float(one.id) / 3] for one in block], np.float32)

    first = ReferenceCache(tmp_path, {"parent": "a"}).fetch(members, compute)
    again = ReferenceCache(tmp_path, {"parent": "a"}).fetch(members, compute)
    assert [len(block) for block in asked] == [BLOCK_PAIRS, BLOCK_PAIRS, 3]
    assert np.array_equal(first, again)
    assert first[1].tolist() == [1.0, float(np.float32(-1 / 3))]
    ReferenceCache(tmp_path, {"parent": "b"}).fetch(members, compute)
    assert len(asked) == 6


def test_a_damaged_block_of_the_reference_is_computed_again_and_no_other(tmp_path, caplog):  # trap O2
    members = [pair(number) for number in range(BLOCK_PAIRS + 1)]
    asked = []

    def compute(block):
        asked.append(len(block))
        return np.full((len(block), 2), -1.25, np.float32)

    cache = ReferenceCache(tmp_path, {})
    whole = cache.fetch(members, compute)
    content = cache.path(1).read_bytes()
    for place in range(0, len(content), 7):
        cache.path(1).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert np.array_equal(cache.fetch(members, compute), whole)
        assert cache.path(1).read_bytes() == content
    assert set(asked[2:]) == {1}
    assert "computing it again" in caplog.text
    other = ReferenceCache(tmp_path, {"parent": "another"})
    other.fetch(members, lambda block: np.zeros((len(block), 2), np.float32))
    cache.path(1).write_bytes(other.path(1).read_bytes())
    assert np.array_equal(cache.fetch(members, compute), whole)
    cache.path(0).unlink()
    cache.fetch(members, compute)
    assert asked[-1] == BLOCK_PAIRS


def test_a_kill_while_the_reference_is_computed_keeps_finished_blocks(tmp_path):  # trap T6
    members = [pair(number) for number in range(3 * BLOCK_PAIRS)]

    def dies(block):
        if block[0].id == str(BLOCK_PAIRS):
            raise KeyboardInterrupt
        return np.zeros((len(block), 2), np.float32)

    cache = ReferenceCache(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        cache.fetch(members, dies)
    asked = []
    cache.fetch(members, lambda block: asked.append(block[0].id) or np.zeros((len(block), 2), np.float32))
    assert asked == [str(BLOCK_PAIRS), str(2 * BLOCK_PAIRS)]


def test_scores_are_those_worked_out_by_hand():
    members = [pair(0, "a", (1, 1), (1,)), pair(1, "b", (1, 1), (1,))]
    reference = np.array([[-4.0, -2.0], [-4.0, -2.0]])
    found = scores(members, np.array([[-3.0, -3.0], [-6.0, -2.0]]), reference)
    # Margins (+1 - -1) = 2 and (-2 - 0) = -2; nats a token -1.5 against -3, and -3 against -2.
    assert found["margin_nats"] == 0.0
    assert found["accuracy"] == 0.5
    assert found["preference_nats_per_token"] == pytest.approx((1.5 - 1.0) / 2)
    assert found["preference_accuracy"] == 0.5
    assert found["chosen_change_nats_per_token"] == pytest.approx((0.5 - 1.0) / 2)
    assert (found["n_pairs"], found["n_templates"]) == (2, 2)
    # Two templates of one pair: Student's t of one degree of freedom, 12.7062, times the standard error of 2.
    assert found["margin_nats_high"] == pytest.approx(12.7062 * 2)
    twins = [pair(number, "ab"[number // 3]) for number in range(6)]
    policy = np.array([[-float(number), -1.0] for number in range(6)])
    found = scores(twins, policy, np.zeros((6, 2)))
    # Margins 1 - number: two templates with means 0 and -3, whose mean has a standard error of 1.5.
    bounds = found["margin_nats_low/en"], found["margin_nats_high/en"]
    assert bounds == pytest.approx((-1.5 - 12.7062 * 1.5, -1.5 + 12.7062 * 1.5))
    alone = scores(twins[:3], policy[:3], np.zeros((3, 2)))
    assert (alone["n_templates"], "margin_nats_low" in alone) == (1, False)
    tied = scores(members, reference, reference)
    assert (tied["margin_nats"], tied["accuracy"]) == (0.0, 0.5)


def test_the_interval_widens_when_pairs_of_a_template_go_together():  # trap M6
    values = np.repeat(np.random.default_rng(1).normal(size=12), 8)
    together = interval(values, [str(place // 8) for place in range(96)])
    alone = interval(values, [str(place) for place in range(96)])
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    # Student's t of 11 degrees of freedom is 2.201.
    assert together[1] - together[0] == pytest.approx(2 * 2.201 * values.std() / math.sqrt(11), rel=0.2)


def test_smoothing_is_refused_where_no_loss_reads_it_and_asked_for_where_one_does():
    assert [fault.path for fault in Dpo.check(dpo_config(label_smoothing=0.1), spec())] == ["label_smoothing"]
    for loss in ("robust", "exo_pair"):
        assert [fault.path for fault in Dpo.check(dpo_config(loss=loss), spec())] == ["label_smoothing"]
        assert Dpo.check(dpo_config(loss=loss, label_smoothing=0.1), spec()) == []
    assert Dpo.check(dpo_config(), spec()) == []


def test_a_plan_counts_both_sequences_of_a_pair():
    assert Dpo.plan(dpo_config(), spec(), 1)["tokens"] == 3 * 4 * 2 * 64


def test_batches_are_padded_to_lengths_at_which_a_row_does_not_feel_its_neighbours():
    batch = collator(0)([{"prompt_ids": [1, 2, 3], "chosen_ids": [4] * 40, "rejected_ids": [5]}])
    assert batch["input_ids"].shape == (2, 2 * PAD_MULTIPLE)
    assert PAD_MULTIPLE % 32 == 0
    assert batch["completion_mask"][1].nonzero().flatten().tolist() == [3]
    assert batch["attention_mask"].sum(1).tolist() == [43, 4]
