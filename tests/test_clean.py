"""The clean stage on small text, through datatrove itself: what stays, what goes and why, and the split."""

import gzip
import hashlib
import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
from clean_cases import CODE, ENGLISH, HINDI, clean, dropped, invented, source, texts, write_rows

from data.clean_form import normalise
from data.corpus import CorpusError, document_id, read_documents, sources
from data.heldout_split import choose_heldout, find_overlap
from data.rules import rules_of
from data.source_config import HeldoutConfig
from data.words import WordRuns
from stages.base import ConfigError
from stages.clean import Clean, _summary


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def slow_runs(text: str, length: int) -> set[tuple[str, ...]]:
    """The runs of words of a text of plain letters, by slicing."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def mixed_input(folder: Path) -> list[dict]:
    """Two sources with duplicates, near duplicates, bad rows and short ones."""
    tales = invented(60)
    near = tales[0].replace(tales[0].split()[30], "changed")
    write_rows(folder / "tales/a.jsonl", [*tales[:40], tales[3], near, "too short", "", *tales[40:]])
    with (folder / "tales/a.jsonl").open("a") as file:
        file.write('{"text": "lone \\ud800 surrogate"}\n{broken\n')
    write_rows(folder / "more/b.jsonl", [tales[7], *invented(30, seed=2)])
    return [source(folder / "tales"), source(folder / "more", "more", language="de")]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The corpus of ``mixed_input``, made once."""
    folder = tmp_path_factory.mktemp("mixed")
    return clean(folder / "run", *mixed_input(folder / "in")), folder


def test_duplicates_go_and_the_earlier_source_keeps_its_copy(mixed):
    corpus, _ = mixed
    assert dropped(corpus, 0) == {
        "duplicate_exact": 1,
        "duplicate_near": 1,
        "empty": 1,
        "invalid_json": 1,
        "invalid_unicode": 1,
        "too_short": 1,
    }
    assert dropped(corpus, 1) == {"duplicate_exact": 1}
    everything = texts(corpus)
    assert len(everything) == 90
    assert len(set(everything)) == 90


def test_every_document_read_is_accounted_for(mixed):
    corpus, _ = mixed
    report = json.loads((corpus / "report.json").read_text())
    assert [(row["source"], row["read"]["documents"]) for row in report["funnel"]] == [("tales", 66), ("more", 31)]
    for row, described in zip(report["funnel"], sources(corpus), strict=True):
        lost = sum(tally["documents"] for tally in row["dropped"].values())
        assert row["read"]["documents"] == lost + row["train"]["documents"] + row["heldout"]["documents"]
        kept = [document for side in ("train", "heldout") for document in read_documents(corpus, side, row["source"])]
        assert sum(len(d["text"].encode()) for d in kept) == described["train"]["bytes"] + described["heldout"]["bytes"]
    near = next(sample for sample in report["samples"] if sample["rule"] == "duplicate_near")
    assert near["source"] == "tales"
    assert "changed" in near["text"] or near["text"] == invented(60)[0][:300]


def test_documents_have_the_promised_form(mixed):
    corpus, _ = mixed
    for split in ("train", "heldout"):
        for document in read_documents(corpus, split):
            assert set(document) == {"id", "text", "source", "language", "title"}
            assert document["id"] == hashlib.sha256(document["text"].encode()).hexdigest()[:32]
            assert unicodedata.is_normalized("NFC", document["text"])
            assert document["language"] == {"tales": "en", "more": "de"}[document["source"]]


def test_the_held_out_documents_are_those_of_the_lowest_hashes_of_each_source(mixed):  # trap M4
    corpus, _ = mixed
    for name in ("tales", "more"):
        train = {document["id"] for document in read_documents(corpus, "train", name)}
        heldout = {document["id"] for document in read_documents(corpus, "heldout", name)}
        assert len(heldout) >= 4
        assert not train & heldout
        assert max(heldout) < min(train)


def test_equal_input_gives_equal_bytes_whatever_the_workers(mixed):
    corpus, folder = mixed
    again = clean(folder / "two", *mixed_input(folder / "in"), workers=2)
    assert digests(again) == digests(corpus)
    assert "train/tales.jsonl.gz" in digests(corpus)


