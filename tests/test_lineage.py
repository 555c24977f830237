"""The ancestry of an artifact is read from the disk alone, and whatever no longer fits it is named."""

import json
import subprocess
import sys

import pytest
from tracked_run import ROOT, sealed, tracker_in

from pipelines.lineage import main
from stages.runtime.artifact import git_state

CORPUS, TOKENIZER, TOKENS, MODEL = "clean-aaaaaaaa", "tokenizer-bbbbbbbb", "tokenize-cccccccc", "pretrain-dddddddd"


def make(runs, name, inputs=(), sources=None):
    """A finished artifact made from the artifacts `inputs`, as the lifecycle leaves it; returns its digest."""
    stage, key8 = name.split("-")
    directory = runs / "demo" / name
    digest = sealed(directory / "output", content=name.encode())
    parents = {}
    tracker = tracker_in(directory, stage=stage, kind=stage, key=key8 * 8)
    for parent, parent_digest in inputs:
        tracker.use_artifact(parent, runs / "demo" / parent / "output", parent_digest)
        kind, key = parent.split("-")
        parents[kind] = {"stage": kind, "key": key * 8, "path": str(runs / "demo" / parent), "digest": parent_digest}
    tracker.log_artifact(name, "model", directory / "output", digest, {})
    tracker.finish("done")
    record = {"format": 1, "state": "done", "stage": stage, "kind": stage, "key": key8 * 8, "output_digest": digest}
    (directory / "stage.json").write_text(json.dumps({**record, "parents": parents, "sources": sources or {}}))
    return digest


@pytest.fixture
def runs(tmp_path):
    """clean -> tokenizer, clean + tokenizer -> tokenize -> pretrain."""
    corpus = make(tmp_path, CORPUS, sources={"wikipedia": "sha256:0123", "code": "sha256:4567"})
    tokenizer = make(tmp_path, TOKENIZER, [(CORPUS, corpus)])
    tokens = make(tmp_path, TOKENS, [(CORPUS, corpus), (TOKENIZER, tokenizer)])
    make(tmp_path, MODEL, [(TOKENS, tokens)])
    return tmp_path


def output(runs, name):
    return runs / "demo" / name / "output" / "model.safetensors"


