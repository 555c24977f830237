"""Preference pairs: own templates, one's own rows, faults by line, and a split that no template crosses."""

import hashlib
import json
import string
import sys

import pytest

from data import preferences_en
from data.errors import DataError
from data.fetch import fetch_package
from data.preferences import SPLITS, TEMPLATES, gather, heldout_templates, read_split, split, template_pairs, write
from data.preferences_config import FilePreferences, PackagePreferences, TemplateSource
from data.preferences_replies import COMPLIANCES, OPENINGS, REFUSALS, is_refusal
from data.preferences_rows import Pair, RowFault, read_rows
from stages.base import ConfigError, StageContext
from stages.preferences import Preferences

OWN = {"type": "templates"}


def config(*sources, **changes):
    return Preferences.Config.model_validate({"kind": "preferences", "sources": list(sources), **changes})


def run(directory, *sources, **changes):
    (directory / "output").mkdir(parents=True)
    context = StageContext(
        pipeline="t", name="preferences", key="0" * 64, seed=1, config=config(*sources, **changes), model=None,
        directory=directory, output=directory / "output", work=directory, cache=directory, parents={}, tracker=None,
    )  # fmt: skip
    result = Preferences().run(context)
    return result, {side: read_split(directory / "output", side) for side in SPLITS}


def files(path, rows, **changes):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    plain = {"type": "files", "name": "own", "licence": "none", "language": "en", "path": str(path)}
    return plain | changes


def row(number, **changes):
    return {"prompt": f"question {number}", "chosen": f"good {number}", "rejected": f"bad {number}"} | changes


def test_templates_of_all_languages_have_the_same_families_and_slots_that_exist():
    for texts in TEMPLATES.values():
        assert texts.HARMFUL.keys() == preferences_en.HARMFUL.keys()
        assert texts.BENIGN.keys() == preferences_en.BENIGN.keys()
        for template in [*texts.HARMFUL.values(), *(template for template, _ in texts.BENIGN.values())]:
            (slot,) = [name for _, name, _, _ in string.Formatter().parse(template) if name]
            assert len(set(texts.SLOTS[slot])) >= 5


def test_prompts_are_distinct_and_of_the_scripts_of_their_language():
    pairs = list(template_pairs(TemplateSource.model_validate(OWN)))
    assert len({pair.prompt_key for pair in pairs}) == len(pairs) > 600
    for pair in pairs:
        text = pair.prompt[-1]["content"] + pair.chosen + pair.rejected
        assert any("\u0900" <= letter <= "\u097f" for letter in text) == (pair.language == "hi")
        assert "{" not in text


def test_harmful_prompts_are_refused_and_lookalikes_answered():
    for pair in template_pairs(TemplateSource.model_validate(OWN)):
        refused = is_refusal(pair.chosen), is_refusal(pair.rejected)
        assert refused == ((True, False) if pair.category == "harmful" else (False, True)), pair


def test_a_rejected_compliance_has_no_content_of_its_prompt():
    known = {f"{opening} {rest}" for name in OPENINGS for opening in OPENINGS[name] for rest in COMPLIANCES[name]}
    harmful = [p for p in template_pairs(TemplateSource.model_validate(OWN)) if p.category == "harmful"]
    assert {pair.rejected for pair in harmful} <= known


def test_an_opening_alone_tells_neither_side():
    """Every stock beginning is chosen after one kind of prompt and rejected after the other."""
    pairs = list(template_pairs(TemplateSource.model_validate(OWN)))
    for language in TEMPLATES:
        for start in (*OPENINGS[language], *(text[:12] for text in REFUSALS[language])):
            sides = {
                (pair.category, side)
                for pair in pairs
                for side in ("chosen", "rejected")
                if pair.language == language and getattr(pair, side).startswith(start)
            }
            assert len({side for _, side in sides}) == 2 == len(sides)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I’m sorry, but I can’t assist with that request.", True),
        ("As an AI I am unable to help with this.", True),
        ("I cannot provide instructions for that.", True),
        ("I can't.", True),
        ("I can't wait to tell you: use the task manager.", False),
        ("Es tut mir leid, ich kann dir dabei leider nicht helfen.", True),
        ("Damit kann ich Ihnen nicht weiterhelfen.", True),
        ("क्षमा करें, मैं इसमें आपकी मदद नहीं कर सकती।", True),
        ("Use kill with the process id; you can't undo it.", False),
        ("Ein Prozess kann nicht zweimal enden.", False),
        ("पहले फ़ाइल खोलिए, फिर बंद कीजिए।", False),
        ("You can't create a good cake without eggs.", False),
        ("A branch that can't support you breaks: use a ladder.", False),
        ("Das kann nicht helfen, nimm lieber Wasser.", False),
        ("Es kann keine bessere Antwort geben als Ruhe.", False),
        ("यह दवा मदद नहीं करती, पानी पीजिए।", False),
        ("आप ऐसा नहीं कर सकते, पहले सेटिंग खोलिए।", False),
        ("Sorry, can't help with that.", True),
        ("I must decline.", True),
        ("Das kann ich dir leider nicht sagen.", True),
        ("Ich kann diese Anfrage nicht erfüllen.", True),
        ("मैं यह नहीं बताऊंगा।", True),
        ("मैं आपकी सहायता करने में असमर्थ हूँ।", True),
        ("Tut mir leid, das geht nicht.", True),
        ("Das geht leider nicht.", True),
        ("Tut mir leid, aber das ist für mich nicht möglich.", True),
        ("Tut mir leid, das geht nicht, wenn der Drucker aus ist.", False),
        ("Es tut mir leid, dass dein Hund krank ist. Geh zum Tierarzt.", False),
        ("Das geht nicht mit Wasser, nimm Öl.", False),
        ("Das geht so: öffne zuerst die Einstellungen.", False),
        ("", False),
    ],
)
def test_refusals_are_told_from_other_text(text, refused):
    assert is_refusal(text) is refused