def test_cleaning_a_cleaned_corpus_changes_nothing(mixed):  # trap T12
    corpus, folder = mixed
    write_rows(folder / "again/a.jsonl", texts(corpus))
    again = clean(folder / "run2", source(folder / "again"))
    assert dropped(again) == {}
    assert sorted(texts(again)) == sorted(texts(corpus))
    assert set(texts(again, "heldout")) <= set(texts(corpus, "heldout"))
    write_rows(folder / "third/a.jsonl", texts(again))
    third = clean(folder / "run3", source(folder / "third"))
    for split in ("train", "heldout"):
        assert texts(third, split) == texts(again, split)


def test_a_killed_run_goes_on_where_it_stopped(mixed, monkeypatch):
    from data import clean as pipeline

    corpus, folder = mixed

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.MinhashDedupCluster, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            clean(folder / "killed", *mixed_input(folder / "in"))
    monkeypatch.setattr(pipeline, "read_source", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(pipeline.SourceRules, "run", lambda *_: pytest.fail("filtered again"))
    assert digests(clean(folder / "killed", *mixed_input(folder / "in"))) == digests(corpus)


def test_code_comes_through_as_it_is_one_document_a_file(tmp_path):  # trap T12
    files = {f"pkg/m{i}.py": CODE.replace("1", str(i)) + f"\n\n{name} = {i}\n" for i, name in enumerate("abcdef")}
    files = {name: text + f"# {invented(6)[i]}\n" for i, (name, text) in enumerate(files.items())}
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    code = source(tmp_path / "in", "code", language="code", rules="code", include=["**/*.py"])
    corpus = clean(tmp_path, code, heldout={"min_documents": 2, "common_documents": 0, "ngram": 50})
    read = {d["title"]: d["text"] for side in ("train", "heldout") for d in read_documents(corpus, side)}
    assert read == {name: text.rstrip() for name, text in files.items()}


def test_near_duplicates_stay_when_asked_to(tmp_path):
    tale = max(invented(20), key=document_id)  # a high hash stays in training, so that overlap does not matter
    write_rows(tmp_path / "in/a.jsonl", [*invented(80, seed=4), tale, tale.replace(tale.split()[3], "other")])
    loose = {"min_documents": 1, "share": 1e-9}
    assert dropped(clean(tmp_path / "a", source(tmp_path / "in"), heldout=loose)) == {"duplicate_near": 1}
    assert dropped(clean(tmp_path / "b", source(tmp_path / "in"), heldout=loose, dedup={"near": False})) == {}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("x = [" + "one, " * 250 + "]", "long_line"),
        ("\n".join(["value = compute_something_long" * 4] * 20), "long_lines"),
        ("\n".join(f"({i}, {i})," for i in range(200)), "few_letters"),
        ("a = 'nul \0 byte' + b + c + d", "binary"),
        (CODE, None),
    ],
)
def test_code_rules_drop_what_is_no_code_by_name(tmp_path, text, rule):
    assert verdict(source(tmp_path, rules="code", language="code"), text) == rule


def verdict(fields: dict, text: str) -> str | None:
    """The first rule that objects."""
    from datatrove.data import Document

    config = Clean.Config.model_validate({"kind": "clean", "sources": [fields]})
    document = Document(text=text, id="1", metadata={"source": fields["name"]})
    return next((found for rule in rules_of(config.sources[0]) if (found := rule(document))), None)


def test_language_is_checked_where_it_is_certain_and_marks_count_as_letters(tmp_path):
    english = source(tmp_path, language_threshold=0.05)
    hindi = source(tmp_path, language="hi", rules="messages", language_threshold=0.05)
    assert verdict(english, ENGLISH) is None
    assert verdict(english, HINDI) == "language"
    assert verdict(hindi, HINDI) is None
    assert verdict(hindi, ENGLISH) == "language"
    assert verdict(source(tmp_path, rules="none", language_threshold=0.05), HINDI) is None


