"""A stream is kept clean of evaluation sets: while it is frozen, while it is read, after a resume, each set by name."""

import json

import pytest
import torch
from fake_chain import write_recipe
from stream_cases import freeze, make_tokenizer, settings, texts, write_sources
from test_clean_notes import RECIPE
from tiny_run import context

from data.clean_config import DecontaminateConfig
from data.clean_decontaminate import ContaminationIndex, build_index
from data.corpus import document_id
from data.mixture import Mixture
from data.stream import CONTAMINATION_FILE, StreamLoader
from data.tokenizer import load
from pipelines.chain import build_chain
from pipelines.contamination import contamination_notes
from pipelines.recipe import load_recipe
from stages import STAGES
from stages.base import ConfigError
from stages.stream import Stream, StreamConfig

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May; how many?"
RULE = "contaminated_tasks"
ENGLISH = {"web-en": 1.0, "buch-de": 0.0}


def planted(share=0.1):
    """Three documents that hold the question, of which none would be held out by its hash."""
    found = (f"{text} {QUESTION.upper()} {number}" for number, text in enumerate(texts("web-en")))
    return [text for text in found if int(document_id(text)[:12], 16) >= share * 16**12][:3]


def index(*items):
    return build_index(DecontaminateConfig(), {"facts": iter([["a b c"]]), "tasks": iter([item] for item in items)})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """Sources with the question planted at the end of a file and at the beginning of another."""
    folder = tmp_path_factory.mktemp("text")
    sources = write_sources(folder)
    rows = [json.dumps({"text": text}) + "\n" for text in planted()]
    for path, text in ((folder / "en/part0.jsonl", rows[0]), (folder / "en/part1.jsonl", rows[1] + rows[2])):
        path.write_text(text + path.read_text() if path.name == "part1.jsonl" else path.read_text() + text)
    return sources


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, tokenizer, described):
    folder = tmp_path_factory.mktemp("stream")
    passes = {"web-en": 2, "buch-de": 2}
    return freeze(folder, tokenizer, described, contamination=index(QUESTION), passes=passes)


def loader(folder):
    return StreamLoader(folder / "output", seq_len=16, global_batch_size=4, seed=7, mixture=Mixture(ENGLISH))


def one_pass(stream, name="web-en"):
    """All that the lanes hand out of one source, as text."""
    for lane in range(2):
        stream._open_lane(lane)
    ids = []
    for lane in stream._lanes.values():
        lane.sources[name].passes = 1
        while (row := lane.sources[name].row(1)) is not None:
            ids.append(int(row[0]))
    return load(stream.info.directory / "tokenizer").decode(ids)


def test_a_question_planted_in_a_stream_is_never_trained_on_and_counted_by_its_set(tmp_path, tokenizer, described):
    # trap M4; the control reads the same text without an index
    unclean = one_pass(loader(freeze(tmp_path, tokenizer, described)))
    assert unclean.count("NATALIA") == 3
    stream = loader(freeze(tmp_path / "clean", tokenizer, described, contamination=index(QUESTION)))
    assert "NATALIA" not in one_pass(stream)
    left_out = stream.report()["web-en"]
    assert left_out[RULE] == 3
    assert "contaminated_facts" not in left_out, "three words are too short to look for"


def test_what_is_frozen_holds_no_item_either_and_is_counted(tmp_path, tokenizer, described):
    # traps M2, M4: every other document is an item, so that held-out ones are too
    items = texts("web-en")[::2]
    assert any(int(document_id(text)[:12], 16) < 0.1 * 16**12 for text in items if len(text.split()) >= 13)
    folder = freeze(tmp_path, tokenizer, described, contamination=index(*items))
    facts = json.loads((folder / "output" / "tokens.json").read_text())
    found = {one["name"]: one for one in facts["decontamination"]["sets"]}
    looked_for = found["tasks"]["items"] - found["tasks"]["unchecked_items"]
    assert found["tasks"]["items"] == len(items)
    # Invented text repeats itself, so that an item may be held by more than its own document.
    assert found["tasks"]["removed_documents"] >= looked_for > 0
    assert found["facts"] == {"name": "facts", "items": 1, "unchecked_items": 1, "removed_documents": 0}
    again = ContaminationIndex.load(folder / "output" / CONTAMINATION_FILE)
    from data.heldout import HeldoutSet

    assert all(again.find(text.decode()) is None for text in HeldoutSet(folder / "output").texts())


def test_a_resumed_clean_stream_is_the_uninterrupted_one_and_counts_on(frozen):
    # trap T6
    whole = loader(frozen)
    expected = [whole.batch(step, slice(0, 4)).input_ids for step in range(60)]
    assert whole.report()["web-en"][RULE] >= 3
    for cut in (1, 20, 47):
        first, second = loader(frozen), loader(frozen)
        head = [first.batch(step, slice(0, 4)).input_ids for step in range(cut)]
        second.restore(json.loads(json.dumps(first.position())))
        tail = [second.batch(step, slice(0, 4)).input_ids for step in range(cut, 60)]
        assert torch.equal(torch.cat(head + tail), torch.cat(expected))
        assert second.report() == whole.report()


