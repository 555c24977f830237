"""sync replays journal and edges into W&B, in order, once, and owns up to what it could not send."""

import json
import os
import shutil
import socket
import sys
import types

import pytest
from tracked_run import sealed, tracker_in

from stages.base import ConfigError
from stages.runtime import mirror
from stages.runtime.artifact import process_started
from stages.runtime.journal import current_rows
from stages.runtime.sync import sync


class FakeServer:
    """A stand-in for W&B's client and server: keeps runs by id, and their summaries over resumption."""

    def __init__(self):
        self.rows, self.links, self.opened, self.references = {}, [], [], {}
        self.fail_after = None

    def Artifact(self, name, type, metadata):  # noqa: N802
        def add_reference(uri, checksum):
            assert checksum
            self.references.setdefault((name, type), set()).add(uri)

        return types.SimpleNamespace(name=name, add_reference=add_reference)

    def Settings(self, **values):  # noqa: N802
        return values

    def setup(self, settings):
        pass

    def init(self, *, id, mode, resume, **facts):
        assert (mode, resume) == ("online", "allow")
        rows = self.rows.setdefault(id, [])
        self.opened.append(facts)
        server = self

        class Run:
            summary = dict(rows[-1]) if rows else {}

            def define_metric(self, name, **facts):
                pass

            def log(self, values):
                if server.fail_after is not None and len(rows) >= server.fail_after:
                    raise ConnectionError("the network went away")
                rows.append(values)

            def use_artifact(self, artifact):
                server.links.append(("used", facts["name"], artifact.name))

            def log_artifact(self, artifact):
                server.links.append(("logged", facts["name"], artifact.name))

            def finish(self, exit_code):
                pass

        return Run()


@pytest.fixture
def server(monkeypatch, tmp_path):
    fake = FakeServer()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for variable in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(variable, "restored after the test")
    monkeypatch.setenv("WANDB_API_KEY", "f00dfeed" * 5)
    return fake


def two_stages(runs):
    """A finished tokenize and a pretrain made from it, whose future after step 2 was lost."""
    # `a` comes first by name and `z` by descent.
    parent, child = runs / "demo" / "z-00000000", runs / "demo" / "a-11111111"
    made = sealed(parent / "output")
    first = tracker_in(parent, stage="z", kind="tokenize", key="0" * 64)
    first.log("tokenize", 1, {"tokens": 10})
    first.log_artifact("z-00000000", "tokens", parent / "output", made, {})
    first.finish("done")
    second = tracker_in(child, stage="a", key="1" * 64)
    for step in (1, 2, 3):
        second.log("train", step, {"loss": 10.0 + step})
    second.resume(2)
    second.log("train", 3, {"loss": 3.0})
    second.use_artifact("z-00000000", parent / "output", made, "tokens")
    for step in (1, 2):
        sealed(child / "checkpoints" / f"step-0000000{step}", content=bytes([step]))
        second.log_checkpoint(step, child / "checkpoints" / f"step-0000000{step}")
    shutil.rmtree(child / "checkpoints" / "step-00000001")
    second.finish("saved")
    return parent, child


def test_sync_sends_what_holds_parents_first_and_names_what_is_gone(tmp_path, server):
    two_stages(tmp_path)
    lines = sync(tmp_path)
    assert [line.split(":")[0] for line in lines] == ["z-00000000", "a-11111111"]
    assert [facts["group"] for facts in server.opened] == ["demo", "demo"]
    sent = [row for rows in server.rows.values() for row in rows if "train/loss" in row]
    assert [(row["train/step"], row["train/loss"]) for row in sent] == [(1, 11.0), (2, 12.0), (3, 3.0)]
    assert server.links == [
        ("logged", "z-00000000", "z-00000000"),
        ("used", "a-11111111", "z-00000000"),
        ("logged", "a-11111111", "a-11111111-checkpoint"),
    ]
    assert lines[1].endswith("no longer on the disk: a-11111111-checkpoint")


def test_a_checkpoint_is_referenced_by_its_manifest_and_an_output_by_its_folder(tmp_path, server):
    parent, child = two_stages(tmp_path)
    sync(tmp_path)
    step_2 = child / "checkpoints" / "step-00000002" / "manifest.json"
    assert server.references == {
        ("z-00000000", "tokens"): {f"file://{parent / 'output'}"},
        ("a-11111111-checkpoint", "checkpoint"): {f"file://{step_2}"},
    }


def test_sync_sends_the_resolved_config_without_secrets(tmp_path, server):
    parent, _ = two_stages(tmp_path)
    record = {"format": 1, "state": "done", "config": {"lr": 0.1, "hf_token": "abc"}, "identity": {"kind": "tokenize"}}
    (parent / "stage.json").write_text(json.dumps(record))
    sync(tmp_path)
    assert server.opened[0]["config"] == {"kind": "tokenize", "config": {"lr": 0.1, "hf_token": "[redacted]"}}


def test_sync_twice_or_after_a_broken_one_sends_no_row_twice(tmp_path, server):
    _, child = two_stages(tmp_path)
    server.fail_after = 2
    assert "FAILED, ConnectionError: the network went away" in sync(tmp_path)[1]
    server.fail_after = None
    sync(tmp_path)
    again = sync(tmp_path)
    expected = [row.number for row in current_rows(child)]
    assert [row[mirror.ROW] for row in server.rows[list(server.rows)[1]]] == expected
    assert all(" 0 rows sent" in line for line in again)


def test_sync_leaves_a_running_stage_alone_and_takes_a_killed_one(tmp_path, server):
    parent, child = two_stages(tmp_path)
    alive = {"pid": os.getpid(), "pid_started": process_started(os.getpid())}
    for directory, process in ((parent, alive), (child, {**alive, "pid_started": "0"})):
        record = {"format": 1, "state": "running", "host": socket.gethostname(), **process}
        (directory / "stage.json").write_text(json.dumps(record))
    running, killed = sync(tmp_path)
    assert "is running" in running
    assert "rows sent" in killed


def test_sync_without_a_key_or_without_artifacts_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="set WANDB_API_KEY"):
        sync(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with pytest.raises(ConfigError, match=r"must hold artifacts with lineage\.json"):
        sync(tmp_path)