def test_web_rules_are_those_of_gopher_and_fineweb(tmp_path):
    web = source(tmp_path, rules="web", min_words=5)
    assert verdict(web, f"{ENGLISH} {' '.join(invented(1))}") is None
    assert verdict(web, "\n".join(["click here now please friends"] * 30)) == "line_punct_ratio"
    assert verdict(web, "\n".join(f"{line}" for line in [ENGLISH] * 10)) == "char_dup_ratio"
    assert verdict(web, invented(1)[0]) == "gopher_enough_stop_words"


def test_normalisation_is_idempotent_and_keeps_indentation():
    text = "\n\ufeff \n    e\u0301t\u00e9\r\n\tx  \r\n\n y\r\n \n"
    assert normalise(text) == "    \u00e9t\u00e9\n\tx  \n\n y"
    draw = random.Random(3)
    for _ in range(300):
        mess = "".join(draw.choices(["\n", " ", "\ufeff", "\r", "e", "\u0301", "\t", "क", "\u093c", "\u2028"], k=12))
        assert normalise(normalise(mess)) == normalise(mess), repr(mess)


def test_a_training_document_that_shares_thirteen_words_with_a_held_out_one_is_removed(tmp_path):  # trap M4
    tales = invented(40)
    write_rows(tmp_path / "first/a.jsonl", tales)
    held = texts(clean(tmp_path / "probe", source(tmp_path / "first")), "heldout")[0]
    shared = held.upper().split()[20:33]
    thirteen, twelve = "; ".join(shared), " ".join(shared[:12])
    filler = invented(2, seed=9)
    write_rows(tmp_path / "second/a.jsonl", [*tales, f"{filler[0]} {thirteen}", f"{filler[1]} {twelve}"])
    fields = source(tmp_path / "second", min_words=1)
    corpus = clean(tmp_path / "run", fields, heldout={"share": 1e-9})
    assert dropped(corpus) == {"heldout_overlap": 1}
    (sample,) = json.loads((corpus / "report.json").read_text())["samples"]
    assert sample["detail"] == " ".join(shared).lower()
    train, heldout = texts(corpus, "train"), texts(corpus, "heldout")
    known = set().union(*(slow_runs(text, 13) for text in heldout))
    assert not any(slow_runs(text, 13) & known for text in train)
    assert any(twelve in text for text in [*train, *heldout])


def test_words_that_many_documents_share_are_boilerplate_until_too_few_remain():
    header = " ".join(invented(1, words=20, seed=5))
    bodies = invented(5, seed=6)
    config = HeldoutConfig(common_documents=3)
    heldout = [("h", f"{header} {bodies[0]}")]
    many = [(str(i), f"{header} {body}") for i, body in enumerate(bodies[1:])]
    assert find_overlap(heldout, many, config) == {}
    assert set(find_overlap(heldout, many[:3], config)) == {"0", "1", "2"}
    copied = [*many[:3], ("copy", f"{header} {bodies[0]}")]
    assert set(find_overlap(heldout, copied, config)) == {"0", "1", "2", "copy"}


def test_a_short_document_equal_but_for_case_and_signs_is_overlap():
    config = HeldoutConfig()
    train = [("a", "open the FILE"), ("b", "open the files")]
    assert set(find_overlap([("h", "Open the file!")], train, config)) == {"a"}
    assert find_overlap([], [("a", "open")], config) == {}
    assert find_overlap([("h", "...")], [("a", "!!!")], config) == {}


def test_runs_of_words_equal_slicing_and_keep_matras():
    text = invented(1, words=40)[0]
    runs = WordRuns(5)
    assert len(runs.of(text)) == len(text.split()) - 4
    assert len(set(runs.of(f"{text} {text}").tolist())) == len(slow_runs(f"{text} {text}", 5))
    assert runs.of("कि की कु के को").tolist() != runs.of("क क क क क").tolist()
    assert len(runs.of(HINDI)) == len(HINDI.split()) - 4
    assert runs.of("one two three four five").tolist() != runs.of("five four three two one").tolist()


