"""lm-evaluation-harness asks our model: its likelihoods are ours, local tasks are named so, n and error given."""

import dataclasses
import json
import math
import re
from pathlib import Path

import evaluated
import pytest
from evaluated import FACTS, evaluate, make_bench, slow_nats
from pydantic import ValidationError

from data.questions import read_mmlu_examples
from data.rewards import extract_answer
from data.tokenizer import encode_text, token_byte_strings
from stages.base import ConfigError
from stages.evaluate import Evaluate
from stages.runtime.suites import bpb
from stages.runtime.suites.bench import greedy
from stages.runtime.suites.config import BpbConfig, FileTask, HarnessConfig
from stages.runtime.suites.harness import items_of, load_tasks
from stages.runtime.suites.harness_local import file_task, local_tasks, tasks_task
from stages.runtime.suites.scores import wilson


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    return evaluated.make_parents(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def bench(parents):
    return make_bench(parents, 4)


def cheapest(bench, by_length: bool) -> list[float]:
    """Which facts' right ending is likeliest, in all or for its characters, one sequence at a time."""
    right = []
    for fact in FACTS:
        costs = []
        for ending in (fact["correct"], *fact["distractors"]["medium"]):
            first = len(encode_text(bench.tokenizer, fact["prompt"]))
            whole = encode_text(bench.tokenizer, f"{fact['prompt']} {ending}")
            costs.append(sum(slow_nats(bench, whole, first)) / (len(ending) if by_length else 1))
        right.append(float(costs[0] == min(costs)))
    return right


def test_local_tasks_give_our_likelihoods_with_n_and_standard_error(parents, bench, tmp_path):  # trap M6
    changes = {"suites": {"harness": {"local": ["facts_local", "tasks_local"], "max_new_tokens": 4}}}
    changes |= dict.fromkeys(("data", "messages", "preferences"))
    _, output = evaluate(tmp_path, parents, **changes)
    scores = {score["name"]: score for score in json.loads((output / "scores.json").read_text())["scores"]}
    assert set(scores) == {
        "harness/facts_local/acc", "harness/facts_local/acc_norm", "harness/tasks_local/exact_match",
    }  # fmt: skip
    items = json.loads((output / "items.json").read_text())
    for name, by_length in (("acc", False), ("acc_norm", True)):
        score, right = scores[f"harness/facts_local/{name}"], cheapest(bench, by_length)
        assert items[score["items"]]["ids"] == [fact["id"] for fact in FACTS]
        assert items[score["items"]]["numerator"] == right
        assert score["value"] == pytest.approx(sum(right) / 3)
        # The standard error of a mean from the sample's variance.
        share = sum(right) / 3
        assert score["interval"] == list(wilson(round(sum(right)), 3))
        error = float(score["method"].rpartition("standard error ")[2])
        assert error == pytest.approx(math.sqrt(share * (1 - share) / 2), rel=1e-5)
        # Nothing of the model may be among the settings, or no two models could be compared.
        assert set(score["settings"]) == {"lm_eval"}
    exact = scores["harness/tasks_local/exact_match"]
    assert (exact["n"], exact["value"], exact["decoding"]) == (24, 0.0, greedy(4))


@pytest.mark.parametrize(
    "text", ["1 + 1 = 2. Answer: 2", "Answer: 3. No! Answer: 2\n", "Answer: 2\nso", "2", "Answer:"]
)
def test_the_harness_takes_the_answer_that_we_take(parents, bench, text):
    step = tasks_task(bench, HarnessConfig())["filter_list"][0]["filter"][0]
    found = re.findall(step["regex_pattern"], text)
    assert (found[step["group_select"]] if found else None) == extract_answer(text)


def test_only_a_mean_of_its_questions_is_paired():  # trap M7
    samples = [{"doc": {"id": str(n)}, "doc_id": n, "perplexity": value} for n, value in enumerate((-1.0, -2.0))]
    assert items_of(samples, "perplexity", math.exp(1.5)) is None
    assert items_of(samples, "perplexity", -1.5).ids == ["0", "1"]
    assert items_of([{"doc": {}, "doc_id": 0, "f1": (1, 0)}], "f1", 0.5) is None


def test_texts_are_scored_whole_and_replies_cut_at_until(bench):
    from lm_eval.api.instance import Instance

    from stages.runtime.suites.harness_model import HarnessModel

    def requests(kind, arguments):
        return [Instance(request_type=kind, doc={}, arguments=one, idx=n) for n, one in enumerate(arguments)]

    model, end = HarnessModel(bench), bench.specials["<|endoftext|>"]
    text = "the cat sat on a red mat"
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert total == pytest.approx(-sum(slow_nats(bench, [end, *encode_text(bench.tokenizer, text)], 1)), abs=1e-4)
    long = "the cat sat on the old hill " * 12
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(long,)]))
    assert math.isfinite(total)
    ((nats, _), (empty, _)) = model.loglikelihood(requests("loglikelihood", [(long, "mat"), ("", "the cat")]))
    assert nats < 0
    assert empty == pytest.approx(-sum(slow_nats(bench, [end, *encode_text(bench.tokenizer, "the cat")], 1)), abs=1e-4)
    asked = [("the", {"until": [], "max_gen_toks": 6}), ("the", {"until": [], "max_gen_toks": 6, "as_chat": True})]
    whole, chat = model.generate_until(requests("generate_until", asked))
    assert whole != chat
    stop = whole[2]
    (cut,) = model.generate_until(requests("generate_until", [("the", {"until": [stop], "max_gen_toks": 6})]))
    assert cut == whole.partition(stop)[0]


