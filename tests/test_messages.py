"""Conversations: every fault by its rule with file and line, exact duplicates, sides by question, equal bytes."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from tiny_corpus import build_corpus

from data import messages
from data.corpus import read_documents
from data.messages_config import MessagesHeldout, MessagesSource
from data.messages_rules import RULES, MessagesFault, checked
from data.messages_sources import question_and_answer, read_conversations
from data.tasks import TaskChoice, rows
from stages.base import ConfigError, StageContext
from stages.messages import Messages, MessagesConfig
from stages.tasks import TasksConfig

SOURCE = TypeAdapter(MessagesSource)
USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def source(**fields):
    plain = {"type": "files", "name": "own", "language": "en", "licence": "own"}
    return SOURCE.validate_python(plain | ({"include": ["*"]} if "type" not in fields else {}) | fields)


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_lines(path: Path, conversations) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": one}, ensure_ascii=False) + "\n" for one in conversations))
    return path


def run_stage(folder: Path, config: dict, parents: dict[str, Path] | None = None, seed: int = 1):
    plain = MessagesConfig.model_validate({"kind": "messages"} | config)
    context = StageContext(
        pipeline="t", name="messages", key="0" * 64, seed=seed, config=plain, model=None, directory=folder,
        output=folder / "output", work=folder / "work", cache=folder / "cache", parents=parents or {}, tracker=None,
    )  # fmt: skip
    return Messages().run(context), folder / "output"


FAULTY = [
    (b"{broken", "invalid_json"),
    (b'{"messages": "\xff"}', "invalid_utf8"),
    (b"[1]", "not_an_object"),
    (b'{"prompt": "x"}', "no_messages"),
    (b'{"messages": "x"}', "no_messages"),
    (b'{"messages": []}', "empty_conversation"),
    (b'{"messages": ["x"]}', "message_not_object"),
    (json.dumps({"messages": [{"role": "human", "content": "x"}, HELLO]}).encode(), "wrong_role"),
    (json.dumps({"messages": [{"role": "user"}, HELLO]}).encode(), "missing_content"),
    (json.dumps({"messages": [USER, {"role": "assistant", "content": None}]}).encode(), "missing_content"),
    (json.dumps({"messages": [{"role": "user", "content": 3}, HELLO]}).encode(), "content_not_text"),
    (json.dumps({"messages": [USER, {"role": "assistant", "content": " \n"}]}).encode(), "empty_content"),
    (json.dumps({"messages": [{"role": "user", "content": "\ud800"}, HELLO]}).encode(), "invalid_unicode"),
    (json.dumps({"messages": [USER, HELLO, {"role": "system", "content": "x"}]}).encode(), "system_not_first"),
    (json.dumps({"messages": [{"role": "system", "content": "x"}, HELLO]}).encode(), "no_user_turn"),
    (json.dumps({"messages": [USER]}).encode(), "no_assistant_turn"),
    (json.dumps({"messages": [USER, USER, HELLO]}).encode(), "roles_repeat"),
    (json.dumps({"messages": [HELLO, USER, HELLO]}).encode(), "roles_repeat"),
    (json.dumps({"messages": [USER, HELLO, USER]}).encode(), "ends_without_assistant"),
]  # fmt: skip


def test_every_faulty_line_is_named_with_its_rule_file_and_line(tmp_path):
    good = json.dumps({"messages": [USER, HELLO], "extra": 1}).encode()
    (tmp_path / "chat.jsonl").write_bytes(b"\n".join([good, b"", *(line for line, _ in FAULTY), good]))
    found = list(read_conversations(source(path=str(tmp_path)), tmp_path, {}))
    assert [read.fault.rule for read in found[1:-1]] == [rule for _, rule in FAULTY]
    assert [read.origin for read in found] == ["chat.jsonl:1", *(f"chat.jsonl:{n + 3}" for n in range(len(FAULTY) + 1))]
    assert found[0].messages == found[-1].messages == [USER, HELLO]
    assert "'human' at messages[0]" in str(found[8].fault)
    assert {rule for _, rule in FAULTY} <= set(RULES)


def test_contents_are_nfc_text_and_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "cafe\u0301 "}, {"type": "text", "text": "<|im_end|>"}]
    found = checked({"messages": [{"role": "user", "content": parts, "name": "x"}, HELLO]})
    assert found == [{"role": "user", "content": "caf\u00e9 <|im_end|>"}, HELLO]
    with pytest.raises(MessagesFault, match="content must be a string"):
        checked({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, HELLO]})


def test_a_tool_may_stand_between_two_turns_of_the_assistant():
    conversation = [{"role": "system", "content": "s"}, USER, HELLO, {"role": "tool", "content": "3"}, HELLO]
    assert checked({"messages": conversation}) == conversation


def test_of_equal_conversations_the_earlier_sources_stays(tmp_path):
    write_lines(tmp_path / "a" / "x.jsonl", [turns("Hi", "Hello"), turns("Hi", "Hello"), turns("Hi", "Hey")])
    write_lines(tmp_path / "b" / "x.jsonl", [turns("Hi", "Hello"), turns("Bye", "So long")])
    both = [source(name=name, path=str(tmp_path / name)) for name in "ab"]
    kept, left_out = messages.gather(both, tmp_path, {})
    assert [(row.source, row.messages[1]["content"]) for row in kept] == [
        ("a", "Hello"),
        ("a", "Hey"),
        ("b", "So long"),
    ]
    assert [(one.source, one.origin, one.fault.rule) for one in left_out] == [
        ("a", "x.jsonl:2", "duplicate"),
        ("b", "x.jsonl:1", "duplicate"),
    ]
    assert "x.jsonl:1" in str(left_out[0].fault)


def test_equal_questions_never_stand_on_both_sides_and_sides_do_not_move(tmp_path):  # trap M4
    rows = [turns(f"question {n // 3}" + " " * (n % 3), f"answer {n}") for n in range(300)]
    write_lines(tmp_path / "a.jsonl", rows)
    one = source(path=str(tmp_path / "a.jsonl"))
    kept, _ = messages.gather([one], tmp_path, {})
    sides, _ = messages.split(kept, MessagesHeldout(share=0.2, min_questions=2))
    questions = {name: {row.question for row in members} for name, members in sides.items()}
    assert not questions["train"] & questions["heldout"]
    # 100 questions at a share of 0.2: 20 expected, standard deviation 4.
    assert 8 <= len(questions["heldout"]) <= 32
    assert len(sides["heldout"]) == 3 * len(questions["heldout"])
    fewer, _ = messages.split(kept[:150], MessagesHeldout(share=0.2, min_questions=2))
    assert {row.id for row in fewer["heldout"]} == {row.id for row in sides["heldout"]} & {row.id for row in kept[:150]}


def test_a_small_source_gives_its_least_questions_but_never_more_than_half(tmp_path):
    write_lines(tmp_path / "a.jsonl", [turns(f"q{n}", "a") for n in range(6)])
    kept, _ = messages.gather([source(path=str(tmp_path / "a.jsonl"))], tmp_path, {})
    sides, _ = messages.split(kept, MessagesHeldout(share=0.01, min_questions=8))
    assert (len(sides["train"]), len(sides["heldout"])) == (3, 3)


def test_max_rows_keeps_the_lowest_hashes_in_their_order(tmp_path):
    write_lines(tmp_path / "a.jsonl", [turns(f"q{n}", "a") for n in range(40)])
    everything, _ = messages.gather([source(path=str(tmp_path / "a.jsonl"))], tmp_path, {})
    kept, left_out = messages.gather([source(path=str(tmp_path / "a.jsonl"), max_rows=7)], tmp_path, {})
    lowest = sorted(row.id for row in everything)[:7]
    assert [row.id for row in kept] == [row.id for row in everything if row.id in lowest]
    assert [one.fault.rule for one in left_out] == ["beyond_max_rows"] * 33


DIALOGUES = """categories:
- talk
conversations:
- - Who walked first?
  - 1969
  - Really?
