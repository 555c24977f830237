"""Contrastive facts: true of one subject and not of another, of one length, frozen by hash; tables stay data."""

import json
import pickle

import pytest

from data import facts
from data.errors import DataError
from data.facts_sources import Country, read_countries, read_names
from stages.base import ConfigError, StageContext
from stages.facts import Facts, FactsConfig

CITIES = {"AA": ("Alland", "Abcde"), "BB": ("Borland", "Bcdef"), "CC": ("Cedland", "Cdefg"), "DD": ("Dorland", "Defgh"),
          "EE": ("Elmland", "Efghijklmnop")}  # fmt: skip
HINDI = {"AA": "अलैंड", "BB": "बोरलैंड", "CC": "सेडलैंड", "DD": "डोरलैंड", "EE": "एल्मलैंड"}


def packages(folder):
    """A countryinfo and a Babel of five made-up countries, in the layout of the real ones."""
    data, locale = folder / "c" / "countryinfo" / "data", folder / "b" / "babel" / "locale-data"
    data.mkdir(parents=True)
    locale.mkdir(parents=True)
    for number, (code, (name, capital)) in enumerate(CITIES.items()):
        row = {"name": name, "ISO": {"alpha2": code}, "capital": capital, "region": "Europe", "population": 9 - number,
               "languages": [code.lower()], "currencies": [code + "D"]}  # fmt: skip
        (data / f"{name}.json").write_text(json.dumps(row))
    (data / "nowhere.json").write_text(json.dumps({"name": "Nowhere", "ISO": {"alpha2": "ZZ"}, "capital": []}))
    for language, names in (
        ("en", {c: n for c, (n, _) in CITIES.items()}),
        ("de", {c: n + "ien" for c, (n, _) in CITIES.items()}),
        ("hi", HINDI),
    ):
        zones = {f"Europe/{capital}": {"city": capital + "-" + language} for _, capital in CITIES.values()}
        tongues = {code.lower(): f"{name[1:5]}isch{language}" for code, name in names.items()}
        days = {number: f"{language}day{number}" for number in range(7)}
        table = {"territories": names | {"150": "Europa"}, "languages": tongues, "time_zones": zones,
                 "days": {"format": {"wide": days}}, "months": {"format": {"wide": {1: "Primus", 2: "Secund"}}},
                 "currency_names": {code + "D": f"{code}-Taler {language}" for code in CITIES}}  # fmt: skip
        (locale / f"{language}.dat").write_bytes(pickle.dumps(table))
    return folder / "c", folder / "b"


def all_stated(tmp_path):
    return facts.statements(read_countries(tmp_path / "c"), read_names(tmp_path / "b"))


def made(tmp_path, **changes):
    packages(tmp_path)
    stated = all_stated(tmp_path)
    return facts.with_distractors(stated, **({"count": 2, "max_length_difference": 2, "per_domain": 9} | changes))


def test_wrong_endings_are_right_ones_of_other_facts_and_of_about_the_same_length(tmp_path):  # trap M5
    rows, stated = made(tmp_path), all_stated(tmp_path)
    assert {(row["domain"], row["language"]) for row in rows} >= {
        ("capital", "en"),
        ("capital", "de"),
        ("capital", "hi"),
    }
    for row in rows:

        def endings(is_same, row=row):
            return {one.correct for one in stated if one.language == row["language"]
                    and (one.domain == row["domain"]) is is_same}  # fmt: skip

        assert "medium" in row["distractors"]
        for difficulty, wrong in row["distractors"].items():
            assert len(set(wrong)) == 2
            assert row["correct"] not in wrong
            assert set(wrong) <= endings(difficulty != "easy")
            assert all(abs(facts.length(one) - facts.length(row["correct"])) <= 2 for one in wrong)
    capitals = {row["prompt"]: row for row in rows if row["domain"] == "capital" and row["language"] == "en"}
    # The fifth capital is twice as long as any other and finds no ending of its length.
    assert set(capitals) == {f"The capital of {name} is" for name in ("Alland", "Borland", "Cedland", "Dorland")}
    assert capitals["The capital of Alland is"]["correct"] == "Abcde"


def test_all_subjects_of_one_continent_leave_nothing_to_contrast(tmp_path):
    assert not [row for row in made(tmp_path) if row["domain"] == "continent"]


def test_what_is_true_of_the_subject_too_is_no_wrong_ending():
    stated = [facts.Statement("language", "en", subject, correct) for subject, correct in
              (("A", "one"), ("A", "two"), ("B", "six"), ("C", "ten"))]  # fmt: skip
    rows = facts.with_distractors(stated, count=2, max_length_difference=0, per_domain=9)
    assert [(row["correct"], sorted(row["distractors"]["medium"])) for row in rows[:2]] == [
        ("one", ["six", "ten"]),
        ("two", ["six", "ten"]),
    ]


def test_populous_countries_come_first_and_other_facts_change_nothing(tmp_path):
    two = made(tmp_path, per_domain=2)
    assert [row["prompt"] for row in two if row["domain"] == "capital" and row["language"] == "de"] == [
        "Die Hauptstadt von Allandien ist", "Die Hauptstadt von Borlandien ist",
    ]  # fmt: skip
    more = {row["id"]: row for row in made(tmp_path / "again", per_domain=9)}
    assert all(more[row["id"]] == row for row in two)