def only_harness(**harness):
    unused = {name: None for name in evaluated.INPUTS if name != "data" or "heldout_local" not in harness["local"]}
    return {"suites": {"harness": harness}} | unused


def scores_in(output):
    return {score["name"]: score for score in json.loads((output / "scores.json").read_text())["scores"]}


def test_the_harnesss_bits_per_byte_differ_from_ours_by_the_first_token_and_what_stands_before_it(
    parents, bench, tmp_path
):  # trap M1
    documents = list(bpb.chosen(parents["data"] / "output", BpbConfig(documents=6, document_tokens=None)))
    assert max(len(document.ids) for document in documents) < bench.max_seq_len
    _, output = evaluate(tmp_path, parents, **only_harness(local=["heldout_local"], heldout_documents=6))
    theirs = scores_in(output)["harness/heldout_local/bits_per_byte"]
    table, end = token_byte_strings(bench.tokenizer), bench.specials["<|endoftext|>"]
    with_end, without, first_bytes, n_bytes = [], [], 0, 0
    for document in documents:
        # The harness asks for every token of the text, so something must stand before the first one.
        with_end.append(slow_nats(bench, [end, *document.ids], 1))
        without.append(slow_nats(bench, document.ids, 1))
        first_bytes += len(table[document.ids[0]])
        n_bytes += sum(len(table[token]) for token in document.ids)
    bits = sum(map(sum, with_end)) / math.log(2)
    # fp32 log-softmax against fp64: about 1e-7 of each token's nats.
    assert theirs["value"] == pytest.approx(bits / n_bytes, rel=1e-6)
    assert (theirs["unit"], theirs["n"], theirs["better"]) == ("bits_per_byte", 12, "lower")
    assert theirs["n_unit"] == "documents"
    assert "over documents, " in theirs["method"]
    assert theirs["interval"][0] < theirs["value"] < theirs["interval"][1]
    ours = bpb.run(bench, BpbConfig(seq_len=128, documents=6, document_tokens=None)).scores[-1]
    assert ours.name == "bpb/all"
    # The two parts of the difference: the first token's own bits and bytes, and what <|endoftext|> does to the others.
    first = sum(nats[0] for nats in with_end) / math.log(2)
    moved = sum(sum(nats[1:]) - sum(alone) for nats, alone in zip(with_end, without, strict=True)) / math.log(2)
    assert ours.value * (n_bytes - first_bytes) == pytest.approx(theirs["value"] * n_bytes - first - moved, rel=1e-6)


