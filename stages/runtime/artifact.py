"""What an artifact says of itself: ``stage.json``, read and replaced atomically, and the facts that go into it.

``stage.json`` is the truth about a stage (TRAPS O1): the launcher's exit code is not. Rank 0 alone writes it.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from model.spec import ModelSpec
from stages.runtime.manifest import sealed_digest, write_atomic
from stages.runtime.scrub import scrub

FORMAT = 1
RECORD = "stage.json"
METRICS = "metrics.jsonl"
ROOT = Path(__file__).resolve().parents[2]

_PACKAGES = ("pedigree-lm", "torch", "deepspeed", "transformers", "tokenizers", "datatrove", "numpy", "wandb")
_NEW_CODE = ("pipelines/*.py", "stages/*.py", "model/*.py", "data/*.py")
"""Patterns of git, in which * crosses folders."""
_TAIL_BYTES = 1 << 16


_COMPARED = (
    "state",
    "stage",
    "kind",
    "key",
    "identity",
    "extension",
    "parents",
    "output_digest",
    "finished",
    "host",
    "pid_started",
)
"""Fields by which later runs know an artifact. A recipe with a secret is refused, so they hold none; what happens to
equal a value of the environment must not break the chain. A record under ``finished`` went through here before."""


class ArtifactError(ValueError):
    """A ``stage.json`` that cannot be read or does not say what it must."""


@dataclass(frozen=True)
class ParentLink:
    """One parent of a job: where its artifact lies, and what its key was when the job's key was made.

    ``lineage`` is what the parent adds to the child's key: its lineage key, or its output digest when it is an artifact
    from outside the recipe. ``stage`` is the parent's name in its own pipeline.
    """

    stage: str
    key: str
    lineage: str
    path: Path


@dataclass(frozen=True)
class Job:
    """One stage of a recipe with all that decides its result; what ``lifecycle.execute`` carries out.

    ``identity`` is the plain data whose hash is ``key``; ``extension`` holds the fields by which a longer run extends
    the same artifact; ``parents`` maps an input's field to the artifact that it names.
    """

    pipeline: str
    name: str
    kind: str
    key: str
    identity: Mapping[str, Any]
    extension: Mapping[str, Any]
    config: BaseModel
    model: ModelSpec | None
    seed: int
    directory: Path
    parents: Mapping[str, ParentLink] = field(default_factory=dict)


def canonical_digest(value: Any) -> str:
    """SHA-256 of ``value`` as canonical JSON: keys sorted, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def lineage_key(key: str, extension: Mapping[str, Any]) -> str:
    """What the run of ``key`` as far as ``extension`` adds to its children's keys."""
    return canonical_digest({"key": key, "extension": dict(extension)})


def now() -> str:
    """This moment in UTC as ISO-8601 with seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def seconds_since(moment: str) -> float:
    """Seconds from an ISO-8601 ``moment`` to now."""
    return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(moment)).total_seconds()


def read_record(directory: Path) -> dict[str, Any] | None:
    """The artifact's ``stage.json``, or None where there is none.

    Raises:
        ArtifactError: when the file is there but is not a record of this format.
    """
    path = directory / RECORD
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; restore it, or delete {directory}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or "state" not in record:
        raise ArtifactError(f"{path} must be a record of format {FORMAT}; delete {directory} to make the stage anew")
    return record


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Replace the artifact's ``stage.json`` durably; a reader sees the old one or the new one, never a part.

    Secrets are taken out of all that is not compared or followed by a later run.
    """
    told = scrub({name: value for name, value in record.items() if name not in _COMPARED})
    text = json.dumps({**record, **told, "updated_at": now()}, indent=1, allow_nan=False, default=str)
    write_atomic(directory / RECORD, f"{text}\n".encode())


def finished_of(record: Mapping[str, Any] | None, directory: Path) -> Mapping[str, Any] | None:
    """The record of the run that made what lies in ``output``; None where that was never finished, or gave way.

    It is ``record`` itself where the state is ``done``. A longer run that extends the artifact keeps it as ``finished``
    until its own output takes the place: it counts as long as the manifest that it names lies there, whenever that run
    was killed.
    """
    if record is None or record["state"] == "done":
        return record
    kept: Mapping[str, Any] | None = record.get("finished")
    return kept if kept is not None and kept["output_digest"] == sealed_digest(directory / "output") else None


