"""What differs between two ancestries, by stage and on one screen; what verify holds against raw data and code."""

import json
import shutil

import pytest
from fake_chain import RECIPE, STAGES, write_recipe
from tracked_run import sealed, tracker_in

from pipelines.lineage import main
from pipelines.lineage_diff import ITEMS, pair_up
from pipelines.lineage_read import family, read_node
from pipelines.run import main as run
from stages.clean import Clean
from stages.runtime import code
from stages.runtime.artifact import canonical_digest


@pytest.fixture
def make(tmp_path):
    """Run a stage of the toy recipe after its ancestors; gives the artifact directory."""

    def made(stage, *overrides, text=RECIPE):
        settings = [word for override in overrides for word in ("--set", override)]
        argv = ["--pipeline", str(write_recipe(tmp_path, text)), "--runs", str(tmp_path / "runs"), *settings]
        before = {path.parent for path in tmp_path.glob("runs/toy/*/stage.json")}
        for name in ("gather", "train", "tuned"):
            assert run(["--stage", name, *argv], STAGES) == 0
            if name == stage:
                break
        after = {path.parent for path in tmp_path.glob("runs/toy/*/stage.json")}
        return next(iter(path for path in after - before if path.name.startswith(f"{stage}-")), None)

    return made


def told(capsys, *argv):
    capsys.readouterr()
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def below(lines, heading):
    """Category to its items under the line that begins with ``heading``."""
    found, name = {}, ""
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        name = line[2:11].strip() or name
        found.setdefault(name, []).append(line[12:])
    return found


def test_a_variant_differs_in_its_own_fields_and_shares_what_is_the_same(make, capsys):
    one, other = make("train"), make("train", "train.lr=0.5", "train.micro_batch_size=2")
    exit_code, lines, _ = told(capsys, "diff", one, other)
    assert exit_code == 0
    assert lines[:2] == [f"A  toy/{one.name}", f"B  toy/{other.name}"]
    assert lines[2].startswith("one and the same in both: gather-")
    assert below(lines, f"{one.name} -> {other.name}  same output") == {
        "config": ["lr 2e-4 -> 0.5"],
        "operation": ["micro_batch_size 1 -> 2"],
        "same": ["data, code, seed"],
    }


def test_a_difference_far_up_is_named_where_it_began_and_where_it_came_in(make, capsys):
    one = make("tuned")
    other = make("tuned", text=RECIPE.replace("seed: 17", "seed: 18").replace("text: hello", "text: other"))
    _, lines, _ = told(capsys, "diff", one, other)
    gathered = below(lines, "gather-")
    assert gathered["config"] == ["sources.0.text hello -> other"]
    assert gathered["seed"] == ["seed 17 -> 18"]
    tuned = below(lines, f"{one.name} -> ")
    assert tuned["seed"] == ["seed 17 -> 18"]
    assert any(item.startswith("input data gather-") for item in tuned["data"])
    assert "config" in tuned["same"][0]
    assert [line for line in lines if line.startswith("only in")] == []
    assert len(lines) <= 40, "one screen"


def test_what_one_of_the_two_lacks_is_said(make, capsys):
    train = make("train")
    tuned = make("tuned")
    _, lines, _ = told(capsys, "diff", train, tuned)
    shared = next(line for line in lines if line.startswith("one and the same"))
    assert train.name in shared, "train is an ancestor of tuned"
    assert [line.split()[:4] for line in lines if line.startswith("only")] == [["only", "in", "B:", tuned.name]]


def test_an_artifact_does_not_differ_from_itself(make):
    tuned = make("tuned")
    pairing = pair_up(tuned, tuned)
    assert (pairing.pairs, pairing.only_a, pairing.only_b) == ([], [], [])
    assert {node.name for node in pairing.same} == {node.name for node in family(tuned)}


def test_the_record_of_a_run_gives_the_edges_that_a_lost_lineage_json_had(make):
    tuned = make("tuned")
    before = read_node(tuned).edges
    (tuned / "lineage.json").unlink()
    after = read_node(tuned)
    assert after.edges_fault.startswith(f"{tuned}/lineage.json is missing")
    assert len(before) == 2
    assert {(edge.name, edge.digest, edge.directory) for edge in after.edges} == {
        (edge.name, edge.digest, edge.directory) for edge in before
    }


def test_stages_of_one_kind_under_two_names_are_a_pair(tmp_path):
    made = [variant(tmp_path, "dpo", lr=0.1), variant(tmp_path, "dpo-ipo", lr=0.2)]
    pairing = pair_up(*made)
    assert [(one.stage, other.stage) for one, other in pairing.pairs] == [("dpo", "dpo-ipo")]