QUESTIONS = [
    {"q": "the cat sat on a red", "options": {"A": "hill", "B": "mat"}, "key": "B"},
    {"q": "one small", "options": ["dog", "mat", "hill"], "key": 0},
    {"q": "over the old", "options": ["mat", "hill"], "key": "hill"},
]


def test_ones_own_file_is_a_local_task_known_by_its_content(parents, bench, tmp_path):
    path = tmp_path / "copy.jsonl"
    evaluated.write_rows(path, QUESTIONS)
    task = {"name": "cats_local", "type": "file", "kind": "choice", "path": str(path), "licence": "CC0"}
    task |= {"question": "q", "choices": "options", "answer": "key"}
    changes = only_harness(local=[], files=[task])
    assert Evaluate.check(evaluated.config(**changes), None) == []
    revision = Evaluate.source_revisions(evaluated.config(**changes))
    _, output = evaluate(tmp_path / "run", parents, **changes)
    scores = scores_in(output)
    assert set(scores) == {"harness/cats_local/acc", "harness/cats_local/acc_norm"}
    right = []
    for row, endings in zip(QUESTIONS, (["mat", "hill"], ["dog", "mat", "hill"], ["hill", "mat"]), strict=True):
        prompt = encode_text(bench.tokenizer, row["q"])
        whole = [encode_text(bench.tokenizer, f"{row['q']} {ending}") for ending in endings]
        costs = [sum(slow_nats(bench, ids, len(prompt))) for ids in whole]
        right.append(float(costs[0] == min(costs)))
    assert scores["harness/cats_local/acc"]["value"] == pytest.approx(sum(right) / 3)
    assert scores["harness/cats_local/acc"]["settings"]["licence"] == "CC0"
    evaluated.write_rows(path, QUESTIONS[:2])
    assert Evaluate.source_revisions(evaluated.config(**changes)) != revision
    assert "path" not in Evaluate.key_config(evaluated.config(**changes))["suites"]["harness"]["files"][0]


def test_answers_in_a_file_are_compared_with_the_last_number_of_the_reply(tmp_path):
    from lm_eval.tasks import TaskManager

    path = tmp_path / "sums.jsonl"
    evaluated.write_rows(path, [{"question": "How many?", "answer": "2 + 3 = 5\n#### 1,005"}])
    task = FileTask(type="file", name="sums_local", kind="answer", path=str(path), licence="CC0")
    (loaded,) = load_tasks(TaskManager(include_defaults=False), [file_task(task, path)], [])["tasks"].values()
    doc = next(iter(loaded.test_docs()))
    assert loaded.doc_to_target(doc) == "1,005"
    step = loaded.config.filter_list[0]["filter"][0]
    for reply, is_right in (("It is 12, so 1005.", 1), ("1,005 it is", 1), ("1005 and 7", 0), ("$1,005.", 1)):
        found = re.findall(step["regex_pattern"], reply)
        assert loaded.process_results(doc, [found[step["group_select"]]])["exact_match"] == is_right


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no row"),
        ([{"question": "x"}], "in row 1: no field answer and no field choices, but question"),
        ([{"question": "x"}] * 9, "in row 1, 2, 3, 4, 5 and 4 more: no field answer"),
        ([["question"]], "a row must be a mapping of fields; got list"),
        ([{"question": "x", "choices": ["a", "a"], "answer": 0}], "two or more different endings"),
        ([{"question": "x", "choices": ["a", "b"], "answer": 2}], "answer must be a number below 2"),
        ([{"question": " ", "choices": ["a", "b"], "answer": 0}], "question must be text"),
        ([{"question": "x", "choices": ["a", "b"], "answer": 0, "id": 1}] * 2, "must tell questions apart"),
    ],
)
def test_faulty_questions_are_refused_by_row(bench, tmp_path, rows, said):
    path = tmp_path / "q.jsonl"
    evaluated.write_rows(path, rows)
    task = FileTask(type="file", name="q_local", kind="choice", path=str(path), licence="CC0")
    inputs = {**bench.inputs, "harness/q_local": path}
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        local_tasks(dataclasses.replace(bench, inputs=inputs), HarnessConfig(local=[], files=[task]))
    assert caught.value.faults[0].path.startswith("suites.harness.files[0].")