def is_done(record: Mapping[str, Any] | None, job: Job) -> bool:
    """Whether exactly this job has been finished and its output is there, though a longer run may be under way."""
    finished = finished_of(record, job.directory)
    return (
        finished is not None
        and finished.get("key") == job.key
        and finished.get("extension") == dict(job.extension)
        and (job.directory / "output").is_dir()
    )


def process_is_alive(record: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote ``record`` still lives; None when it ran on another host."""
    if record.get("host") != socket.gethostname():
        return None
    try:
        return process_started(int(record["pid"])) == record.get("pid_started")
    except (KeyError, TypeError, ValueError):
        return False


def process_started(pid: int) -> str | None:
    """When process ``pid`` started, in the kernel's clock ticks; tells it from a later one of the same number.

    None when there is no such process (a zombie counts as none); where ``/proc`` is absent every living process has the
    same answer.
    """
    try:
        # After the command's name, which may hold spaces and brackets: state is field 3, starttime field 22 (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown" if not Path("/proc/self").exists() and _answers(pid) else None
    return None if fields[0] in "ZX" else fields[19]


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the artifact's sealed checkpoints, ascending."""
    found = (re.fullmatch(r"step-(\d+)", path.parent.name) for path in directory.glob("checkpoints/*/manifest.json"))
    return sorted(int(match[1]) for match in found if match)


def last_events(directory: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each event in the tail of ``metrics.jsonl``; a row cut off by a kill is passed over."""
    path = directory / METRICS
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
            event, step = row["event"], row["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if not (isinstance(event, str) and isinstance(step, int)):
            continue
        if event == "resume":
            # What stood above is of a future that was lost.
            rows = [earlier for earlier in rows if earlier["step"] <= step]
        rows.append(row)
    return {row["event"]: row for row in rows}


def reached_step(directory: Path, record: Mapping[str, Any] | None = None) -> int | None:
    """The step from which the artifact would go on (its newest checkpoint), or its record's, or None."""
    steps = checkpoint_steps(directory)
    return steps[-1] if steps else (record or {}).get("step")


def shown(directory: Path) -> str:
    """The directory as a person at this place would write it: relative when it lies below."""
    here = Path.cwd()
    return str(directory.relative_to(here) if directory.is_relative_to(here) else directory)


def environment() -> dict[str, Any]:
    """Where and on what this process runs: git state, versions, hardware, host, pid; fields of ``stage.json``."""
    return {
        "git": git_state(ROOT),
        "versions": versions(),
        "hardware": hardware(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": process_started(os.getpid()),
    }


def git_state(root: Path) -> dict[str, Any]:
    """Commit and whether the code differs from it; both None where ``root`` is no checkout of its own.

    It differs where a tracked file was changed, or a module lies in our packages that git does not know.
    """
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    # Notes and results beside the program change nothing of it; a new module does.
    added = _output(["git", "-C", str(root), "ls-files", "--others", "--exclude-standard", "--", *_NEW_CODE])
    return {"commit": commit, "dirty": None if changes is None or added is None else bool(changes or added)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, without importing them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, and the names of the GPUs, without torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu_name(), "cores": cores, "memory_bytes": memory_bytes, "gpus": gpu_names()}


def gpu_names() -> list[str]:
    """Names of this machine's NVIDIA GPUs; empty where the driver's tool is absent or finds none."""
    if shutil.which("nvidia-smi") is None:
        return []
    return (_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]) or "").splitlines()


def has_gpu() -> bool:
    """Whether this machine has a GPU that a launcher could use, judged without torch: NVIDIA's or AMD's devices."""
    return bool(gpu_names()) or any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/dxg", "/dev/kfd"))


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _output(command: list[str]) -> str | None:
    """A command's standard output without its last line break, or None when it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
