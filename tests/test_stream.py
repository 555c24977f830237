"""Pure streaming: each document once a pass, shares exact, a place that resumes to the bit, ends that are planned."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from stream_cases import N_DOCUMENTS, freeze, make_tokenizer, settings, texts, write_sources
from tiny_run import Log, context

from data.corpus import document_id
from data.errors import DataError
from data.heldout import HeldoutSet
from data.mixture import Mixture, Phase
from data.prefetch import Prefetcher
from data.shards import HELDOUT, read_ids, read_info
from data.stream import StreamLoader
from data.stream_freeze import freeze_stream
from data.tokenizer import load
from stages import STAGES
from stages.base import ConfigError, StopRequested
from stages.pretrain import Pretrain
from stages.runtime.faults import ending_of
from stages.runtime.training_data import TrainingData
from stages.stream import Stream, StreamConfig

T, G = 16, 4
EQUAL = {"web-en": 1.0, "buch-de": 1.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, tokenizer, sources):
    return freeze(tmp_path_factory.mktemp("stream"), tokenizer, sources, passes={"web-en": 9, "buch-de": 9})


def loader(folder, *, weights=EQUAL, later=(), **changes):
    mixture = Mixture(weights, later=tuple(later))
    plain = {"seq_len": T, "global_batch_size": G, "seed": 7, "mixture": mixture, **changes}
    return StreamLoader(folder / "output", **plain)


def read(stream, steps, rows=(slice(0, G),), first=0):
    return [[stream.batch(step, part).input_ids for part in rows] for step in range(first, first + steps)]


def joined(batches):
    return torch.cat([torch.cat(parts) for parts in batches])


def held_out(name, share=0.1):
    return {text for text in texts(name) if int(document_id(text)[:12], 16) < share * 16**12}


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_rows_are_the_documents_of_a_pass_each_once_and_no_held_out_one(tmp_path, tokenizer, sources, lanes):
    # traps M4, T6: four files go whole to the lanes, the one Parquet file row by row
    stream, reader = loader(freeze(tmp_path, tokenizer, sources, lanes=lanes)), load(tokenizer)
    stream.batch(0, slice(0, G))
    for name in EQUAL:
        ids = []
        for lane in stream._lanes.values():
            lane.sources[name].restore({})
            while (row := lane.sources[name].row(1)) is not None:
                ids.append(int(row[0]))
        found = Counter(reader.decode(ids).split("<|endoftext|>")[:-1])
        expected = set(texts(name)) - held_out(name)
        chats = [text for text in found if "<|im_start|>user" in text]
        assert len(stream._lanes) == lanes
        assert set(found) - set(chats) <= expected
        assert sum(found.values()) == len(found) == len(expected)
        assert chats


@pytest.mark.parametrize("cut", [1, 2, 9, 23, 41, 57, 76])
def test_a_resumed_stream_is_the_uninterrupted_one(frozen, cut):
    # trap T6: within a window, and after several
    whole = read(loader(frozen), 80)
    first = loader(frozen)
    head = read(first, cut)
    place = json.loads(json.dumps(first.position()))
    second = loader(frozen)
    second.restore(place)
    assert torch.equal(joined(head + read(second, 80 - cut, first=cut)), joined(whole))


def test_a_source_that_gives_other_documents_on_a_resume_is_refused(frozen):
    # trap T6
    first = loader(frozen)
    read(first, 60)
    place = first.position()
    assert place["0"]["sources"]["web-en"]["rows"] > 0
    place["0"]["sources"]["web-en"]["rows"] = 0
    place["0"]["sources"]["web-en"]["state"] = None
    second = loader(frozen)
    second.restore(place)
    with pytest.raises(DataError, match="source web-en must give the documents again that it gave before"):
        read(second, 9, first=60)


def test_a_place_forgotten_gives_other_rows(frozen):
    # trap T6: what the test above would see
    whole = joined(read(loader(frozen), 6))
    assert not torch.equal(joined(read(loader(frozen), 3) + read(loader(frozen), 3)), whole)


def test_another_number_of_ranks_goes_on_without_replay_or_loss(frozen):
    # trap T6
    whole = joined(read(loader(frozen), 9))
    ranks = [loader(frozen), loader(frozen)]
    halves = [slice(0, 2), slice(2, 4)]
    parts = [read(rank, 4, (half,)) for rank, half in zip(ranks, halves, strict=True)]
    place = {lane: at for rank in ranks for lane, at in rank.position().items()}
    one = loader(frozen)
    one.restore(json.loads(json.dumps(place)))
    middle = read(one, 2, first=4)
    again = [loader(frozen), loader(frozen)]
    for rank in again:
        rank.restore(one.position())
    tail = [read(rank, 3, (half,), first=6) for rank, half in zip(again, halves, strict=True)]
    by_step = [torch.cat([parts[0][step][0], parts[1][step][0]]) for step in range(4)]
    by_step += [batch[0] for batch in middle]
    by_step += [torch.cat([tail[0][step][0], tail[1][step][0]]) for step in range(3)]
    assert torch.equal(torch.cat(by_step), whole)


def test_micro_batches_and_reading_ahead_change_nothing(frozen):
    whole = joined(read(loader(frozen), 6))
    stream = loader(frozen)
    ahead = Prefetcher(stream.batch, steps=2, last_step=6, position=stream.position)
    parts = [torch.cat([ahead(step, slice(at, at + 1)).input_ids for at in range(G)]) for step in range(3)]
    place = ahead.position
    ahead.close()
    assert torch.equal(torch.cat(parts), whole[: 3 * G])
    second = loader(frozen)
    second.restore(place)
    assert torch.equal(joined(read(second, 3, first=3)), whole[3 * G :])


def test_shares_follow_the_schedule_and_its_phases(frozen):
    # trap T5
    later = [Phase(8, {"web-en": 1.0, "buch-de": 0.0}, "phases.0.mixture")]
    stream = loader(frozen, weights={"web-en": 1.0, "buch-de": 3.0}, later=later)
    german = "üßö"
    reader = load(frozen / "output" / "tokenizer")
    counts = [0, 0]
    for step, parts in enumerate(read(stream, 12)):
        rows = [reader.decode(row.tolist()) for row in parts[0]]
        counts[step >= 8] += sum(any(c in row for c in german) or "Hund" in row or " der" in row for row in rows)
    plan = stream.plan(12)
    assert plan["buch-de"]["share_asked"] == pytest.approx(0.75 * 8 / 12)
    assert plan["buch-de"]["tokens"] == 24 * T
    assert counts[1] == 0
    assert counts[0] >= 18, "most of 24 rows show a German word"


def test_a_stream_is_read_forward_only(frozen):
    stream = loader(frozen)
    stream.batch(0, slice(0, G))
    with pytest.raises(ValueError, match=r"rows must be read in order: lane 0 stands at row 2; got step 0, row 0"):
        stream.batch(0, slice(0, 2))
    with pytest.raises(ValueError, match="must be read in order"):
        stream.batch(2, slice(0, 2))


def test_a_source_that_ends_ends_the_run_by_name_unless_it_was_given_more_passes(tmp_path, tokenizer, sources):
    # trap T5
    stream = loader(freeze(tmp_path, tokenizer, sources, passes={"web-en": 9}))
    with pytest.raises(DataError) as caught:
        read(stream, 500)
    [(field, message)] = caught.value.faults
    assert field == "passes.buch-de"
    step = int(re.search(r"source buch-de ended at step (\d+) in lane [01] \(of 0 to 1", message)[1])
    assert message.startswith("must be more than 1: ")
    assert f"or lower max_steps to {step}; stream.on_end: drop" in message
    assert len(read(loader(tmp_path), step)) == step, "so long the stream lasts"


def test_a_source_that_ends_may_leave_its_rows_to_the_others(tmp_path, tokenizer, sources):
    # trap T5
    said = []
    folder = freeze(tmp_path, tokenizer, sources, passes={"web-en": 3}, on_end="drop")
    stream = loader(folder, say=said.append)
    with pytest.raises(DataError, match=r"max_steps must be at most \d+: every source .* in lane \d .*stream\.passes"):
        read(stream, 5000)
    ended = Counter(line.split(":")[0] + line.split(":")[1][:10] for line in said)
    assert ended["source buch-de, lane 0 pass 1 of"] == 1
    assert ended["source web-en, lane 0 pass 3 of"] == 1
    whole = read(loader(folder), 40)
    first = loader(folder)
    head = read(first, 30)
    second = loader(folder)
    second.restore(json.loads(json.dumps(first.position())))
    assert torch.equal(joined(head + read(second, 10, first=30)), joined(whole))


def test_text_that_overlaps_the_held_out_set_is_left_out_and_counted(tmp_path, tokenizer):
    # trap M4
    described = write_sources(tmp_path / "text")
    planted = sorted(held_out("web-en"), key=len)[-1]
    assert len(planted.split()) >= 13
    with (tmp_path / "text/en/part1.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": f"{planted} and more"}) + "\n")
        file.write("no json\n")
    folder = freeze(tmp_path / "stream", tokenizer, described, passes={"web-en": 2, "buch-de": 9}, lanes=1)
    stream = loader(folder, weights={"web-en": 1.0, "buch-de": 0.0})
    while stream._lanes == {} or stream._lanes[0].sources["web-en"].place.number == 0:
        step = stream._lanes[0].rows // G if stream._lanes else 0
        stream.batch(step, slice(0, G))
    dropped = stream.report()["web-en"]
    assert dropped["held_out"] >= len(held_out("web-en"))
    assert dropped["overlaps_held_out"] >= 1
    assert dropped["bad_json"] >= 1 if "bad_json" in dropped else sum(dropped.values()) > dropped["held_out"] + 1


def test_the_artifact_freezes_held_out_text_and_stages_no_training_token(frozen):
    # traps M2, T8
    info = read_info(frozen / "output")
    heldout = HeldoutSet(frozen / "output")
    assert heldout.hash == info.heldout_hash
    for source in info.sources:
        assert source["train"]["tokens"] == 0
        assert 1 <= source["heldout"]["documents"] <= 6
    assert [source["domain"] for source in info.sources] == ["web", None]
    assert min(count for name, count in info.special_token_counts.items() if name != "<|pad|>") > 0
    known = {document_id(text) for text in held_out("web-en")}
    assert set(read_ids(frozen / "output", HELDOUT, "web-en")) <= known
    assert np.load(frozen / "output" / "unigram.npy").sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 3}, "global_batch_size must be a multiple of the stream's lanes 2; got 3"),
        ({"mixture": Mixture()}, "mixture must weigh the sources of a stream"),
        ({"mixture": Mixture(EQUAL, cap_epochs=2.0, max_steps=4)}, "cap_epochs must be unset"),
        ({"mixture": Mixture({"web-en": 1.0})}, r"mixture.buch-de must give every source its weight"),
        ({"seq_len": 1}, "seq_len must be at least 2"),
    ],
)
def test_what_does_not_fit_a_stream_is_refused(frozen, changes, message):
    with pytest.raises(ValueError, match=message):
        loader(frozen, **changes)


def test_what_does_not_fit_a_stream_is_told_before_it_is_frozen(sources):
    # The tokenizer and the corpus behind the stream would have been made for nothing.
    stream = StreamConfig(tokenizer="t", sources=sources, lanes=3)
    plain = {"kind": "pretrain", "data": "stream", "seq_len": 16, "global_batch_size": 4, "max_steps": 9, "lr": 1e-3}

    def told(data, **fields):
        config = Pretrain.Config.model_validate(plain | fields)
        return [fault.path for fault in Pretrain.check_parent_configs(config, {"data": data})]

    assert told(stream, packing="whole", cap_epochs=2.0) == ["global_batch_size", "cap_epochs", "mixture", "packing"]
    assert told(stream, global_batch_size=6, mixture=EQUAL, data_workers=2) == []
    tokens = STAGES["tokenize"].Config.model_validate({"kind": "tokenize", "corpus": "c", "tokenizer": "t"})
    assert told(tokens, packing="whole", cap_epochs=2.0) == []
    assert told(tokens, data_workers=2) == ["data_workers"]


def test_files_that_changed_since_the_freeze_are_refused(tmp_path, tokenizer):
    described = write_sources(tmp_path / "text")
    folder = freeze(tmp_path / "stream", tokenizer, described)
    with (tmp_path / "text/en/part1.jsonl").open("a") as file:
        file.write('{"text": "late"}\n')
    with pytest.raises(
        DataError,
        match="the stream was frozen with; those of web-en changed; restore them or run the stage stream again",
    ):
        loader(folder)


def test_a_source_without_a_held_out_document_is_refused(tmp_path, tokenizer):
    # trap M4
    (tmp_path / "one.jsonl").write_text('{"text": "only one"}\n')
    one = {"type": "files", "name": "one", "language": "en", "licence": "none", "rules": "none"}
    one |= {"path": str(tmp_path / "one.jsonl"), "include": ["*"]}
    with pytest.raises(DataError, match="source one must yield a document to hold out and one to train on"):
        freeze_stream(settings([one]), tokenizer, tmp_path, seed=1, heldout_documents=1, sample_documents=9,
                      min_special_count=1)  # fmt: skip


def test_rules_and_passes_that_mean_nothing_are_named_before_anything_runs(sources):
    changed = [{**sources[0], "rules": "web"}, {**sources[1], "name": "web-en"}]
    config = StreamConfig(tokenizer="t", sources=changed, passes={"web": 2, "web-en": 0})
    said = [str(fault) for fault in Stream.check(config, None)]
    assert any(line.startswith("sources.0.rules: must be none") for line in said)
    assert any(line.startswith("sources.1.name: must differ") for line in said)
    assert any(line.startswith("passes.web: must name one of the sources") for line in said)
    assert any(line.startswith("passes.web-en: must be at least 1") for line in said)


def test_a_shipped_entry_is_a_source_of_a_stream():
    config = StreamConfig(tokenizer="t", sources=[{"entry": "fineweb-edu"}])
    assert Stream.check(config, None) == []
    assert Stream.source_names(config)[0].language == "en"
    assert "fineweb-edu" in Stream.source_revisions(config)


def test_the_stage_writes_the_artifact(tmp_path, tokenizer, sources):
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "output").symlink_to(tokenizer)
    config = StreamConfig(
        tokenizer="tokenizer", sources=sources, lanes=2, chat_share=0.3, heldout_share=0.1, heldout_documents=5
    )
    at = context(tmp_path / "run", tmp_path / "parent")
    object.__setattr__(at, "config", config)
    object.__setattr__(at, "parents", {"tokenizer": tmp_path / "parent"})
    result = Stream().run(at)
    assert result.metrics["heldout_hash"] == HeldoutSet(at.output).hash
    assert any("web-en" in line for line in result.summary)
    assert N_DOCUMENTS["web-en"] > result.metrics["heldout_documents"] > 1


STREAMED = {"mixture": EQUAL, "precision": "fp32"}


def test_pretraining_on_a_stream_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, frozen):
    # trap T6
    from test_pretrain import StopsAt, weights

    whole = Log()
    Pretrain().run(context(tmp_path / "whole", frozen, tracker=whole, **STREAMED, prefetch_steps=0))
    stopped, resumed = StopsAt(tmp_path / "parts", 3), Log()
    with pytest.raises(StopRequested, match="step 3"):
        Pretrain().run(context(tmp_path / "parts", frozen, tracker=stopped, **STREAMED))
    result = Pretrain().run(context(tmp_path / "parts", frozen, tracker=resumed, **STREAMED))
    ended = [line for line in result.summary if line.startswith("source web-en: ")]
    assert ended
    assert "passes done in its lanes, left out: held_out" in ended[0]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    losses = stopped.of("train", "loss_nats_per_token") | resumed.of("train", "loss_nats_per_token")
    assert losses == whole.of("train", "loss_nats_per_token")


def test_a_run_whose_stream_ended_goes_on_with_more_passes_as_if_it_had_them_from_the_start(
    tmp_path, tokenizer, sources
):
    # traps T5, T6
    from test_pretrain import weights

    folder = freeze(tmp_path / "stream", tokenizer, sources, passes={"web-en": 9})
    asked = {**STREAMED, "data": "fluss", "max_steps": 30, "checkpoint_every_steps": 4}
    more = {**asked, "passes": {"buch-de": 9}}
    with pytest.raises(DataError) as caught:
        Pretrain().run(context(tmp_path / "run", folder, **asked))
    (line,) = ending_of(caught.value, "pretrain", tmp_path).lines
    assert line.startswith("pretrain.passes.buch-de: must be more than 1: source buch-de ended at step ")
    assert "fluss.on_end: drop, or more text, would be another stream, on which it begins anew" in line
    assert Pretrain.key_config(context(tmp_path / "k", folder, **more).config) == Pretrain.key_config(
        context(tmp_path / "k", folder, **asked).config
    )
    resumed = Log()
    Pretrain().run(context(tmp_path / "run", folder, tracker=resumed, **more))
    assert [row["step"] for row in resumed.rows if row["event"] == "resume"] != [0]
    Pretrain().run(context(tmp_path / "whole", folder, **more))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_passes_that_mean_nothing_to_the_run_are_refused(tmp_path, tokenizer, sources, frozen):
    from tiny_run import make_tokens

    dropping = freeze(tmp_path / "drop", tokenizer, sources, on_end="drop")
    for folder, passes, message in (
        (frozen, {"web": 2}, "passes.web: must name one of the sources web-en, buch-de; got web; rename it"),
        (dropping, {"web-en": 2}, "passes: must be left out where the stream drops what ends"),
        (make_tokens(tmp_path / "tokens"), {"en": 2}, "passes: must be left out with shards, whose passes max_epochs"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainingData(context(tmp_path / "run", folder, **{**STREAMED, "mixture": None}, passes=passes))


def test_whole_packing_of_a_stream_is_refused_by_name(tmp_path, frozen):
    with pytest.raises(ConfigError, match="packing: must be cut with a stream"):
        Pretrain().run(context(tmp_path, frozen, **STREAMED, packing="whole"))
