"""`fastedit revert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastedit.cli import arguments
from fastedit.cli.apply import DeltasArgument, inputs_of
from fastedit.cli.phase import work_begins, wrote
from fastedit.errors import FileError, ModelError
from fastedit.files import check_directory

if TYPE_CHECKING:
    from fastedit.undo import Undo


def revert(
    deltas: DeltasArgument,
    model: Annotated[Path, typer.Option(help="Folder of the edited checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint without the edits; replaces a checkpoint.")],
    undo: Annotated[
        Path | None,
        typer.Option(help="File with what makes it exact; by default delta.undo in --model or beside DELTAS."),
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Also write weights that are off by a rounding.")
    ] = False,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Remove edits from a checkpoint, bit for bit or not at all; give all edits that were applied together.

    Subtracting an edit restores the old weights only up to rounding. The weights that would be off are in delta.undo,
    which `fastedit edit` and `fastedit apply` write into the checkpoint, and `fastedit diff` beside its delta.

    Example: fastedit revert edited/delta.safetensors --model ./edited --output ./as-before
    """
    check_directory(output, inputs_of(model, deltas) | ({"the input of --undo": undo} if undo else {}))
    from fastedit.checkpoints import Reverted
    from fastedit.cli.bars import Bars
    from fastedit.compose import read
    from fastedit.undo import copy_undo_files, undo_files

    weight_deltas, checkpoint = read(deltas), arguments.load_checkpoint(model)
    undos = _undos(model, deltas, undo, approximate)
    reverted = Reverted(checkpoint, weight_deltas, list(undos.values()))
    wrong = reverted.problem()
    if wrong and not approximate:
        raise ModelError(
            f"{wrong}; --approximate subtracts the deltas all the same, which gives weights up to a rounding"
        )
    gone = [reverted.updates, *(delta.updates for delta in weight_deltas)]
    held = [path for path in undo_files(model) if path in undos and not any(map(undos[path].belongs_to, gone))]

    def keep_undo(folder: Path) -> None:
        copy_undo_files(held, folder, below=False)

    work_begins()
    with Bars() as bars:
        checkpoint.write(output, reverted.changes(), keep_undo, bars.callback("checkpoint"))
    wrote(output)
    said = f"subtracted; not checked to the bit: {wrong}" if wrong else "as before, bit for bit"
    typer.echo(f"{len(reverted.updates)} parameters {said}; written to {output}")


def _undos(model: Path, deltas: Sequence[Path], given: Path | None, approximate: bool) -> dict[Path, Undo]:
    """The readable undo files by path, the likeliest first, with a note on others.

    The one beside a delta of `fastedit diff` is of the checkpoint that it was taken of, which may differ, in its dtype
    or by a rounding, from one that the delta was applied to.

    Raises:
        FileError: `given` is needed but unreadable.
    """
    from fastedit.undo import UNDO, Undo, undo_files

    beside = (path for delta in deltas if (path := delta.with_suffix(Path(UNDO).suffix)).is_file())
    undos = {}
    for path in dict.fromkeys([given, *undo_files(model)] if given else [*undo_files(model), *beside]):
        try:
            undos[path] = Undo.load(path)
        except FileError as error:
            if path == given and not approximate:
                raise
            arguments.tell([f"{error}; it is left out"])
    return undos