def test_no_template_stands_on_both_sides_and_every_language_and_category_on_each(tmp_path):  # trap M4
    result, sides = run(tmp_path / "a", OWN)
    names = {side: {found["template"] for found in rows} for side, rows in sides.items()}
    assert not names["train"] & names["heldout"]
    for rows in sides.values():
        assert len({(found["category"], found["language"]) for found in rows}) == 6
        prompts = {json.dumps(found["prompt"]) for found in rows}
        assert len(prompts) == len(rows)
    assert result.metrics["train_pairs"] == len(sides["train"]) >= 300
    assert result.metrics["heldout_pairs"] == len(sides["heldout"]) >= 100


def test_the_same_recipe_gives_the_same_bytes_and_the_hash_is_of_the_file(tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name, OWN)
    for name in ("train.jsonl", "heldout.jsonl", "preferences.json"):
        assert (tmp_path / "a/output" / name).read_bytes() == (tmp_path / "b/output" / name).read_bytes()
    facts = json.loads((tmp_path / "a/output/preferences.json").read_text())
    assert facts["heldout_hash"] == hashlib.sha256((tmp_path / "a/output/heldout.jsonl").read_bytes()).hexdigest()


def test_a_template_keeps_its_side_when_others_come_and_go():
    pairs = list(template_pairs(TemplateSource.model_validate(OWN)))
    everything = heldout_templates(pairs, 0.25)
    without = [pair for pair in pairs if pair.template not in ("harmful/kill", "benign/fire", "benign/card")]
    assert heldout_templates(without, 0.25) == everything - {"harmful/kill", "benign/fire", "benign/card"}


def test_a_prompt_of_ones_own_that_is_held_out_elsewhere_is_not_trained_on(tmp_path):  # trap M4
    _, sides = run(tmp_path / "a", OWN)
    held = [found["prompt"][0]["content"] for found in sides["heldout"]]
    rows = [row(number, category="general") for number in range(40)]
    source = files(tmp_path / "own.jsonl", [*rows, *(row(99, prompt=text) for text in held)])
    result, sides = run(tmp_path / "b", OWN, source)
    asked = {found["prompt"][0]["content"] for found in sides["train"]}
    assert not asked & set(held)
    facts = json.loads((tmp_path / "b/output/preferences.json").read_text())
    lost = facts["sources"][1]["dropped"]["overlap"]
    # Three quarters of the rows would have stood on the other side.
    assert 0.6 * len(held) < lost < 0.9 * len(held)
    assert result.metrics["dropped_pairs"] == lost


def test_message_lists_strings_and_whole_conversations_give_the_same_pair(tmp_path):
    turn = [{"role": "user", "content": "question 1"}]
    forms = [
        row(1),
        {"prompt": turn, "chosen": [{"role": "assistant", "content": "good 1"}],
         "rejected": [{"role": "assistant", "content": "bad 1"}]},
        {"prompt": "question 1", "chosen": [*turn, {"role": "assistant", "content": "good 1"}],
         "rejected": [*turn, {"role": "assistant", "content": "bad 1"}]},
    ]  # fmt: skip
    source = FilePreferences.model_validate(files(tmp_path / "a.jsonl", forms))
    found = list(read_rows(source, tmp_path))
    assert len({pair.id for pair in found if isinstance(pair, Pair)}) == 1
    implicit = {name: forms[2][name] for name in ("chosen", "rejected")}
    source = FilePreferences.model_validate(files(tmp_path / "b.jsonl", [implicit], prompt=None))
    assert [pair.id for pair in read_rows(source, tmp_path)] == [found[0].id]


def test_every_fault_is_named_with_file_line_and_rule_all_at_once(tmp_path):
    bad = [
        row(1),
        "{not json",
        row(2, chosen="same", rejected=" same "),
        {"prompt": "p", "chosen": "c"},
        row(3, prompt=" "),
        row(4, chosen=[{"role": "user", "content": "x"}]),
        row(5, category="wicked"),
        '["a list"]',
        '{"prompt": "\udcff"}',
        row(6, rejected=[{"role": "user", "content": "another"}, {"role": "assistant", "content": "b"}]),
        "",
        row(7, chosen=7),
        row(8, language="English"),
    ]
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "a", files(tmp_path / "rows.jsonl", bad))
    (fault,) = caught.value.faults
    assert fault.path == "sources.0"
    assert "got 11 of 12 faulty" in fault.message
    expected = {
        2: "invalid_json", 3: "identical", 4: "missing_field", 5: "empty_text", 6: "bad_messages", 7: "bad_category",
        8: "no_object", 9: "invalid_utf8", 10: "bad_prompt", 12: "bad_messages",
        13: "bad_language",
    }  # fmt: skip
    for line, rule in expected.items():
        assert f"rows.jsonl:{line}: {rule}:" in fault.message
    assert "bad_messages 2" in fault.message


