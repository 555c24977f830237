"""The knowledge profile: what a text is about, tokens by language and domain, and what to collect next."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_corpus import build_corpus

from data.corpus import DocumentWriter, document_id, read_documents, write_description
from data.domains import DOMAINS, LANGUAGES, TOPICS, classify, evidence, is_dialogue, listed, scores
from data.profile import (
    COLLECT,
    ENOUGH,
    SCARCE,
    UNJUDGED,
    UNMEASURED,
    WEAK,
    Advice,
    Cell,
    Margin,
    advise,
    profile_corpus,
)
from data.tokenizer import encode_text, finish, load
from data.tokenizer_train import train_byte_level
from stages import STAGES
from stages.base import StageContext
from stages.profile import FACT_DOMAINS, Profile, ProfileConfig, _summary

ROOT = Path(__file__).resolve().parents[1]

TEXTS = {
    ("en", "geography"): "The river flows from the mountains through the valley to the coast of the northern province.",
    ("en", "history"): "The emperor conquered the kingdom after a long siege, and his army ended the dynasty.",
    (
        "en",
        "science",
    ): "An electron orbits the nucleus of an atom; photons carry electromagnetic energy between molecules.",
    (
        "en",
        "mathematics",
    ): "The theorem says that every integer is a product of prime numbers; its proof is by induction.",
    (
        "en",
        "medicine",
    ): "Patients with chronic symptoms receive therapy; the drug lowers blood pressure in the arteries.",
    ("en", "technology"): "The server stores files in a database; users install the package and configure the network.",
    ("en", "arts"): "The composer wrote an opera and two symphonies; the painter showed her paintings in a museum.",
    (
        "en",
        "society",
    ): "Parliament passed the law, and the court asked the government to protect the rights of citizens.",
    (
        "en",
        "thought",
    ): "The philosopher asks whether the soul and God exist; theology answers from the scripture of the church.",
    ("en", "everyday"): "Cook the rice with vegetables and cheese; the soup is eaten with bread and a glass of wine.",
    ("de", "geography"): "Der Fluss entspringt im Gebirge und mündet an der Küste der Provinz in die Bucht.",
    (
        "de",
        "history",
    ): "Im Mittelalter eroberte der König nach der Schlacht das Reich, und seine Truppen beendeten den Krieg.",
    ("de", "medicine"): "Bei chronischen Erkrankungen hilft die Therapie; das Medikament lindert Schmerzen und Fieber.",
    (
        "de",
        "technology",
    ): "Der Server speichert Dateien in der Datenbank; Benutzer installieren das Paket über das Netzwerk.",
    ("hi", "geography"): "यह नदी पर्वतों से निकलकर घाटी और प्रदेश के कई शहरों से होती हुई समुद्र तट तक जाती है।",
    ("hi", "medicine"): "इस रोग के लक्षण बुखार और दर्द हैं; चिकित्सक अस्पताल में मरीज़ का उपचार दवाओं से करते हैं।",
    ("hi", "technology"): "सर्वर पर फ़ाइल सहेजें और कंप्यूटर में सॉफ्टवेयर डाउनलोड करें।",
}
NOTHING = {"en": "It was nothing that anyone had said before.", "de": "Das war nichts, was jemand gesagt hatte.",
           "hi": "यह वह नहीं था जो किसी ने कहा था।"}  # fmt: skip


@pytest.mark.parametrize(("language", "domain"), TEXTS)
def test_a_text_is_known_by_its_words(language, domain):
    assert classify(TEXTS[language, domain], language) == domain


@pytest.mark.parametrize("language", NOTHING)
def test_a_text_without_evidence_is_other(language):
    assert classify(NOTHING[language], language) == "other"


def test_a_text_between_two_domains_is_other():
    both = f"{TEXTS['en', 'medicine']} {TEXTS['en', 'technology']}"
    found = scores(both, "en")
    assert found["medicine"] == pytest.approx(found["technology"], rel=0.25)
    assert classify(both, "en") == "other"


def test_evidence_is_shared_by_the_domains_that_list_a_word():
    assert evidence("glacier", "en") == (("geography", 1.0),)
    shared = evidence("geologically", "en")
    assert shared == (("science", 1.0),), "an ending is free after a star"
    assert evidence("general", "en") == (("history", 1.0),)
    assert evidence("treaty", "en") == (("history", 0.5), ("society", 0.5))
    assert evidence("bürgerkrieg", "de")[0][0] == "history", "a beginning is free before a star"


def test_a_word_counts_once():
    assert scores("glacier glacier glacier", "en") == {"geography": 1.0}


def test_the_title_speaks_too():
    text = "It is the second of its kind and was opened later."
    assert classify(text, "en") == "other"
    assert classify(text, "en", "Glacier and volcano of the peninsula") == "geography"


def test_code_is_code_and_other_languages_are_other():
    assert classify("def river(mountain): return valley + coast", "code") == "code"
    assert classify(TEXTS["en", "geography"], "fr") == "other"


def test_turns_of_several_voices_are_dialogue():
    talk = "Anna: Where is the river?\nBen: Behind the mountain.\nAnna: And the coast?\nBen: Far away.\n"
    assert classify(talk, "en") == "dialogue"
    assert is_dialogue("— क्या हुआ?\n— कुछ नहीं।\n— सच?\n— हाँ।")
    assert not is_dialogue("Note: one\nNote: two\nNote: three\nNote: four"), "one voice"
    assert not is_dialogue("- one\n- two\n- three\n- four"), "a list"
    assert not is_dialogue("Name: x\nAge: 3\nCity: y\nLand: z"), "a form: no voice comes again"


def test_every_language_has_words_for_every_domain():
    for language, words in LANGUAGES.items():
        assert tuple(words) == TOPICS
        assert all(len(of_domain.split()) >= 25 for of_domain in words.values())
        assert all(word.strip("*") for word in listed(language))


def build(directory: Path, stated: str | None = None) -> Path:
    """Forty documents of German geography and technology and of English medicine, and code."""
    described = []
    parts = {"geo": ("de", "geography", 30), "tech": ("de", "technology", 10), "med": ("en", "medicine", 20)}
    for name, (language, domain, count) in parts.items():
        with DocumentWriter(directory / "train" / f"{name}.jsonl.gz") as writer:
            for number in range(count):
                text = f"{TEXTS[language, domain]} {number}" + " mehr" * (number % 7)
                writer.write({"id": document_id(text), "text": text, "source": name, "language": language,
                              "title": None})  # fmt: skip
        size = {"documents": writer.documents, "bytes": writer.bytes}
        entry = {"name": name, "language": language, "licence": "none", "dropped": {}, "train": size}
        entry |= {"heldout": {"documents": 0, "bytes": 0}, "domain": stated if name == "med" else None}
        described.append(entry)
    write_description(directory, described)
    return directory


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level(list(TEXTS.values()), 400, folder)
    finish(folder, load(folder), "byte_level_bpe", {})
    return folder


def test_a_source_that_fits_into_the_sample_is_counted_exactly(tokenizer_dir, tmp_path):
    corpus = build(tmp_path)
    cells, declared = profile_corpus(corpus, tokenizer_dir, sample_bytes=10**6, seed=1)
    assert declared == []
    loaded = load(tokenizer_dir)
    expected = {
        name: sum(len(encode_text(loaded, document["text"])) for document in read_documents(corpus, "train", name))
        for name in ("geo", "tech", "med")
    }
    found = {(cell.language, cell.domain): cell for cell in cells}
    assert {pair: cell.tokens for pair, cell in found.items()} == {
        ("de", "geography"): expected["geo"], ("de", "technology"): expected["tech"],
        ("en", "medicine"): expected["med"],
    }  # fmt: skip
    assert all(cell.half_width_tokens == 0 for cell in cells)
    assert found["de", "geography"].documents == 30
    assert found["de", "geography"].examples[0].startswith("Der Fluss entspringt")


@pytest.mark.parametrize(
    ("stated", "counted_as"), [("science", ("science", True)), ("web", ("medicine", False))], ids=["topic", "origin"]
)
def test_a_declared_domain_stands_beside_the_classified_one(tokenizer_dir, tmp_path, stated, counted_as):
    # A domain of knowledge is believed; "web" says where the text comes from, and hides nothing of what it is about.
    cells, (declared,) = profile_corpus(build(tmp_path, stated), tokenizer_dir, sample_bytes=10**6, seed=1)
    (cell,) = [cell for cell in cells if cell.language == "en"]
    assert (cell.domain, cell.stated) == counted_as
    assert (declared.source, declared.domain, declared.believed) == ("med", stated, stated == "science")
    assert declared.classified == {"medicine": cell.tokens}
    assert declared.shares == {"medicine": 1.0}


def test_the_profile_shows_what_sources_declare_and_what_their_text_was_classified_as(tokenizer_dir, tmp_path):
    result, content = run_profile(build(tmp_path / "c", "web"), tokenizer_dir, tmp_path)
    assert content["declared"][0]["classified_shares"] == {"medicine": 1.0}
    assert result.summary[-1] == (
        "source med declares web (which is no domain of knowledge: counted as classified); classified: medicine 100%"
    )


def test_a_sample_estimates_the_whole_within_its_interval(tokenizer_dir, tmp_path):
    """Over 200 seeds the 95% interval holds the truth in about 95%, and the estimates' mean is the truth."""
    corpus = build(tmp_path)
    truth = {
        (cell.language, cell.domain): cell.tokens
        for cell in profile_corpus(corpus, tokenizer_dir, sample_bytes=10**6, seed=1)[0]
    }
    inside, estimates = 0, []
    for seed in range(200):
        cells, _ = profile_corpus(corpus, tokenizer_dir, sample_bytes=1500, seed=seed)
        found = next((cell for cell in cells if (cell.language, cell.domain) == ("de", "geography")), None)
        estimates.append(found.tokens if found else 0.0)
        inside += bool(found) and abs(found.tokens - truth["de", "geography"]) <= found.half_width_tokens
    mean = sum(estimates) / len(estimates)
    spread = (sum((one - mean) ** 2 for one in estimates) / len(estimates)) ** 0.5
    assert abs(mean - truth["de", "geography"]) < 3 * spread / len(estimates) ** 0.5
    assert inside > 0.88 * 200