def test_a_stream_that_names_no_set_stays_what_it_was(tmp_path, tokenizer, described, frozen):
    plain = freeze(tmp_path, tokenizer, described)
    assert not (plain / "output" / CONTAMINATION_FILE).exists()
    assert (frozen / "output" / CONTAMINATION_FILE).is_file()
    config = StreamConfig(tokenizer="t", sources=described)
    assert not {"decontaminate", "tasks"} & set(Stream.key_config(config))
    assert "decontaminate" in Stream.key_config(StreamConfig(tokenizer="t", sources=described,
                                                             decontaminate={"ngram": 12}))  # fmt: skip


def stage_context(tmp_path, tokenizer, described, **fields):
    (tmp_path / "tokenizer").mkdir(parents=True)
    (tmp_path / "tokenizer/output").symlink_to(tokenizer)
    (tmp_path / "tasks/output").mkdir(parents=True)
    row = {"prompt": [{"role": "user", "content": QUESTION}], "answer": "72"}
    (tmp_path / "tasks/output/heldout.jsonl").write_text(json.dumps(row) + "\n")
    plain = settings(described).model_dump() | {"heldout_documents": 5, "min_special_count": 1}
    at = context(tmp_path / "run", tmp_path / "tokenizer")
    config = StreamConfig.model_validate(plain | {"tokenizer": "tokenizer", "tasks": "tasks"} | fields)
    object.__setattr__(at, "config", config)
    object.__setattr__(at, "parents", {"tokenizer": tmp_path / "tokenizer", "tasks": tmp_path / "tasks"})
    return at


def test_the_stage_counts_by_set_in_its_metrics_and_summary(tmp_path, tokenizer, described):
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"q": "w x y z", "a": "v"}) + "\n" + json.dumps({"q": texts("buch-de")[0], "a": ""}))
    files = [{"name": "own", "path": str(bench), "fields": ["q", "a"]}]
    result = Stream().run(stage_context(tmp_path, tokenizer, described, decontaminate={"files": files}))
    counts = {name: result.metrics[f"{what}_{name}"] for name in ("tasks", "own") for what in ("items",)}
    assert counts == {"tasks": 1, "own": 2}
    assert (result.metrics["removed_documents_tasks"], result.metrics["unchecked_items_own"]) == (3, 1)
    read = result.metrics["read_documents"]
    told = f"3 of the {read:,} documents read so far left out, and every later one"
    assert f"tasks: 1 items, 0 too short to look for; {told}" in result.summary


def test_benchmarks_of_a_stream_that_are_not_there_are_one_line_before_anything_runs(described):
    files = [{"name": "own", "path": "absent.jsonl", "fields": ["q"]}]
    config = StreamConfig(tokenizer="t", sources=described, decontaminate={"files": files})
    (fault,) = Stream.check(config, None)
    assert str(fault) == (
        "decontaminate.files.0.path: must be an existing file; got absent.jsonl; set it to where the file lies"
    )
    with pytest.raises(ConfigError, match=r"decontaminate\.files\.0\.path"):
        Stream.source_revisions(config)


def notes(tmp_path, *changes):
    source = "{name: b, type: hub, language: en, licence: none, rules: none, repository: o/n, revision: %s}" % (
        "b" * 40
    )
    text = RECIPE.replace(
        "  pretrain: {kind: pretrain, data: tokenize,",
        f"  stream: {{kind: stream, tokenizer: tokenizer, sources: [{source}]}}\n"
        "  pretrain: {kind: pretrain, data: stream,",
    )
    recipe = load_recipe(write_recipe(tmp_path, text), changes)
    found = contamination_notes(build_chain(recipe, tmp_path / "runs", STAGES))
    return [note for note in found if note.startswith("stream ")]


def test_sets_that_a_stream_does_not_check_are_told_and_the_others_not(tmp_path):
    begin = "stream reads its text as it comes, and is not kept clean of "
    end = ": scores on them may be learnt by heart; set {}, or name them in stream.decontaminate.unchecked"
    both = "stream.messages=messages, stream.tasks=tasks"
    assert notes(tmp_path) == [f"{begin}messages, tasks{end.format(both)}"]
    assert notes(tmp_path, "stream.tasks=tasks") == [f"{begin}messages{end.format('stream.messages=messages')}"]
    assert notes(tmp_path, "stream.tasks=tasks", "stream.decontaminate.unchecked=[messages]") == []
    assert notes(tmp_path, "stream.tasks=tasks", "stream.messages=messages") == []
