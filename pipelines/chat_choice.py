"""Which model the chat speaks with, and what to do when the one that was named is not there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.command import run_command
from pipelines.staleness import standing
from pipelines.suggest import suggestion
from stages.base import ConfigError, Fault
from stages.runtime.artifact import finished_of, read_record, shown

if TYPE_CHECKING:
    from pipelines.chain import Chain, Node
    from pipelines.chat_models import Speaker

MODEL, EXPORT = "model", "export"
MOST_FILES = 4
"""Files of a folder that are named."""
BASE_KINDS = frozenset({"pretrain"})
"""Kinds whose models continue text and were never taught to answer."""


def speakers(options: argparse.Namespace, chain: Callable[[], Chain]) -> list[Speaker]:
    """The models that ``options`` name, loaded, each announced on stderr.

    Raises:
        ConfigError: naming every model that is unknown or unfinished, with the nearest name or the command to run.
        CheckpointError: for damaged files.
    """
    from pipelines.chat_models import Checkpoint

    if options.gguf is not None:
        return [_gguf(options, chain)]
    names = options.compare or [options.stage]
    faults: list[Fault] = []
    chosen: list[tuple[str, Path]] = []
    for name in names:
        try:
            chosen.append(_chosen(name, options, chain))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    found: list[Speaker] = []
    for label, directory in chosen:
        found.append(Checkpoint(label, directory / "output"))
        print(f"{label}: {_about(directory, options.stage is None and not options.compare)}; {found[-1].about()}",
              file=sys.stderr)  # fmt: skip
    return found


def _chosen(name: str | None, options: argparse.Namespace, chain: Callable[[], Chain]) -> tuple[str, Path]:
    """Label and artifact directory of the model called ``name``; the last finished one when there is no name."""
    if name is not None and "/" in name:
        return _artifact(Path(name))
    loaded = chain()
    if name is None:
        return _last_finished(loaded, options)
    if name in loaded.nodes:
        return name, _finished(loaded.nodes[name], options)
    directory = loaded.runs / loaded.recipe.name / name
    if (directory / "stage.json").is_file():
        return _artifact(directory)
    models = [node.name for node in loaded if node.stage.produces == MODEL]
    message = (
        f"must name a model stage of {loaded.recipe.name}; got {name!r}; {suggestion(name, models, 'model stage')}"
    )
    raise ConfigError(Fault(_flag(options), message))


def _last_finished(chain: Chain, options: argparse.Namespace) -> tuple[str, Path]:
    models = [node for node in chain if node.stage.produces == MODEL]
    done = [node for node in models if _is_done(node)]
    if done:
        return done[-1].name, done[-1].job.directory
    if not models:
        raise ConfigError(Fault("--pipeline", f"must have a stage that makes a model; {chain.recipe.name} has none"))
    command = run_command(models[0], options)
    raise ConfigError(
        Fault("--stage", f"needs a finished model stage; {chain.recipe.name} has none yet; run: {command}")
    )


def _is_done(node: Node) -> bool:
    try:
        return standing(node).done
    except ConfigError:
        return False


def _finished(node: Node, options: argparse.Namespace, produces: str = MODEL) -> Path:
    """The directory of a stage that is done and makes what is wanted."""
    if node.stage.produces != produces:
        way = "; use --gguf" if node.stage.produces == EXPORT else ""
        made = f"must name a stage that makes a {produces}; {node.name} makes {node.stage.produces}{way}"
        raise ConfigError(Fault(_flag(options), made))
    found = standing(node)
    if not found.done:
        why = "; ".join(found.reasons)
        message = f"must be a finished stage; {node.name} is {found.state} ({why}); run: {run_command(node, options)}"
        raise ConfigError(Fault(_flag(options), message))
    return node.job.directory


def _artifact(directory: Path) -> tuple[str, Path]:
    """A finished model artifact, whatever recipe it belongs to."""
    record, must = read_record(directory), f"must be the directory of a finished model; got {directory}"
    if record is None:
        raise ConfigError(Fault("--stage", f"{must}, which holds no stage.json; set runs/<pipeline>/<stage>-<key>"))
    if finished_of(record, directory) is None:
        raise ConfigError(Fault("--stage", f"{must}, whose state is {record['state']}; finish it first"))
    if not (directory / "output" / "config.json").is_file():
        raise ConfigError(Fault("--stage", f"{must}, which is a {record.get('kind')} without config.json"))
    return directory.resolve().name, directory


def _about(directory: Path, is_default: bool) -> str:
    record: dict[str, Any] = read_record(directory) or {}
    words = [f"{record.get('kind')} in {shown(directory)}"]
    if is_default:
        words.append("the last finished model stage (--stage takes another)")
    if record.get("kind") in BASE_KINDS:
        words.append("it continues text and was not taught to answer")
    return ", ".join(words)


def _flag(options: argparse.Namespace) -> str:
    return "--compare" if options.compare else "--gguf" if options.gguf is not None else "--stage"


def _gguf(options: argparse.Namespace, chain: Callable[[], Chain]) -> Speaker:
    from pipelines.chat_models import Gguf

    path = Path(options.gguf) if options.gguf else _exported(chain(), options)
    if not path.is_file():
        raise ConfigError(Fault("--gguf", f"must be a GGUF file; got {path}, which is {_instead(path)}"))
    try:
        speaker = Gguf(path)
    except ValueError as error:
        raise ConfigError(Fault("--gguf", str(error).removeprefix("field path "))) from error
    print(f"{speaker.label}: {shown(path.absolute())}; {speaker.about()}", file=sys.stderr)
    return speaker


def _instead(path: Path) -> str:
    """What there is in place of a file, and what to name."""
    if not path.is_dir():
        return "not there"
    # No deeper than an artifact's own folder: it might be anybody's home.
    found = (one for depth in ("", "*/", "*/*/") for one in path.glob(f"{depth}*.gguf"))
    files = [str(one) for one in sorted(found) if one.is_file()]
    shown_files = ", ".join(files[:MOST_FILES]) + (f" and {len(files) - MOST_FILES} more" if files[MOST_FILES:] else "")
    if not files:
        return "a folder without any; name the file, or run the export stage"
    return f"a folder; name {'one of ' if files[1:] else ''}{shown_files}"


def _exported(chain: Chain, options: argparse.Namespace) -> Path:
    """The smallest GGUF of the recipe's last export stage, verified against its manifest."""
    from stages.runtime.manifest import verify_manifest

    exports = [node for node in chain if node.stage.produces == EXPORT]
    if not exports:
        raise ConfigError(
            Fault("--gguf", f"must name a file; {chain.recipe.name} has no export stage to take one from")
        )
    output = _finished(exports[-1], options, EXPORT) / "output"
    verify_manifest(output)
    files = sorted(output.rglob("*.gguf"), key=lambda path: (path.stat().st_size, path.name))
    if not files:
        why = "its formats hold none, or its parity.json says why not"
        raise ConfigError(Fault("--gguf", f"must name a file; {exports[-1].name} wrote no GGUF ({why})"))
    return files[0]