def cell(language: str, domain: str, tokens: float) -> Cell:
    return Cell(language=language, domain=domain, stated=False, tokens=tokens)


def test_verdicts_follow_the_margins_and_the_shares():
    cells = [cell("en", "geography", 9_800), cell("en", "history", 100), cell("en", "science", 60),
             cell("en", "society", 40), cell("code", "code", 5_000)]  # fmt: skip
    margins = {
        ("en", "geography"): Margin(-0.2, 30, (-0.5, 0.1)),
        ("en", "history"): Margin(0.1, 30, (-0.1, 0.3)),
        ("en", "science"): Margin(0.9, 30, (0.6, 1.2)),
        ("en", "arts"): Margin(-0.4, 10, None),
    }
    advice = advise(cells, margins, 0.02, 10)
    verdicts = {(one.language, one.domain): one.verdict for one in advice}
    assert verdicts["en", "geography"] == WEAK
    assert verdicts["en", "history"] == COLLECT
    assert verdicts["en", "science"] == SCARCE, "known, and still little"
    assert verdicts["en", "society"] == SCARCE
    assert verdicts["en", "arts"] == COLLECT, "no document fell there"
    assert verdicts["code", "code"] == UNMEASURED
    assert [(one.domain) for one in advice[:2]] == ["arts", "history"], "the lowest margin first"
    assert (
        advise([cell("en", "science", 10)], {("en", "science"): Margin(1.0, 9, (0.5, 1.5))}, 0.02, 9)[-1].verdict
        == ENOUGH
    )


