"""Whatever a launcher says at the end, the last line of `--all` is ours: stage, reason, log, what to run."""

import os
import re
import sys

import pytest
from fake_chain import STAGES, write_recipe

from pipelines import launch
from pipelines.chain import build_chain
from pipelines.last_words import last_words
from pipelines.recipe import load_recipe
from stages.runtime.artifact import read_record, write_record
from stages.runtime.lock import hold

NOISE = "import os, sys, subprocess; code = subprocess.call(sys.argv[1:]); print('[ERROR] sigkill_handler exits'," \
    " file=sys.stderr, flush=True); sys.exit(code)"  # fmt: skip


def command_for(node):
    return f"deepspeed pipelines/run.py --stage {node.name}"


@pytest.fixture
def run(tmp_path, capfd):
    """`--all` over the toy recipe under a launcher that talks last; code and the lines of stderr."""

    def go(*settings):
        from fake_chain import FAKE_RUN

        path = write_recipe(tmp_path)
        chain = build_chain(load_recipe(path, list(settings), STAGES), tmp_path / "runs", STAGES)

        def argv(nodes):
            words = [word for node in nodes for word in ("--stage", node.name)]
            words += [word for setting in settings for word in ("--set", setting)]
            options = ["--pipeline", str(path), "--runs", str(tmp_path / "runs")]
            return [sys.executable, "-c", NOISE, sys.executable, str(FAKE_RUN), *words, *options]

        chosen = chain.selection(None, "train")
        code = launch.run_all(chain, chosen, argv, command_for, finish=lambda: print("report", file=sys.stderr))
        return code, capfd.readouterr().err.splitlines(), chain.nodes["train"]

    return go


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("error", 1, "train failed: RuntimeError: the sum is not finite; log: "),
        ("fault", 2, "train was refused: train.lr: must be lower; got more; set less; log: "),
        ("kill", 1, "train failed: it was killed while running; log: "),
        ("saved", 85, "train: saved; log: "),
    ],
)
def test_the_last_line_says_which_stage_why_where_and_what_next(run, ending, code, words):
    found, lines, node = run(f"train.ending={ending}")
    assert found == code
    assert any("sigkill_handler" in line for line in lines)
    assert lines[-1].startswith(words + str(node.job.directory / "log.txt"))
    assert lines[-1].endswith("alone: deepspeed pipelines/run.py --stage train")
    assert "the same command goes on" in lines[-1]


def test_a_run_that_is_done_ends_without_last_words(run):
    code, lines, _ = run()
    assert (code, [line for line in lines if "failed" in line or "saved" in line]) == (0, [])


def test_a_long_reason_is_cut_and_no_secret_is_repeated(run, monkeypatch):
    _, _, node = run("train.ending=error")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    record = read_record(node.job.directory)
    write_record(node.job.directory, {**record, "step": 7, "error": "hf_abcdefghijklmnop\n" + "x" * 999})
    words = last_words([node], 1, command_for)
    assert words is not None
    assert words.startswith("train failed at step 7: ")
    assert "hf_abcdefghijklmnop" not in words
    assert "\n" not in words
    assert len(words) < 700


def test_of_two_starts_at_once_the_second_says_who_works_on_the_stage(run):
    # The record is the other run's, which has met no error: it was not killed.
    _, _, node = run("train.ending=kill")
    with hold(node.job.directory):
        words = last_words([node], 1, command_for)
    assert words is not None
    assert re.match(rf"train was not run: .* is being worked on by process {os.getpid()} on .*; wait for it, or", words)
    assert words.endswith("alone: deepspeed pipelines/run.py --stage train")
    assert "killed" not in words
