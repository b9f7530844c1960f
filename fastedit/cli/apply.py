"""`fastedit apply`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli import arguments
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins, wrote
from fastedit.files import check_directory

if TYPE_CHECKING:
    from torch import Tensor

    from fastedit.compose import Overlap

DeltasArgument = Annotated[
    list[Path], typer.Argument(help="Deltas, as `fastedit edit` writes them.", show_default=False)
]


def apply(
    deltas: DeltasArgument,
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint that the deltas were made for.")],
    output: Annotated[Path, typer.Option(help="Folder for the edited checkpoint; replaces a checkpoint.")],
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Add saved edits to a checkpoint, one file at a time, without loading the model.

    Deltas of one model are added up. A delta that was made on top of others comes right after them.

    Example: fastedit apply one.safetensors two.safetensors --model ./Llama-3-8B --output ./edited
    """
    check_directory(output, inputs_of(model, deltas))
    from fastedit.checkpoints import Stack
    from fastedit.cli.bars import Bars
    from fastedit.compose import added, overlaps, read, stacked
    from fastedit.undo import UNDO, Undo, copy_undo_files, undo_files

    weight_deltas, checkpoint = read(deltas), arguments.load_checkpoint(model)
    stack, undo, total = Stack(checkpoint), Undo(), added(weight_deltas)
    stacked(weight_deltas, checkpoint.fingerprint(), stack.put)

    def change(path: str) -> Callable[[Tensor], Tensor]:
        def new(weight: Tensor) -> Tensor:
            edited = stack.edited(path, weight)
            undo.keep(path, weight, edited, total[path])
            return edited

        return new

    def keep_undo(folder: Path) -> None:
        copy_undo_files(undo_files(model), folder, below=True)
        undo.save(folder / UNDO)

    work_begins()
    with Bars() as bars:
        changes = {path: change(path) for path in total}
        checkpoint.write(output, changes, keep_undo, bars.callback("checkpoint"))
    wrote(output)
    if overlapping := overlaps(weight_deltas):
        show(_table(overlapping, deltas))
    typer.echo(f"{len(total)} parameters edited by {len(weight_deltas)} deltas; written to {output}")


def inputs_of(model: Path, deltas: Sequence[Path]) -> dict[str, Path]:
    """The inputs of a command on checkpoints, by their names in messages."""
    return arguments.inputs_of(str(model)) | {f"delta {i}": delta for i, delta in enumerate(deltas, 1)}


def _table(overlapping: Sequence[Overlap], names: Sequence[Path]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("both change", "one", "other", "cosine", box=box.SIMPLE_HEAD)
    for overlap in overlapping:
        table.add_row(overlap.path, str(names[overlap.one]), str(names[overlap.other]), f"{overlap.cosine:+.3f}")
    return table
