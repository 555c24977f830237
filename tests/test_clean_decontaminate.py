"""Evaluation items are kept out of the corpus: by a run of words, short items as a whole, each set by its name."""

import json
import re

import pytest
from clean_cases import clean, dropped, invented, report, source, texts, write_rows

from data.clean_config import EVALUATION_SETS, DecontaminateConfig
from data.clean_decontaminate import STAGE_SETS, ContaminationIndex, build_index, texts_in
from stages.base import ConfigError
from stages.clean import Clean

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May; how many?"
SHORT = "The official language of Andorra is Catalan since long ago"
WORDS = QUESTION.replace(",", "").replace(";", "").replace("?", "").split()


def index_of(*items: str, **fields) -> ContaminationIndex:
    return build_index(DecontaminateConfig(**fields), {"bench": iter([item] for item in items)})


def write_set(path, kind: str, rows: list[dict]):
    """An artifact of a stage, as far as its file goes; the directory."""
    (path / "output").mkdir(parents=True)
    (path / "output" / STAGE_SETS[kind][0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def slow_shares(item: str, document: str, length: int) -> bool:
    """Whether the document holds a run of so many of the item's words, by slicing."""
    runs = []
    for text in (item, document):
        words = re.findall(r"\w+", text.lower())
        runs.append({tuple(words[i : i + length]) for i in range(len(words) - length + 1)})
    return bool(runs[0] & runs[1])


def test_thirteen_words_in_a_row_contaminate_and_twelve_do_not():
    index = index_of(QUESTION)
    for start in range(len(WORDS)):
        for end in range(start + 1, len(WORDS) + 1):
            document = f"before {' '.join(WORDS[start:end]).upper()} after"
            found = index.find(document)
            assert (found is not None) is slow_shares(QUESTION, document, 13) is (end - start >= 13)
    name, shared = index.find(" - ".join(WORDS))
    assert (name, shared) == ("bench", " ".join(WORDS[:13]).lower())


def test_a_short_item_contaminates_as_a_whole_and_a_very_short_one_never():
    index = index_of(SHORT, "What is 3 + 4?", min_words=8)
    assert index.find(f"It is known: {SHORT.lower()}, they say")
    assert index.find(" ".join(SHORT.split()[:-1])) is None
    assert index.find("What is 3 + 4?") is None
    assert [(one.items, one.unchecked_items) for one in index.facts] == [(2, 1)]


def test_the_set_that_is_named_is_the_one_that_holds_the_item():
    first, second = invented(2, words=20)
    index = build_index(DecontaminateConfig(), {"a": iter([[first]]), "b": iter([["short"], [second, first]])})
    assert index.find(f"x {first}")[0] == "a"
    assert index.find(f"x {second}")[0] == "b"


def test_an_index_says_the_same_after_it_was_saved(tmp_path):
    index = index_of(QUESTION, SHORT)
    index.save(tmp_path / "index.npz")
    again = ContaminationIndex.load(tmp_path / "index.npz")
    for text in (QUESTION, SHORT, "neither", ""):
        assert again.find(text) == index.find(text)
    assert again.facts == index.facts
    assert index_of("too short").find("too short") is None


def test_texts_are_found_at_any_depth_and_roles_are_none():
    value = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [{"text": "there"}]}, 3, None]
    assert list(texts_in(value)) == ["hello", "there"]


@pytest.mark.parametrize("kind", EVALUATION_SETS)
def test_a_question_planted_in_training_is_removed_and_counted_by_its_set(tmp_path, kind):
    rows = {
        "tasks": {"prompt": [{"role": "user", "content": QUESTION}], "answer": "72"},
        "facts": {"prompt": " ".join(QUESTION.split()[:10]), "correct": " ".join(QUESTION.split()[10:])},
        "preferences": {"prompt": [{"role": "user", "content": QUESTION}]},
        "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": QUESTION}]},
        "problems": {"prompt": f'def f():\n    """{QUESTION}"""', "solution": "    return 72"},
    }
    tales = invented(20)
    write_rows(tmp_path / "in/a.jsonl", [*tales, f"{invented(1, seed=3)[0]} {QUESTION.upper()}"])
    parents = {kind: write_set(tmp_path / kind, kind, [rows[kind], dict.fromkeys(rows[kind], "no")])}
    corpus = clean(tmp_path / "run", source(tmp_path / "in"), parents=parents)
    assert dropped(corpus) == {f"contaminated_{kind}": 1}
    assert not any("NATALIA" in text for text in texts(corpus))
    (sample,) = report(corpus)["samples"]
    assert sample["rule"] == f"contaminated_{kind}"
    assert sample["detail"] == " ".join(WORDS[:13]).lower()
    assert report(corpus)["decontamination"]["sets"] == [{"name": kind, "items": 2, "unchecked_items": 1}]