def variant(root, stage, kind="dpo", state="done", sources=None, config=None, **facts):
    """A finished artifact with the record that the lifecycle writes, of whatever kind."""
    identity = {"kind": kind, "code_version": 1, "config": facts, "model": None, "seed": 17, "sources": sources or {}}
    key = canonical_digest(identity | {"parents": {}})
    directory = root / "demo" / f"{stage}-{key[:8]}"
    digest = sealed(directory / "output", content=stage.encode())
    tracker = tracker_in(directory, stage=stage, kind=kind, key=key)
    tracker.finish("done")
    record = {
        "format": 1, "state": state, "stage": stage, "kind": kind, "key": key, "output_digest": digest, "seed": 17,
        "identity": identity | {"parents": {}}, "config": config or facts, "extension": {}, "sources": sources or {},
        "code_version": 1, "git": {"commit": "a" * 40, "dirty": True}, "versions": {"torch": "2.13.0"},
        "code_digest": code.write_code(directory), "parents": {},
    }  # fmt: skip
    (directory / "stage.json").write_text(json.dumps(record))
    return directory


def amend(directory, **changes):
    record = json.loads((directory / "stage.json").read_text())
    (directory / "stage.json").write_text(json.dumps(record | changes))


def test_changed_code_is_named_file_by_file(tmp_path, capsys):
    one, other = variant(tmp_path, "a", lr=0.1), variant(tmp_path, "b", lr=0.1)
    files = code.read_code(other)
    changed = {**files, "model/lm.py": "0" * 64, "data/new.py": "1" * 64}
    (other / code.CODE_FILE).write_text(json.dumps(changed))
    amend(other, code_digest=code.code_digest(changed), git={"commit": "b" * 40, "dirty": False})
    _, lines, _ = told(capsys, "diff", one, other)
    assert below(lines, one.name)["code"] == [
        "commit aaaaaaaaaaaa and changes -> bbbbbbbbbbbb",
        "2 files: data/new.py, model/lm.py",
    ]


def test_sources_software_and_overridden_gates_are_told_apart(tmp_path, capsys):
    one = variant(tmp_path, "a", kind="clean", sources={"wiki": "p==1:aa q==1:bb", "gone": "x"})
    other = variant(tmp_path, "b", kind="clean", sources={"wiki": "p==2:cc q==1:bb", "come": "y"})
    gate = {"stage": "eval", "metric": "bpb/de", "said": "0.2 worse", "at": "2026-01-01"}
    amend(other, versions={"torch": "2.11.0"}, overridden_gates=[gate], world_size=2)
    _, lines, _ = told(capsys, "diff", one, other)
    found = below(lines, one.name)
    assert found["data"] == ["source come added", "source gone removed", "source wiki p==1:aa -> p==2:cc"]
    assert found["software"] == ["torch 2.13.0 -> 2.11.0"]
    assert found["machine"] == ["ranks none -> 2"]
    assert "eval bpb/de" in found["gates"][0]
    assert "seed" in found["same"][0]
    _, shown, _ = told(capsys, "show", other)
    assert "  gate overridden: eval bpb/de: 0.2 worse (2026-01-01)" in shown


def test_outputs_that_differ_though_nothing_else_does_are_pointed_out(tmp_path, capsys):
    one = variant(tmp_path / "one", "a", lr=0.1)
    other = variant(tmp_path / "two", "a", lr=0.1)
    assert "the outputs do" not in "".join(told(capsys, "diff", one, other)[1])
    shutil.rmtree(other / "output")
    sealed(other / "output", content=b"another")
    assert "nothing that is recorded differs, and yet the outputs do" in "".join(told(capsys, "diff", one, other)[1])


def test_a_screen_holds_a_few_items_of_a_category_and_all_on_request(tmp_path, capsys):
    fields = {f"f{number}": number for number in range(ITEMS + 5)}
    one = variant(tmp_path, "a", **fields)
    other = variant(tmp_path, "b", **{name: value + 1 for name, value in fields.items()})
    short = below(told(capsys, "diff", one, other)[1], one.name)["config"]
    assert short[:2] == ["f0 0 -> 1", "f1 1 -> 2"]
    assert short[-1] == "and 5 more: --all shows them"
    assert len(below(told(capsys, "diff", one, other, "--all")[1], one.name)["config"]) == ITEMS + 5


def test_an_unknown_side_is_named_and_an_exact_stage_name_preferred(tmp_path, capsys):
    variant(tmp_path, "dpo", lr=0.1)
    variant(tmp_path, "dpo-ipo", lr=0.2)
    assert told(capsys, "--runs", tmp_path, "diff", "dpo", "dpo-ipo")[0] == 0
    exit_code, _, refusal = told(capsys, "--runs", tmp_path, "diff", "dpo", "nothing")
    assert exit_code == 2
    assert refusal.startswith("B: must name one artifact directory; got 'nothing'")


