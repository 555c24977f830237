"""Learning in a process of its own: the same bytes as in this one, also after a kill; its words, faults and end."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_corpus import build_corpus

from data import tokenizer_learn
from data.errors import DataError
from data.sample import Sample, sample_texts
from data.tokenizer import directory_digest
from data.tokenizer_learn import LearnJob, describe, learn
from data.tokenizer_train import learn_byte_level, learn_sentencepiece
from stages.runtime.faults import ending_of
from stages.tokenizer import TokenizerConfig, build

KINDS = ("byte_level_bpe", "sentencepiece_bpe")
ROOT = Path(__file__).resolve().parents[1]
SHARES = {"en": 2.0, "de": 1.0, "hi": 1.0, "code": 1.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("corpus"))


def job(corpus, model_type="byte_level_bpe", **changes) -> LearnJob:
    given = {
        "corpus": str(corpus), "model_type": model_type, "vocab_size": 400, "max_bytes": 30_000, "seed": 5,
        "language_shares": SHARES, "progress_seconds": 10.0,
        "indentation_runs": [4] if model_type == "sentencepiece_bpe" else [],
    }  # fmt: skip
    return LearnJob(**{**given, **changes})


@pytest.mark.parametrize("model_type", KINDS)
def test_a_worker_learns_the_same_bytes_as_this_process(model_type, corpus, tmp_path):
    wanted = job(corpus, model_type)
    texts = sample_texts(corpus, max_bytes=wanted.max_bytes, language_shares=SHARES, seed=wanted.seed)
    if model_type == "byte_level_bpe":
        expected = learn_byte_level(texts, wanted.vocab_size)
    else:
        expected = learn_sentencepiece(texts, wanted.vocab_size, wanted.indentation_runs)
    assert learn(wanted, tmp_path).model == expected


def test_a_worker_reports_its_sample_and_its_memory(corpus, capsys, tmp_path):
    learned = learn(job(corpus), tmp_path)
    sample = Sample(corpus, 30_000, SHARES, 5)
    for _ in sample:
        pass
    assert learned.sampled_bytes == sample.taken
    assert 10e6 < learned.peak_rss_bytes < 2e9
    assert "sample: code" in capsys.readouterr().out


def test_the_memory_is_the_workers_own(corpus, tmp_path):
    ballast = bytearray(600_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert learn(job(corpus), tmp_path).peak_rss_bytes < 400e6
    assert len(ballast) == 600_000_000


def test_environment_and_threads_change_no_byte(corpus, monkeypatch, tmp_path):
    models = []
    for hash_seed, threads in (("0", "1"), ("77", "4")):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        monkeypatch.setenv("RAYON_NUM_THREADS", threads)
        models.append(learn(job(corpus), tmp_path).model)
    assert models[0] == models[1]


def test_a_fault_of_the_user_comes_back_in_one_line(corpus, tmp_path):
    with pytest.raises(
        ValueError, match=r"^language_shares must name exactly \['code', 'de', 'en', 'hi'\]; got \['en'\]"
    ):
        learn(job(corpus, language_shares={"en": 1.0}), tmp_path)
    with pytest.raises(ValueError, match=r"^vocab_size must fit the sampled text; got 50000"):
        learn(job(corpus, "sentencepiece_bpe", vocab_size=50_000), tmp_path)


def test_a_fault_of_the_worker_names_its_field_as_the_recipe_does(corpus, tmp_path):
    with pytest.raises(DataError) as caught:
        learn(job(corpus, language_shares={"en": 1.0}), tmp_path)
    (line,) = ending_of(caught.value, "tokenizer", tmp_path).lines
    assert line.startswith("tokenizer.language_shares: must name exactly ['code', 'de', 'en', 'hi']; got ['en']; name")


def test_a_worker_that_is_killed_is_no_success(corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer_learn, "_follow", lambda worker, wanted: (worker.kill(), "")[1])
    with pytest.raises(ValueError, match=r"its process ended with -9; lower max_sample_bytes"):
        learn(job(corpus), tmp_path)


def test_no_worker_outlives_an_interruption(corpus, monkeypatch, tmp_path):
    started = []

    def interrupted(worker, wanted):
        started.append(worker)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer_learn, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(job(corpus), tmp_path)
    assert started[0].returncode == -signal.SIGKILL


def test_a_worker_dies_with_the_process_that_asked():  # trap O7
    # One process starts another, which would wait for ever, and is killed.
    worker = (
        "import os, signal; from data.tokenizer_worker import _die_with; "
        "_die_with(os.getppid()); print(os.getpid(), flush=True); signal.pause()"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    number = int(asking.stdout.readline())
    opened = os.pidfd_open(number)
    asking.kill()
    ended = select.select([opened], [], [], 5)[0]
    if not ended:
        os.kill(number, signal.SIGKILL)
    os.close(opened)
    asking.communicate()
    assert ended, "the worker still ran"


@pytest.mark.parametrize("model_type", KINDS)
def test_a_run_that_is_killed_and_started_anew_ends_with_the_same_files(model_type, corpus, tmp_path):
    """A handful of what ``make torture`` does by the hundred: kill at a random moment, begin again, compare bytes."""
    config = TokenizerConfig(
        corpus="clean", model_type=model_type, vocab_size=400, max_sample_bytes=30_000,
        indentation_runs=[4] if model_type == "sentencepiece_bpe" else [],
    )  # fmt: skip

    def make(directory: Path) -> str:
        directory.mkdir()
        build(config, corpus, directory, 3, tmp_path, tmp_path / "work")
        return directory_digest(directory)

    whole, drawn = make(tmp_path / "whole"), random.Random(6)
    arguments = (config.model_dump(), str(corpus), str(tmp_path / "killed"), str(tmp_path / "work"))
    code = (
        "import pathlib\nfrom stages.tokenizer import TokenizerConfig, build\n"
        f"config, corpus, output, work = {arguments!r}\npathlib.Path(output).mkdir()\n"
        "build(TokenizerConfig(**config), pathlib.Path(corpus), pathlib.Path(output), 3, None, pathlib.Path(work))\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert asking.stdout.readline().startswith("sample:"), "the worker has begun"
    opened = os.pidfd_open(asking.pid)
    select.select([opened], [], [], drawn.uniform(0, 0.2))
    os.close(opened)
    asking.kill()
    asking.communicate()
    assert make(tmp_path / "again") == whole


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"stage":"Compute merges","current":120,"total":4096}\n', "compute merges 120 of 4,096"),
        ("I0000 15001 bpe_model_trainer.cc:421] Merged: freq=26 merges=2800 piece=x\n", "2,800 merges of about 4,096"),
        ("bpe_model_trainer.cc(258) LOG(INFO) Added: freq=7 size=180 all=9 piece=y\n", "180 merges of about 4,096"),
        ("I0000 00:00:1.2 15001 trainer_interface.cc:466] Normalizing sentences...\n", "preparing words"),
        ("  hard_vocab_limit: 1\n", ""),
    ],
)  # fmt: skip
def test_both_libraries_logs_say_how_far_it_is(line, said):
    assert describe(line, 4096) == said


def test_how_far_it_is_is_printed(corpus, capsys, tmp_path):
    learn(job(corpus, progress_seconds=1e-9), tmp_path)
    assert "tokenizer: compute merges" in capsys.readouterr().out


def test_a_language_without_enough_text_is_named(corpus, capsys):
    sample = Sample(corpus, 1_000_000, {**SHARES, "hi": 5.0}, 5)
    total = sum(len(text.encode()) for text in sample)
    said = capsys.readouterr().out
    assert "sample: hi has 0.02 MB of the 0.56 MB that its share asks for; all of it was taken" in said
    assert sum(sample.taken.values()) == total


def test_a_sample_holds_one_document_at_a_time(tmp_path):
    """Memory does not grow with the text: 40 MB pass through in a few."""
    import tracemalloc

    from data.corpus import DocumentWriter, write_description

    with DocumentWriter(tmp_path / "train" / "a.jsonl.gz") as writer:
        for number in range(40):
            writer.write({"id": f"{number:032x}", "text": f"{number} " * 250_000, "source": "a", "language": "en",
                          "title": None})  # fmt: skip
    size = {"documents": writer.documents, "bytes": writer.bytes}
    write_description(tmp_path, [{"name": "a", "language": "en", "licence": "none", "dropped": {}, "train": size,
                                  "heldout": {"documents": 0, "bytes": 0}}])  # fmt: skip
    tracemalloc.start()
    taken = sum(len(text) for text in Sample(tmp_path, 10**9, None, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken > 25e6
    assert peak < taken / 4