def test_a_benchmark_of_ones_own_is_a_file_and_its_fields(tmp_path):
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"question": QUESTION, "options": {"A": invented(1, words=15, seed=9)[0]}}) + "\n")
    planted = f"{invented(1, seed=4)[0]} {invented(1, words=15, seed=9)[0]}"
    write_rows(tmp_path / "in/a.jsonl", [*invented(20), planted])
    write_rows(tmp_path / "code/a.jsonl", [*invented(8, seed=6), f"# {QUESTION}\nx = 72"])
    files = [{"name": "gsm", "path": str(bench), "fields": ["question", "options"]}]
    sources = [source(tmp_path / "in"), source(tmp_path / "code", "code", rules="none")]
    corpus = clean(tmp_path / "run", *sources, decontaminate={"files": files})
    assert dropped(corpus, 0) == dropped(corpus, 1) == {"contaminated_gsm": 1}


def test_a_benchmark_cannot_take_the_place_of_a_stages_set(tmp_path):
    files = [{"name": "tasks", "path": "bench.jsonl", "fields": ["question"]}]
    with pytest.raises(ValueError, match="must not name a file like a set of a stage; got tasks; rename it"):
        DecontaminateConfig(files=files)


def test_benchmarks_that_cannot_be_read_are_one_line_each(tmp_path):
    write_rows(tmp_path / "in/a.jsonl", invented(9))
    (tmp_path / "b.jsonl").write_text('{"question": "q"}\n{"other": 1}\n')
    (tmp_path / "c.jsonl").write_text("[1]\n")
    cases = {"b": "b.jsonl:2 lacks; it has: other", "c": "must hold a JSON object a line; got c.jsonl:1"}
    for name, message in cases.items():
        files = [{"name": name, "path": str(tmp_path / f"{name}.jsonl"), "fields": ["question"]}]
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            clean(tmp_path / name, source(tmp_path / "in"), decontaminate={"files": files})
        assert caught.value.faults[0].path.startswith("decontaminate.files.0.")
    config = {
        "kind": "clean",
        "sources": [source(tmp_path / "in")],
        "decontaminate": {"files": [files[0] | {"path": "absent"}]},
    }
    (fault,) = Clean.check(Clean.Config.model_validate(config), None)
    assert (fault.path, "existing file; got absent" in fault.message) == ("decontaminate.files.0.path", True)


def test_the_content_of_a_benchmark_enters_the_key_and_its_place_does_not(tmp_path):
    write_rows(tmp_path / "in/a.jsonl", invented(9))
    found = []
    for name, text in (("x", "a"), ("y", "a"), ("z", "b")):
        write_rows(tmp_path / f"{name}.jsonl", [text])
        file = {"name": "bench", "path": str(tmp_path / f"{name}.jsonl"), "fields": ["text"]}
        fields = {"kind": "clean", "sources": [source(tmp_path / "in")], "decontaminate": {"files": [file]}}
        config = Clean.Config.model_validate(fields)
        found.append((Clean.key_config(config), Clean.source_revisions(config)))
    assert found[0] == found[1]
    assert found[0][0] == found[2][0]
    assert found[0][1] != found[2][1]


def test_cleaning_a_decontaminated_corpus_again_drops_nothing(tmp_path):  # trap T12
    parents = {"tasks": write_set(tmp_path / "tasks", "tasks", [{"prompt": QUESTION}])}
    write_rows(tmp_path / "in/a.jsonl", [*invented(20), QUESTION, f"{' '.join(WORDS[:12])} twelve"])
    once = clean(tmp_path / "run", source(tmp_path / "in", min_words=1), parents=parents)
    write_rows(tmp_path / "again/a.jsonl", texts(once))
    again = clean(tmp_path / "run2", source(tmp_path / "again", min_words=1), parents=parents)
    assert dropped(again) == {}
    assert sorted(texts(again)) == sorted(texts(once))