def test_show_names_code_seed_and_each_pin_of_a_source(tmp_path, capsys):
    directory = variant(tmp_path, "clean", kind="clean", sources={"wiki": "p==1:aa q==1:bb"})
    _, lines, _ = told(capsys, "show", directory)
    digest = json.loads((directory / "stage.json").read_text())["code_digest"]
    assert lines[1:] == [
        f"  code aaaaaaaaaaaa (changed)  version 1  files {digest[:12]}  torch 2.13.0  seed 17",
        "  source wiki  p==1:aa",
        "  source wiki  q==1:bb",
    ]


def test_every_artifact_lists_the_code_that_made_it(make):
    directory = make("gather")
    files = code.read_code(directory)
    assert files == code.code_files()
    assert {
        "pipelines/run.py",
        "stages/base.py",
        "model/lm.py",
        "data/chat.py",
        "ds_configs/zero1.json",
    } <= files.keys()
    assert read_node(directory).record["code_digest"] == code.code_digest(files)


def test_verify_notes_code_that_moved_on_and_refuses_a_list_that_was_touched(tmp_path, capsys):
    directory = variant(tmp_path, "a", lr=0.1)
    assert told(capsys, "verify", directory)[0] == 0
    files = code.read_code(directory) | {"model/lm.py": "0" * 64}
    (directory / code.CODE_FILE).write_text(json.dumps(files))
    exit_code, _, faults = told(capsys, "verify", directory)
    assert exit_code == 1
    assert "code.json must hash to" in faults
    amend(directory, code_digest=code.code_digest(files))
    exit_code, lines, _ = told(capsys, "verify", directory)
    assert exit_code == 0
    (note,) = [line for line in lines if line.startswith("note")]
    assert note.endswith("1 files of the code here are not what made it: model/lm.py")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"seed": 18}, "seed 18 must be the identity's, 17"),
        ({"key": "0" * 64}, "key 000000000000 must be that of its identity"),
        ({"parents": {"from_": {"digest": "f" * 64}}}, "input from_ ffffffffffff, lineage.json has no such edge"),
    ],
)
def test_a_record_that_contradicts_itself_does_not_verify(tmp_path, capsys, change, fault):
    directory = variant(tmp_path, "a", lr=0.1)
    amend(directory, **change)
    exit_code, _, faults = told(capsys, "verify", directory)
    assert exit_code == 1
    assert fault in faults


@pytest.fixture
def own_files(tmp_path):
    """A finished clean artifact whose source is a folder of one's own text."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("the cat sat")
    source = {"type": "files", "name": "own", "language": "en", "licence": "none", "path": str(tmp_path / "text")}
    plain = {"kind": "clean", "sources": [{**source, "include": ["*.txt"], "rules": "none"}]}
    config = Clean.Config.model_validate(plain)
    pins = Clean.source_revisions(config)
    return variant(tmp_path, "clean", kind="clean", sources=pins, config=config.model_dump(mode="json", by_alias=True))


def test_verify_hashes_ones_own_raw_files_again(own_files, tmp_path, capsys):
    assert told(capsys, "verify", own_files)[0] == 0
    (tmp_path / "text" / "one.txt").write_text("the dog sat")
    exit_code, _, faults = told(capsys, "verify", own_files)
    assert exit_code == 1
    assert "source own was" in faults
    assert "what lies there now is" in faults


def test_raw_files_that_are_gone_are_a_note_since_nothing_can_be_held_against_them(own_files, tmp_path, capsys):
    shutil.rmtree(tmp_path / "text")
    exit_code, lines, _ = told(capsys, "verify", own_files)
    assert exit_code == 0
    assert any("its sources cannot be read from here" in line for line in lines)


def test_a_touched_file_of_a_cached_package_is_a_fault_and_an_absent_package_a_note(tmp_path, capsys):
    from data import fetch

    pin = f"p==1:{'a' * 64}"
    directory = variant(tmp_path, "a", kind="unknown", sources={"wiki": pin})
    cached = tmp_path / "cache" / "packages" / "p-1-aaaaaaaa"
    _, lines, _ = told(capsys, "verify", directory, "--cache", tmp_path / "cache")
    assert any(line.startswith("note") and "p==1 is not in" in line for line in lines)
    cached.mkdir(parents=True)
    (cached / "text.json").write_text("raw")
    cached.with_name(cached.name + ".digests").write_text(json.dumps(fetch._digests(cached)))
    assert told(capsys, "verify", directory, "--cache", tmp_path / "cache")[0] == 0
    fetch._checked.clear()
    (cached / "text.json").write_text("RAW")
    exit_code, _, faults = told(capsys, "verify", directory, "--cache", tmp_path / "cache")
    assert exit_code == 1
    assert "text.json first" in faults
