"""Where the steps of cleaning run: this machine, SLURM or Ray, through datatrove's executors. Imports datatrove.

Each step is a list of datatrove blocks over numbered tasks; datatrove marks a task that is complete in the step's log
folder, so a step that is run again does only what is missing. Wherever it runs, the result is the same.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.utils.logging import logger

from data.clean_config import Executor, RayExecutor, SlurmExecutor
from data.errors import DataError

IN_JOB = "SLURM_ARRAY_TASK_ID"
ROOT = Path(__file__).resolve().parent.parent


class Steps:
    """Runs steps one after another, each over its tasks, ``workers`` at a time."""

    def __init__(self, work: Path, executor: Executor, workers: int) -> None:
        self.work, self.executor, self.workers = work, executor, workers

    def __call__(self, name: str, tasks: int, blocks: list[Any]) -> None:
        """Run ``blocks`` over ``tasks`` tasks under ``name``; what is complete already is left as it is.

        Raises:
            DataError: when a cluster did not finish every task.
        """
        if isinstance(self.executor, SlurmExecutor) and IN_JOB in os.environ:
            message = (
                f"must not be slurm inside an array job of SLURM; got {IN_JOB} in the environment; run from a plain job"
            )
            raise DataError([("executor", message)])
        logs = self.work / "logs" / name
        runner = _runner(self.executor, blocks, tasks, self.workers, logs, f"pedigree-{name}-{self.work.parent.name}")
        if not runner.get_incomplete_ranks():
            return
        runner.run()
        if missing := runner.get_incomplete_ranks():
            left = f"{len(missing)} of {tasks} tasks did not: see {logs}"
            message = f"must finish the step {name}; {left}, then run again"
            raise DataError([("executor", message)])


def _runner(executor: Executor, blocks: list[Any], tasks: int, workers: int, logs: Path, job: str) -> PipelineExecutor:
    if isinstance(executor, SlurmExecutor):
        return _slurm(executor, blocks, tasks, workers, logs, job)
    if isinstance(executor, RayExecutor):
        return RayPipelineExecutor(
            blocks, tasks=tasks, workers=workers, logging_dir=str(logs), mem_per_cpu_gb=executor.memory_gb,
            tasks_per_job=executor.tasks_per_job,
        )  # fmt: skip
    return QuietExecutor(blocks, tasks=tasks, workers=workers, logging_dir=str(logs))


class QuietExecutor(LocalPipelineExecutor):
    """datatrove's local executor, its console output in files, without a helper process for one worker."""

    pipeline: list[Any]

    def run(self) -> None:
        """Run the incomplete tasks, in this process or in a pool."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) == 1:
            steps = self.pipeline
            for rank in ranks:
                self.pipeline = deepcopy(steps)
                _run_task(self, rank)
            return
        # Unlike datatrove's pool this one fails, rather than waits for ever, when a worker dies.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(self.workers, len(ranks)), mp_context=context) as pool:
            list(pool.map(partial(_run_task, self), ranks))


def _run_task(executor: LocalPipelineExecutor, rank: int) -> None:
    """Run one task; what datatrove prints (progress bars, log lines) goes to a file beside its logs."""
    console = Path(executor.logging_dir.path) / f"console_{rank:05d}.txt"
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("w") as stream, contextlib.redirect_stderr(stream):
        try:
            executor._run_for_rank(rank, local_rank=1)
        finally:
            logger.remove()  # datatrove has just pointed its log at the stream that closes here


class WaitingSlurmExecutor(SlurmPipelineExecutor):
    """datatrove's SLURM executor that returns when the job has ended, and cancels it when it is interrupted."""

    def run(self) -> None:
        """Submit and wait (``sbatch --wait``); on a node, work on the tasks of the job."""
        if IN_JOB in os.environ:
            return super().run()
        try:
            super().run()
        except subprocess.CalledProcessError:
            return None  # the job failed: the tasks that it completed say how far it came
        except BaseException:
            subprocess.run(["scancel", f"--name={self.job_name}"], check=False)
            raise
        return None

    def launch_merge_stats(self) -> None:
        """Nothing: the step's folder is removed with the stage's work."""


def _slurm(
    executor: SlurmExecutor, blocks: list[Any], tasks: int, workers: int, logs: Path, job: str
) -> SlurmPipelineExecutor:
    """The nodes get this program's own interpreter and source, whatever their login shell says."""
    paths = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH PYTHONPATH={shlex.quote(str(ROOT))}"
    return WaitingSlurmExecutor(
        blocks,
        tasks=tasks,
        time=f"{executor.time_hours}:00:00",
        partition=executor.partition,
        mem_per_cpu_gb=executor.mem_per_cpu_gb,
        workers=-1 if workers == 1 else workers,
        job_name=job,
        qos=executor.qos,
        env_command="; ".join(command for command in (executor.setup, paths) if command),
        sbatch_args={**executor.options, "wait": ""},
        max_array_size=executor.max_array_size,
        tasks_per_job=executor.tasks_per_job,
        logging_dir=str(logs.absolute()),
    )
