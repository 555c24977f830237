"""Mixtures by source, language and domain, in phases, under a cap of epochs."""

import numpy as np
import pytest
from fake_chain import write_recipe
from golden_recipes import TINY_HELIX
from tiny_corpus import build_tokens
from tiny_run import config, spec

from data import mix
from data.errors import DataError
from data.loader import MixtureLoader
from data.mix import PERIOD_ROWS, PhasedSchedule, SourceSchedule
from data.mixture import Mixture, Phase, capped, cell_of, source_shares
from pipelines.chain import build_chain
from pipelines.preflight import refuse_early
from pipelines.recipe import load_recipe
from stages import STAGES
from stages.base import ConfigError, SourceName
from stages.pretrain import Pretrain

FACTS = [
    {"name": "wiki-en", "language": "en", "domain": "history"},
    {"name": "code", "language": "code", "domain": "code"},
    {"name": "books-en", "language": "en", "domain": None},
    {"name": "wiki-de", "language": "de", "domain": "history"},
]
TOKENS = {"wiki-en": 300, "code": 1000, "books-en": 100, "wiki-de": 50}


def shares(weights, by="source", tokens=TOKENS):
    return source_shares(FACTS, tokens, [Phase(0, weights)], by)[0]


def test_weights_by_source_are_normalised():
    asked = {"wiki-en": 2, "code": 1, "books-en": 1, "wiki-de": 0}
    assert shares(asked) == {"wiki-en": 0.5, "code": 0.25, "books-en": 0.25, "wiki-de": 0}


def test_sources_of_one_language_share_its_weight_by_their_tokens():
    found = shares({"en": 8, "code": 1, "de": 1}, "language")
    assert found == pytest.approx({"wiki-en": 0.6, "books-en": 0.2, "code": 0.1, "wiki-de": 0.1})


def test_sources_of_one_domain_share_its_weight_across_languages():
    found = shares({"history": 7, "code": 2, "-": 1}, "domain")
    assert found == pytest.approx({"wiki-en": 0.6, "wiki-de": 0.1, "code": 0.2, "books-en": 0.1})


def test_a_cell_is_a_language_and_a_domain():
    words = [cell_of(source, "language_domain") for source in FACTS]
    assert words == ["en/history", "code/code", "en/-", "de/history"]
    found = shares({"en/history": 4, "code/code": 3, "en/-": 2, "de/history": 1}, "language_domain")
    assert found == pytest.approx({"wiki-en": 0.4, "code": 0.3, "books-en": 0.2, "wiki-de": 0.1})


def test_no_weights_mean_by_tokens_in_whatever_words():
    natural = {name: count / sum(TOKENS.values()) for name, count in TOKENS.items()}
    for by in ("source", "language", "domain", "language_domain"):
        assert shares(None, by) == pytest.approx(natural)


@pytest.mark.parametrize(
    ("weights", "by", "message"),
    [
        ({"en": 1, "de": 1}, "language", "mixture.code must give every source its weight"),
        ({"en": 1, "de": 1, "cod": 1, "code": 1}, "language", "mixture.cod must name a source of .* did you mean code"),
        ({"history": 1, "code": -1, "-": 1}, "domain", "mixture.code must be 0 or a positive number; got -1"),
        ({"wiki-en": 1, "code": 1, "books-en": 1, "wiki-de": 1}, "language", "mixture.wiki-en must name a source"),
    ],
)
def test_words_that_do_not_fit_are_refused(weights, by, message):
    with pytest.raises(DataError, match=message):
        shares(weights, by)


def test_every_phase_is_checked_and_named():
    phases = [Phase(0, {"en": 1, "de": 1, "code": 1}), Phase(5, {"en": 1, "de": 1, "hi": 1}, "phases.0.mixture")]
    with pytest.raises(DataError) as caught:
        source_shares(FACTS, TOKENS, phases, "language")
    assert [field for field, _ in caught.value.faults] == ["phases.0.mixture.hi", "phases.0.mixture.code"]


