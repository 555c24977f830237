"""Pages from templates: one self-contained file each, every value escaped, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipelines import report_format
from pipelines.report_evaluation import beside_chance, sandbox_of
from pipelines.table import figure
from pipelines.terminal import harmless

FOLDER = Path(__file__).resolve().parent
STYLE = "page_style.css"


def render(template: str, **values: Any) -> str:
    """The page of that template; ``values`` are escaped unless they are ``Markup`` of ours."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "number": report_format.number,
        "interval": report_format.interval_text,
        "decoding": report_format.decoding_text,
        "prompt": lambda messages: harmless(report_format.prompt_text(messages)),
        "cell": report_format.cell,
        "figure": lambda value, name: (
            figure(name, value) if str(name).endswith("_bytes") else report_format.cell(value)
        ),
        "chance": beside_chance,
        "sandbox": sandbox_of,
        "visible": lambda text: harmless(str(text)),
    }
    style = Markup((FOLDER / STYLE).read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values).strip() + "\n"


def write(path: Path, text: str) -> None:
    """Replace ``path`` by the page; a reader sees the old one or the new one.

    Raises:
        ArtifactError: where nothing can be written.
    """
    from stages.runtime.artifact import ArtifactError
    from stages.runtime.manifest import write_atomic

    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise ArtifactError(f"the page {path} cannot be written: {error}; name another place") from error