@pytest.mark.parametrize("margin", [Margin(-2.0, 1, None), Margin(2.0, 1, None), Margin(1.0, 9, (0.5, 1.5))])
def test_a_margin_of_too_few_facts_says_nothing_of_a_cell(margin):
    cells = [cell("en", "science", 9_000), cell("en", "arts", 10)]
    found = {one.domain: one for one in advise(cells, dict.fromkeys((("en", "science"), ("en", "arts")), margin),
                                               0.02, 10)}  # fmt: skip
    assert found["science"].verdict == UNJUDGED
    assert found["science"].told == f"too few facts (n={margin.n}) to judge"
    assert found["arts"].verdict == SCARCE, "by its tokens, whatever the facts"
    assert found["arts"].told == f"scarce; too few facts (n={margin.n}) to judge"


def test_only_languages_with_words_miss_domains():
    found = {(one.language, one.domain) for one in advise([cell("fr", "other", 9)], {}, 0.02, 10)}
    assert found == {("fr", "other")}


def make_scores(directory: Path, ids: list[str], margins: list[float]) -> Path:
    (directory / "output").mkdir(parents=True)
    items = {"margins/nats_per_token": {"ids": ids, "numerator": margins}} if ids else {"bpb": {}}
    (directory / "output" / "items.json").write_text(json.dumps(items))
    return directory


def run_profile(corpus: Path, tokenizer: Path, tmp_path: Path, scored: Path | None = None, **fields):
    config = ProfileConfig(
        kind="profile", corpus="clean", tokenizer="tokenizer", scores="evaluate" if scored else None, **fields
    )
    parents = {}
    for name, output in (("corpus", corpus), ("tokenizer", tokenizer)):
        parents[name] = tmp_path / name
        parents[name].mkdir()
        (parents[name] / "output").symlink_to(output)
    if scored:
        parents["scores"] = scored
    context = StageContext(
        pipeline="p", name="profile", key="k", seed=3, config=config, model=None, directory=tmp_path,
        output=tmp_path / "out", work=tmp_path / "work", cache=tmp_path, parents=parents, tracker=None,
    )  # fmt: skip
    return Profile().run(context), json.loads((tmp_path / "out" / "profile.json").read_text())