@pytest.mark.parametrize(
    ("subject", "correct", "fair"),
    [("Mexico", "Mexico City", False), ("Tunisia", "Tunis", False), ("France", "Paris", True),
     ("Burma (Myanmar)", "Rangoon", False), ("Congo - Kinshasa", "Lingala", False), ("Euro 1999", "Mark", False)],
)  # fmt: skip
def test_an_answer_that_the_prompt_gives_away_is_no_fact(subject, correct, fair):
    assert facts._is_fair(facts.Statement("capital", "en", subject, correct)) is fair


def test_unsettled_capitals_and_names_with_an_article_are_left_out():
    names = read_like({"KZ": "Kazakhstan", "US": "United States", "FR": "France"})
    countries = [Country(code, capital, "150", ("xx",), (), 1) for code, capital in
                 (("KZ", "Nur-Sultan"), ("US", "Washington"), ("FR", "Paris"))]  # fmt: skip
    stated = facts.statements(countries, {language: names for language in facts.LANGUAGES})
    english = {(one.domain, one.subject) for one in stated if one.language == "en"}
    assert ("capital", "France") in english
    assert ("capital", "Kazakhstan") not in english
    assert not [subject for _, subject in english if subject == "United States"]
    assert ("capital", "United States") in {(one.domain, one.subject) for one in stated if one.language == "hi"}


def read_like(territories):
    from data.facts_sources import Names

    cities = {name: name for name in ("Paris", "Washington", "Nur-Sultan")}
    return Names(territories, {"xx": "Xish"}, {}, cities)


def test_marks_on_letters_do_not_count_as_length():
    assert [facts.length(text) for text in ("एशिया", "यूरोप", "Brasília", "Brasi\u0301lia")] == [3, 3, 8, 8]


class Evil:
    def __reduce__(self):
        return (print, ("called",))


class TimeZone:
    """Stands for a class that Babel's tables mention."""


def test_a_table_imports_and_calls_nothing(tmp_path, capsys):  # trap O3
    _, babel = packages(tmp_path)
    table = pickle.loads((babel / "babel" / "locale-data" / "de.dat").read_bytes())
    (babel / "babel" / "locale-data" / "de.dat").write_bytes(pickle.dumps(table | {"odd": Evil()}))
    with pytest.raises(DataError, match=r"names builtins\.print; do not use it"):
        read_names(babel)
    assert capsys.readouterr().out == ""
    TimeZone.__module__, TimeZone.__qualname__ = "babel.dates", "TimeZone"
    raw = pickle.dumps(table | {"odd": 77777}, protocol=0).replace(b"I77777\n", b"cbabel.dates\nTimeZone\n(tR")
    (babel / "babel" / "locale-data" / "de.dat").write_bytes(raw)
    assert read_names(babel)["de"].territories["AA"] == "Allandien"


def test_folders_that_are_not_the_packages_are_refused(tmp_path):
    with pytest.raises(DataError, match="must be the package countryinfo"):
        read_countries(tmp_path)
    with pytest.raises(DataError, match="must be the package Babel"):
        read_names(tmp_path)


def stage_config(**changes):
    package = {"version": "1.0", "sha256": "a" * 64}
    plain = {"kind": "facts", "countries": {"name": "countryinfo", **package}, "names": {"name": "babel", **package}}
    return FactsConfig.model_validate(plain | changes)


def run_stage(folder, cache, config):
    (folder / "output").mkdir(parents=True)
    context = StageContext(
        pipeline="t", name="facts", key="0" * 64, seed=1, config=config, model=None, directory=folder,
        output=folder / "output", work=folder / "work", cache=cache, parents={}, tracker=None,
    )  # fmt: skip
    return Facts().run(context)


@pytest.fixture
def cache(tmp_path):
    """Packages as the fetcher leaves them, so that nothing is downloaded."""
    countries, names = packages(tmp_path / "made")
    folder = tmp_path / "cache" / "packages"
    folder.mkdir(parents=True)
    countries.rename(folder / "countryinfo-1.0-aaaaaaaa")
    names.rename(folder / "babel-1.0-aaaaaaaa")
    return tmp_path / "cache"


def test_the_stage_freezes_its_facts_by_hash_and_gives_equal_bytes(tmp_path, cache):  # trap M2
    config = stage_config(distractors=2, min_facts=10)
    result = run_stage(tmp_path / "1", cache, config)
    run_stage(tmp_path / "2", cache, config)
    first, second = (tmp_path / name / "output" for name in "12")
    assert (first / "facts.jsonl").read_bytes() == (second / "facts.jsonl").read_bytes()
    assert result.metrics["facts"] == len(list(facts.read_facts(first)))
    assert facts.facts_info(first)["sources"][0] == {"name": "countryinfo", "version": "1.0", "licence": "not declared"}
    text = (first / "facts.jsonl").read_text()
    (first / "facts.jsonl").write_text(text.replace("Abcde", "Xbcde"))
    with pytest.raises(ValueError, match="must hash to"):
        list(facts.read_facts(first))


def test_too_few_facts_are_refused(tmp_path, cache):
    with pytest.raises(ConfigError, match="min_facts: must be at most the facts there are; got 900 of"):
        run_stage(tmp_path / "run", cache, stage_config(min_facts=900))


def test_every_prompt_has_one_place_for_its_subject_and_a_domain_of_the_config():
    domains = FactsConfig.model_fields["domains"].default
    assert set(domains) == set(facts.DOMAINS)
    assert all(prompt.count("{subject}") == 1 and not prompt.endswith(" ") for prompt in facts.PROMPTS.values())
