"""The W&B copy of ``metrics.jsonl``: one run a stage, and a failure of it never touches the training (TRAPS O5, O6).

W&B is imported when a mirror is opened and not before. Every call to it passes ``WandbMirror._try``: the first
failure is said once and ends the mirror, while the journal goes on; ``sync`` brings the rest to W&B later. What W&B
would record of itself (code, git diff, argv, requirements, console) is switched off; what it is given was scrubbed.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import logging
import netrc
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from stages.base import EXIT_DONE, EXIT_FAILED, EXIT_SAVED, StopRequested
from stages.runtime.manifest import MANIFEST

Mode = Literal["auto", "online", "offline", "disabled"]
EXIT_CODES = {"done": EXIT_DONE, "saved": EXIT_SAVED, "failed": EXIT_FAILED}
CHECKPOINT = "checkpoint"
"""Type of the artifacts that hold engine state."""
ROW = "journal/row"
"""The line of ``metrics.jsonl`` that a W&B row copies: W&B's summary then knows how far the copy reaches."""
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 15.0
"""Shorter than the 30 s that the launcher grants between SIGTERM and SIGKILL."""
MAX_NAME = 128

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """Who a W&B run is: stable over restarts, so that every fragment of a stage lands in one run."""

    id: str
    name: str
    group: str
    job_type: str
    project: str
    entity: str | None = None


def identity(pipeline: str, stage: str, kind: str, key: str, project: str, entity: str | None) -> RunIdentity:
    """The run of a stage: its id is a hash of pipeline, stage name and key, its name the artifact directory's."""
    digest = hashlib.sha256(f"{pipeline}/{stage}/{key}".encode()).hexdigest()
    return RunIdentity(
        id=f"{safe_name(stage)[:32]}-{digest[:16]}",
        name=f"{stage}-{key[:8]}",
        group=pipeline,
        job_type=kind,
        project=project,
        entity=entity,
    )


def safe_name(name: str) -> str:
    """``name`` with every character that W&B refuses in names of artifacts and ids replaced by a dash."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:MAX_NAME]


def has_api_key() -> bool:
    """Whether W&B could log in: ``WANDB_API_KEY`` is set, or ``~/.netrc`` knows W&B's host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def resolve_mode(mode: Mode) -> Literal["online", "offline", "disabled"]:
    """What ``auto`` means here and now: online with an API key, else offline."""
    if mode == "auto":
        return "online" if has_api_key() else "offline"
    return mode


