"""Output of the command line: tables and summaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fastedit.results import EditResult


def show(what: RenderableType) -> None:
    """Print with the terminal's width, or with 120 columns to a file or pipe."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(width=120)
    console.print(what)


def summary(result: EditResult) -> str:
    """One line about an edit: how many edits, how fast, and what was kept if it was interrupted."""
    n = len(result.requests)
    if result.interrupted:
        return f"interrupted after {result.seconds:.1f} s, of {n} edits: {result.interrupted}"
    learned = n - len(result.unlearned)
    return f"{learned} of {n} edits learned in {result.seconds:.1f} s, {n / result.seconds:.1f} edits/s"
