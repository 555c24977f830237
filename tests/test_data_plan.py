"""What of data, mixtures and tokenizers a plan refuses: exit code 2, dotted path, value and way out, nothing run."""

import json

import pytest
from fake_chain import write_recipe
from golden_recipes import TINY_HELIX
from tiny_run import make_tokens

from pipelines.run import main
from stages import STAGES
from stages.pretrain import Pretrain
from stages.stream import Stream, StreamConfig

ROWS = [{"body": f"Sentence {number} of a text that is long enough.", "score": number} for number in range(9)]
SOURCE = "{type: files, name: tales, language: en, licence: own, rules: prose, path: PATH, include: ['*.*']"


@pytest.fixture
def plan(tmp_path, capsys):
    def run(text, *argv):
        path = write_recipe(tmp_path, text)
        code = main(["--plan", "--pipeline", str(path), "--runs", str(tmp_path / "runs"), *argv], STAGES)
        return code, capsys.readouterr()

    return run


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "a.jsonl"
    path.write_text("no json\n" + "".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def recipe(path, fields=""):
    source = SOURCE.replace("PATH", str(path.parent))
    return f"name: t\nstages:\n  clean:\n    kind: clean\n    sources:\n      - {source}{fields}}}\n"


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        (
            "{wikipedia-en: 0, messages-de: 0}",
            "pretrain.mixture: must leave at least one source with a share; got wikipedia-en 0, messages-de 0;",
        ),
        ("{}", "pretrain.mixture: must leave at least one source with a share; got no weight; raise one weight"),
    ],
)
def test_a_mixture_without_any_share_is_refused(plan, mixture, said):
    code, out = plan(TINY_HELIX.replace("    kind: pretrain\n", f"    kind: pretrain\n    mixture: {mixture}\n"))
    assert code == 2
    assert said in out.err


def test_a_phase_without_any_share_is_refused(plan):
    phases = "    phases: [{from_step: 1, mixture: {wikipedia-en: 0, messages-de: 0}}]\n"
    code, out = plan(TINY_HELIX.replace("    kind: pretrain\n", f"    kind: pretrain\n{phases}"))
    assert code == 2
    assert "pretrain.phases.0.mixture: must leave at least one source with a share" in out.err


def test_a_mixture_that_finished_shards_cannot_give_is_refused(tmp_path):
    # trap T5
    tokens = {"data": make_tokens(tmp_path / "tokens")}
    from tiny_run import config, spec

    def said(**changes):
        return [str(fault) for fault in Pretrain.check_parents(config(**changes), spec(), tokens)]

    assert said() == []
    assert said(mixture={"de": 1, "fr": 1}, mixture_by="language")[0].startswith("mixture.fr: must name a source of")
    (many,) = said(max_steps=500, max_epochs=1, mixture={"en": 1, "de": 0})
    assert many.startswith("max_epochs: must cover the ")
    assert "lower mixture.en or max_steps" in many


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ("{en: 1, fr: 2}", "tokenizer.language_shares.fr: must be a language of the corpus (de, en); got fr; rename"),
        ("{en: 1}", "tokenizer.language_shares.de: must be given, since the corpus has that language; got none; set"),
        ("{}", "tokenizer.language_shares.de: must be given, since the corpus has that language"),
        ("{en: 0, de: 0}", "tokenizer.language_shares.en: must be positive; got 0.0; set its share"),
    ],
)
def test_shares_of_languages_that_do_not_fit_the_corpus_are_refused(plan, shares, said):
    code, out = plan(
        TINY_HELIX.replace("    kind: tokenizer\n", f"    kind: tokenizer\n    language_shares: {shares}\n")
    )
    assert code == 2
    assert said in out.err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            ", template: '{text}'",
            "clean.sources.0.template: refers to 'text', which a.jsonl:2 lacks; it has: body, score",
        ),
        (
            ", template: '{score}'",
            "clean.sources.0.template: must give text; got '{score}', of which a.jsonl:2 says: score",
        ),
        (", template: '{body}', title: name", "clean.sources.0.title: refers to 'name', which a.jsonl:2 lacks"),
        (
            ", template: '{body}', filters: [{field: points, min: 3}]",
            "clean.sources.0.filters: refers to 'points', which a.jsonl:2 lacks; it has: body, score",
        ),
    ],
)
def test_a_field_that_the_first_row_does_not_have_is_refused_with_those_that_it_has(plan, lines, fields, said):
    code, out = plan(recipe(lines, fields))
    assert code == 2
    assert said in out.err
    assert plan(recipe(lines, ", template: '{body}', title: body, filters: [{field: score, min: 99}]"))[0] == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            "decontaminate: {files: [{name: gsm, path: FILE, fields: [question]}]}",
            "clean.decontaminate.files.0.fields: must name fields of every row; got 'question', which bench",
        ),
        (
            "quality: {labels: FILE, sources: [tales]}",
            'clean.quality.labels: must hold {"text": ..., "label": ...} a line',
        ),
    ],
)
def test_benchmarks_and_labels_without_their_fields_are_refused(plan, lines, tmp_path, fields, said):
    (tmp_path / "bench.jsonl").write_text('{"text": "How many?", "answer": "4"}\n')
    asked = fields.replace("FILE", str(tmp_path / "bench.jsonl"))
    code, out = plan(recipe(lines, ", template: '{body}'") + f"    {asked}\n")
    assert code == 2
    assert said in out.err


def test_a_stream_looks_at_its_first_rows_too(lines):
    source = {"type": "files", "name": "tales", "language": "en", "licence": "own", "rules": "none", "include": ["*"]}
    config = StreamConfig(tokenizer="tokenizer", sources=[source | {"path": str(lines.parent)}])
    assert [fault.path for fault in Stream.check(config, None)] == ["sources.0.template"]


def test_a_source_that_does_not_fit_is_told_before_the_others_are_read(tmp_path, lines):
    from clean_cases import clean, source, write_rows

    from stages.base import ConfigError

    write_rows(tmp_path / "good" / "a.jsonl", ["A good text."] * 9)
    with pytest.raises(ConfigError, match=r"sources\.1\.template: refers to 'text', which a\.jsonl:2 lacks"):
        clean(tmp_path / "run", source(tmp_path / "good"), source(lines.parent, name="bad"))
    assert not list((tmp_path / "run" / "work").rglob("*.jsonl"))


def test_a_plan_says_passes_in_words(plan, lines):
    text = f"""name: t
stages:
  clean:
    kind: clean
    sources: [{SOURCE.replace("PATH", str(lines.parent))}, template: '{{body}}'}}]
  tokenizer: {{kind: tokenizer, corpus: clean, model_type: byte_level_bpe, vocab_size: 512}}
  stream:
    kind: stream
    tokenizer: tokenizer
    passes: {{tales: 4}}
    sources: [{SOURCE.replace("PATH", str(lines.parent)).replace("prose", "none")}, template: '{{body}}'}}]
"""
    code, out = plan(text)
    assert code == 0
    assert [line.split() for line in out.out.splitlines() if line.split()[:1] == ["passes"]] == [
        ["passes", "tales", "4"]
    ]
