"""The comparison as a page."""

from __future__ import annotations

from pathlib import Path

from pipelines import page
from pipelines.comparison import Comparison


def write_page(found: Comparison, path: Path) -> None:
    """Write the comparison to ``path`` as one self-contained page."""
    page.write(path, page.render("compare_page.html", found=found))