@pytest.mark.parametrize("seed", range(3))
def test_a_phased_schedule_gives_every_source_each_of_its_rows_once_and_in_order(seed):
    # trap T6: nothing is replayed or lost at a change of phase
    rng = np.random.default_rng(seed)
    weights = [rng.dirichlet(np.ones(4)), np.array([0.5, 0, 0.5, 0]), rng.dirichlet(np.ones(4))]
    edges = [0, PERIOD_ROWS - 777, PERIOD_ROWS + 1234]
    schedule, n = PhasedSchedule(list(zip(edges, weights, strict=True))), 2 * PERIOD_ROWS
    owners, numbers = schedule.locate(np.arange(n))
    for source in range(4):
        assert numbers[owners == source].tolist() == list(range(int((owners == source).sum())))
    for rows in (0, 1, edges[1], edges[1] + 5, edges[2], n):
        assert schedule.counts(rows).tolist() == np.bincount(owners[:rows], minlength=4).tolist()
    assert not set(owners[edges[1] : edges[2]].tolist()) & {1, 3}
    for phase, (first, last) in enumerate(zip(edges, [*edges[1:], n], strict=True)):
        realised = np.bincount(owners[first:last], minlength=4) / (last - first)
        assert np.abs(realised - weights[phase]).max() < 4 / (last - first)


def test_one_phase_is_the_plain_schedule():
    weights, rows = np.array([0.2, 0.5, 0.3]), np.arange(70_000)
    plain, phased = SourceSchedule(weights), PhasedSchedule([(0, weights)])
    for expected, found in zip(plain.locate(rows), phased.locate(rows), strict=True):
        assert np.array_equal(expected, found)


def test_the_worst_error_is_that_of_the_worst_window():
    # trap T5: against every window counted one by one
    weights = np.array([0.7, 0.2, 0.1])
    schedule, rows = SourceSchedule(weights), 13
    owners, _ = schedule.locate(np.arange(PERIOD_ROWS + rows))
    windows = np.lib.stride_tricks.sliding_window_view(owners, rows)[:PERIOD_ROWS]
    worst = max(np.abs((windows == source).mean(1) - weights[source]).max() for source in range(3))
    assert PhasedSchedule([(0, weights)]).worst_error(rows) == pytest.approx(worst)


@pytest.mark.parametrize("rows", [63, 64, 65, 77, 128, 150])
def test_the_worst_error_of_windows_longer_than_a_period_is_exact(rows, monkeypatch):
    # trap T5: the schedule's period is made short, so that every window can be counted
    monkeypatch.setattr(mix, "PERIOD_ROWS", 64)
    weights = np.array([0.7, 0.2, 0.1])
    schedule = SourceSchedule(weights)
    owners, _ = schedule.locate(np.arange(64 + rows))
    windows = np.lib.stride_tricks.sliding_window_view(owners, rows)
    worst = max(np.abs((windows == source).mean(1) - weights[source]).max() for source in range(3))
    assert schedule.worst_error(rows) == pytest.approx(worst, abs=1e-12)


T, G = 16, 8


