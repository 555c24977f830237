"""Faults put into one life of a run, in a forked child and gone with it: no part of the product can reach them."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

Patch = Callable[[], None]


def no_room_at_second_save() -> None:
    """During the second save no file may grow beyond a few kilobytes: the kernel refuses as a full disk does."""
    from stages.runtime.checkpoint import CheckpointStore

    save, calls = CheckpointStore.save, []

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, resource.RLIM_INFINITY))
        try:
            return save(self, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    CheckpointStore.save = limited  # type: ignore[method-assign]


def die_after_step_7() -> None:
    """SIGKILL when the batch of step 7 is asked for: the newest checkpoint is then that of step 6."""
    from data.loader import MixtureLoader

    batch = MixtureLoader.batch

    def deadly(self: Any, step: int, rows: slice) -> Any:
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step, rows)

    MixtureLoader.batch = deadly  # type: ignore[method-assign]


def shifted_data() -> None:
    """Read the data from one step further on."""
    from data.loader import MixtureLoader

    batch = MixtureLoader.batch
    MixtureLoader.batch = lambda self, step, rows: batch(self, step + 1, rows)  # type: ignore[method-assign]


def forgotten_moments() -> None:
    """Lose AdamW's moments, as a resume from weights alone would."""

    def forget(engine: Any) -> None:
        for state in engine.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].zero_()

    _after_load(forget)


def nudged_weight() -> None:
    """Change one master weight by the smallest amount that its format knows."""

    def nudge(engine: Any) -> None:
        import torch

        weights = engine.optimizer.param_groups[0]["params"][0].detach().view(-1)
        weights[0] = torch.nextafter(weights[0], torch.tensor(9.0))

    _after_load(nudge)


CONTROLS: dict[str, Patch] = {
    "shifted data": shifted_data,
    "forgotten moments": forgotten_moments,
    "one weight nudged": nudged_weight,
}


def leave_modules(path: Path) -> Patch:
    """A patch that writes the names of all imported modules to ``path`` when the life is over."""

    def patch() -> None:
        import sys

        from stages.runtime import lifecycle

        execute = lifecycle.execute

        def executed(*arguments: Any) -> int:
            code = execute(*arguments)
            path.write_text("\n".join(sys.modules))
            return code

        lifecycle.execute = executed  # type: ignore[assignment]

    return patch


def _after_load(change: Callable[[Any], None]) -> None:
    from stages.runtime.engine import TrainingEngine

    load = TrainingEngine.load

    def changed(self: Any, *arguments: Any) -> None:
        load(self, *arguments)
        change(self)

    TrainingEngine.load = changed  # type: ignore[method-assign]
