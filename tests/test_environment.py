"""Without the environment every command ends in one line: what is missing and what to run; never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import environment

ROOT = Path(__file__).resolve().parents[1]


def bare(*argv: str) -> subprocess.CompletedProcess[str]:
    """A command under this Python without its installed packages."""
    return subprocess.run([sys.executable, "-S", "-E", *argv], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "argv",
    [
        ["pipelines/run.py", "--plan"],
        ["pipelines/run.py", "--bogus"],
        ["pipelines/chat.py"],
        ["pipelines/compare.py", "a", "b"],
        ["pipelines/report.py"],
        ["-m", "pipelines.lineage", "show", "x"],
    ],
)
def test_a_python_without_packages_is_told_what_to_run(argv):
    ended = bare(*argv)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "has no pydantic, yaml, numpy, " in line
    assert ".venv/bin/python pipelines/" in line
    assert ended.stdout == ""


def test_help_needs_nothing():
    ended = bare("pipelines/run.py", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--plan" in ended.stdout


def test_the_line_names_make_where_there_is_no_environment_and_not_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "NEEDED", ("pydantic", "no_such_package"))
    argv = [str(tmp_path / "pipelines" / "run.py"), "--set", "a.b=secret"]
    assert environment.fault(argv) == (
        f"this Python ({sys.executable}) has no no_such_package: run `make env` in {tmp_path} once, then start it with "
        ".venv/bin/python pipelines/run.py"
    )
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert (environment.fault(argv) or "").endswith("no_such_package: start it with .venv/bin/python pipelines/run.py")
    monkeypatch.setattr(environment, "MIN_PYTHON", (99, 0))
    assert "older than 99.0" in (environment.fault(argv) or "")


def test_what_is_needed_is_what_the_project_declares():
    import re
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^A-Za-z0-9_-]", line)[0].lower() for line in declared}
    assert {"pyyaml" if name == "yaml" else name for name in environment.NEEDED} <= names
    assert environment.fault(["run.py"]) is None
