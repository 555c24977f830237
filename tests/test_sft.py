"""Supervised fine-tuning: one gradient however rows are shared out, no leaks, fp32 kept, the stop token learnt."""

from __future__ import annotations

import json

import numpy as np
import pytest
from finetune_cases import campaign
from sft_cases import ROWS, SHARED

from pipelines.run import main
from stages.pretrain import Pretrain, PretrainConfig
from stages.sft import SFT, SFTConfig

UNIT = 2.0**-24  # half the spacing of fp32 numbers at 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    # Shown with a test that misses what a life should have left behind.
    print(campaign("sft", folder, "probes"), (folder / "sft" / "alone.log").read_text()[-5000:])
    return folder / "sft"


@pytest.fixture(scope="module")
def rows(root):
    """One conversation's gradient at a time, by plain autograd, and the tokens of all: the independent reference."""
    stored = np.load(root / "rows.npz")
    names = [name.split("/", 1)[1] for name in stored.files if name.startswith("0/")]
    found = [{name: stored[f"{number}/{name}"] for name in names} for number in range(ROWS)]
    return found, int(stored["tokens"]), stored["scored"]


def excess(found, rows):
    """Largest error of any gradient entry over its bound; at most 1 when right.

    An entry is a sum over at most n tokens in some order, so two orders differ by at most 2 n u sum|terms| (Higham
    2002, section 4.2); sum|terms| is at least the conversations' absolute sum, taken at the parameter's largest entry,
    since the errors of what flows into small entries are those of the large ones.
    """
    reference, tokens, _ = rows
    worst = 0.0
    for name in reference[0]:
        parts = [row[name] for row in reference]
        bound = 2 * tokens * UNIT * max(sum(abs(part) for part in parts).max(), 1e-12)
        worst = max(worst, abs(found[name] - sum(parts)).max() / bound)
    return worst


@pytest.mark.parametrize(("engine", "ranks", "micro"), SHARED)
def test_one_by_eight_eight_by_one_and_two_ranks_by_four_give_the_same_gradients(root, rows, engine, ranks, micro):
    # trap T2
    assert excess(np.load(root / f"{engine}-{ranks}x{micro}.npz"), rows) <= 1


def test_the_gradient_bound_tells_a_mean_of_means_apart(root, rows):  # trap T2
    found, _, scored = rows
    naive = {
        name: sum(row[name] * scored.mean() / count for row, count in zip(found, scored, strict=True))
        for name in found[0]
    }
    assert excess(naive, rows) > 100


def test_packed_conversations_do_not_see_each_other(root):  # trap K3
    found = json.loads((root / "leak.json").read_text())
    assert found["rows"] == 1
    assert found["first_label"] == -100
    assert found["other_moved"] > 0.01
    assert found["own_gradient"] > 0
    assert (found["moved"], found["gradient"], found["by_positions"]) == (0, 0, 0)
    # Alone it is cut into other chunks: sums of at most 64 terms in another order, through three layers and a norm.
    assert found["from_alone"] <= 3 * 2 * 64 * UNIT * found["scale"]


def test_a_step_with_an_infinite_loss_is_left_out_counted_and_told(root):  # trap T3
    found = json.loads((root / "nonfinite.json").read_text())
    (skip,) = found["skips"]
    assert (skip["step"], skip["reason"], skip["skipped"]) == (2, "nonfinite", 1)
    assert (found["metrics"]["skipped_nonfinite"], found["metrics"]["steps"]) == (1, 4)
    assert np.isfinite(found["metrics"]["nats_per_token"])


def test_an_engine_that_casts_parameters_is_refused_by_name(root):  # trap K7
    text = (root / "cast.txt").read_text()
    assert text.startswith("RuntimeError")
    assert "A_log (an fp32 island) must stay float32" in text


def test_bf16_under_autocast_keeps_parameters_and_ends_well(root):  # trap K7
    record = json.loads((root / "bf16" / "stage.json").read_text())
    assert record["state"] == "done"


def test_a_stop_token_that_was_not_learnt_fails_the_run(root):  # traps T4 and T8
    assert "<|im_end|> has mean probability" in (root / "stop.txt").read_text()


def test_the_output_stops_at_a_turns_end_and_caches(root):  # trap T8
    output = root / "bf16" / "output"
    ids = json.loads((output / "info.json").read_text())["special_tokens"]
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert json.loads((output / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        ({"kind": "cosine"}, 1e-3), ({"kind": "constant"}, 1e-2),
        ({"kind": "wsd", "warmup_steps": 2, "decay_steps": 5}, 1e-3),
    ],
)  # fmt: skip
def test_a_peak_above_the_rate_at_which_the_parent_will_end_is_known_before_it_runs(schedule, last):  # trap T1
    parent = PretrainConfig(
        kind="pretrain", seq_len=8, global_batch_size=1, max_steps=10, lr=1e-2, min_lr_ratio=0.1, schedule=schedule
    )
    plain = {"kind": "sft", "from": "pretrain", "max_length": 8, "global_batch_size": 1, "max_steps": 2}
    for lr, rewarm, paths in ((last, False, []), (last * 1.01, False, ["lr"]), (last * 1.01, True, [])):
        config = SFTConfig.model_validate(plain | {"lr": lr, "rewarm": rewarm})
        assert [fault.path for fault in SFT.check_parent_configs(config, {"from_": parent})] == paths
    again = parent.model_copy(update={"lr": last * 1.01, "from_": "pretrain"})
    assert [fault.path for fault in Pretrain.check_parent_configs(again, {"from_": parent})] == ["lr"]


def test_the_plan_tells_a_peak_above_the_parents_last_rate(tmp_path, capsys):  # trap T1
    asked = ["--plan", "--runs", str(tmp_path), "--set", "sft.rewarm=false"]
    assert main(asked) == 2
    # The default recipe's pretraining ends at a tenth of 4e-3.
    assert "sft.lr: must be at most the parent's final lr 0.0004 on a warm start; got 0.0015" in capsys.readouterr().err
    assert main([*asked, "--set", "sft.lr=4e-4"]) == 0
