"""Fetching pinned packages: hash-checked, whole or absent, nothing written outside its folder. No network."""

import hashlib
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from data import fetch
from data.fetch import FetchError, fetch_package, licence, unpack
from data.source_config import Package

METADATA = "Metadata-Version: 2.1\nName: tale\nVersion: 1.0\nLicense-Expression: MIT\n"


def build_wheel(folder: Path, files: dict[str, str]) -> Path:
    """A minimal wheel ``tale-1.0`` that pip accepts."""
    path = folder / "tale-1.0-py3-none-any.whl"
    info = {
        "tale-1.0.dist-info/METADATA": METADATA,
        "tale-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tale-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, **info}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip's own settings name as the only place to find packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


def pinned(wheel: Path) -> Package:
    return Package(name="tale", version="1.0", sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "packages").iterdir() if path.suffix not in (".lock", ".digests")}


def test_a_package_is_fetched_by_pips_own_settings_and_only_once(index, tmp_path, monkeypatch):
    package = pinned(build_wheel(index, {"tale/text.json": '{"a": 1}'}))
    folder = fetch_package(package, tmp_path / "cache")
    assert (folder / "tale/text.json").read_text() == '{"a": 1}'
    assert licence(folder) == "MIT"
    monkeypatch.setattr(fetch, "_run_pip", lambda *_: pytest.fail("a cached package was downloaded again"))
    assert fetch_package(package, tmp_path / "cache") == folder


def test_another_hash_than_the_pinned_one_is_refused_and_leaves_nothing(index, tmp_path):
    wheel = build_wheel(index, {"tale/a.py": "a = 1\n"})
    package = pinned(wheel)
    build_wheel(index, {"tale/a.py": "a = 2\n"})
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(FetchError, match=f"must have sha256 {package.sha256}; got {actual}") as caught:
        fetch_package(package, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not any(not name.endswith(".partial") for name in names(tmp_path / "cache"))


def test_an_unknown_package_is_one_line_that_names_it_and_a_way_out(index, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    with pytest.raises(FetchError, match=r"package tale==1\.0 could not be downloaded.*--data DIR") as caught:
        fetch_package(Package(name="tale", version="1.0", sha256="0" * 64), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_failing_download_is_tried_three_times(index, tmp_path, monkeypatch):
    wheel = build_wheel(index, {"tale/a.py": "a = 1\n"})
    run_pip, attempts = fetch._run_pip, []

    def fails_twice(package, folder):
        attempts.append(folder)
        return "connection reset" if len(attempts) < 3 else run_pip(package, folder)

    monkeypatch.setattr(fetch, "_run_pip", fails_twice)
    assert (fetch_package(pinned(wheel), tmp_path / "cache", pause_s=0) / "tale/a.py").is_file()
    attempts.clear()
    monkeypatch.setattr(fetch, "_run_pip", lambda *_: attempts.append(1) or "connection reset")
    with pytest.raises(FetchError, match="in 3 attempts: connection reset"):
        fetch_package(pinned(wheel), tmp_path / "other", pause_s=0)
    assert len(attempts) == 3


def test_a_fetch_killed_at_the_last_moment_leaves_nothing_that_looks_whole(index, tmp_path, monkeypatch):
    package = pinned(build_wheel(index, {"tale/a.py": "a = 1\n"}))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_package(package, tmp_path / "cache")
    (left,) = names(tmp_path / "cache")
    assert left.endswith(".partial")
    (tmp_path / "cache/packages" / left / "content/tale/a.py").write_text("half")
    folder = fetch_package(package, tmp_path / "cache")
    assert (folder / "tale/a.py").read_text() == "a = 1\n"
    assert names(tmp_path / "cache") == {folder.name}


def test_a_cached_file_that_changed_is_refused_and_a_fresh_fetch_mends_it(index, tmp_path, monkeypatch):
    package = pinned(build_wheel(index, {"tale/a.py": "a = 1\n", "tale/b.py": "b = 1\n"}))
    folder = fetch_package(package, tmp_path / "cache")
    (folder / "tale/b.py").write_text("b = 2\n")
    (folder / "tale/__pycache__").mkdir()
    (folder / "tale/__pycache__/a.pyc").write_bytes(b"what an import leaves")
    monkeypatch.setattr(fetch, "_checked", set())
    with pytest.raises(
        FetchError, match=r"tale==1\.0: 1 of its files in the cache are .* tale/b\.py first; remove "
    ) as caught:
        fetch_package(package, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
    assert (fetch_package(package, tmp_path / "cache") / "tale/b.py").read_text() == "b = 1\n"


def test_a_file_that_was_added_to_the_cache_is_refused_too(index, tmp_path, monkeypatch):
    package = pinned(build_wheel(index, {"tale/a.py": "a = 1\n"}))
    folder = fetch_package(package, tmp_path / "cache")
    monkeypatch.setattr(fetch, "_checked", set())
    assert fetch_package(package, tmp_path / "cache") == folder
    (folder / "tale/planted.py").write_text("x = 1\n")
    monkeypatch.setattr(fetch, "_checked", set())
    with pytest.raises(FetchError, match=r"tale/planted\.py first"):
        fetch_package(package, tmp_path / "cache")


@pytest.mark.parametrize("name", ["../evil.py", "tale/../../evil.py", "/etc/evil.py", "..\\evil.py", "C:/evil.py"])
def test_an_entry_outside_the_folder_is_refused_before_anything_is_written(tmp_path, name):
    archive = tmp_path / "bad.whl"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("good.py", "fine")
        content.writestr(name, "evil")
    with pytest.raises(FetchError, match="would be written outside its folder"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_in_an_archive_is_refused(tmp_path):
    link = zipfile.ZipInfo("tale/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as content:
        content.writestr(link, "/etc/passwd")
    with pytest.raises(FetchError, match="refused"):
        unpack(tmp_path / "bad.whl", tmp_path / "out")


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "bad.whl").write_bytes(b"<html>not found</html>")
    with pytest.raises(FetchError, match=r"bad\.whl is not a readable archive"):
        unpack(tmp_path / "bad.whl", tmp_path / "out")


@pytest.mark.parametrize(
    ("header", "stated"),
    [
        ("License: BSD", "BSD"),
        ("Classifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("Summary: nothing", "not declared"),
    ],
)
def test_the_declared_licence_is_read(tmp_path, header, stated):
    (tmp_path / "x.dist-info").mkdir()
    (tmp_path / "x.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: x\n{header}\n")
    assert licence(tmp_path) == stated