def test_a_document_never_changes_sides_when_others_come():
    few = {"a": [hashlib.sha256(bytes([i])).hexdigest()[:32] for i in range(200)]}
    more = {"a": [*few["a"], *(hashlib.sha256(bytes([i, 1])).hexdigest()[:32] for i in range(200))]}
    config = HeldoutConfig(share=0.1, min_documents=1)
    assert choose_heldout(more, config) & set(few["a"]) == choose_heldout(few, config)
    assert 8 <= len(choose_heldout(few, config)) <= 35


def test_a_small_source_holds_out_its_minimum_but_at_most_half():
    ids = {"a": ["1" * 32, "3" * 32, "2" * 32, "f" * 32], "b": ["e" * 32]}
    assert choose_heldout(ids, HeldoutConfig(share=0.01, min_documents=3)) == {"1" * 32, "2" * 32}


def test_a_source_of_one_document_or_none_is_one_clear_line(tmp_path):  # trap T4
    write_rows(tmp_path / "one/a.jsonl", invented(1))
    write_rows(tmp_path / "none/a.jsonl", ["short", "shorter"])
    with pytest.raises(ConfigError) as caught:
        clean(tmp_path, source(tmp_path / "one", "one"), source(tmp_path / "none", "none"))
    first, second = caught.value.faults
    assert (first.path, second.path) == ("sources.0", "sources.1")
    assert "source one must keep at least 2 documents" in first.message
    assert "got 0 (dropped: too_short 2)" in second.message
    assert not any("\n" in fault.message for fault in caught.value.faults)


def test_faults_of_a_config_are_found_before_the_run(tmp_path):
    write_rows(tmp_path / "in/a.jsonl", invented(1))
    fields = {"kind": "clean", "sources": [source(tmp_path / "in"), source(tmp_path / "absent")]}
    faults = Clean.check(Clean.Config.model_validate(fields), None)
    assert [fault.path for fault in faults] == ["sources.0.name", "sources.1.name", "sources.1.path"]
    fields["sources"][1]["name"] = "other"
    with pytest.raises(ConfigError, match=r"sources\.1\.path: must be an existing folder"):
        Clean.source_revisions(Clean.Config.model_validate(fields))


def test_the_key_depends_on_content_not_on_place_or_workers(tmp_path):
    configs = []
    for folder, workers in (("x", 1), ("y", 2)):
        write_rows(tmp_path / folder / "a.jsonl", invented(1))
        fields = {"kind": "clean", "workers": workers, "sources": [source(tmp_path / folder)]}
        configs.append(Clean.Config.model_validate(fields))
    assert Clean.key_config(configs[0]) == Clean.key_config(configs[1])
    assert Clean.source_revisions(configs[0]) == Clean.source_revisions(configs[1])


def test_a_corpus_is_read_strictly(mixed, tmp_path):
    corpus, _ = mixed
    with pytest.raises(CorpusError, match="split must be one of train, heldout; got 'test'"):
        next(read_documents(corpus, "test"))
    with pytest.raises(CorpusError, match="source must be one of tales, more; got 'tale'"):
        next(read_documents(corpus, "train", "tale"))
    with pytest.raises(CorpusError, match=r"is no corpus: it has no corpus\.json"):
        sources(tmp_path)


def test_corpus_files_carry_no_time_and_no_name(mixed):
    corpus, _ = mixed
    data = (corpus / "train/tales.jsonl.gz").read_bytes()
    assert data[4:8] == b"\0\0\0\0"  # RFC 1952: MTIME
    assert not data[3] & 0x08  # RFC 1952: FNAME
    assert gzip.decompress(data).endswith(b"}\n")


def test_the_summary_says_how_many_rules_it_does_not_name():
    side = {"documents": 1, "bytes": 10}
    entry = {"name": "tales", "language": "en", "train": side, "heldout": side}
    endings = []
    for count in (0, 4, 5, 6):
        dropped = {f"rule_{number}": 9 - number for number in range(count)}
        lines = _summary([entry | {"dropped": dropped}], {"decontamination": {"sets": []}, "quality": None})
        endings.append(lines[1].split("0.000  ")[1])
    named = "rule_0 9, rule_1 8, rule_2 7, rule_3 6"
    assert endings == ["-", named, f"{named} and 1 more rule", f"{named} and 2 more rules"]
