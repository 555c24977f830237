"""The terminal chat as its user meets it: what is said where, how it ends, and what stands in for a traceback."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_chain import RECIPE, STAGES, make_chain, run_chain

from pipelines.chat import main

ROOT = Path(__file__).resolve().parent.parent
TALK = RECIPE.replace("base: {kind: fit, data: text}", "base: {kind: fit, data: text, weights: true}").replace(
    "quality: 0.3}", "quality: 0.3, weights: true}", 1
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two finished stages with real tiny models: base and tuned."""
    directory = tmp_path_factory.mktemp("chat")
    run_chain(make_chain(directory, TALK), "text", "base", "pairs", "tuned")
    return directory


@pytest.fixture
def chat(home, monkeypatch, capsys):
    """Runs the command with lines on a piped stdin; returns exit code, stdout and stderr."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def run(*argv, say=""):
        with open(home / "stdin.txt", "w+", encoding="utf-8", errors="surrogateescape") as stdin:
            stdin.write(say)
            stdin.seek(0)
            monkeypatch.setattr(sys, "stdin", stdin)
            code = main([*argv, "--pipeline", str(home / "toy.yaml"), "--runs", str(home / "runs")], STAGES)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_help_comes_without_heavy_imports():
    program = (
        "import sys\nfrom pipelines.chat import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_pipe_gets_a_transcript_on_stdout_and_all_else_on_stderr(chat):
    code, out, err = chat("--max-new-tokens", "8", "--temperature", "0", say="the cat\n\n//die Wiese\x1b\n/reset\n")
    assert code == 0
    said = [line for line in out.splitlines() if line.startswith(("you> ", "tuned> "))]
    assert [line.partition("> ")[0] for line in said] == ["you", "tuned", "you", "tuned"]
    assert (said[0], said[2]) == ("you> the cat", "you> /die Wiese\ufffd")
    assert out.startswith("you> the cat\ntuned> ")
    assert "tuned: fit" in err
    assert "the last finished model stage" in err
    assert err.count("first after") == 2
    assert "tokens/s" in err
    assert "tokens/s" not in out
    assert "forgotten" in err


def test_the_same_seed_gives_the_same_answer_and_another_one_another(chat):
    first = chat("--stage", "base", "--max-new-tokens", "20", "--seed", "3", say="the cat\n/reset\nthe cat\n")[1]
    again = chat("--stage", "base", "--max-new-tokens", "20", "--seed", "3", say="the cat\n")[1]
    other = chat("--stage", "base", "--max-new-tokens", "20", "--seed", "4", say="the cat\n")[1]
    assert first == again + again
    assert other != again


def test_an_artifact_is_found_by_its_name_and_its_directory(chat, home):
    directory = next((home / "runs" / "toy").glob("base-*"))
    answers = {
        chat("--stage", name, "--max-new-tokens", "5", say="hi\n")[1].partition("\nbase")[2].partition("> ")[2]
        for name in ("base", directory.name, str(directory))
    }
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stage", "tunde"], ["--stage: must name a model stage of toy; got 'tunde'; did you mean 'tuned'?"]),
        (
            ["--stage", "left"],
            ["must be a finished stage; left is not", "run: deepspeed pipelines/run.py --stage left"],
        ),
        (["--stage", "pairs"], ["makes a model; pairs makes corpus"]),
        (["--stage", "ship"], ["makes a model; ship makes export; use --gguf"]),
        (["--stage", "no/such/place"], ["holds no stage.json"]),
        (["--compare", "base"], ["must name two to 4 models; got base"]),
        (["--gguf", "nothing.gguf"], ["must be a GGUF file; got nothing.gguf"]),
        (["--stage", "base", "--gguf", "x"], ["not allowed with argument"]),
        (["--colour"], ["unknown option --colour"]),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(chat, argv, words):
    code, out, err = chat(*argv)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err.replace("left is stale", "left is not")


def test_all_values_out_of_range_are_named_at_once(chat):
    code, _, err = chat("--temperature", "nan", "--top-p", "0", "--max-new-tokens", "0", "--seed", "-1")
    assert code == 2
    assert [line.split(":")[0] for line in err.splitlines()] == [
        "--temperature",
        "--top-p",
        "--max-new-tokens",
        "--seed",
    ]


def test_every_unknown_model_of_a_comparison_is_named(chat):
    code, _, err = chat("--compare", "bose", "base", "tund")
    assert code == 2
    assert "'bose'" in err
    assert "'tund'" in err


def test_damaged_weights_are_refused_in_one_line(chat, home):
    weights = next((home / "runs" / "toy").glob("base-*")) / "output" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        code, out, err = chat("--stage", "base", say="hi\n")
    finally:
        weights.write_bytes(whole)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "model.safetensors has another SHA-256" in err


def test_without_a_finished_model_the_command_to_run_is_named(tmp_path, capsys):
    make_chain(tmp_path).runs.mkdir()
    code = main(["--pipeline", str(tmp_path / "toy.yaml"), "--runs", str(tmp_path / "runs")], STAGES)
    assert code == 2
    assert "run: deepspeed pipelines/run.py --stage base" in capsys.readouterr().err


def test_commands_are_obeyed_and_not_answered(chat):
    say = "/system Sei kurz.\n/system\n/nonsense\n//slash\n/exit\nnever said\n"
    code, out, err = chat("--stage", "base", "--max-new-tokens", "3", say=say)
    assert code == 0
    assert "system message: Sei kurz." in err
    assert "/nonsense is no command" in err
    assert len(re.findall(r"^3 tokens,", err, re.MULTILINE)) == 1
    assert out.count("\n") >= 1


def test_a_conversation_that_is_full_says_so_and_goes_on_after_reset(chat):
    say = "the cat sat on a red mat and saw one small dog run over the old hill. " * 3 + "\n/reset\nhi\n"
    code, _, err = chat("--stage", "base", "--max-new-tokens", "3", say=say)
    assert code == 0
    assert "not sent: the conversation has" in err
    assert "the model holds 64; /reset starts anew" in err
    assert "3 tokens" in err.splitlines()[-1]


def test_bytes_that_are_no_text_do_not_end_the_chat(chat):
    assert chat("--stage", "base", "--max-new-tokens", "3", say="a\udcff\x00b\n")[0] == 0


def test_models_are_compared_in_columns_with_one_seed(chat, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    code, out, err = chat("--compare", "base", "base", "--max-new-tokens", "30", say="the cat\n")
    said, *lines = out.splitlines()
    rows = [line.split(" │ ") for line in lines]
    assert (code, said) == (0, "you> the cat")
    assert [word.strip() for word in rows[0]] == ["base", "base"]
    assert all(left.strip() == right.strip() for left, right in (row for row in rows if len(row) == 2))
    assert err.count("base: 30 tokens") == 2


SLOW_CHAT = """
import sys, time
sys.path[:0] = ["", sys.argv[1]]
import model.decode
from pipelines.chat import main
from report_chain import STAGES

