"""A stream from the hub through ``datasets``' own reader, from a hub on this machine: pinned, resumed, out of reach.

One child process reads, since ``datasets`` learns where the hub is when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import local_hub
from source_rows import card, fineweb_edu, write_parquet
from stream_cases import make_tokenizer

from data.catalogue import ENTRIES
from data.corpus import document_id
from data.tokenizer import load

ROOT = Path(__file__).resolve().parent.parent
EDU = ENTRIES["fineweb-edu"]
N_ROWS, SHARE = 120, 0.1

CHILD = """
import json, sys
from pathlib import Path
from data.mixture import Mixture
from data.stream import StreamLoader
from data.stream_config import StreamSettings
from data.stream_freeze import freeze_stream

folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])

def frozen(name, **source):
    output = folder / name
    output.mkdir()
    plain = {"sources": [{"entry": "fineweb-edu", **source}], "lanes": 2, "shuffle_documents": 8,
             "heldout_share": 0.1, "chat_share": 0}
    freeze_stream(StreamSettings.model_validate(plain), tokenizer, output, seed=4, heldout_documents=3,
                  sample_documents=10, min_special_count=0, cache=folder / "cache")
    return output

def loader(output):
    return StreamLoader(output, seq_len=16, global_batch_size=4, seed=7, mixture=Mixture({"fineweb-edu": 1.0}),
                        cache=folder / "cache")

def rows(stream, first, last):
    return [stream.batch(step, slice(0, 4)).input_ids.tolist() for step in range(first, last)]

def everything(stream):
    ids = []
    for lane in range(2):
        source = stream._open_lane(lane).sources["fineweb-edu"]
        while (row := source.row(1)) is not None:
            ids.append(int(row[0]))
    return ids

whole = frozen("whole")
found = {"all": everything(loader(whole)), "uncut": rows(loader(whole), 0, 30), "resumed": []}
for cut in (1, 13, 29):
    first, second = loader(whole), loader(whole)
    head = rows(first, 0, cut)
    second.restore(json.loads(json.dumps(first.position())))
    found["resumed"].append(head + rows(second, cut, 30))
found["some"] = everything(loader(frozen("some", max_documents=40)))
try:
    everything(loader(frozen("broken", repository="org/broken")))
except Exception as error:
    found["broken"] = [type(error).__name__, str(error)]
for name, source in (("elsewhere", {"revision": "b" * 40}), ("nobody", {"repository": "nobody/nothing"})):
    try:
        frozen(name, **source)
    except Exception as error:
        found[name] = [type(error).__name__, getattr(error, "field", ""), str(error)]
print(json.dumps(found))
"""


def texts() -> list[str]:
    return [f"Page {number} about rivers." for number in range(N_ROWS)]


def repository(folder: Path, broken: bool = False) -> Path:
    """Two files, so that each of two lanes has its own."""
    for file in range(2):
        rows = [fineweb_edu(number, 3.0) for number in range(file * N_ROWS // 2, (file + 1) * N_ROWS // 2)]
        path = write_parquet(folder / f"sample/100BT/00{file}_00000.parquet", rows)
        if broken and file:
            path.write_bytes(path.read_bytes()[:-40])
    (folder / "README.md").write_text(card({"sample-100BT": "sample/100BT/*"}))
    return folder


def environment(folder: Path, **changes: str) -> dict[str, str]:
    known = {**os.environ, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), **changes}
    return {name: value for name, value in known.items() if name not in ("HF_TOKEN", "HF_DATASETS_OFFLINE")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def read(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("hub")
    served = {
        (EDU["repository"], EDU["revision"]): repository(folder / "served"),
        ("org/broken", EDU["revision"]): repository(folder / "broken-served", broken=True),
    }
    with local_hub(served) as hub:
        command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), str(tokenizer)]
        env = environment(folder, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), hub


def documents(tokenizer, ids):
    return load(tokenizer).decode(ids).split("<|endoftext|>")[:-1]


def to_train_on(first: int = N_ROWS) -> list[str]:
    return [text for text in texts()[:first] if int(document_id(text)[:12], 16) >= SHARE * 16**12]


def test_a_hubs_stream_gives_each_row_once_and_no_held_out_one(read, tokenizer):  # trap M4
    found, hub = read
    assert sorted(documents(tokenizer, found["all"])) == sorted(to_train_on())
    assert 0 < len(to_train_on()) < N_ROWS
    assert sorted(documents(tokenizer, found["some"])) == sorted(to_train_on(40)), "max_documents counts rows"
    assert hub.unknown == []
    # The pinned commit alone is read; the other is asked for by the test of a commit that is not there.
    assert all(EDU["revision"] in line or "b" * 40 in line for line in hub.asked if "nobody" not in line)


def test_a_hubs_stream_resumes_at_the_very_token(read):  # trap T6
    found, _ = read
    assert found["resumed"] == [found["uncut"]] * 3


def test_what_the_hub_does_not_have_or_breaks_off_is_one_line(read):
    found, _ = read
    kind, line = found["broken"]
    assert kind == "HubError"
    assert line.startswith(f"org/broken at {EDU['revision'][:12]} broke off after ")
    assert line.endswith("; run it again")
    assert found["elsewhere"][:2] == ["SourceError", "revision"]
    assert f"Revision '{'b' * 40}' doesn't exist" in found["elsewhere"][2]
    assert found["nobody"][:2] == ["SourceError", "repository"]
    assert not any("\n" in line for line in (found["broken"][-1], found["elsewhere"][-1], found["nobody"][-1]))


RECIPE = """name: hubby
model:
  d_model: 32
  d_ff: 48
  vocab_size: 512
  max_seq_len: 64
  layers: "1*att"
  mixers:
    att: {mixer: attention, n_heads: 2, n_kv_heads: 1, head_dim: 16}
stages:
  clean:
    kind: clean
    sources: [{name: a, type: files, path: TEXT, language: en, licence: own, rules: none, include: ["*.jsonl"]}]
  tokenizer: {kind: tokenizer, corpus: clean, vocab_size: 512}
  stream: {kind: stream, tokenizer: tokenizer, lanes: 2, sources: [{entry: fineweb-edu}]}
  pretrain: {kind: pretrain, data: stream, seq_len: 32, global_batch_size: 4, max_steps: 9, lr: 1.0e-3}
"""


@pytest.mark.parametrize("offline", ["1", "0"], ids=["told to be offline", "nobody answers"])
def test_a_stream_that_is_out_of_reach_is_refused_in_one_line_before_anything_runs(tmp_path, offline):
    (tmp_path / "text").mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts())
    (tmp_path / "text/a.jsonl").write_text(rows)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("TEXT", str(tmp_path / "text")))
    command = [sys.executable, str(ROOT / "pipelines/run.py"), "--pipeline", str(tmp_path / "r.yaml"), "--all"]
    # Port 9 of this machine: nobody listens there.
    env = environment(tmp_path, HF_HUB_OFFLINE=offline, HF_ENDPOINT="http://127.0.0.1:9")
    done = subprocess.run(
        [*command, "--runs", str(tmp_path / "runs")], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert (
        "stream.sources.0.repository: must be within reach to be streamed; got HuggingFaceFW/fineweb-edu at 87f" in line
    )
    assert line.endswith("check the name, the network and HF_HUB_OFFLINE")
    assert not list((tmp_path / "runs").rglob("stage.json")), "nothing ran"
