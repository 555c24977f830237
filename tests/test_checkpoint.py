"""Checkpoints: the newest that is whole comes back; nothing is lost when a save fails."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from damage import FILES, fill, flip

from stages.runtime import checkpoint, manifest
from stages.runtime.checkpoint import CheckpointError, CheckpointStore, assert_own


def store_with(tmp_path: Path, *steps: int, keep: int = 5) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep)
    for step in steps:
        store.save(step, fill, {"cursor": step * 10})
    return store


def test_the_newest_comes_back_with_its_files_and_state(tmp_path):
    store = store_with(tmp_path, 10, 20)
    step, folder, state = store.newest()
    assert (step, state) == (20, {"cursor": 200})
    assert folder == tmp_path / "checkpoints/step-00000020"
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000020\n"


def test_floats_in_the_state_come_back_bit_for_bit(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    values = {"loss": 0.1 + 0.2, "tiny": 5e-324, "bad": float("inf")}
    store.save(1, fill, values)
    assert store.newest()[2] == values


def test_an_empty_store_gives_nothing(tmp_path):
    assert CheckpointStore(tmp_path / "checkpoints", keep=1).newest() is None


@pytest.mark.parametrize("name", [*FILES, "state.json", "manifest.json"])
def test_a_faulty_newest_gives_way_to_the_one_before_and_is_named(tmp_path, caplog, name):  # trap O2
    store = store_with(tmp_path, 10, 20)
    flip(store.path(20) / name, 1)
    with caplog.at_level(logging.WARNING):
        step, folder, _ = store.newest()
    assert (step, folder) == (10, store.path(10))
    assert name in caplog.text
    assert "step-00000020" in caplog.text
    assert "falling back to step-00000010" in caplog.text


def test_when_none_verifies_the_run_does_not_silently_start_over(tmp_path):
    store = store_with(tmp_path, 10, 20)
    (store.path(10) / "rng.bin").unlink()
    flip(store.path(20) / "rng.bin", 0)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint .* can be trusted.*rng\.bin has another.*rng\.bin is missing"
    ):
        store.newest()


@pytest.mark.parametrize("damaged", [10, 30])
def test_a_damaged_one_beside_whole_ones_of_another_course_does_not_end_the_run(tmp_path, caplog, damaged):
    store = store_with(tmp_path, 10, 20, 30)
    flip(store.path(damaged) / "rng.bin", 0)
    with caplog.at_level(logging.WARNING):
        assert store.newest(lambda step, state: False) is None
    assert f"step-{damaged:08d}: rng.bin has another SHA-256" in caplog.text


def test_old_ones_go_and_pinned_ones_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 7):
        store.save(step, fill, {}, pin=step == 2)
    assert store.steps() == [2, 5, 6]


def test_after_a_fall_back_the_faulty_future_never_counts_as_newest(tmp_path):
    store = store_with(tmp_path, 20, 30)
    flip(store.path(30) / "rng.bin", 0)
    assert store.newest()[0] == 20
    store.keep = 1
    store.save(28, fill, {"cursor": 280})
    assert store.steps() == [28]
    assert (store.directory / "step-00000030.aside").is_dir()


def test_a_faulty_one_of_the_same_step_is_replaced(tmp_path):
    store = store_with(tmp_path, 10, 20)
    flip(store.path(20) / "rng.bin", 0)
    store.save(20, fill, {"cursor": 1})
    assert store.newest()[2] == {"cursor": 1}


def test_saving_a_step_twice_keeps_the_whole_one(tmp_path):
    store = store_with(tmp_path, 10)
    store.save(10, lambda folder: pytest.fail("nothing to write"), {})
    assert store.newest()[2] == {"cursor": 100}


def test_leftovers_of_a_crash_are_swept_by_the_next_save_and_nothing_else(tmp_path):
    store = store_with(tmp_path, 10)
    for name in ("step-00000020.tmp", "step-00000005.removed.tmp"):
        (store.directory / name / "engine").mkdir(parents=True)
    for name in ("step-00000020.pin.tmp", "latest.tmp", "notes.tmp"):
        (store.directory / name).touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.directory / "step-00000030.tmp").symlink_to(outside)
    assert store.newest()[0] == 10
    store.save(11, fill, {})
    left = {path.name for path in store.directory.iterdir() if path.name.endswith(".tmp")}
    assert left == {"notes.tmp", "step-00000030.tmp"}
    assert outside.is_dir()


def test_going_on_ends_what_a_killed_save_left_half_done(tmp_path):
    store = store_with(tmp_path, 10, 20, 30)
    (store.directory / "step-00000040.tmp").mkdir()
    (store.directory / "latest").write_text("step-00000020\n")
    store.keep = 2
    store.set_aside_after(30)
    assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step-00000020", "step-00000030"]
    assert (store.directory / "latest").read_text() == "step-00000030\n"


def test_going_on_from_behind_a_faulty_one_keeps_the_one_that_verified(tmp_path):
    store = store_with(tmp_path, 10, 20)
    flip(store.path(20) / "rng.bin", 0)
    store.keep = 1
    store.set_aside_after(store.newest()[0])
    assert store.steps() == [10]
    assert (store.directory / "step-00000020.aside").is_dir()


def test_a_whole_checkpoint_of_another_course_is_passed_over_not_deleted(tmp_path):
    store = store_with(tmp_path, 10, 20)
    assert store.newest(lambda step, state: state["cursor"] < 150)[0] == 10
    assert store.newest(lambda step, state: False) is None
    store.set_aside_after(-1)
    assert store.steps() == []
    assert (store.directory / "step-00000010.aside").is_dir()


def test_reading_alone_changes_nothing_on_disk(tmp_path):
    store = store_with(tmp_path, 10)
    (store.directory / "step-00000020.tmp").mkdir()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    store.newest()
    assert store.steps() == [10]
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_must_leave_one(tmp_path, keep):
    with pytest.raises(ValueError, match=f"keep must be at least 1; got {keep}"):
        CheckpointStore(tmp_path, keep)


def test_state_that_is_not_plain_data_is_refused_before_anything_is_written(tmp_path):
    store = store_with(tmp_path, 10)
    with pytest.raises(TypeError):
        store.save(20, fill, {"generator": object()})
    assert [path.name for path in store.directory.iterdir() if "20" in path.name] == []


def assert_only(store: CheckpointStore, step: int) -> None:
    assert store.newest()[0] == step
    assert store.steps() == [step]
    assert [path.name for path in store.directory.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space, lower keep_checkpoints"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free some space, lower keep_checkpoints"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "free some space, lower keep_checkpoints"),
        (PermissionError(errno.EACCES, "Permission denied"), "right to write there"),
        (OSError(errno.EROFS, "Read-only file system"), "right to write there"),
    ],
)
def test_a_disk_that_refuses_loses_nothing_and_says_what_to_do(tmp_path, error, way_out):
    store = store_with(tmp_path, 10)

    def write(folder: Path) -> None:
        fill(folder)
        raise error

    with pytest.raises(CheckpointError) as caught:
        store.save(20, write, {})
    assert_only(store, 10)
    size = sum(len(content) for content in FILES.values()) + (store.path(10) / "state.json").stat().st_size
    assert f"needs about {size} bytes" in str(caught.value)
    assert "bytes are free" in str(caught.value)
    assert "step-00000010 is untouched" in str(caught.value)
    assert way_out in str(caught.value)


def test_a_disk_that_fills_up_while_the_manifest_is_written_loses_nothing(tmp_path, monkeypatch):
    store = store_with(tmp_path, 10)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(manifest, "write_atomic", full)
    with pytest.raises(CheckpointError, match=r"step 20 could not be saved.*No space left"):
        store.save(20, fill, {})
    assert_only(store, 10)


def test_a_fault_of_the_program_is_not_dressed_up_as_one_of_the_disk(tmp_path):
    store = store_with(tmp_path, 10)

    def write(folder: Path) -> None:
        fill(folder)
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        store.save(20, write, {})
    assert_only(store, 10)


def test_too_little_space_is_seen_before_anything_is_written(tmp_path):
    store = store_with(tmp_path, 10)
    with pytest.raises(
        CheckpointError, match=r"needs 1152921504606846976 bytes; \d+ bytes are free; nothing was written"
    ):
        store.save(20, lambda folder: pytest.fail("wrote"), {}, expected_bytes=1 << 60)
    assert_only(store, 10)


FULL = """
import resource, signal, sys
from pathlib import Path
from stages.runtime.checkpoint import CheckpointError, CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), 5)
store.save(1, lambda folder: (folder / "a").write_bytes(bytes(1000)), {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
try:
    store.save(2, lambda folder: (folder / "a").write_bytes(bytes(1_000_000)), {})
except CheckpointError as error:
    print(error)
"""


def test_a_write_that_the_kernel_cuts_short_loses_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert "checkpoint step 2 could not be saved" in run.stdout
    assert "File too large" in run.stdout
    assert_only(CheckpointStore(tmp_path, 5), 1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be written to .*checkpoints"):
        CheckpointStore(tmp_path / "checkpoints", 1).save(1, fill, {})


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    store = store_with(tmp_path, 10, keep=1)

    def refuse(directory: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "discard", refuse)
    store.save(20, fill, {})
    assert store.newest()[0] == 20
    assert "step-00000010 could not be deleted" in caplog.text


def test_engine_state_is_loaded_from_the_stages_own_folder(tmp_path):  # trap O3
    store = store_with(tmp_path / "mine", 10)
    assert_own(store.path(10), tmp_path / "mine")


def test_engine_state_of_another_stage_is_refused(tmp_path):  # trap O3
    theirs = store_with(tmp_path / "theirs", 10)
    with pytest.raises(CheckpointError, match=r"own folder .*mine; got .*theirs"):
        assert_own(theirs.path(10), tmp_path / "mine")
    with pytest.raises(CheckpointError):
        assert_own(tmp_path / "mine/../theirs/checkpoints", tmp_path / "mine")


def test_engine_state_reached_through_a_link_is_refused_and_passed_over(tmp_path, caplog):  # trap O3
    mine, theirs = store_with(tmp_path / "mine", 10), store_with(tmp_path / "theirs", 20)
    mine.path(20).symlink_to(theirs.path(20))
    with pytest.raises(CheckpointError):
        assert_own(mine.path(20), tmp_path / "mine")
    assert mine.newest()[0] == 10
    assert "only loaded from this stage's own folder" in caplog.text


def test_a_checkpoints_folder_that_is_a_link_is_not_ones_own(tmp_path):  # trap O3
    store_with(tmp_path / "theirs", 20)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/checkpoints").symlink_to(tmp_path / "theirs/checkpoints")
    with pytest.raises(CheckpointError, match=r"only loaded from this stage's own folder .*mine"):
        CheckpointStore(tmp_path / "mine/checkpoints", keep=1).newest()


def test_an_artifact_below_a_linked_folder_is_still_ones_own(tmp_path):
    store = store_with(tmp_path / "disk", 10)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert_own(tmp_path / "runs/checkpoints" / store.path(10).name, tmp_path / "runs")
    assert CheckpointStore(tmp_path / "runs/checkpoints", keep=1).newest()[0] == 10
