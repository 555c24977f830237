"""The classifier of content: what it learns, how its threshold is chosen and said, and what it refuses."""

import json
import math
import random
import re

import numpy as np
import pytest
from clean_cases import clean, dropped, invented, report, run_clean, source, texts, write_rows

from data.clean_config import QualityConfig
from data.clean_quality import QualityModel, fit, missed, read_labels, train_quality, wilson
from data.errors import DataError
from stages.base import ConfigError
from stages.clean import Clean

GOOD = (
    "the theory explains how water moves through soil because pressure falls with depth and roots take up salts".split()
)
BAD = "buy cheap click offer now free shipping win prize casino discount limited deal best price order today".split()


def labelled(count: int, seed: int = 1, noise: float = 0.0) -> list[dict]:
    """Half good, half bad; ``noise`` of each kind carries the other's words."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        good = number % 2 == 0
        words = GOOD if good is (draw.random() >= noise) else BAD
        text = " ".join([*draw.choices(words, k=20), *draw.choices(["and", "of", "it", str(number)], k=6)])
        rows.append({"text": f"{text} {number}", "label": "good" if good else "bad"})
    return rows


def write_labels(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(path, **fields) -> QualityConfig:
    return QualityConfig(labels=str(path), sources=["tales"], hash_bits=14, **fields)


def test_the_gradient_steps_reach_the_optimum_that_plain_newton_finds(tmp_path):
    """One feature decides: with weights on it alone the loss has a closed optimum, log(p / (1 - p)) of each group."""
    rows = [("alpha", True)] * 30 + [("alpha", False)] * 10 + [("omega", True)] * 10 + [("omega", False)] * 30
    path = write_labels(tmp_path / "l.jsonl", [{"text": text, "label": str(good).lower()} for text, good in rows])
    labels = list(read_labels(config_of(path)))
    model = fit(config_of(path, epochs=200, l2=0.0), labels)
    for text, share in (("alpha", 0.75), ("omega", 0.25)):
        assert math.isclose(model.score(text), share, abs_tol=0.03)


def test_the_threshold_holds_its_precision_on_labels_that_did_not_choose_it(tmp_path):
    path = write_labels(tmp_path / "l.jsonl", labelled(1200, noise=0.1))
    model, facts = train_quality(config_of(path, target=0.85))
    assert sum(part["n"] for part in facts["labels"].values()) == 1200
    test = facts["test"]
    low, high = test["precision_interval"]
    assert low < test["precision"] < high
    # A tenth of either kind looks like the other, so that no rule is above 0.9; chance is one half.
    assert low <= 0.9
    assert high >= 0.85
    assert test["recall"] > 0.8
    assert 0 < model.threshold < 1
    assert (facts["missed"] is None) == (test["precision"] >= 0.85)


def test_the_curve_is_that_of_a_plain_count(tmp_path):
    path = write_labels(tmp_path / "l.jsonl", labelled(600, noise=0.2))
    model, facts = train_quality(config_of(path, aim="share", target=0.3))
    rows = [row for row in labelled(600, noise=0.2) if side(row["text"]) == "test"]
    for point in facts["curve"]:
        kept = [row["label"] == "good" for row in rows if model.score(row["text"]) >= point["threshold"]]
        good = sum(row["label"] == "good" for row in rows)
        assert math.isclose(point["kept_share"], len(kept) / len(rows), abs_tol=5e-5)
        assert math.isclose(point["precision"], sum(kept) / len(kept), abs_tol=5e-5)
        assert math.isclose(point["recall"], sum(kept) / good, abs_tol=5e-5)
    chosen = [row for row in labelled(600, noise=0.2) if side(row["text"]) == "threshold"]
    kept = sum(model.score(row["text"]) >= model.threshold for row in chosen)
    assert math.isclose(kept / len(chosen), 0.3, abs_tol=0.02)


def side(text: str) -> str:
    import hashlib

    place = int(hashlib.sha256(b"label\0" + text.encode()).hexdigest()[:12], 16) / 16**12
    return "train" if place < 0.6 else "threshold" if place < 0.8 else "test"


def test_wilsons_interval_is_that_of_the_textbook():
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=5e-4)
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=5e-4)
    assert wilson(0, 0) is None


def test_equal_labels_give_equal_models_in_any_order_and_survive_saving(tmp_path):
    rows = labelled(300)
    first, _ = train_quality(config_of(write_labels(tmp_path / "a.jsonl", rows)))
    second, _ = train_quality(config_of(write_labels(tmp_path / "b.jsonl", rows[::-1] + rows[:9])))
    assert np.array_equal(first.weights, second.weights)
    assert (first.bias, first.threshold) == (second.bias, second.threshold)
    first.save(tmp_path / "m.npz")
    again = QualityModel.load(tmp_path / "m.npz")
    assert [again.score(row["text"]) for row in rows] == [first.score(row["text"]) for row in rows]
    assert again.score("") == again.score("...")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (labelled(60), "must give each part at least 20 labels to keep and as many to drop; got"),
        ([*labelled(200), {"text": "no label"}], "a line; got l.jsonl:201"),
        ([*labelled(200), {"text": 3, "label": "good"}], "a line; got l.jsonl:201"),
        (labelled(400, noise=0.5), "must be reachable; got 0.9, the best is"),
    ],
)
def test_labels_that_cannot_teach_are_one_clear_line(tmp_path, rows, message):
    with pytest.raises(DataError, match=re.escape(message)):
        train_quality(config_of(write_labels(tmp_path / "l.jsonl", rows), epochs=3))


def test_documents_below_the_threshold_go_from_the_judged_source_alone(tmp_path):
    labels = write_labels(tmp_path / "l.jsonl", labelled(400))
    fresh = labelled(40, seed=9)
    write_rows(tmp_path / "in/a.jsonl", [row["text"] for row in fresh])
    write_rows(
        tmp_path / "raw/a.jsonl", [f"{row['text']} {tail}" for row, tail in zip(fresh, invented(40), strict=True)]
    )
    quality = {"labels": labels, "sources": ["tales"], "target": 0.95, "hash_bits": 14}
    sources = [source(tmp_path / "in", rules="none"), source(tmp_path / "raw", "raw", rules="none")]
    corpus = clean(tmp_path / "run", *sources, quality=quality, dedup={"near": False}, heldout={"common_documents": 0})
    good = {row["text"] for row in fresh if row["label"] == "good"}
    assert dropped(corpus)["low_quality"] == 20
    assert "low_quality" not in dropped(corpus, 1)
    assert {text for text in texts(corpus) if text in {row["text"] for row in fresh}} == good
    assert report(corpus)["quality"]["threshold"] == QualityModel.load(corpus / "quality.npz").threshold
    assert re.fullmatch(r"score 0\.\d{4} below 0\.\d{4}", report(corpus)["samples"][0]["detail"])
    assert "Quality classifier" in (corpus / "funnel.html").read_text()


@pytest.mark.parametrize(
    ("aim", "target", "test", "said"),
    [
        ("precision", 0.9, {"n": 100, "kept": 50, "precision": 0.9}, None),
        ("precision", 0.9, {"n": 100, "kept": 50, "precision": 0.88},
         "precision 0.88 on labels that chose nothing (n=50, 95% interval 0.762 to 0.9438), which may be chance"),
        ("precision", 0.9, {"n": 100, "kept": 50, "precision": 0.5}, "0.3664 to 0.6336), which is more than chance"),
        ("precision", 0.9, {"n": 100, "kept": 0, "precision": None}, "keeps none of 100 labels that chose nothing"),
        ("share", 0.3, {"n": 100, "kept": 34, "precision": 0.5}, None),
        ("share", 0.3, {"n": 100, "kept": 50, "precision": 1.0}, "share kept 0.5 on labels that chose nothing (n=100"),
    ],
)  # fmt: skip
def test_a_target_that_fresh_labels_do_not_bear_out_is_told(aim, target, test, said):
    kept = test["kept"]
    test |= {"precision_interval": wilson(round((test["precision"] or 0) * kept), kept)}
    found = missed(config_of("l.jsonl", aim=aim, target=target), test)
    assert found is None if said is None else said in found


def test_a_missed_target_is_warned_of_in_log_summary_and_artifact(tmp_path, capsys):
    # The labels that choose the threshold are clean, a third of those that test it lie.
    rows = labelled(600)
    for number, row in enumerate(row for row in rows if side(row["text"]) == "test"):
        row["label"] = ("bad" if row["label"] == "good" else "good") if number % 3 == 0 else row["label"]
    labels = write_labels(tmp_path / "l.jsonl", rows)
    write_rows(tmp_path / "in/a.jsonl", [row["text"] for row in labelled(40, seed=9)])
    quality = {"labels": labels, "sources": ["tales"], "target": 0.95, "hash_bits": 14}
    fields = {"dedup": {"near": False}, "heldout": {"common_documents": 0}}
    result, corpus = run_clean(tmp_path / "run", source(tmp_path / "in", rules="none"), quality=quality, **fields)
    facts = report(corpus)["quality"]
    assert (facts["aim"], facts["target"]) == ("precision", 0.95)
    assert facts["missed"].startswith("the classifier misses quality.target 0.95: precision 0.")
    assert facts["missed"].endswith("give it more labels, or another target")
    assert f"WARNING: {facts['missed']}" in result.summary
    assert f"WARNING: {facts['missed']}" in capsys.readouterr().out
    assert "Warning: the classifier misses quality.target 0.95" in (corpus / "funnel.html").read_text()


def test_faults_of_a_classifier_are_found_before_the_run(tmp_path):
    write_rows(tmp_path / "in/a.jsonl", invented(3))
    fields = {"kind": "clean", "sources": [source(tmp_path / "in")]}
    config = Clean.Config.model_validate(fields | {"quality": {"labels": "absent", "sources": ["tales", "tails"]}})
    assert [(fault.path, fault.message) for fault in Clean.check(config, None)] == [
        ("quality.labels", "must be an existing file; got absent; set it to where the file lies"),
        ("quality.sources.1", "must be one of tales; got 'tails'; mend the name"),
    ]
    with pytest.raises(ConfigError, match=r"quality\.labels: must be an existing file"):
        Clean.source_revisions(config)
