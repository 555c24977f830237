"""The hub through ``datasets``' own readers, from a hub on this machine: pinned, streamed or not, faults in one line.

One child process reads everything, since ``datasets`` learns where the hub is when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import local_hub
from pydantic import TypeAdapter, ValidationError
from source_rows import (
    fineweb_2_repository,
    fineweb_edu,
    fineweb_edu_repository,
    medqa_repository,
    wikipedia_repository,
    write_jsonl,
    write_parquet,
)

from data.catalogue import ENTRIES
from data.messages_config import MessagesSource
from data.messages_sources import messages_revision
from data.preferences import source_revision as preferences_revision
from data.preferences_config import PreferenceSource
from data.source_config import HubSource, Source
from data.sources import source_revision

ROOT = Path(__file__).resolve().parent.parent
SOURCE = TypeAdapter(Source)
OTHER = "f" * 40
EDU = ENTRIES["fineweb-edu"]
SAID = {"language": "en", "licence": "none"}
PLAIN = {"type": "hub", "name": "plain", **SAID, "rules": "none", "repository": "org/plain", "revision": "a" * 40}

CHILD = """
import json, os, sys
from pathlib import Path
from pydantic import TypeAdapter
from data.messages_config import MessagesSource
from data.messages_sources import read_conversations
from data.preferences_config import PreferenceSource
from data.preferences_rows import read_rows
from data.source_config import Source
from data.sources import read_source

cache = Path(sys.argv[1])

def read(kind, plain):
    if kind == "source":
        found = read_source(TypeAdapter(Source).validate_python(plain), cache)
        return [[d.text, d.title, d.fault, d.detail, d.origin] for d in found]
    if kind == "messages":
        found = read_conversations(TypeAdapter(MessagesSource).validate_python(plain), cache, {})
        return [[r.origin, r.messages and r.messages[0]["content"], r.fault and r.fault.rule] for r in found]
    found = read_rows(TypeAdapter(PreferenceSource).validate_python(plain), cache)
    return [[row.origin, row.chosen] for row in found]

for name, kind, plain in json.load(sys.stdin):
    try:
        said = {"read": read(kind, plain)}
    except ValueError as error:
        said = {"error": str(error), "type": type(error).__name__, "field": getattr(error, "field", None)}
    except RuntimeError as error:
        said = {"error": str(error), "type": type(error).__name__, "field": getattr(error, "field", None)}
    print(json.dumps([name, said]))