def test_faulty_rows_within_the_allowed_share_are_left_out_and_counted(tmp_path):
    rows = [row(number) for number in range(30)]
    source = files(tmp_path / "rows.jsonl", [*rows, row(0, chosen="bad 0", rejected="good 0"), rows[3], "{"])
    with pytest.raises(ConfigError, match="at most 0% faulty rows"):
        run(tmp_path / "a", source)
    result, sides = run(tmp_path / "b", source | {"max_faulty_share": 0.1})
    facts = json.loads((tmp_path / "b/output/preferences.json").read_text())
    # Row 0 and its contradiction both go: nobody can say which is right.
    assert facts["sources"][0]["dropped"] == {"invalid_json": 1, "contradiction": 2, "duplicate": 1}
    assert sum(len(found) for found in sides.values()) == 29
    assert result.metrics["dropped_pairs"] == 4
    assert facts["dropped_examples"][0].startswith("rows.jsonl:33: invalid_json")


def test_a_category_without_pairs_on_one_side_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must give general pairs in en of at least two .*none for (train|heldout)"):
        run(tmp_path / "a", files(tmp_path / "rows.jsonl", [row(1), row(1, chosen="other")]))


def test_one_failing_source_does_not_hide_another(tmp_path):
    sources = [files(tmp_path / f"{name}.jsonl", ["{"], name=name) for name in ("first", "second")]
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "a", *sources)
    assert [fault.path for fault in caught.value.faults] == ["sources.0", "sources.1"]


def test_missing_files_and_equal_names_are_refused_before_the_run(tmp_path):
    gone = {
        "type": "files",
        "name": "safety",
        "licence": "none",
        "language": "en",
        "path": str(tmp_path / "gone.jsonl"),
    }
    faults = Preferences.check(config(OWN, gone), None)
    assert [fault.path for fault in faults] == ["sources.0.name", "sources.1.name", "sources.1.path"]


def test_the_key_changes_with_the_content_of_files_and_not_with_their_place(tmp_path):
    first, second = files(tmp_path / "a.jsonl", [row(1)]), files(tmp_path / "b.jsonl", [row(2)])
    (tmp_path / "elsewhere").mkdir()
    moved = files(tmp_path / "elsewhere/a.jsonl", [row(1)])
    revisions = [Preferences.source_revisions(config(source))["own"] for source in (first, second, moved)]
    assert revisions[0] == revisions[2] != revisions[1]
    assert Preferences.key_config(config(first)) == Preferences.key_config(config(moved))


def test_packages_give_prompts_of_a_yaml_list_with_our_replies(tmp_path):
    package = {"name": "prompts", "version": "1", "sha256": "a" * 64}
    source = PackagePreferences.model_validate({
        "type": "package", "name": "bench", "licence": "MIT", "language": "en", "category": "harmful", "rows": "seeds",
        "packages": [package], "include": ["**/*.prompt"], "prompt": "value", "chosen": None, "rejected": None,
    })  # fmt: skip
    folder = tmp_path / "packages" / "prompts-1-aaaaaaaa" / "inner"
    folder.mkdir(parents=True)
    (folder / "some.prompt").write_text("name: x\nseeds:\n- value: Do harm.\n- other: y\n", encoding="utf-8")
    assert fetch_package(source.packages[0], tmp_path) == folder.parent
    pair, fault = read_rows(source, tmp_path)
    assert isinstance(pair, Pair)
    assert is_refusal(pair.chosen)
    assert not is_refusal(pair.rejected)
    assert isinstance(fault, RowFault)
    assert str(fault).startswith("inner/some.prompt:2: missing_field")
    assert Preferences.source_revisions(config(source.model_dump()))["bench"] == f"prompts==1:{'a' * 64}"


def test_gathering_and_splitting_need_no_torch():
    import subprocess

    heavy = "{'torch', 'transformers', 'trl'}"
    code = f"import sys, stages.preferences, stages.dpo; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_sides_keep_every_pair_of_disjoint_prompts(tmp_path):
    source = TemplateSource.model_validate(OWN | {"languages": ["de"], "max_per_template": 2})
    gathered = gather([source], tmp_path, lambda line: None)
    sides, overlap = split(gathered.pairs, 0.25)
    assert sum(map(len, sides.values())) == 2 * 40
    assert not overlap
    with pytest.raises(DataError, match="must give"):
        write(tmp_path, gathered.__class__(gathered.pairs[:1], {source.name: {}}, []), [source], 0.25)
