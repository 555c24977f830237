"""Faults of a recipe's `model` section: all at once, each with its own path and line, none hiding another."""

import pytest
from fake_chain import MODEL, RECIPE, STAGES, write_recipe

from model.pattern import expand_pattern, read_pattern
from model.spec import AttentionSpec, ModelSpec
from pipelines.run import main

BROKEN_MODEL = """
model:
  d_model: 100
  d_ff: wide
  vocab_size: 256
  max_seq_len: 128
  layers: "(3*ssd 1*atention 0*gated $"
  mixers:
    ssd: {mixer: mamba2}
    grouped: {mixer: mamba2, head_dim: 50, n_groups: 3}
    local:
      mixer: attention
      n_heads: 4
      n_kv_heads: 3
      head_dim: 15
      global_tokens: 2
    gated: {mixer: attention, n_heads: 4, n_kv_heads: 5, output_gat: true}
    odd: {mixer: gla, n_heads: 0}
    strange: {mixer: gru}
    "two words": {mixer: gla, n_heads: 1}
"""


def told(tmp_path, capsys, text, stages=STAGES):
    path = write_recipe(tmp_path, text)
    assert main(["--all", "--pipeline", str(path), "--runs", str(tmp_path / "runs")], stages) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err.splitlines()


def line_of(words: str, text: str) -> int:
    return 1 + next(number for number, line in enumerate(text.splitlines()) if words in line)


# What stands in the recipe's line, the path, and how the message begins.
PLANTED = [
    ("d_ff: wide", "model.d_ff", "must be a valid integer; got 'wide'"),
    ("layers:", "model.layers", "must close each bracket that it opens; got"),
    ("layers:", "model.layers", "must repeat by 1 or more; got"),
    ("layers:", "model.layers", "must have a mixer's name or '(' where '$' stands; got"),
    ("layers:", "model.layers", "must use words that mixers defines; got 'atention'; define it, or use one of gated, "),
    ("ssd: {", "model.mixers.ssd.head_dim", "must divide expand * d_model = 200; got 64; set one of [1, 2, 4, 5, "),
    ("grouped: {", "model.mixers.grouped", "must be used by layers; got none that names it; use it or remove it"),
    ("grouped: {", "model.mixers.grouped.n_groups", "must divide the 4 heads; got 3; set one of [1, 2, 4]"),
    ("local:", "model.mixers.local", "must be used by layers"),
    ("n_kv_heads: 3", "model.mixers.local.n_kv_heads", "must divide n_heads 4; got 3; set one of [1, 2, 4]"),
    ("head_dim: 15", "model.mixers.local.head_dim", "must be even for rotary positions; got 15; set 16"),
    ("global_tokens: 2", "model.mixers.local.global_tokens", "needs a window; got 2 and no window; set window, or"),
    ("gated: {", "model.mixers.gated.n_kv_heads", "must divide n_heads 4; got 5; set one of [1, 2, 4]"),
    ("gated: {", "model.mixers.gated.output_gat", "is not a field; got true; did you mean 'output_gate'?"),
    ("odd: {", "model.mixers.odd", "must be used by layers"),
    ("odd: {", "model.mixers.odd.n_heads", "must be greater than or equal to 1; got 0"),
    ("strange: {", "model.mixers.strange", "must be used by layers"),
    ("strange: {", "model.mixers.strange.mixer", "must be one of mamba2, gla, attention; got 'gru'"),
    ("two words", "model.mixers.two words", "must be used by layers"),
    ("two words", "model.mixers.two words", "must be a word of letters, digits and underscores; got 'two words'"),
    ("lr: 2e-4", "train.lr", "must be a valid number; got 'fast'"),
    ("micro_batch_size: 9", "tuned.micro_batch_size", "must be at most 4; got 9; set 4"),
]