plain = model.decode.stream


def slow(*args, **kwargs):
    for token in plain(*args, **kwargs):
        time.sleep(0.2)
        yield token


model.decode.stream = slow
sys.exit(main(sys.argv[2:], STAGES))
"""


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(home):
    """The real command on a pseudo-terminal."""
    options = ["--stage", "base", "--pipeline", str(home / "toy.yaml"), "--runs", str(home / "runs")]
    process, terminal = _on_terminal([sys.executable, "-c", SLOW_CHAT, str(ROOT / "tests"), *options])
    seen = _until(terminal, b"you> ")
    os.write(terminal, b"the cat\n")
    seen += _until(terminal, b"base> ")
    time.sleep(0.7)
    os.write(terminal, b"\x03")
    seen += _until(terminal, b"you> ")
    os.write(terminal, b"\x03")
    seen += _until(terminal, b"you> ")
    os.write(terminal, b"\x04")
    assert process.wait(60) == 0
    os.close(terminal)
    text = seen.decode("utf-8", "replace")
    assert "; stopped" in text
    assert "/exit or Ctrl-D ends" in text
    assert "Traceback" not in text


def _on_terminal(argv):
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "100"}
    process = subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment, start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def _take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _until(terminal, word, limit_s=180.0):
    seen, end = b"", time.monotonic() + limit_s
    while word not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.5)[0]:
            seen += os.read(terminal, 4096)
    return seen
