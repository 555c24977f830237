"""What a recipe measures with and does not keep its corpus clean of is told before anything runs."""

from fake_chain import write_recipe

from pipelines.chain import build_chain
from pipelines.contamination import contamination_notes
from pipelines.plan import plan, plan_lines
from pipelines.recipe import load_recipe
from stages import STAGES

RECIPE = """name: noted
model:
  d_model: 32
  d_ff: 48
  vocab_size: 320
  max_seq_len: 128
  layers: "1*att"
  mixers:
    att: {mixer: attention, n_heads: 2, n_kv_heads: 1, head_dim: 16}
stages:
  clean:
    kind: clean
    sources: [{name: a, type: hub, language: en, licence: none, rules: none, repository: o/n, revision: %s}]
  tokenizer: {kind: tokenizer, corpus: clean, vocab_size: 320}
  tokenize: {kind: tokenize, corpus: clean, tokenizer: tokenizer}
  pretrain: {kind: pretrain, data: tokenize, seq_len: 32, global_batch_size: 4, max_steps: 9, lr: 1.0e-3}
  tasks:
    kind: tasks
    tasks: [{name: parity, size: 4, train: 100, heldout: 100}]
  messages:
    kind: messages
    corpus: clean
    sources: [{name: m, type: corpus, language: en, licence: none, corpus_source: a}]
  evaluate:
    kind: evaluate
    from: pretrain
    tasks: tasks
    messages: messages
    suites: {reasoning: {}, format: {}}
""" % ("a" * 40)


def notes(tmp_path, *settings: str) -> list[str]:
    recipe = load_recipe(write_recipe(tmp_path, RECIPE), settings)
    return contamination_notes(build_chain(recipe, tmp_path / "runs", STAGES))


def test_a_set_that_the_corpus_may_hold_is_told_with_what_to_set(tmp_path):
    (note,) = notes(tmp_path)  # not of messages: they are made from the corpus, and kept apart by its split
    assert note == (
        "clean is not kept clean of tasks, which measures in evaluate: set clean.tasks=tasks, or add tasks to "
        "clean.decontaminate.unchecked"
    )
    recipe = load_recipe(write_recipe(tmp_path, RECIPE))
    shown = plan(build_chain(recipe, tmp_path / "runs", STAGES), 1)
    assert note in shown["notes"]
    assert f"note: {note}" in plan_lines(shown)


def test_nothing_is_told_once_the_recipe_has_spoken(tmp_path):
    assert notes(tmp_path, "clean.tasks=tasks") == []
    assert notes(tmp_path, "clean.decontaminate.unchecked=[tasks]") == []


def test_what_the_recipe_says_of_it_moves_the_key_only_where_it_moves_the_corpus(tmp_path):
    keys = []
    for settings in ([], ["clean.decontaminate.unchecked=[tasks]"], ["clean.tasks=tasks"]):
        recipe = load_recipe(write_recipe(tmp_path, RECIPE), settings)
        keys.append(build_chain(recipe, tmp_path / "runs", STAGES).nodes["clean"].job.key)
    assert keys[0] == keys[1] != keys[2]


def test_a_stream_and_the_harness_own_sets_are_told_too(tmp_path):
    source = "{name: b, type: hub, language: en, licence: none, rules: none, repository: o/n, revision: %s}" % (
        "b" * 40
    )
    text = RECIPE.replace(
        "  pretrain: {kind: pretrain, data: tokenize,",
        f"  stream: {{kind: stream, tokenizer: tokenizer, sources: [{source}]}}\n"
        "  pretrain: {kind: pretrain, data: stream,",
    ).replace("format: {}}", "format: {}, harness: {local: [], tasks: [mmlu]}}")
    recipe = load_recipe(write_recipe(tmp_path, text))
    told = contamination_notes(build_chain(recipe, tmp_path / "runs", STAGES))
    begins = (
        "stream reads its text as it comes, and is not kept clean of messages, tasks",
        "no corpus is kept clean of mmlu, which the harness measures in evaluate",
    )
    assert [sum(note.startswith(begin) for note in told) for begin in begins] == [1, 1]