"""

JOBS = [
    ("edu", "source", {"entry": "fineweb-edu", "title": "url"}),
    ("edu downloaded", "source", {"entry": "fineweb-edu", "title": "url", "streaming": False}),
    ("edu filtered", "source", {
        "entry": "fineweb-edu", "max_documents": 6,
        "filters": [{"field": "language_score", "min": 0.65}, {"field": "int_score", "in": [3, 4]}],
    }),
    ("fineweb2-de", "source", {"entry": "fineweb2-de"}),
    ("fineweb2-hi", "source", {"entry": "fineweb2-hi"}),
    ("medqa", "source", {"entry": "medqa"}),
    ("wikipedia-hi", "source", {"entry": "wikipedia-hi"}),
    ("no field", "source", {"entry": "fineweb-edu", "template": "{content}"}),
    ("no filter field", "source", {"entry": "fineweb-edu", "filters": [{"field": "quality", "min": 1}]}),
    ("no subset", "source", {"entry": "fineweb-edu", "subset": "sample-1BT"}),
    ("no split", "source", {"entry": "fineweb-edu", "hub_split": "test"}),
    ("no revision", "source", {"entry": "fineweb-edu", "revision": "b" * 40}),
    ("no repository", "source", {**PLAIN, "repository": "nobody/nothing"}),
    ("breaks off", "source", {**PLAIN, "repository": "org/broken"}),
    ("messages", "messages", {"type": "hub", "name": "chat", **SAID, "repository": "org/chat", "revision": "a" * 40,
                              "read_rows": 2}),
    ("no messages", "messages", {"type": "hub", "name": "chat", **SAID, "repository": "org/no", "revision": "a" * 40}),
    ("preferences", "preferences", {"type": "hub", "name": "pairs", **SAID, "repository": "org/pairs",
                                    "revision": "a" * 40, "max_rows": 2}),
]  # fmt: skip
OFFLINE = [
    ("pinned copy", "source", {"entry": "fineweb-edu", "streaming": False}),
    ("other copy", "source", {"entry": "fineweb-edu", "streaming": False, "revision": OTHER}),
    ("no copy", "source", PLAIN),
]


def child(jobs: list, folder: Path, **environment: str) -> dict[str, dict]:
    (folder / "org").mkdir(exist_ok=True)
    known = {**os.environ, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), **environment}
    for name in ("HF_TOKEN", "HF_DATASETS_OFFLINE"):
        known.pop(name, None)
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder / "cache")]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, cwd=folder, env=known, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """(what each job gave, the hub): first with the hub in reach, then without."""
    folder = tmp_path_factory.mktemp("hub")
    broken = write_parquet(folder / "served/broken/b.parquet", [fineweb_edu(1, 3.0)])
    write_parquet(folder / "served/broken/a.parquet", [fineweb_edu(n, 3.0) for n in range(3)])
    broken.write_bytes(broken.read_bytes()[:-40])
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}] for n in range(3)]
    write_jsonl(folder / "served/chat/a.jsonl", [{"messages": each} for each in turns])
    pairs = [{"prompt": f"Why {n}?", "chosen": f"good {n}", "rejected": "bad"} for n in range(3)]
    write_jsonl(folder / "served/pairs/a.jsonl", pairs)
    edu = fineweb_edu_repository(folder / "served/edu")
    # A folder of the data set's name where the program runs: it must not be read in the data set's place.
    write_parquet(folder / "HuggingFaceFW/fineweb-edu/sample/100BT/0.parquet", [fineweb_edu(666, 3.0)])
    repositories = {
        (EDU["repository"], EDU["revision"]): edu,
        (EDU["repository"], OTHER): edu,
        (ENTRIES["fineweb2-de"]["repository"], ENTRIES["fineweb2-de"]["revision"]): fineweb_2_repository(
            folder / "served/two"
        ),
        (ENTRIES["medqa"]["repository"], ENTRIES["medqa"]["revision"]): medqa_repository(folder / "served/medqa"),
        (ENTRIES["wikipedia-hi"]["repository"], ENTRIES["wikipedia-hi"]["revision"]): wikipedia_repository(
            folder / "served/wiki"
        ),
        **{(f"org/{name}", "a" * 40): folder / "served" / name for name in ("broken", "chat", "pairs")},
    }
    with local_hub(repositories) as hub:
        found = child(JOBS, folder, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        asked = list(hub.asked)
        found |= child(OFFLINE, folder, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
        assert hub.asked == asked, "nothing is asked when offline"
        return found, hub


def texts(said: dict) -> list[str]:
    return [row[0] for row in said["read"] if row[2] is None]


def refusal(said: dict) -> tuple[str, str]:
    assert "\n" not in said["error"]
    return said["field"], said["error"]


def test_the_hub_is_asked_for_the_pinned_commit_and_nothing_else(read):
    _, hub = read
    assert hub.unknown == []
    revisions = {EDU["revision"], ENTRIES["fineweb2-de"]["revision"], ENTRIES["medqa"]["revision"]}
    revisions |= {ENTRIES["wikipedia-hi"]["revision"], "a" * 40, "b" * 40}
    assert all(any(revision in line for revision in revisions) for line in hub.asked)


def test_rows_come_in_the_order_of_the_files_streamed_or_downloaded(read):
    found, _ = read
    assert texts(found["edu"]) == [f"Page {n} about rivers." for n in range(8)]
    assert found["edu"]["read"][0][1] == "https://example.org/0"
    assert found["edu"]["read"][7][4] == "HuggingFaceFW/fineweb-edu:8"
    assert found["edu downloaded"] == found["edu"]


def test_rows_are_chosen_by_scores_and_the_others_counted_with_what_was_found(read):
    found, _ = read
    # Rows 0..5 have language scores 0.5 0.6 0.7 0.8 0.5 0.6 and scores 2.6 3.1 3.6 4.1 2.6 3.1.
    assert texts(found["edu filtered"]) == ["Page 2 about rivers.", "Page 3 about rivers."]
    left_out = [(row[2], row[3]) for row in found["edu filtered"]["read"] if row[2]]
    low = [("filter_language_score", f"{score} is below 0.65") for score in (0.5, 0.6)]
    assert left_out == low * 2


def test_every_entry_reads_rows_of_its_schema(read):
    found, _ = read
    assert texts(found["fineweb2-de"]) == ["Ein Fluss im Süden."] * 2
    assert texts(found["fineweb2-hi"]) == ["एक छोटी नदी।"] * 2
    # datasets gives rows of one set one schema, so that a question without option C has it without a value.
    assert texts(found["medqa"]) == [
        "Question 1?\nA. Iron\nB. Zinc\nAnswer: B. Zinc",
        "Question 2?\nA. Rest\nB. Heat\nC. Ice\nAnswer: C. Ice",
    ]
    assert texts(found["wikipedia-hi"]) == ["Place 1\n\nA town.", "Place 2\n\nA town."]


@pytest.mark.parametrize(
    ("job", "field", "words"),
    [
        (
            "no field",
            "template",
            "refers to 'content', which HuggingFaceFW/fineweb-edu:1 lacks; it has: dump, file_path",
        ),
        ("no filter field", "filters", "refers to 'quality', which HuggingFaceFW/fineweb-edu:1 lacks"),
        ("no subset", "subset", "'sample-1BT' not found. Available: ['default', 'sample-100BT']"),
        ("no split", "hub_split", "Available splits: ['train']"),
        ("no revision", "revision", f"Revision '{'b' * 40}' doesn't exist"),
        ("no repository", "repository", "got nobody/nothing at aaaaaaaaaaaa: Dataset 'nobody/nothing' doesn't exist"),
        ("breaks off", "repository", "org/broken at aaaaaaaaaaaa broke off after 3 rows: "),
        ("no messages", "repository", "Dataset 'org/no' doesn't exist"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_field(read, job, field, words):
    named, message = refusal(read[0][job])
    assert named == field
    assert words in message


def test_conversations_and_pairs_come_from_the_hub_too(read):
    found, _ = read
    assert found["messages"]["read"] == [["org/chat:1", "q0", None], ["org/chat:2", "q1", None]]
    assert found["preferences"]["read"] == [["org/pairs:1", "good 0"], ["org/pairs:2", "good 1"]]


def test_without_a_network_the_pinned_copy_is_read_and_no_other(read):
    found, _ = read
    assert texts(found["pinned copy"]) == texts(found["edu"])
    field, message = refusal(found["other copy"])
    assert (field, EDU["revision"] in message, OTHER in message) == ("revision", True, True)
    assert refusal(found["no copy"])[0] == "repository"


def test_a_revision_is_a_commit_and_pins_the_source():
    source = SOURCE.validate_python({"entry": "fineweb-edu"})
    assert isinstance(source, HubSource)
    assert source_revision(source) == f"HuggingFaceFW/fineweb-edu@{EDU['revision']}"
    chat, pairs = (next(plain for job, _, plain in JOBS if job == name) for name in ("messages", "preferences"))
    assert messages_revision(TypeAdapter(MessagesSource).validate_python(chat)) == f"org/chat@{'a' * 40}"
    assert preferences_revision(TypeAdapter(PreferenceSource).validate_python(pairs)) == f"org/pairs@{'a' * 40}"
    with pytest.raises(ValidationError, match="revision"):
        SOURCE.validate_python({"entry": "fineweb-edu", "revision": "main"})
