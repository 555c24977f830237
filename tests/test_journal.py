"""metrics.jsonl is the truth: strict JSON, no row lost to a kill, lost futures told from what holds (TRAPS O5, M3)."""

import json
import logging
import math
import os
import subprocess
import sys

import pytest
from tracked_run import ROOT, run_child, tracker_in

from stages.runtime import journal
from stages.runtime.journal import Journal, read_metrics


def test_a_row_is_strict_json_with_event_step_and_utc_time(tmp_path):
    tracker = tracker_in(tmp_path)
    tracker.log("train", 3, {"loss_nats_per_token": 1.5, "note": "नमस्ते", "n_tokens": 7})
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row.pop("time").endswith("+00:00")
    assert row == {"event": "train", "step": 3, "loss_nats_per_token": 1.5, "note": "नमस्ते", "n_tokens": 7}


def test_non_finite_values_are_valid_json_and_come_back_as_floats(tmp_path):
    tracker = tracker_in(tmp_path)
    tracker.log("train", 1, {"loss": math.nan, "norm": math.inf, "gap": -math.inf, "lr": 0.1})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert stored["loss"] is None
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"])
    assert (row["norm"], row["gap"], row["lr"]) == (math.inf, -math.inf, 0.1)
    assert "nonfinite" not in row


def test_scalars_of_other_libraries_are_unwrapped_and_the_rest_is_refused(tmp_path):
    import numpy

    tracker = tracker_in(tmp_path)
    tracker.log("train", 1, {"a": numpy.float32(0.5), "b": numpy.int64(3), "c": numpy.bool_(True)})
    (row,) = read_metrics(tmp_path)
    assert (row["a"], row["b"], row["c"]) == (0.5, 3, True)
    with pytest.raises(ValueError, match="'losses' must be a number or a string; got list"):
        tracker.log("train", 2, {"losses": [1.0, 2.0]})
    with pytest.raises(ValueError, match="metric 'step'"):
        tracker.log("train", 2, {"step": 1})
    assert len(read_metrics(tmp_path)) == 1


def test_a_score_without_the_hash_of_its_set_is_refused(tmp_path):  # trap M3
    tracker = tracker_in(tmp_path)
    with pytest.raises(ValueError, match="heldout_hash"):
        tracker.log("eval", 1, {"bpb/de": 1.2})
    tracker.log("eval", 1, {"bpb/de": 1.2, "heldout_hash": "9f"})
    assert read_metrics(tmp_path)[0]["heldout_hash"] == "9f"


def test_sigkill_loses_no_row_that_was_logged(tmp_path):  # trap O5
    code = """
import sys
from pathlib import Path
from stages.runtime.tracking import open_tracker
tracker = open_tracker(Path(sys.argv[1]), pipeline="p", stage="s", kind="k", key="0" * 64, config={}, mode="disabled")
step = 0
while True:
    step += 1
    tracker.log("train", step, {"loss": 1 / step})
    print(step, flush=True)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    acknowledged = 0
    for line in child.stdout:
        acknowledged = int(line)
        if acknowledged == 200:
            child.kill()  # what it still says until it is dead counts as logged too
    child.stdout.close()
    child.wait()
    assert acknowledged >= 200
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps[:acknowledged] == list(range(1, acknowledged + 1))


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_row_is_cut_off_and_said(tmp_path, caplog, cut):
    first = tracker_in(tmp_path)
    first.log("train", 1, {"loss": 2.0})
    first.log("train", 2, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]  # readers pass over it meanwhile
    with caplog.at_level(logging.WARNING):
        tracker_in(tmp_path).log("train", 2, {"loss": 1.0})
    assert "torn end after line 1" in caplog.text
    for line in path.read_text().splitlines():
        json.loads(line)
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == [1, 2]
    assert "torn end" in read_metrics(tmp_path, "alert")[0]["text"]


def test_blocks_left_empty_by_a_power_cut_are_cut_off(tmp_path):
    tracker_in(tmp_path).log("train", 1, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 100 + b"\n" + b"\0" * 50)
    assert f"cut off {151} bytes" in Journal(tmp_path).repaired
    assert path.read_bytes() == whole


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    tracker = tracker_in(tmp_path)
    for step in (1, 2, 3):
        tracker.log("train", step, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"{garbage", lines[2], b""]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 must be a JSON row"):
        read_metrics(tmp_path)


def test_a_row_that_the_disk_takes_in_part_is_taken_back_and_raised(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from stages.runtime.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.append("train", 1, {"loss": 1.0})
size = journal.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
try:
    journal.append("train", 2, {"loss": 1.0})
except OSError as error:
    print("refused", journal.path.stat().st_size == size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(journal.append("train", 3, {"loss": 1.0}))
"""
    assert run_child(code, str(tmp_path)).stdout.split("\n")[:2] == ["refused True", "2"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_resume_supersedes_the_lost_future_and_the_last_row_of_a_step_holds(tmp_path):  # trap T6
    tracker = tracker_in(tmp_path)
    for step in range(1, 6):
        tracker.log("train", step, {"loss": 100.0 + step})
    tracker.log("eval", 4, {"nats_per_token": 9.0})
    tracker.alert("the disk is slow")
    again = tracker_in(tmp_path)
    again.resume(2)
    again.log("train", 3, {"loss": 3.0})
    again.log("train", 3, {"loss": 3.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path, "train")] == [(1, 101.0), (2, 102.0), (3, 3.5)]
    assert read_metrics(tmp_path, "eval") == []
    assert [row["event"] for row in read_metrics(tmp_path)] == ["train", "train", "alert", "resume", "train"]


def test_a_run_that_was_resumed_twice_keeps_each_surviving_piece(tmp_path):
    tracker = tracker_in(tmp_path)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        tracker.log("train", step, {"loss": loss})
    tracker.resume(2)
    tracker.log("train", 3, {"loss": 30.0})
    tracker.log("train", 4, {"loss": 40.0})
    tracker.resume(3)
    tracker.log("train", 4, {"loss": 400.0})
    assert [row["loss"] for row in read_metrics(tmp_path, "train")] == [1.0, 2.0, 30.0, 400.0]


def test_rows_reach_the_disk_at_intervals_and_at_once_when_flushed(tmp_path, monkeypatch):
    synced = []
    now = [0.0]
    monkeypatch.setattr(journal.os, "fsync", lambda descriptor: synced.append(now[0]))
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    tracker = tracker_in(tmp_path)
    synced.clear()
    for now[0] in (1.0, 2.0, 5.0, 6.0):
        tracker.log("train", int(now[0]), {"loss": 1.0})
    assert synced == [5.0]
    tracker.flush()
    assert synced == [5.0, 6.0]


def test_ranks_other_than_zero_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for tracker in (tracker_in(tmp_path / "a", rank=3), tracker_in(tmp_path / "b")):
        tracker.log("train", 1, {"loss": 1.0})
        tracker.use_artifact("x", tmp_path, "00")
        tracker.log_artifact("x", "model", tmp_path, "00", {})
        tracker.alert("quiet")
        tracker.resume(1)
        tracker.flush()
        tracker.finish("done")
    assert list(tmp_path.iterdir()) == []
