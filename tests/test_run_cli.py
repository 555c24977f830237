"""The operator's command line: what it imports, what it refuses, what the launcher adds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_chain import STAGES, write_recipe

from pipelines.run import main, parse, without_local_rank

ROOT = Path(__file__).resolve().parent.parent


def loaded_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has imported after `code`."""
    heavy = ["torch", "deepspeed", "transformers", "datatrove", "wandb", "pandas"]
    program = f"import sys\n{code}\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))


def test_help_imports_nothing_heavy():
    code = "from pipelines.run import main\ntry: main(['--help'])\nexcept SystemExit as end: assert end.code == 0"
    assert loaded_after(code) == set()


def test_plan_imports_nothing_heavy():
    assert loaded_after("from pipelines.run import main\nassert main(['--plan']) == 0") == set()


def test_the_registry_imports_nothing_heavy():
    assert loaded_after("import stages") == set()


def test_the_launchers_local_rank_is_taken_out():
    expected = ["--stage", "x"]
    assert without_local_rank(["--local_rank=3", *expected]) == expected
    assert without_local_rank(["--local_rank", "3", *expected]) == expected
    assert without_local_rank(["--local-rank=0", "--stage", "x", "--local_rank", "1"]) == expected
    assert without_local_rank(["--local_rank", *expected]) == expected
    assert parse(["--local_rank=0", "--stage", "train"]).stage == ["train"]


def test_as_a_script_the_root_takes_the_place_of_its_folder(tmp_path):
    program = (
        "import runpy, sys\n"
        f"sys.path[0] = {str(ROOT / 'pipelines')!r}\n"
        "sys.argv = ['run.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'pipelines' / 'run.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sys.path[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(ROOT)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "one of the arguments --stage --all --plan --status --sync is required"),
        (["--plan", "--all"], "not allowed with"),
        (["--stag", "train"], "see --help"),
        (["--plan", "--nothing"], "unknown option --nothing"),
        (["--stage", "train", "--from", "x"], "--from and --until belong to --all"),
        (["--stage", "train", "--num_gpus", "2"], "give it to deepspeed"),
        (["--all", "--num_gpus", "0"], "must be from 1 to 100000; got 0"),
        (["--all", "--json"], "--json belongs to"),
    ],
)
def test_a_wrong_command_is_one_line_and_2(argv, words, capsys):
    assert main(argv, STAGES) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("argv", [["--stage", "trian"], ["--all", "--from", "trian"], ["--all", "--until", "trian"]])
def test_an_unknown_stage_is_named_with_the_nearest(cli, argv, capsys):
    assert cli(*argv) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", ["two", "2"])
def test_ranks_without_a_launcher_are_refused_in_one_line(cli, monkeypatch, capsys, ranks):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert cli("--stage", "train") == 2
    err = capsys.readouterr().err
    assert "start through the launcher" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("mode", [["--all"], ["--stage", "gather"]])
def test_a_runs_folder_that_is_a_file_is_one_line(tmp_path, capsys, mode):
    (tmp_path / "afile").write_text("")
    recipe = write_recipe(tmp_path)
    assert main([*mode, "--pipeline", str(recipe), "--runs", str(tmp_path / "afile")], STAGES) == 2
    assert "--runs must be a folder that can be written; got" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} {ROOT / 'pipelines' / 'run.py'} --plan --json | head -1"
    ended = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert ended.stderr == ""