def test_show_prints_the_ancestry_down_to_the_sources_with_keys_and_digests(runs, capsys):
    assert main(["--runs", str(runs), "show", "pretrain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(len(line) - len(line.lstrip()), line.split()[0]) for line in lines] == [
        (0, MODEL), (2, TOKENS), (4, CORPUS), (6, "source"), (6, "source"), (4, TOKENIZER), (6, CORPUS),
    ]  # fmt: skip
    assert lines[3].split() == ["source", "code", "sha256:4567"]
    recorded = json.loads((runs / "demo" / TOKENS / "stage.json").read_text())
    assert f"key {'c' * 12} " in lines[1]
    assert f"output {recorded['output_digest'][:12]}" in lines[1]
    assert "CHANGED" not in "".join(lines)


def test_show_without_a_name_lists_the_artifacts(runs, capsys):
    assert main(["--runs", str(runs), "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"demo/{name}" for name in sorted((CORPUS, TOKENIZER, TOKENS, MODEL))
    ]
    assert main(["--runs", str(runs / "nothing"), "show"]) == 2


def test_an_artifact_is_found_by_path_and_an_unclear_name_is_refused(runs, capsys):
    assert main(["show", str(runs / "demo" / CORPUS)]) == 0
    assert main(["--runs", str(runs), "show", "tokeni"]) == 2
    refusal = capsys.readouterr().err
    assert TOKENIZER in refusal
    assert TOKENS in refusal
    assert main(["--runs", str(runs), "show", "*"]) == 2
    assert main(["--runs", str(runs), "show", "../.."]) == 2


def test_verify_passes_over_a_whole_family(runs, capsys):
    assert main(["--runs", str(runs), "verify", "pretrain"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("ok ") == 4


@pytest.mark.parametrize("arguments", [["verify", "pretrain"], ["verify"]])
def test_verify_names_a_flipped_byte_in_an_ancestor(runs, capsys, arguments):
    path = output(runs, CORPUS)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    assert main(["--runs", str(runs), *arguments]) == 1
    (fault,) = capsys.readouterr().err.splitlines()
    assert CORPUS in fault
    assert "model.safetensors" in fault


def test_verify_does_not_look_beyond_the_family(runs):
    output(runs, MODEL).write_bytes(b"other")
    assert main(["--runs", str(runs), "verify", "tokenize-"]) == 0
    assert main(["--runs", str(runs), "verify"]) == 1


def test_a_damaged_checkpoint_is_found(runs, capsys):
    folder = runs / "demo" / MODEL / "checkpoints" / "step-00000007"
    sealed(folder)
    assert main(["--runs", str(runs), "verify", MODEL]) == 0
    (folder / "model.safetensors").unlink()
    assert main(["--runs", str(runs), "verify", MODEL]) == 1
    assert "step-00000007: model.safetensors is missing" in capsys.readouterr().err


def test_a_record_that_cannot_be_read_is_one_fault_and_hides_no_other(runs, capsys):
    (runs / "demo" / CORPUS / "stage.json").write_text("{half")
    output(runs, MODEL).write_bytes(b"other")
    assert main(["--runs", str(runs), "verify"]) == 1
    faults = capsys.readouterr().err
    assert "stage.json cannot be read" in faults
    assert MODEL in faults
    assert main(["--runs", str(runs), "show", MODEL]) == 0
    assert f"{CORPUS}  UNREADABLE" in capsys.readouterr().out


def test_a_parent_that_was_made_anew_is_said_to_have_changed(runs, capsys):
    from stages.runtime.manifest import write_manifest

    output(runs, CORPUS).write_bytes(b"another corpus")
    digest = write_manifest(output(runs, CORPUS).parent)
    record = json.loads((runs / "demo" / CORPUS / "stage.json").read_text())
    (runs / "demo" / CORPUS / "stage.json").write_text(json.dumps({**record, "output_digest": digest}))
    assert main(["--runs", str(runs), "show", MODEL]) == 0
    shown = capsys.readouterr().out
    assert shown.count("CHANGED") == 2  # as an input of tokenize and of tokenizer
    assert main(["--runs", str(runs), "verify", MODEL]) == 1
    assert capsys.readouterr().err.count(f"was made from {CORPUS}") == 2


def test_a_parent_that_is_gone_is_named(runs, capsys):
    import shutil

    shutil.rmtree(runs / "demo" / CORPUS)
    assert main(["--runs", str(runs), "show", TOKENIZER]) == 0
    assert f"{CORPUS}  GONE" in capsys.readouterr().out
    assert main(["--runs", str(runs), "verify", TOKENIZER]) == 1


BROKEN = {
    "missing": (None, "lineage.json is missing"),
    "emptied": ("", "lineage.json cannot be read: Expecting value"),
    "a list": ("[]", "lineage.json must be an object with a run, its inputs and outputs"),
    "an empty object": ("{}", "lineage.json must hold a list of inputs"),
    "no run": ('{"inputs": [], "outputs": []}', "lineage.json must name its run"),
    "no outputs": ('{"run": {}, "inputs": []}', "lineage.json must hold a list of outputs"),
    "half an edge": (
        '{"inputs": [{"name": "x"}], "outputs": []}',
        "lineage.json must give inputs.0 its type, path, digest, metadata",
    ),
}


@pytest.fixture(params=BROKEN)
def broken(request, runs):
    """The same artifacts, the tokens' ``lineage.json`` damaged, and what is to be said of it."""
    content, words = BROKEN[request.param]
    path = runs / "demo" / TOKENS / "lineage.json"
    path.unlink() if content is None else path.write_text(content)
    return runs, f"{runs / 'demo' / TOKENS}/{words}"


def test_show_says_that_lineage_json_is_lost_and_goes_on_by_the_parents_of_stage_json(broken, capsys):
    runs, words = broken
    assert main(["--runs", str(runs), "show", MODEL]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        MODEL, TOKENS, "FAULT", CORPUS, "source", "source", TOKENIZER, CORPUS,
    ]  # fmt: skip
    assert lines[2].startswith(f"    FAULT {words}")
    assert f"restore it from a copy, or delete {runs / 'demo' / TOKENS} and run the stage again" in lines[2]
    assert main(["--runs", str(runs), "show"]) == 1
    assert f"  FAULT {words}" in capsys.readouterr().out


def test_diff_says_that_lineage_json_is_lost_and_compares_the_whole_ancestries(broken, capsys):
    runs, words = broken
    assert main(["--runs", str(runs), "diff", MODEL, TOKENS]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"FAULT {words}")
    assert lines[3] == f"one and the same in both: {', '.join((TOKENS, CORPUS, TOKENIZER))}"


def test_verify_names_the_lost_lineage_json_alone_and_walks_on(broken, capsys):
    runs, words = broken
    assert main(["--runs", str(runs), "verify", MODEL]) == 1
    captured = capsys.readouterr()
    (fault,) = captured.err.splitlines()
    assert fault.startswith(f"FAULT {words}")
    assert "restore it from a copy" in fault
    assert captured.out.count("ok ") == 4


def test_a_moved_runs_folder_finds_its_ancestors_without_lineage_json(runs, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    (runs / "demo").rename(moved)
    (moved / MODEL / "lineage.json").unlink()
    assert main(["show", str(moved / MODEL)]) == 1
    shown = capsys.readouterr().out
    assert "GONE" not in shown
    assert CORPUS in shown


def test_an_unfinished_run_lacks_lineage_json_only_once_it_has_taken_an_input(runs, capsys):
    directory = runs / "demo" / "dpo-eeeeeeee"
    directory.mkdir()
    link = {"stage": "pretrain", "key": "d" * 64, "path": str(runs / "demo" / MODEL), "digest": None}
    record = {"format": 1, "state": "failed", "stage": "dpo", "kind": "dpo", "parents": {"from_": link}}
    (directory / "stage.json").write_text(json.dumps(record))
    assert main(["show", str(directory)]) == 0
    assert "lineage.json" not in capsys.readouterr().out
    link["digest"] = "f" * 64
    (directory / "stage.json").write_text(json.dumps(record))
    assert main(["show", str(directory)]) == 1
    assert "lineage.json is missing; run the stage again: going on writes it anew" in capsys.readouterr().out


def test_a_moved_runs_folder_keeps_its_lineage(runs, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    (runs / "demo").rename(moved)
    assert main(["show", str(moved / MODEL)]) == 0
    assert "GONE" not in capsys.readouterr().out
    assert main(["verify", str(moved / MODEL)]) == 0


def test_an_empty_runs_folder_is_refused(tmp_path, capsys):
    assert main(["--runs", str(tmp_path), "verify"]) == 2
    assert "must hold artifacts" in capsys.readouterr().err


def test_as_a_script_it_takes_the_modules_that_lie_beside_it_and_not_installed_ones(tmp_path):
    room = tmp_path / "pipelines"
    room.mkdir()
    (room / "__init__.py").touch()
    (room / "lineage.py").write_bytes((ROOT / "pipelines" / "lineage.py").read_bytes())
    (room / "environment.py").write_text("def fault(argv):\n    return 'its own environment'\n")
    command = [sys.executable, str(room / "lineage.py"), "show", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "its own environment\n")


def test_notes_beside_the_program_do_not_change_its_code_and_a_new_module_does(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    module = tmp_path / "stages" / "deep" / "one.py"
    module.parent.mkdir(parents=True)
    module.write_text("a = 1\n")
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "one")
    (tmp_path / "notes.md").touch()
    (tmp_path / "scratch.py").touch()
    (module.parent / "notes.txt").touch()
    assert git_state(tmp_path)["dirty"] is False
    new = module.with_name("two.py")
    new.touch()
    assert git_state(tmp_path)["dirty"] is True
    new.unlink()
    assert git_state(tmp_path)["dirty"] is False
    module.write_text("a = 2\n")
    assert git_state(tmp_path)["dirty"] is True


def test_the_module_runs_as_a_command_without_heavy_imports():
    code = (
        "import sys\nfrom pipelines.lineage import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nassert not {'torch', 'deepspeed', 'transformers', 'wandb'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "verify" in done.stdout
