"""One training run on several ranks against itself on one: the loss curve, a rank killed, and resumes on fewer ranks.

    python benchmarks/agreement.py --ranks 4 --runs /tmp/agreement --data runs --set pretrain.max_steps=200

Runs of the recipe's pretraining stage, each launched by ``deepspeed`` as an operator would: on one rank; on one rank in
other micro-batches, which takes the same sums in another order and so shows how far rounding alone leads; on all ranks;
and one on all ranks of which one is ended by SIGKILL on the way. That one is started again on all ranks, asked to stop,
goes on on half as many, and so on down to one rank, which ends it. Written down: the largest difference of losses from
those of one rank, the seconds from the kill to the launcher's end, the state in ``stage.json``, processes left, and the
steps from which the run went on. ``--data`` holds finished data stages, which are copied.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, provenance, write_result

POLL_S = 0.05


class Run:
    """One folder of runs and the launches in it."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.arguments, self.name = arguments, name
        self.folder = arguments.runs / name
        if arguments.data is not None and not self.folder.exists():
            shutil.copytree(arguments.data, self.folder)
        self.log = arguments.runs / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)

    @property
    def artifact(self) -> Path | None:
        """The stage's folder, once there is one."""
        found = sorted(self.folder.glob("*/pretrain-*/stage.json"))
        return found[0].parent if found else None

    def record(self) -> dict[str, Any]:
        """``stage.json``, empty before there is one."""
        return json.loads((self.artifact / "stage.json").read_text()) if self.artifact else {}

    def losses(self) -> dict[int, float]:
        """Loss a token by step; what a later attempt logged counts."""
        return {row["step"]: row["loss_nats_per_token"] for row in self.rows() if "loss_nats_per_token" in row}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of training steps."""
        path = self.artifact / "metrics.jsonl" if self.artifact else None
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row for row in rows if row.get("event") == "train"]

    def step(self) -> int:
        """The last step that was logged."""
        return max((row["step"] for row in self.rows()), default=0)

    def start(self, ranks: int, device: int | None = None, *changes: str) -> subprocess.Popen[bytes]:
        """Launch the stage on so many ranks, as an operator would; ``device`` is one GPU, where there are any."""
        alone = device is not None and has_gpu()
        where = ["--include", f"localhost:{device}"] if alone else ["--num_gpus", str(ranks)]
        port = ["--master_port", str(29600 + os.getpid() % 300 + ranks + 20 * len(self.name))]
        script, folder = str(ROOT / "pipelines" / "run.py"), ["--runs", str(self.folder)]
        command = [sys.executable, "-m", "deepspeed.launcher.runner", *where, *port, script, "--stage", "pretrain"]
        if self.name == "all":
            command = [sys.executable, script, "--all", "--until", "pretrain", "--num_gpus", str(ranks)]
        command += folder
        if self.arguments.pipeline is not None:
            command += ["--pipeline", str(self.arguments.pipeline)]
        for change in (
            "pretrain.log_every_steps=1",
            "pretrain.checkpoint_every_steps=20",
            *self.arguments.changes,
            *changes,
        ):
            command += ["--set", change]
        environment = os.environ | ({} if has_gpu() else {"DS_ACCELERATOR": "cpu"})
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        # One that is left when this program breaks is asked to stop.
        atexit.register(process.terminate)
        return process


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--pipeline", type=Path, help="recipe; the default one without it")
    parser.add_argument("--runs", type=Path, required=True, help="empty folder for the runs")
    parser.add_argument("--data", type=Path, help="folder of runs whose data stages are finished")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="STAGE.FIELD=VALUE")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one launch")
    parser.add_argument("--commit", help="commit of the tree, where it is no checkout")
    parser.add_argument("--result", type=Path, default=RESULTS / "agreement.json")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    origin = provenance(arguments.commit)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        write_result(arguments.result, [one | origin for one in rows], {"ranks": arguments.ranks})

    alone, control, together = (Run(name, arguments) for name in ("alone", "control", "together"))
    # Side by side: nothing is timed here.
    started = [
        alone.start(1, 0),
        control.start(1, 1, "pretrain.micro_batch_size=1"),
        together.start(arguments.ranks),
    ]
    codes = [process.wait(arguments.timeout) for process in started]
    add({"what": "1 rank, sums in another order (micro-batches of 1)", **differences(control, alone)})
    add({"what": f"{arguments.ranks} ranks", "exit_codes": codes, **differences(together, alone)})
    # By ``--all``, which launches by itself; then by the launcher, and from there on.
    add({"launched_by": "run.py --all"} | killed(Run("all", arguments), arguments.ranks))
    broken = Run("broken", arguments)
    add({"launched_by": "deepspeed"} | killed(broken, arguments.ranks))
    for row in handed_down(broken, arguments.ranks):
        add(row)
    add({"what": "killed, then on fewer and fewer ranks", **differences(broken, alone)})
    good = not any(codes) and all(row.get("largest_difference", 0) is not None for row in rows)
    return 0 if good and broken.record().get("state") == "done" else 1


def differences(run: Run, reference: Run) -> dict[str, Any]:
    """The largest difference of losses, absolute and by step; None where the runs have not the same steps."""
    mine, theirs = run.losses(), reference.losses()
    if not mine or set(mine) != set(theirs):
        return {"largest_difference": None, "steps": len(mine), "steps_expected": len(theirs)}
    apart = {step: abs(mine[step] - theirs[step]) for step in mine}
    worst = max(apart, key=lambda step: apart[step])
    return {
        "largest_difference": apart[worst],
        "at_step": worst,
        "by_fifties": [max(apart[step] for step in apart if step <= end) for end in range(50, len(apart) + 1, 50)],
        "steps": len(mine),
        "last_loss": mine[max(mine)],
        "last_loss_expected": theirs[max(theirs)],
    }


def killed(run: Run, ranks: int) -> dict[str, Any]:
    """Start on ``ranks``, end the last one by SIGKILL on the way, and see what becomes of the rest."""
    process = run.start(ranks)
    if not wait_for(process, lambda: run.step() >= 30):
        return {"what": f"SIGKILL of rank {ranks - 1} of {ranks}", "error": f"ended before step 30: see {run.log}"}
    victims = members(process.pid, ranks)
    os.kill(victims[-1], signal.SIGKILL)
    at = time.monotonic()
    code = process.wait(run.arguments.timeout)
    seconds = time.monotonic() - at
    left = [pid for pid in victims if is_alive(pid)]
    record = run.record()
    return {
        "what": f"SIGKILL of rank {ranks - 1} of {ranks}",
        "seen_at_step": run.step(),
        "seconds_to_the_end": round(seconds, 1),
        "launcher_code": code,
        "state": record.get("state"),
        "error": str(record.get("error"))[:200],
        "processes_left": len(left),
    }


def handed_down(run: Run, ranks: int) -> list[dict[str, Any]]:
    """Go on on ``ranks``, half as many, and so on to one, stopping each but the last after some steps."""
    found = []
    while True:
        before = run.step()
        process = run.start(ranks)
        if ranks > 1:
            wait_for(process, functools.partial(has_run_on, run, before + 30))
            if run.artifact is not None:
                (run.artifact / "STOP").touch()
        code = process.wait(run.arguments.timeout)
        record = run.record()
        resumed = [line for line in run.log.read_text(errors="replace").splitlines() if "resumed from" in line]
        row = {"what": f"goes on on {ranks}", "exit_code": code, "state": record.get("state"), "step": run.step()}
        found.append(row | {"said": resumed[-1].strip() if resumed else None})
        if ranks == 1:
            return found
        ranks //= 2


def has_run_on(run: Run, step: int) -> bool:
    return run.step() >= step and run.record().get("state") == "running"


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> bool:
    """Poll until ``condition`` holds; False where the process ended first."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(POLL_S)
    return False


def members(launcher: int, ranks: int) -> list[int]:
    """The processes of the ranks below ``launcher``, by rank."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        facts = dict(word.partition(b"=")[::2] for word in words)
        if b"--local_rank=" in command and b"RANK" in facts and is_below(int(folder.name), launcher):
            # What a rank forks looks like it, and is younger.
            rank, pid = int(facts[b"RANK"]), int(folder.name)
            found[rank] = min(pid, found.get(rank, pid))
    assert len(found) >= ranks, f"{ranks} ranks must be running; found {found}"
    return [found[rank] for rank in range(ranks)]


def is_below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def has_gpu() -> bool:
    from stages.runtime.artifact import has_gpu as found

    return found()


if __name__ == "__main__":
    raise SystemExit(main())