def test_every_fault_is_told_at_once_with_its_own_path_and_line(tmp_path, capsys):  # trap T7
    text = RECIPE.replace(MODEL, BROKEN_MODEL).replace("lr: 1e-4", "lr: 1e-4\n    micro_batch_size: 9")
    lines = told(tmp_path, capsys, text.replace("lr: 2e-4", "lr: fast"))
    expected = [f"line {line_of(words, text)}: {path}: {message}" for words, path, message in PLANTED]
    missing = [start for start in expected if not any(line.startswith(start) for line in lines)]
    assert not missing, "\n".join(["not told:", *missing, "told:", *lines])
    assert len(lines) == len(expected), "\n".join(lines)


def test_an_unknown_word_in_a_list_of_layers_has_its_place(tmp_path, capsys):
    (line,) = told(tmp_path, capsys, RECIPE.replace('"2*m"', "[m, n, m]"))
    assert "model.layers.1: must use words that mixers defines; got 'n'; define it, or use one of m" in line


def test_a_broken_model_of_the_real_stages_is_no_traceback_and_hides_no_fault_of_theirs(tmp_path, capsys):
    from pipelines.recipe import DEFAULT
    from stages import STAGES as REAL

    text = DEFAULT.read_text(encoding="utf-8").replace("n_kv_heads: 2", "n_kv_heads: 3", 1)
    assert "n_kv_heads: 3" in text
    path = write_recipe(tmp_path, text)
    setting = "pretrain.schedule.warmup_steps=140"
    argv = ["--plan", "--pipeline", str(path), "--set", setting, "--runs", str(tmp_path / "runs")]
    assert main(argv, REAL) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert "pretrain.schedule.warmup_steps: must be below max_steps" in lines[0]
    assert "n_kv_heads: must divide n_heads" in lines[1]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a", ["a"]),
        ("2*a b*2", ["a", "a", "b", "b"]),
        ("2*(a (b)*2)", ["a", "b", "b", "a", "b", "b"]),
        ("(2*a 1*b)*2", ["a", "a", "b", "a", "a", "b"]),
        ("2*a*3", ["a"] * 6),
    ],
)
def test_patterns_give_their_layers(pattern, words):
    assert expand_pattern(pattern) == words


@pytest.mark.parametrize(
    ("pattern", "rules"),
    [
        ("", ["must name at least one layer"]),
        ("()", ["must name at least one layer"]),
        ("((a)", ["must close each bracket"]),
        ("a) b)", ["must open each bracket"]),
        ("3 a", ["must have '*' after the count 3"]),
        ("a*b", ["must have a count after '*'"]),
        ("3*", ["must repeat a mixer's name or a group"]),
        ("a*0", ["must repeat by 1 or more"]),
        ("a*" + "9" * 5000, ["must give 1 to 512 layers"]),
        ("300*a 300*a", ["must give 1 to 512 layers"]),
        ("a, b; 0*c (", ["where ',' stands", "where ';' stands", "must repeat by 1", "must close each bracket"]),
    ],
)
def test_every_mistake_of_a_pattern_is_told(pattern, rules):
    _, faults = read_pattern(pattern)
    assert len(faults) == len(rules), faults
    assert all(rule in fault for rule, fault in zip(rules, faults, strict=True))
    with pytest.raises(ValueError, match="layers must"):
        expand_pattern(pattern)


def test_absurd_heads_are_refused_at_once():
    with pytest.raises(ValueError, match="less than or equal to 65536"):
        AttentionSpec(mixer="attention", n_heads=10**15, n_kv_heads=7)


def test_a_section_alone_names_its_own_fields():
    with pytest.raises(ValueError, match="n_kv_heads\n  must divide n_heads 4; got 3"):
        AttentionSpec(mixer="attention", n_heads=4, n_kv_heads=3)


def test_a_validated_section_is_taken_as_it_is():
    mixer = AttentionSpec(mixer="attention", n_heads=4, n_kv_heads=2, head_dim=16)
    spec = ModelSpec(d_model=64, d_ff=64, vocab_size=64, max_seq_len=64, layers="m", mixers={"m": mixer})
    assert ModelSpec.model_validate(spec) is spec
    assert spec.mixers["m"] == mixer
