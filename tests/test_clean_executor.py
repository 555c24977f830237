"""Cleaning through a cluster's queue: the script that is submitted, the same corpus, and what goes wrong."""

import os
import re
import stat
import sys
from pathlib import Path

import pytest
from clean_cases import clean, invented, source, write_rows
from test_clean import digests

from stages.base import ConfigError
from stages.clean import Clean

ROOT = Path(__file__).resolve().parent.parent
SBATCH = """#!/bin/bash
# Runs the array's jobs one after another, and prints the id of the job as sbatch does.
script="${@: -1}"
cp "$script" "$QUEUE/$(ls "$QUEUE" | wc -l).slurm"
for option in "$@"; do [[ $option == --export=* ]] && export "${option##*,}"; done
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node1 bash "$script" > "$QUEUE/../out-$task.txt" 2>&1 || exit 1
done
echo "Submitted batch job 4711"
"""
TOOLS = {
    "sbatch": SBATCH,
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho node1\n",
    "scancel": '#!/bin/bash\necho "$*" >> "$QUEUE/../cancelled"\n',
}
SLURM = {"kind": "slurm", "partition": "cpu", "time_hours": 3, "qos": "low", "setup": "export SEEN=1",
         "options": {"account": "lab"}, "tasks_per_job": 2, "max_array_size": 1}  # fmt: skip


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    """A folder of tools that stand in for a cluster's; what is submitted is kept in the folder returned."""
    tools, kept = tmp_path / "tools", tmp_path / "queue"
    tools.mkdir()
    kept.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(kept))
    return kept


def tales(folder: Path) -> dict:
    write_rows(folder / "a.jsonl", [*invented(12), invented(12)[3]])
    return source(folder)


def test_a_recipe_gives_the_same_corpus_through_the_queue(tmp_path, queue):
    fields = {"dedup": {"near": False}}
    here = clean(tmp_path / "here", tales(tmp_path / "in"), **fields)
    there = clean(tmp_path / "there", tales(tmp_path / "in"), executor=SLURM, **fields)
    assert digests(there) == digests(here)
    scripts = [path.read_text() for path in sorted(queue.glob("*.slurm"))]
    assert len(scripts) == 3  # filter, exact_find, exact_filter
    lines = scripts[0].splitlines()
    assert {
        "#SBATCH --partition=cpu", "#SBATCH --time=3:00:00", "#SBATCH --mem-per-cpu=4G", "#SBATCH --cpus-per-task=1",
        "#SBATCH --array=0-0", "#SBATCH --account=lab", "#SBATCH --qos=low", "#SBATCH --wait",
        "#SBATCH --job-name=pedigree-filter-there",
    } <= set(lines)  # fmt: skip
    (paths,) = [line for line in lines if "export PATH=" in line]
    assert paths == f"export SEEN=1; export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}"
    assert re.search(r"srun .*launch_pickled_pipeline \S+/logs/filter/executor\.pik$", lines[-1])


def test_a_job_that_fails_is_one_clear_line_and_the_next_run_goes_on(tmp_path, queue):
    arguments = {"executor": SLURM, "dedup": {"near": False}}
    (queue.parent / "tools/srun").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(
        ConfigError, match=r"executor: must finish the step filter; 1 of 1 tasks did not: see \S+/filter"
    ):
        clean(tmp_path / "run", tales(tmp_path / "in"), **arguments)
    assert len(list(queue.glob("*.slurm"))) == 1


def test_an_interrupted_wait_cancels_the_job(tmp_path, queue, monkeypatch):
    from data import clean_executor

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(clean_executor.SlurmPipelineExecutor, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clean(tmp_path / "run", tales(tmp_path / "in"), executor=SLURM)
    assert (tmp_path / "cancelled").read_text() == "--name=pedigree-filter-run\n"


def test_a_queue_is_not_used_from_inside_an_array_job(tmp_path, queue, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(ConfigError, match="must not be slurm inside an array job"):
        clean(tmp_path / "run", tales(tmp_path / "in"), executor=SLURM)


def test_slurm_is_refused_before_a_run_where_there_is_no_queue(tmp_path, monkeypatch):
    config = Clean.Config.model_validate({"kind": "clean", "sources": [tales(tmp_path / "in")], "executor": SLURM})
    monkeypatch.setenv("PATH", str(tmp_path))
    (fault,) = Clean.check_reach(config)
    assert str(fault).startswith("executor.kind: must be local or ray where there is no sbatch; got slurm")
    assert Clean.check(config, None) == [], "a plan may be made anywhere"


def test_ray_is_refused_where_it_is_not_installed(tmp_path, monkeypatch):
    import importlib.util

    config = Clean.Config.model_validate(
        {"kind": "clean", "sources": [tales(tmp_path / "in")], "executor": {"kind": "ray"}}
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (fault,) = Clean.check(config, None)
    assert (fault.path, "pip install ray" in fault.message) == ("executor.kind", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert Clean.check(config, None) == []


def test_where_it_runs_does_not_enter_the_key(tmp_path):
    keys = []
    for executor in (SLURM, {"kind": "ray"}, {"kind": "local"}):
        fields = {"kind": "clean", "sources": [tales(tmp_path / "in")], "executor": executor}
        keys.append(Clean.key_config(Clean.Config.model_validate(fields)))
    assert keys[0] == keys[1] == keys[2]
