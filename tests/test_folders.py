"""A folder that is named wrongly is said to be wrong: never taken for an empty one, never for a file."""

import pytest

from pipelines import chat, compare, lineage, report, run

COMMANDS = {
    "status": lambda runs: run.main(["--status", "--runs", runs]),
    "chat": lambda runs: chat.main(["--runs", runs]),
    "compare": lambda runs: compare.main(["sft", "dpo", "--runs", runs]),
    "report": lambda runs: report.main(["--runs", runs]),
    "show": lambda runs: lineage.main(["show", "--runs", runs]),
    "show one": lambda runs: lineage.main(["show", "sft", "--runs", runs]),
    "verify": lambda runs: lineage.main(["verify", "--runs", runs]),
    "diff": lambda runs: lineage.main(["diff", "sft", "dpo", "--runs", runs]),
}


@pytest.mark.parametrize("what", ["a file", "not there"])
@pytest.mark.parametrize("command", COMMANDS)
def test_artifacts_are_not_looked_for_where_no_folder_is(command, what, tmp_path, capsys):
    runs = tmp_path / "runs"
    if what == "a file":
        runs.write_text("text")
    assert COMMANDS[command](str(runs)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        f"--runs: must be the folder of artifacts; got {runs}, which is "
        + ("a file; name another" if what == "a file" else "not there; name the one that run.py was given")
    ]
    assert what == "a file" or not runs.exists()


def test_a_plan_into_a_file_is_refused_and_one_into_a_new_folder_is_not(tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    assert run.main(["--plan", "--runs", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert run.main(["--plan", "--runs", str(tmp_path / "new")]) == 0


def test_a_fresh_clone_has_no_runs_and_may_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.main(["--status", "--runs", str(tmp_path / "runs")]) == 0
    assert "never run" in capsys.readouterr().out


def gguf(folder, capsys):
    assert chat.main(["--gguf", str(folder)]) == 2
    return capsys.readouterr().err.strip()


def test_a_folder_in_place_of_a_gguf_file_is_called_one_and_its_files_are_named(tmp_path, capsys):
    start = f"--gguf: must be a GGUF file; got {tmp_path}, which is a folder"
    assert gguf(tmp_path, capsys) == f"{start} without any; name the file, or run the export stage"
    (tmp_path / "gguf").mkdir()
    for name in ("b", "a"):
        (tmp_path / "gguf" / f"{name}.gguf").touch()
    assert gguf(tmp_path, capsys) == f"{start}; name one of {tmp_path}/gguf/a.gguf, {tmp_path}/gguf/b.gguf"
    for name in ("c", "d", "e", "f"):
        (tmp_path / f"{name}.gguf").touch()
    assert gguf(tmp_path, capsys).endswith(" and 2 more")
    assert gguf(tmp_path / "none.gguf", capsys).endswith("none.gguf, which is not there")
