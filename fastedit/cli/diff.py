"""`fastedit diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastedit.cli import arguments
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins
from fastedit.errors import ConfigError
from fastedit.files import check_file

if TYPE_CHECKING:
    from fastedit.checkpoints import Difference
    from fastedit.weights import Update

_RANKED, _SHOWN = 8, 30  # the rank of a large matrix takes seconds


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder of a checkpoint.", show_default=False)],
    other: Annotated[Path, typer.Argument(metavar="B", help="Folder of another one.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Write what leads from A to B to this file, as a delta.")] = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Tell which parameters of two checkpoints differ, and by how much; the models are not loaded.

    Example: fastedit diff ./Llama-3-8B ./edited --output edit.safetensors
    """
    from fastedit.checkpoints import differences, rank_of
    from fastedit.undo import UNDO

    if output:
        undone = output.with_suffix(Path(UNDO).suffix)
        if undone == output:
            raise ConfigError(f"--output {output}: the undo file of the delta has this name; give another")
        for path in (output, undone):
            check_file(path, arguments.inputs_of(str(one)) | {"B": other})
    from fastedit.cli.bars import Bars

    a, b = arguments.load_checkpoint(one), arguments.load_checkpoint(other)
    work_begins()
    found: list[Difference] = []
    updates: dict[str, Update] = {}
    ranks: list[str] = []
    with Bars() as bars:
        for difference, update in differences(a, b, bars.callback("comparing")):
            if len(found) < _RANKED:
                ranks.append("> 256" if (rank := rank_of(update)) is None else str(rank))
            if output:
                updates[difference.path] = update
            found.append(difference)
    if found:
        _show(found, ranks)
    typer.echo(f"{len(found)} of {len(a.shapes)} parameters differ")
    if output and found:
        from fastedit.delta import WeightDelta, versions
        from fastedit.undo import Undo

        about = {"method": "diff", "fingerprint": a.fingerprint(), "versions": versions()}
        WeightDelta(updates, about).save(output)
        undo = Undo()
        for name in updates:
            undo.keep(name, a.read(name), b.read(name), updates[name])
        undo.save(undone)
        typer.echo(f"the delta from A to B was written to {output}")


def _show(found: list[Difference], ranks: list[str]) -> None:
    from rich import box
    from rich.table import Table

    more = f"and {len(found) - _SHOWN} more" if len(found) > _SHOWN else None
    table = Table("parameter", "weights that differ", "relative", "largest", "rank", box=box.SIMPLE_HEAD, caption=more)
    for difference, rank in zip(found[:_SHOWN], [*ranks, *[""] * _SHOWN], strict=False):
        share, relative = f"{difference.changed:.1%}", f"{difference.relative:.2e}"
        table.add_row(difference.path, share, relative, f"{difference.largest:.2e}", rank)
    show(table)