class WandbMirror:
    """One open W&B run; after the first failure every method does nothing and ``alive`` is false."""

    def __init__(
        self,
        directory: Path,
        run: RunIdentity,
        config: Mapping[str, Any],
        mode: Literal["online", "offline"],
        finish_timeout_s: float = FINISH_TIMEOUT_S,
    ) -> None:
        self.mode = mode
        self._finish_timeout_s = finish_timeout_s
        self.failure = ""
        self._run: Any = None
        self._axes: set[str] = set()
        self._sent: list[Any] = []
        self._try(lambda: self._open(Path(directory).resolve(), run, config))

    @property
    def alive(self) -> bool:
        """Whether rows still reach W&B."""
        return self._run is not None

    @property
    def mirrored_rows(self) -> int:
        """Line of ``metrics.jsonl`` up to which W&B already had rows when an online run was resumed."""
        found = self._try(lambda: self._run.summary.get(ROW)) if self.alive else None
        return int(found or 0)

    def log(self, event: str, step: int, values: Mapping[str, Any], row: int) -> None:
        """Send one row, each event on an axis of its own: W&B shifts an explicit ``step=`` on resumed fragments."""
        self._try(lambda: self._log(event, step, values, row))

    def use_artifact(self, name: str, kind: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Declare an input online; W&B refuses this offline, where ``lineage.json`` keeps the edge for ``sync``."""
        if self.mode == "online":
            self._try(lambda: self._run.use_artifact(self._artifact(name, kind, path, metadata)))

    def log_artifact(self, name: str, kind: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Declare an output by reference: the files stay where they are, W&B keeps their checksums."""
        sent = self._try(lambda: self._run.log_artifact(self._artifact(name, kind, path, metadata)))
        if sent is not None:
            self._sent.append(sent)

    def confirm(self) -> str:
        """Wait until the server has every output, which W&B sends behind the caller's back; why it has not, or ""."""
        faults = []
        for sent in self._sent if self.alive else []:
            try:
                sent.wait()
            except Exception as error:
                faults.append(one_line(error))
        return "; ".join(faults)

    def alert(self, title: str, text: str) -> None:
        """Send an alert."""
        self._try(lambda: self._run.alert(title, text))

    def finish(self, state: str) -> None:
        """Flush and close; a run that was saved to be requeued counts as preempted."""
        if state == "saved":
            self._try(lambda: self._run.mark_preempting())
        self._try(lambda: self._run.finish(exit_code=EXIT_CODES.get(state, EXIT_FAILED)))
        self._run = None

    def _try(self, call: Callable[[], Any]) -> Any:
        if self.failure:
            return None
        try:
            return call()
        except StopRequested:
            # A signal that came during the call is the run's affair and no failure of W&B.
            raise
        except Exception as error:
            self.failure = one_line(error)
            self._run = None
            # Registered after W&B's own hook, and so called before it.
            atexit.register(_silence_wandb_at_exit)
            logger.warning(
                "W&B mirror stopped (%s); metrics.jsonl goes on; run.py --sync brings it to W&B later", self.failure
            )
            return None

    def _open(self, directory: Path, run: RunIdentity, config: Mapping[str, Any]) -> None:
        keep_inside(directory)
        import wandb

        wandb.setup(wandb.Settings(silent=True, console="off"))
        self._run = wandb.init(
            dir=directory,
            id=run.id,
            name=run.name,
            group=run.group,
            job_type=run.job_type,
            project=run.project,
            entity=run.entity,
            config=dict(config),
            mode=self.mode,
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(**discreet_settings(), finish_timeout=self._finish_timeout_s),
        )

    def _log(self, event: str, step: int, values: Mapping[str, Any], row: int) -> None:
        axis = f"{event}/step"
        if event not in self._axes:
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f"{event}/*", step_metric=axis)
            self._axes.add(event)
        self._run.log({axis: step, ROW: row, **{f"{event}/{name}": value for name, value in values.items()}})

    def _artifact(self, name: str, kind: str, path: Path, metadata: Mapping[str, Any]) -> Any:
        import wandb

        artifact = wandb.Artifact(safe_name(name), type=safe_name(kind), metadata=described(metadata))
        # Of engine state, gigabytes every few minutes, the manifest stands for all: it holds every file's SHA-256.
        referenced = Path(path) / MANIFEST if kind == CHECKPOINT else Path(path)
        artifact.add_reference(f"file://{referenced.resolve()}", checksum=True)
        return artifact


def one_line(error: Exception) -> str:
    """An error's kind and words without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def described(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """``metadata`` with figures of groups (``margin_nats/de``) together under ``by_group``.

    W&B refuses an artifact with more than 100 keys; a stage that scores many groups has more figures than that.
    """
    grouped = {name: value for name, value in metadata.items() if "/" in name}
    plain = {name: value for name, value in metadata.items() if name not in grouped}
    return {**plain, "by_group": grouped} if grouped else plain


def keep_inside(directory: Path) -> None:
    """Point W&B's folders, which it takes from the environment alone, into the artifact: none is lost with a home.

    Its reports of its own faults and times, which go to its makers, are switched off the same way, unless the user said
    otherwise.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ["WANDB_DIR"] = str(directory)
    os.environ["WANDB_DATA_DIR"] = str(directory / "wandb" / "data")
    os.environ["WANDB_CACHE_DIR"] = str(directory / "wandb" / "cache")


def discreet_settings() -> dict[str, Any]:
    """Settings under which W&B records nothing but what it is given, says nothing, and owns up to what it lost."""
    return {
        "console": "off",
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "host": "",
        "program": "",
        "x_save_requirements": False,
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout_raises": True,
    }


def _silence_wandb_at_exit() -> None:
    """Its failure was told; a service that died with the launcher is no traceback at the end of the console."""
    told = sys.unraisablehook

    def hook(fault: sys.UnraisableHookArgs) -> None:
        at = fault.exc_traceback
        while at is not None and at.tb_next is not None:
            at = at.tb_next
            if f"{os.sep}wandb{os.sep}" in at.tb_frame.f_code.co_filename:
                return
        told(fault)

    sys.unraisablehook = hook