def counting(first: int, n_tokens: int) -> list[list[int]]:
    """Documents of 7 ids that count up from ``first``; with EOS each is 8 tokens."""
    return [list(range(first + 7 * n, first + 7 * n + 7)) for n in range(n_tokens // 8)]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    documents = {"aa": counting(10, 3200), "bb": counting(10_000, 1600), "cc": counting(20_000, 320)}
    return build_tokens(tmp_path_factory.mktemp("tokens"), documents)


def make(tokens, **asked):
    return MixtureLoader(tokens, seq_len=T, global_batch_size=G, seed=3, mixture=Mixture(**asked))


def rows_by_source(loader, steps):
    tops = np.concatenate([loader.batch(step, slice(0, G)).input_ids.numpy().max(1) for step in steps])
    return np.bincount((tops >= 10_000).astype(int) + (tops >= 20_000), minlength=3) / len(tops)


def test_phases_change_the_shares_at_their_step(tokens):
    later = (
        Phase(10, {"aa": 1, "bb": 3, "cc": 0}, "phases.0.mixture"),
        Phase(14, {"aa": 0, "bb": 0, "cc": 1}, "phases.1.mixture"),
    )
    loader = make(tokens, weights={"aa": 3, "bb": 1, "cc": 0}, later=later)
    assert rows_by_source(loader, range(10)) == pytest.approx([0.75, 0.25, 0])
    assert rows_by_source(loader, range(10, 14)) == pytest.approx([0.25, 0.75, 0])
    assert rows_by_source(loader, range(14, 16)) == pytest.approx([0, 0, 1])
    plan = loader.plan(16)
    assert plan["cc"]["share_asked"] == pytest.approx(2 / 16)
    assert plan["bb"]["share_asked"] == pytest.approx((10 * 0.25 + 4 * 0.75) / 16)
    assert plan["cc"]["tokens"] == 2 * G * T
    assert make(tokens, weights={"aa": 3, "bb": 1, "cc": 0}, later=later).plan(12)["cc"]["tokens"] == 0


def test_a_run_that_is_made_longer_reads_the_same_rows_before(tokens):
    # trap T6
    later = (Phase(10, {"aa": 0, "bb": 1, "cc": 0}, "phases.0.mixture"),)
    asked = {"weights": {"aa": 1, "bb": 1, "cc": 1}, "later": later}
    short, long = make(tokens, **asked, max_steps=12), make(tokens, **asked, max_steps=40)
    for step in (0, 9, 10, 11):
        assert short.batch(step, slice(0, G)).input_ids.equal(long.batch(step, slice(0, G)).input_ids)


def test_a_capped_source_is_read_that_often_and_the_others_fill_up_in_proportion(tokens):
    # trap T5
    steps = 40
    total = steps * G * T
    loader = make(tokens, weights={"aa": 2, "bb": 1, "cc": 3}, cap_epochs=2.0, max_steps=steps)
    plan = loader.plan(steps)
    capped = 2 * 320 / total
    assert plan["cc"]["share_asked"] == pytest.approx(capped)
    assert plan["cc"]["epochs"] == pytest.approx(2.0, abs=T * 1.01 / 320)
    assert plan["aa"]["share_asked"] == pytest.approx((1 - capped) * 2 / 3)
    assert plan["aa"]["share_asked"] / plan["bb"]["share_asked"] == pytest.approx(2)


def test_a_cap_is_met_across_phases_and_pushes_on(tokens):
    # cc is asked in both phases; what it gives up puts bb over the cap as well
    later = (Phase(20, {"aa": 1, "bb": 2, "cc": 5}, "phases.0.mixture"),)
    loader = make(tokens, weights={"aa": 1, "bb": 2, "cc": 1}, later=later, cap_epochs=1.5, max_steps=40)
    plan = loader.plan(40)
    for name in ("bb", "cc"):
        assert plan[name]["epochs"] == pytest.approx(1.5, abs=0.06)
    assert sum(figures["tokens"] for figures in plan.values()) == 40 * G * T
    first, second = loader.phase_shares
    assert second["cc"] / first["cc"] == pytest.approx(5 / 8 / (1 / 4))
    assert sum(first.values()) == pytest.approx(1)
    assert sum(second.values()) == pytest.approx(1)


def test_a_source_that_grew_over_the_cap_is_lowered_from_what_it_grew_to():
    # trap T5: aa gives up 0.6 of phase 0, of which bb takes half; from 1,300 tokens it then comes down to 1,170
    asked = [{"aa": 0.8, "bb": 0.1, "cc": 0.1}, {"aa": 0.0, "bb": 0.9, "cc": 0.1}]
    first, second = capped(asked, [1_000, 1_000], {"aa": 200, "bb": 1_170, "cc": 9_000}, 1.0)
    assert first == pytest.approx({"aa": 0.2, "bb": 0.36, "cc": 0.44})
    assert second == pytest.approx({"aa": 0, "bb": 0.81, "cc": 0.19})


def any_mixture(rng):
    """Shares in up to 3 phases of up to 5 sources, the phases' tokens, and the sources' tokens."""
    names = "abcde"[: rng.integers(2, 6)]
    weights = np.maximum(rng.integers(-2, 9, (rng.integers(1, 4), len(names))), 0) + 0.0
    weights[:, 0] += ~weights.any(1)
    asked = [dict(zip(names, row, strict=True)) for row in (weights / weights.sum(1, keepdims=True)).tolist()]
    lengths = 100 * rng.integers(1, 20, len(asked))
    return asked, lengths.tolist(), dict(zip(names, (30 * rng.integers(1, 40, len(names))).tolist(), strict=True))


def test_capped_shares_of_any_mixture_are_shares_within_the_cap_or_the_cap_is_refused():
    # trap T5
    rng, fates = np.random.default_rng(0), []
    for _ in range(1_500):
        asked, lengths, held = any_mixture(rng)
        try:
            found = capped(asked, lengths, held, 2.0)
        except DataError as error:
            fates += [field for field, _ in error.faults]
            continue
        read = {name: sum(n * phase[name] for n, phase in zip(lengths, found, strict=True)) for name in held}
        full = {name for name in held if read[name] > 2 * held[name] * (1 - 1e-9)}
        assert all(read[name] <= 2 * held[name] * (1 + 1e-9) for name in held)
        for before, phase in zip(asked, found, strict=True):
            assert min(phase.values()) >= 0
            assert sum(phase.values()) == pytest.approx(1, abs=1e-12)
            assert all(phase[name] == 0 for name in held if before[name] == 0)
            grown = [phase[name] / before[name] for name in held.keys() - full if before[name]]
            assert grown == pytest.approx(grown[:1] * len(grown)), "those below the cap grow alike"
            assert all(growth >= 1 - 1e-9 for growth in grown)
        fates.append("pushed on" if len(full) > 1 else "capped" if full else "as asked")
    assert set(fates) == {"cap_epochs", "pushed on", "capped", "as asked"}
    assert min(map(fates.count, set(fates))) > 50


def test_a_cap_that_the_data_cannot_meet_is_refused(tokens):
    # trap T5
    with pytest.raises(DataError, match=r"cap_epochs must let the sources bb, cc give the 5,120 tokens of the run"):
        make(tokens, weights={"aa": 0, "bb": 1, "cc": 1}, cap_epochs=1.0, max_steps=40)


ONE, BOTH, OTHER = {"aa": 1.0, "bb": 0.0}, {"aa": 0.5, "bb": 0.5}, {"aa": 0.0, "bb": 1.0}


@pytest.mark.parametrize(
    ("shares", "lengths", "tokens", "said"),
    [
        # a short first phase alone would be filled: it is the run that is not
        ([BOTH, BOTH], [1_536, 25_598_464], [300_000, 65_832], "aa, bb give the 25,600,000 tokens of the run; at 2 "
         "passes they give 731,664"),
        # no less so where the phases weigh the same sources differently
        ([BOTH, {"aa": 0.9, "bb": 0.1}], [100, 900], [50, 60], "aa, bb give the 1,000 tokens of the run; at 2 passes "
         "they give 220"),
        ([ONE, OTHER], [1_000, 1_000], [400, 5_000], "aa give the 1,000 tokens of phase 0; at 2 passes they give 800"),
        ([BOTH, ONE], [1_000, 1_000], [400, 5_000], "aa give the 1,000 tokens of phase 1; at 2 passes they give 800"),
        ([ONE, OTHER, ONE], [1_000, 10, 1_000], [900, 99], "aa give the 2,000 tokens of phases 0, 2; at 2 passes they "
         "give 1,800"),
        # enough for phase 0 by itself, which gets 1,600 / 1,500 of a token for each that is asked, less what 1 takes
        ([ONE, {"aa": 0.8, "bb": 0.2}], [1_000, 1_000], [600, 600], "aa give the 1,000 tokens of phase 0; at 2 passes "
         "they give 667 there, since other phases read them too"),
    ],
)  # fmt: skip
def test_a_cap_that_cannot_be_met_says_what_is_short_in_true_figures(shares, lengths, tokens, said):
    # trap T5
    with pytest.raises(DataError) as caught:
        capped(shares, lengths, dict(zip(("aa", "bb"), tokens, strict=True)), 2.0)
    ((field, message),) = caught.value.faults
    assert field == "cap_epochs"
    assert message.startswith(f"must let the sources {said}; raise cap_epochs")


def test_a_capped_run_is_not_extended_since_its_shares_depend_on_its_length():
    plain = {"schedule": {"kind": "constant"}}
    assert Pretrain.extension(config(**plain)) == {"max_steps": 6}
    assert Pretrain.extension(config(**plain, cap_epochs=2.0)) == {}
    assert "max_steps" in Pretrain.key_config(config(**plain, cap_epochs=2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phases": [{"from_step": 6, "mixture": {"en": 1}}]},
            "phases.0.from_step: must lie after step 0 and before max_steps 6; got 6",
        ),
        (
            {"phases": [{"from_step": 3, "mixture": {"en": 1}}, {"from_step": 3, "mixture": {"en": 1}}]},
            "phases.1.from_step: must lie after step 3",
        ),
        ({"phases": [{"from_step": 3, "mixture": {"en": -1}}]}, "phases.0.mixture.en: must be 0 or more; got -1"),
        ({"mixture": {"en": -1}}, "mixture.en: must be 0 or more; got -1"),
        ({"mixture_by": "domain"}, "mixture_by: means something with `mixture` or `phases` only; got domain"),
    ],
)
def test_phases_that_cannot_be_are_named_before_anything_runs(changes, message):
    assert any(str(fault).startswith(message) for fault in Pretrain.check(config(**changes), spec()))


def test_a_phase_that_names_no_source_is_named_before_anything_runs():
    asked = config(mixture={"en": 1, "de": 1}, phases=[{"from_step": 2, "mixture": {"en": 1, "fr": 1}}])
    said = [fault.path for fault in Pretrain.check_sources(asked, {"data": ["en", "de"]})]
    assert said == ["phases.0.mixture.fr", "phases.0.mixture.de"]


class Described:
    def __init__(self, name, language, domain):
        self.name, self.language, self.domain = name, language, domain


def test_a_word_for_no_language_or_domain_is_named_before_anything_runs():
    sources = [SourceName.of(Described(fact["name"], fact["language"], fact["domain"])) for fact in FACTS]
    asked = config(mixture={"en": 1, "de": 1, "cod": 1}, mixture_by="language")
    said = [str(fault) for fault in Pretrain.check_sources(asked, {"data": sources})]
    assert said[0].startswith("mixture.cod: must name one of the data's sources en, code, de; did you mean code?")
    assert said[1].startswith("mixture.code: must give every source its weight")
    asked = config(mixture={"en/history": 1, "en/-": 1, "de/history": 1, "code/code": 1}, mixture_by="language_domain")
    assert Pretrain.check_sources(asked, {"data": sources}) == []
    assert Pretrain.check_sources(asked, {"data": ["elsewhere"]}) == []


def test_the_recipe_knows_languages_and_domains_before_any_text_is_read(tmp_path):
    text = TINY_HELIX.replace(
        "    kind: pretrain\n", "    kind: pretrain\n    mixture_by: language\n    mixture: {en: 1, fr: 1}\n"
    )
    chain = build_chain(load_recipe(write_recipe(tmp_path, text)), tmp_path / "runs", STAGES)
    with pytest.raises(ConfigError) as caught:
        refuse_early(chain, list(chain), 1, False)
    said = str(caught.value)
    assert "pretrain.mixture.fr: must name one of the data's sources en, de" in said