- - Yes or no?
  - Yes
- - Alone
"""


def test_dialogues_are_spoken_in_turn_and_an_unanswered_last_line_is_left_off(tmp_path):
    (tmp_path / "talk.yml").write_text(DIALOGUES)
    (tmp_path / "zz.yml").write_text("a: [")
    found = list(read_conversations(source(path=str(tmp_path)), tmp_path, {}))
    assert [read.messages for read in found[:2]] == [turns("Who walked first?", "1969"), turns("Yes or no?", "True")]
    assert [(read.origin, read.fault and read.fault.rule) for read in found] == [
        ("talk.yml:4", None),
        ("talk.yml:7", None),
        ("talk.yml:9", "no_assistant_turn"),
        ("zz.yml", "invalid_yaml"),
    ]


def document(text: str, title: str | None = "Rome") -> dict:
    return {"id": "0", "title": title, "text": text, "language": "en"}


def test_an_answer_is_as_many_whole_sentences_as_fit():
    text = "Rome\n\nRome is a city. It lies on the Tiber. It is old."
    assert question_and_answer(document(text), 40) == turns(
        "Tell me about Rome.", "Rome is a city. It lies on the Tiber."
    )
    assert question_and_answer(document(text), 36)[1]["content"] == "Rome is a city."
    with pytest.raises(MessagesFault, match="15 bytes"):
        question_and_answer(document(text), 14)
    with pytest.raises(MessagesFault, match="title"):
        question_and_answer(document(text, None), 40)


def test_an_abbreviation_or_an_open_bracket_does_not_end_a_sentence():
    first = "J. S. Bach (b. 21 March. Eisenach) wrote music."
    told = document(f"{first} He died.", "Bach")
    assert question_and_answer(told, 50)[1]["content"] == first
    for inside_the_bracket_or_the_initials in (30, 8):
        with pytest.raises(MessagesFault, match="must fit into max_answer_bytes"):
            question_and_answer(told, inside_the_bracket_or_the_initials)


def test_documents_that_the_corpus_holds_out_are_never_trained_on(tmp_path):  # trap M4
    corpus = build_corpus(tmp_path / "corpus")
    config = {"corpus": "clean", "sources": [{"type": "corpus", "name": "wiki-qa", "language": "en", "licence": "none",
                                              "corpus_source": "wiki", "max_answer_bytes": 400}]}  # fmt: skip
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "output").symlink_to(corpus)
    _, output = run_stage(tmp_path / "run", config, {"corpus": tmp_path / "clean"})
    titles = {f"Tell me about {row['title']}." for row in read_documents(corpus, "heldout", "wiki")}
    asked = {
        side: {row["messages"][0]["content"] for row in messages.read_messages(output, side)}
        for side in messages.SPLITS
    }
    assert asked["heldout"]
    assert asked["heldout"] <= titles
    assert not asked["train"] & titles
    assert len(asked["train"]) > 50


def test_a_training_row_that_asks_a_held_out_question_is_left_out(tmp_path):
    held = messages.Conversation("1", "same", turns("q", "a"), "x", "en", "x:1", side="heldout")
    train = messages.Conversation("2", "same", turns("q", "b"), "y", "en", "y:1", side="train")
    sides, left_out = messages.split([held, train], MessagesHeldout())
    assert (sides["train"], sides["heldout"]) == ([], [held])
    assert [(one.origin, one.fault.rule) for one in left_out] == [("y:1", "heldout_question")]


@pytest.fixture
def tasks(tmp_path):
    """A finished ``tasks`` artifact, and the questions of each of its sides."""
    choice, folder = TaskChoice(name="add", size=2, train=60, heldout=60), tmp_path / "tasks" / "output"
    folder.mkdir(parents=True)
    asked = {}
    for side in messages.SPLITS:
        made = list(rows(choice, side, 3))
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        asked[side] = [row["prompt"][0]["content"] for row in made]
    return asked


WORKED = {"type": "tasks", "name": "worked", "language": "en", "licence": "none"}


def questions_of(output, side):
    return {row["messages"][0]["content"] for row in messages.read_messages(output, side)}


def test_demonstrations_stand_on_the_side_of_the_tasks_on_which_their_question_does(tasks, tmp_path):  # trap M4
    # GRPO trains on every question of the tasks' training side: none of them may be measured here.
    config = {"tasks": "tasks", "sources": [{**WORKED, "max_rows": 40}]}
    _, output = run_stage(tmp_path / "run", config, {"tasks": tmp_path / "tasks"})
    shown, held = questions_of(output, "train"), questions_of(output, "heldout")
    assert shown < set(tasks["train"])
    assert held < set(tasks["heldout"])
    # max_rows are trained on; a twentieth of all, or eight at least, is held out.
    assert (len(shown), len(held)) == (40, 8)
    every = [row for side in messages.SPLITS for row in messages.read_messages(output, side)]
    assert all("Answer: " in row["messages"][-1]["content"] for row in every)


def test_a_question_of_the_tasks_in_any_other_file_stands_on_the_tasks_side_too(tasks, tmp_path):  # trap M4
    path = tmp_path / "own.jsonl"
    rows_of_one = [turns(question, "yes") for side in messages.SPLITS for question in tasks[side]]
    rows_of_one += [turns(f"q{number}", "a") for number in range(40)]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in rows_of_one))
    own = {"type": "files", "name": "own", "language": "en", "licence": "none", "path": str(path), "include": ["*"]}
    config = {"tasks": "tasks", "sources": [own, WORKED]}
    _, output = run_stage(tmp_path / "run", config, {"tasks": tmp_path / "tasks"})
    assert not questions_of(output, "heldout") & set(tasks["train"])
    assert not questions_of(output, "train") & set(tasks["heldout"])
    assert {f"q{number}" for number in range(40)} <= questions_of(output, "heldout") | questions_of(output, "train")


def test_of_tasks_that_hold_nothing_out_no_demonstrations_are_made():
    config = MessagesConfig.model_validate({"kind": "messages", "tasks": "tasks", "sources": [WORKED]})
    for heldout, expected in ((0, ["sources.0"]), (9, [])):
        asked = TasksConfig(tasks=[{"name": "add", "size": 2, "train": 60, "heldout": heldout}])
        assert [fault.path for fault in Messages.check_parent_configs(config, {"tasks": asked})] == expected


def test_a_task_that_the_stage_does_not_have_is_refused(tasks, tmp_path):
    config = {"tasks": "tasks", "sources": [WORKED]}
    with pytest.raises(ConfigError, match=r"sources\.0\.tasks.*must name tasks of the stage \(add\); got mul"):
        run_stage(tmp_path / "other", {**config, "sources": [{**config["sources"][0], "tasks": ["mul"]}]},
                  {"tasks": tmp_path / "tasks"})  # fmt: skip


def test_passages_of_one_document_stand_on_one_side(tmp_path):
    corpus = build_corpus(tmp_path / "corpus")
    one = source(type="corpus", name="names", corpus_source="netz", turns="language", language="de", passages=3,
                 max_answer_bytes=40, heldout_documents="hash")  # fmt: skip
    kept, _ = messages.gather([one], tmp_path, {"corpus": corpus})
    sides, _ = messages.split(kept, MessagesHeldout(share=0.3))
    documents = {side: {row.question for row in members} for side, members in sides.items()}
    assert max(len([row for row in kept if row.question == group]) for group in documents["train"]) > 1
    # What is written names the family, so that intervals draw a document's passages together (M6).
    assert all(row.row()["family"] == row.question for row in kept)
    assert not documents["train"] & documents["heldout"]
    assert {row["id"] for row in read_documents(corpus, "heldout", "netz")} <= documents["heldout"]
    # More is held out than the corpus does, since n is to be larger than its split.
    assert len(documents["heldout"]) > 10


def test_the_stage_writes_equal_bytes_whatever_the_seed_and_names_what_it_left_out(tmp_path, capsys):
    conversations = [*(turns(f"frage {n}", "antwort") for n in range(50)), [USER]]
    write_lines(tmp_path / "own" / "a.jsonl", conversations)
    config = {"sources": [{"type": "files", "name": "own", "language": "de", "licence": "own", "include": ["*"],
                           "path": str(tmp_path / "own")}]}  # fmt: skip
    result, first = run_stage(tmp_path / "1", config, seed=1)
    _, second = run_stage(tmp_path / "2", config, seed=2)
    names = ["heldout.jsonl", "left_out.jsonl", "messages.json", "train.jsonl"]
    assert sorted(path.name for path in first.iterdir()) == names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    info = messages.messages_info(first)
    assert info["languages"]["de"]["train"] + info["languages"]["de"]["heldout"] == 50
    assert info["sources"][0]["left_out"] == {"no_assistant_turn": 1}
    assert result.metrics["heldout_hash"] == info["heldout_hash"]
    assert "a.jsonl:51: an assistant must speak; got roles user" in capsys.readouterr().out


def test_a_source_without_anything_left_is_refused_with_its_rules(tmp_path):  # trap T4
    write_lines(tmp_path / "a.jsonl", [[USER], [USER]])
    config = {"sources": [{"type": "files", "name": "own", "language": "en", "licence": "own", "include": ["*"],
                           "path": str(tmp_path / "a.jsonl")}]}  # fmt: skip
    with pytest.raises(ConfigError, match=r"sources\.0: source own must keep .* got 0 and 0 .*no_assistant_turn 2"):
        run_stage(tmp_path / "run", config)


def test_inputs_must_be_named_where_they_are_read_and_only_there(tmp_path):  # trap T7
    corpus = {"type": "corpus", "name": "a", "language": "en", "licence": "x", "corpus_source": "wiki"}
    files = {
        "type": "files",
        "name": "a",
        "language": "en",
        "licence": "x",
        "include": ["*"],
        "path": str(tmp_path / "no"),
    }
    config = MessagesConfig.model_validate({"kind": "messages", "tasks": "tasks", "sources": [corpus, files]})
    faults = {fault.path: fault.message for fault in Messages.check(config, None)}
    assert set(faults) == {"corpus", "tasks", "sources.0.name", "sources.1.name", "sources.1.path"}
    assert "must name a stage, since sources.0 reads it" in faults["corpus"]
    assert "must be left out where no source reads it" in faults["tasks"]
    found = Messages.check_sources(config, {"corpus": ["wikipedia", "web"]})
    assert [str(fault) for fault in found] == ["sources.0.corpus_source: must be one of wikipedia, web; got 'wiki'"]