def test_a_file_that_is_not_there_a_name_taken_twice_and_a_published_name_are_refused(tmp_path):
    path = str(tmp_path / "none.jsonl")
    plain = {"name": "facts_local", "type": "file", "kind": "choice", "path": path, "licence": "CC0"}
    faults = Evaluate.check(
        evaluated.config(**only_harness(local=["facts_local"], files=[plain]) | {"facts": "facts"}), None
    )
    assert [fault.path for fault in faults] == ["suites.harness.files[0].path", "suites.harness.files[0].name"]
    for wrong in ({"name": "mmlu"}, {"path": None}, {"package": {"name": "p", "version": "1", "sha256": "a" * 64}}):
        with pytest.raises(ValidationError, match=r"match pattern|valid string|not permitted"):
            FileTask.model_validate(plain | wrong)


@pytest.mark.parametrize(("language", "fewest"), [("en", 280), ("de", 280), ("hi", 280)])
def test_mmlus_development_questions_come_from_the_harness_itself_and_are_not_called_mmlu(language, fewest):
    import lm_eval

    rows = read_mmlu_examples(Path(lm_eval.__file__).parent / "tasks", language)
    assert len(rows) >= fewest
    assert all(len(row["choices"]) == 4 and 0 <= row["right"] < 4 and row["question"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    script = sum("\u0900" <= letter <= "\u097f" for row in rows for letter in row["question"])
    assert (script > 1000) is (language == "hi")


def test_published_tasks_come_from_the_hub_or_are_refused_with_a_way_out(monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = Path(lm_eval.__file__).parent / "tasks" / "arc"
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    with pytest.raises(ConfigError, match=r"must be had from the hub; arc_easy cannot be: .*_local"):
        load_tasks(manager, [], ["arc_easy"])
    with pytest.raises(ConfigError, match=r"must be tasks of the harness; got arc_esay"):
        load_tasks(manager, [], ["arc_esay"])


def test_a_task_that_samples_is_not_decoded_greedily_in_silence(bench):
    from lm_eval.api.instance import Instance

    from stages.runtime.suites.harness_model import HarnessModel

    asked = ("the", {"until": [], "do_sample": True, "temperature": 0.7})
    request = Instance(request_type="generate_until", doc={}, arguments=asked, idx=0)
    with pytest.raises(ConfigError, match="must be tasks that decode greedily"):
        HarnessModel(bench).generate_until([request])


def test_a_context_stands_at_the_texts_beginning_as_in_training(bench):
    from lm_eval.api.instance import Instance

    from stages.runtime.suites.harness_model import HarnessModel

    request = Instance(request_type="loglikelihood", doc={}, arguments=("the cat sat on", " a red mat"), idx=0)
    ((nats, _),) = HarnessModel(bench).loglikelihood([request])
    ids, first = (
        encode_text(bench.tokenizer, "the cat sat on a red mat"),
        len(encode_text(bench.tokenizer, "the cat sat on")),
    )
    assert nats == pytest.approx(-sum(slow_nats(bench, ids, first)), abs=2e-5)
    after_an_end = slow_nats(bench, [bench.specials["<|endoftext|>"], *ids], first + 1)
    assert abs(nats + sum(after_an_end)) > 1e-3
