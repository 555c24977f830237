"""Folders that are whole or refused, by every kind of damage; flushed before they are renamed."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from damage import FILES, fill, flip

from stages.runtime import manifest
from stages.runtime.checkpoint import CheckpointError, seal, verify_manifest, write_manifest


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    folder.mkdir()
    fill(folder)
    write_manifest(folder)
    return folder


def test_the_manifest_lists_each_file_with_size_and_hash(whole):
    listed = json.loads((whole / "manifest.json").read_text())["files"]
    assert listed == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }


def test_the_digest_is_the_manifests_own_hash(whole):
    assert verify_manifest(whole) == hashlib.sha256((whole / "manifest.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_byte_is_found_and_named(whole, name, where):
    flip(whole / name, 0 if where == "first" else -1)
    with pytest.raises(CheckpointError, match=f"{name} has another SHA-256"):
        verify_manifest(whole)


def test_every_flipped_byte_of_the_manifest_itself_is_found(whole):
    content = (whole / "manifest.json").read_bytes()
    for offset in range(len(content)):
        flip(whole / "manifest.json", offset)
        with pytest.raises(CheckpointError, match=r"manifest\.json does not match its own checksum"):
            verify_manifest(whole)
        (whole / "manifest.json").write_bytes(content)
    verify_manifest(whole)


def test_all_faults_are_named_at_once(whole):
    (whole / "extra.pt").write_bytes(b"?")
    (whole / "rng.bin").unlink()
    os.truncate(whole / "engine/model.pt", 7)
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(whole)
    assert "rng.bin is missing" in str(caught.value)
    assert "extra.pt is not in the manifest" in str(caught.value)
    assert "engine/model.pt has 7 bytes, the manifest says 420" in str(caught.value)


def test_a_folder_without_manifest_was_never_finished(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing, so it was never finished"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize("target", ["/etc/hostname", "engine"])
def test_a_link_is_refused_even_when_its_content_would_match(whole, target):
    (whole / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"link must be a plain file; got a symbolic link"):
        verify_manifest(whole)


def test_a_sealed_folder_was_flushed_before_it_was_renamed(tmp_path, monkeypatch):  # trap O2
    temporary = tmp_path / "output.tmp"
    temporary.mkdir()
    fill(temporary)
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    digest = seal(temporary, tmp_path / "output")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {f"output.tmp/{name}" for name in FILES} <= set(before)
    assert before.index("output.tmp/manifest.json.tmp") > max(before.index(f"output.tmp/{name}") for name in FILES)
    assert {"output.tmp", "output.tmp/engine"} <= set(before)
    assert after == ["."]
    assert verify_manifest(tmp_path / "output") == digest
    assert not temporary.exists()


def test_an_extended_run_may_seal_over_its_older_output(tmp_path):
    for content in (b"short", b"longer"):
        temporary = tmp_path / "output.tmp"
        temporary.mkdir()
        (temporary / "weights").write_bytes(content)
        seal(temporary, tmp_path / "output")
    assert (tmp_path / "output/weights").read_bytes() == b"longer"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


class Killed(BaseException):
    """Stands for a kill: nothing below may catch it."""


@pytest.mark.parametrize("deaths", ["second rename", "removal"])
def test_what_a_crash_while_an_older_output_gave_way_left_goes_with_the_next_seal(tmp_path, monkeypatch, deaths):
    # trap O2
    def attempt(content: bytes) -> str:
        (tmp_path / "output.tmp").mkdir(exist_ok=True)
        (tmp_path / "output.tmp/weights").write_bytes(content)
        return seal(tmp_path / "output.tmp", tmp_path / "output")

    def killed(*_: object) -> None:
        raise Killed

    attempt(b"short")
    real_rename = os.rename
    with monkeypatch.context() as patch:
        if deaths == "removal":
            patch.setattr(manifest.shutil, "rmtree", killed)
        else:
            patch.setattr(os, "rename", lambda a, b: killed() if a.name == "output.tmp" else real_rename(a, b))
        with pytest.raises(Killed):
            attempt(b"longer")
    assert (tmp_path / "output.removed.tmp").is_dir()
    if deaths == "removal":
        assert (tmp_path / "output/weights").read_bytes() == b"longer", "the new one stands before the old one goes"
    digest = attempt(b"longest")
    assert verify_manifest(tmp_path / "output") == digest
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_sealing_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be a directory to seal; got nothing"):
        seal(tmp_path / "output.tmp", tmp_path / "output")