def test_the_stage_says_what_to_collect_next(tokenizer_dir, tmp_path):
    ids = [f"capital-de-{number:012x}" for number in range(12)] + [f"riddle-de-{number:012x}" for number in range(3)]
    scored = make_scores(tmp_path / "scores", [*ids, "weekday-fr-0"], [0.5] * 6 + [-0.9] * 6 + [1.0] * 4)
    result, content = run_profile(build(tmp_path / "c"), tokenizer_dir, tmp_path, scored)
    geography = next(one for one in content["advice"] if (one["language"], one["domain"]) == ("de", "geography"))
    assert geography["margin"]["n"] == 12
    assert geography["margin"]["nats_per_token"] == pytest.approx(-0.2)
    low, high = geography["margin"]["interval"]
    assert low < -0.2 < high
    assert geography["verdict"] == WEAK
    assert geography["told"] == WEAK
    assert content["min_facts"] == 10
    assert content["unmapped_fact_domains"] == ["riddle"]
    assert content["measured_languages_without_text"] == [["fr", "everyday"]]
    assert result.metrics["tokens"] == sum(one["tokens"] for one in content["cells"])
    assert result.metrics["cells_weak_in_spite_of_its_text"] == 1
    assert any(line.startswith("collect next: de/") for line in result.summary)
    assert "riddle" in result.summary[-1]


def test_facts_of_a_new_domain_are_mapped_by_the_recipe(tokenizer_dir, tmp_path):
    scored = make_scores(tmp_path / "scores", [f"riddle-de-{number:012x}" for number in range(8)], [0.1] * 8)
    fields = {"fact_domains": {"riddle": "thought"}}
    _, content = run_profile(build(tmp_path / "c"), tokenizer_dir, tmp_path, scored, **fields)
    assert content["unmapped_fact_domains"] == []
    found = next(one for one in content["advice"] if (one["language"], one["domain"]) == ("de", "thought"))
    assert found["margin"]["n"] == 8


def test_without_scores_nothing_is_called_weak(tokenizer_dir, tmp_path):
    _, content = run_profile(build_corpus(tmp_path / "c"), tokenizer_dir, tmp_path)
    assert {one["verdict"] for one in content["advice"]} <= {SCARCE, UNMEASURED}


def test_faults_name_the_field(tmp_path):
    config = ProfileConfig(kind="profile", corpus="c", tokenizer="t", scores="e", fact_domains={"riddle": "nonsense"})
    (fault,) = Profile.check(config, None)
    assert fault.path == "fact_domains.riddle"
    (fault,) = Profile.check_parents(config, None, {"scores": make_scores(tmp_path, [], [])})
    assert fault.path == "scores"
    assert "must have run the suite margins" in fault.message


def test_every_domain_of_our_facts_stands_for_one_of_text():
    from data.facts import DOMAINS as FACTS

    assert {name for name in FACTS if name not in FACT_DOMAINS and name not in DOMAINS} == set()
    assert set(FACT_DOMAINS.values()) <= set(DOMAINS)
    assert STAGES["profile"] is Profile


def test_the_benchmark_counts_right_wrong_and_unsaid(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("domains", "record"):
        sys.modules.pop(name, None)
    import domains as benchmark

    one = benchmark.Labelled
    rows = benchmark.measure(
        [one("en", TEXTS["en", "medicine"], None, ("medicine",)), one("en", TEXTS["en", "arts"], None, ("medicine",)),
         one("en", NOTHING["en"], None, ("medicine",)), one("en", NOTHING["en"], None, ("medicine",))]
    )  # fmt: skip
    whole = next(row for row in rows if row["label"] == "all")
    assert (whole["n"], whole["coverage"], whole["precision"], whole["recall"]) == (4, 0.5, 0.5, 0.25)


def test_languages_take_turns_in_what_to_collect_next_and_the_rest_is_counted():
    urgent = [Advice("de", f"d{number}", 0.0, 0.0, COLLECT, None, False) for number in range(9)]
    later = [Advice(language, "x", 1.0, 0.0, SCARCE, None, False) for language in ("en", "hi")]
    enough = [Advice("fr", "x", 9.0, 0.9, ENOUGH, None, False)]
    assert _summary([], [*urgent, *later, *enough], [])[-1] == (
        "collect next: de/d0, en/x, hi/x, de/d1, de/d2, de/d3, de/d4, de/d5, and 3 more"
    )
    assert _summary([], [*urgent[:8], *enough], [])[-1].endswith("de/d6, de/d7")
    assert _summary([], enough, [])[-1] == "collect next: nothing is scarce or weak"
