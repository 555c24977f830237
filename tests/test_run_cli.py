"""The operator's command: exit codes, output, what is left in `stage.json`, several ranks, two runs at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_chain import RECIPE, STAGES, write_recipe

from pipelines.chain import build_chain
from pipelines.recipe import load_recipe
from pipelines.run import main, parse, without_local_rank
from stages.runtime import artifact
from stages.runtime.artifact import canonical_digest, read_record, write_record
from stages.runtime.lifecycle import Surroundings, follow
from stages.runtime.lock import hold
from stages.runtime.manifest import verify_manifest

ROOT = Path(__file__).resolve().parent.parent
FAKE_RUN = ROOT / "tests" / "fake_run.py"


@pytest.fixture
def cli(tmp_path):
    def run(*argv, text=RECIPE):
        return main([*argv, "--pipeline", str(write_recipe(tmp_path, text)), "--runs", str(tmp_path / "runs")], STAGES)

    return run


def records(tmp_path):
    found = [read_record(path.parent) for path in (tmp_path / "runs").rglob("stage.json")]
    return {record["stage"]: record for record in found}


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
    assert parse(["--local_rank=0", "--stage", "train"]).stage == "train"


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
        (["--plan", "--nothing"], "unrecognized arguments: --nothing"),
        (["--stage", "train", "--from", "x"], "--from and --until belong to --all"),
        (["--stage", "train", "--num_gpus", "2"], "give it to deepspeed"),
        (["--all", "--num_gpus", "0"], "must be at least 1"),
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


def test_a_stage_runs_after_the_data_stages_that_it_needs_and_a_second_time_says_done(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    assert {name: record["state"] for name, record in records(tmp_path).items()} == {"gather": "done", "train": "done"}
    assert "trained" in capsys.readouterr().out
    assert cli("--stage", "train") == 0
    assert "already done" in capsys.readouterr().out
    assert records(tmp_path)["train"]["attempts"] == 1


def test_the_record_holds_what_the_contract_promises(cli, tmp_path):
    assert cli("--stage", "train") == 0
    found = records(tmp_path)
    train, gather = found["train"], found["gather"]
    assert canonical_digest(train["identity"]) == train["key"]
    assert train["parents"]["data"]["digest"] == gather["output_digest"]
    directory = next((tmp_path / "runs" / "toy").glob("train-*"))
    assert verify_manifest(directory / "output") == train["output_digest"]
    assert train["extension"] == {"max_steps": 300}
    assert train["config"]["lr"] == 2e-4
    assert train["config"]["from"] is None
    assert train["model"]["d_model"] == 64
    assert (train["seed"], train["step"], train["world_size"], train["attempts"]) == (17, 300, 1, 1)
    assert train["metrics"] == {"step": 300, "loss": 1.5}
    assert train["started_at"].endswith("+00:00")
    assert train["pid"] == os.getpid()
    assert {"commit", "dirty"} <= train["git"].keys()
    assert "torch" in train["versions"]
    assert train["hardware"]["memory_bytes"] > 1 << 28
    assert "trained" in (directory / "log.txt").read_text()
    assert not list(directory.glob("*.tmp"))


@pytest.mark.parametrize(
    ("ending", "code", "state", "words", "traceback"),
    [
        ("saved", 85, "saved", "saved (SIGTERM)", False),
        ("error", 1, "failed", "RuntimeError: the sum is not finite", True),
        ("fault", 2, "failed", "train.lr: must be lower", False),
        # What a library raises is no fault of the user's: by its class alone it could be either.
        ("value", 1, "failed", "ValueError: lr must be lower", True),
        ("data", 2, "failed", "train.lr: must fit the text; got more; set less", False),
        ("fetch", 1, "failed", "train failed: package a==1 could not be downloaded; check the network", False),
        ("memory", 1, "failed", "out of memory", False),
        ("disk", 1, "failed", "no space left on the disk", False),
    ],
)
def test_each_ending_has_its_exit_code_state_and_line(cli, tmp_path, capsys, ending, code, state, words, traceback):
    assert cli("--stage", "train", "--set", f"train.ending={ending}") == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err
    assert ("Traceback" in captured.err) == traceback
    record = records(tmp_path)["train"]
    assert record["state"] == state
    assert record["error"] is None or "\n" not in record["error"]
    log = next((tmp_path / "runs" / "toy").glob("train-*/log.txt")).read_text()
    assert ("Traceback" in log) == (ending not in ("saved", "fault", "data"))
    # The ending is operational, so the same artifact goes on and ends well.
    assert cli("--stage", "train") == 0
    assert records(tmp_path)["train"]["attempts"] == 2
    assert records(tmp_path)["train"]["error"] is None


@pytest.mark.parametrize("refusal", ["fault", "data"])
def test_a_refused_restart_leaves_what_was_saved_as_it_was(cli, tmp_path, capsys, refusal):
    assert cli("--stage", "train", "--set", "train.ending=saved") == 85
    train = next((tmp_path / "runs" / "toy").glob("train-*"))
    (train / "checkpoints" / "step-00000007").mkdir(parents=True)
    (train / "checkpoints" / "step-00000007" / "manifest.json").touch()
    assert cli("--stage", "train", "--set", "train.ending=saved") == 85
    before = records(tmp_path)["train"]
    assert cli("--stage", "train", "--set", f"train.ending={refusal}") == 2
    assert "train.lr: must" in capsys.readouterr().err
    after = records(tmp_path)["train"]
    assert (after["state"], after["step"], after["error"]) == ("saved", 7, None)
    assert {**after, "updated_at": None} == {**before, "updated_at": None}
    assert cli("--plan") == 0
    assert "saved at step 7" in capsys.readouterr().out


def test_a_refused_extension_leaves_the_finished_run_done(cli, tmp_path):
    assert cli("--stage", "train") == 0
    assert cli("--stage", "train", "--set", "train.max_steps=400", "--set", "train.ending=fault") == 2
    assert records(tmp_path)["train"]["state"] == "done"
    assert cli("--stage", "train") == 0
    assert records(tmp_path)["train"]["attempts"] == 1


def test_a_secret_that_a_stage_tells_is_nowhere_in_its_artifact_nor_on_the_console(
    cli, tmp_path, capsys, monkeypatch
):  # trap O6
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-of-the-hub")
    assert cli("--stage", "train", "--set", "train.ending=secret") == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    written = {path: path.read_text() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert {path.name for path, text in written.items() if "401 for token=" in text} >= {"stage.json", "log.txt"}
    for text in (captured.out, captured.err, *written.values()):
        assert "s3cr3t" not in text
        assert "pw1234" not in text


def test_a_data_stage_takes_sigterm_as_a_request_to_stop(cli, tmp_path):
    assert cli("--stage", "gather", "--set", "gather.ending=sigterm") == 85
    assert records(tmp_path)["gather"]["state"] == "saved"
    assert cli("--stage", "gather") == 0


def test_a_failing_data_stage_ends_the_stage_that_needs_it(cli, tmp_path):
    assert cli("--stage", "train", "--set", "gather.ending=error") == 1
    assert set(records(tmp_path)) == {"gather"}


def test_a_training_ancestor_is_never_trained_on_the_side(cli, tmp_path, capsys):
    assert cli("--stage", "tuned", "--set", "train.lr=1e-3") == 2
    line = capsys.readouterr().err
    assert "tuned.from: must be a finished stage; got train, stale (never run); run: deepspeed " in line
    assert "--stage train" in line
    assert "--set train.lr=1e-3" in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert cli("--stage", "train") == 0
    assert cli("--stage", "tuned", "--set", "train.lr=1e-3") == 2
    assert "train.lr 2e-4 -> 1e-3" in capsys.readouterr().err
    assert cli("--stage", "tuned") == 0


def test_a_parent_that_does_not_fit_is_refused_before_the_run(cli, tmp_path, capsys):  # trap K10
    assert cli("--stage", "train", "--set", "gather.sources.0.text=poison") == 2
    assert "train.data: must hold no poison" in capsys.readouterr().err
    assert records(tmp_path)["train"]["state"] == "failed"


def test_a_parent_whose_bytes_changed_is_refused(cli, tmp_path, capsys):  # trap O2
    assert cli("--stage", "gather") == 0
    next((tmp_path / "runs" / "toy").glob("gather-*/output/text.txt")).write_text("HELLO")
    assert cli("--stage", "train") == 1
    assert "text.txt has another SHA-256" in capsys.readouterr().err


def test_a_run_with_checkpoints_does_not_go_on_from_other_data(cli, tmp_path, capsys):  # trap T6
    assert cli("--stage", "train", "--set", "train.ending=saved") == 85
    train = next((tmp_path / "runs" / "toy").glob("train-*"))
    (train / "checkpoints" / "step-00000007").mkdir(parents=True)
    (train / "checkpoints" / "step-00000007" / "manifest.json").touch()
    gather = next((tmp_path / "runs" / "toy").glob("gather-*"))
    (gather / "stage.json").unlink()
    real = STAGES["gather"].run

    def other(self, context):
        result = real(self, context)
        (context.output / "more.txt").write_text("more")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STAGES["gather"], "run", other)
        assert cli("--stage", "train") == 2
    assert "train.data: must be the artifact that this run began with" in capsys.readouterr().err


def test_two_runs_of_one_artifact_refuse_each_other(cli, tmp_path, capsys):
    assert cli("--stage", "gather", "--set", "gather.ending=saved") == 85
    directory = next((tmp_path / "runs" / "toy").glob("gather-*"))
    with hold(directory):
        assert cli("--stage", "gather") == 1
    assert f"is being worked on by process {os.getpid()} on " in capsys.readouterr().err
    assert records(tmp_path)["gather"]["state"] == "saved", "the refused run must not touch the record"
    assert cli("--stage", "gather") == 0


def test_a_killed_run_is_interrupted_and_its_lock_is_gone(cli, tmp_path, capsys):  # trap O1
    recipe = write_recipe(tmp_path)
    argv = ["--stage", "gather", "--pipeline", str(recipe), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, str(FAKE_RUN), *argv, "--set", "gather.ending=kill"], capture_output=True, check=False
    )
    assert done.returncode == -9
    assert records(tmp_path)["gather"]["state"] == "running"
    assert cli("--status") == 0
    assert "interrupted" in capsys.readouterr().out
    assert cli("--stage", "gather") == 0


def ranks(tmp_path, *argv, world_size=2):
    """Start fake_run once a rank, as a launcher would: one parent, the ranks in the environment."""
    recipe = write_recipe(tmp_path)
    command = [sys.executable, str(FAKE_RUN), *argv, "--pipeline", str(recipe), "--runs", str(tmp_path / "runs")]
    base = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    started = [
        subprocess.Popen(
            [*command, f"--local_rank={rank}"],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in reversed(range(world_size))
    ]
    return [(process.communicate(timeout=60), process.returncode) for process in reversed(started)]


def test_all_ranks_run_the_stage_and_rank_0_alone_writes_and_speaks(tmp_path):
    (first, code), (second, other) = ranks(tmp_path, "--stage", "train")
    assert (code, other) == (0, 0), second[1]
    assert "gathered" in first[0]
    assert second == ("", "")
    assert records(tmp_path)["train"]["world_size"] == 2
    assert len(next((tmp_path / "runs" / "toy").glob("train-*/metrics.jsonl")).read_text().splitlines()) == 1
    assert [code for _, code in ranks(tmp_path, "--stage", "train")] == [0, 0]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--stage", "gather"], 0),
        (["--stage", "train", "--set", "train.ending=saved"], 85),
        (["--stage", "train", "--set", "gather.ending=error"], 1),
        (["--stage", "tuned"], 2),
        (["--all"], 2),
    ],
)
def test_every_rank_ends_with_the_same_code(tmp_path, argv, code):
    (_, (second, _)), codes = zip(*(ended for ended in ranks(tmp_path, *argv)), strict=True)
    assert codes == (code, code)
    assert second == ""


def test_a_refusal_is_told_once_on_each_machine(cli, tmp_path, capsys, monkeypatch):
    assert cli("--stage", "train", "--set", "train.ending=fault") == 2
    assert capsys.readouterr().err.count("train.lr: must be lower") == 1
    recipe = load_recipe(tmp_path / "toy.yaml", ["train.ending=fault"], STAGES)
    node = build_chain(recipe, tmp_path / "runs", STAGES).nodes["train"]
    monkeypatch.setenv("RANK", "1")
    assert follow(node.stage(), node.job, Surroundings(tmp_path)) == 2
    assert capsys.readouterr().err == ""
    write_record(node.job.directory, {**read_record(node.job.directory), "host": "elsewhere"})
    assert follow(node.stage(), node.job, Surroundings(tmp_path)) == 2
    assert capsys.readouterr().err == "rank 1: train.lr: must be lower; got more; set less\n"


def test_other_ranks_notice_that_rank_0_was_killed_while_it_prepared(tmp_path):  # trap O7
    (_, first), (said, second) = ranks(tmp_path, "--stage", "train", "--set", "gather.ending=kill")
    assert first == -9
    assert second == 1
    assert "rank 0 died while it prepared the stage" in said[1]


def test_status_marks_the_recipes_artifact_among_its_variants(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    assert cli("--stage", "train", "--set", "train.lr=1e-4") == 0
    capsys.readouterr()
    assert cli("--status", "--json") == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(entry["stage"], entry["state"], entry["current"]) for entry in entries] == [
        ("gather", "done", True),
        ("train", "done", True),
        ("train", "done", False),
        ("tuned", "stale", True),
    ]
    assert entries[1]["loss"] == 1.5
    assert entries[1]["tokens_per_s"] == 1000.0
    assert entries[1]["max_steps"] == 300
    assert cli("--status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("*") for line in lines[1:4]) >= 2
    assert "300/300" in lines[2]


def test_plan_shows_keys_reasons_figures_and_disk(cli, tmp_path, capsys):
    assert cli("--stage", "train") == 0
    capsys.readouterr()
    assert cli("--plan", "--set", "train.lr=1e-4", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    by_name = {stage["stage"]: stage for stage in plan["stages"]}
    assert by_name["gather"]["state"] == "done"
    assert by_name["train"]["reasons"] == ["train.lr 2e-4 -> 1e-4"]
    assert by_name["train"]["figures"]["tokens"] == 30000
    assert by_name["tuned"]["parents"] == {"data": "gather", "from": "train"}
    assert cli("--plan", "--set", "train.lr=1e-4") == 0
    out = capsys.readouterr().out
    assert by_name["train"]["key"][:8] in out
    assert "30,000" in out
    assert "disk: at least 4.0 KiB wanted" in out
    assert "left to do: train, tuned" in out


def test_last_events_pass_over_a_lost_future(tmp_path):
    rows = [("train", 100), ("train", 300), ("eval", 290), ("resume", 280), ("train", 295)]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"event": "{e}", "step": {s}}}\n' for e, s in rows))
    assert {event: row["step"] for event, row in artifact.last_events(tmp_path).items()} == {
        "train": 295,
        "resume": 280,
    }


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
