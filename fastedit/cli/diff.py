"""`fastedit diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastedit.cli import arguments
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins, wrote
from fastedit.errors import ConfigError, ModelError, listed
from fastedit.files import check_file

if TYPE_CHECKING:
    from torch import Tensor

    from fastedit.checkpoints import Checkpoint, Difference
    from fastedit.weights import Update

_RANKED, _SHOWN = 8, 30  # parameters with a rank, which takes seconds for a large matrix; parameters that are listed


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="Folder of a checkpoint.", show_default=False)],
    other: Annotated[Path, typer.Argument(metavar="B", help="Folder of another one.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Write what leads from A to B to this file, as a delta.")] = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Show which parameters of two checkpoints differ, and by how much, without loading the models.

    Example: fastedit diff ./Llama-3-8B ./edited --output edit.safetensors
    """
    from fastedit.checkpoints import differences
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
    differing: list[Difference] = []
    updates: dict[str, Update] = {}
    ranks: list[str] = []
    with Bars() as bars:
        for difference, update in differences(a, b, bars.callback("comparing")):
            if len(differing) < _RANKED:
                ranks.append(_rank(difference, update))
            if output:
                updates[difference.path] = update
            differing.append(difference)
    if differing:
        _show(differing, ranks)
    typer.echo(f"{len(differing)} of {len(a.shapes)} parameters differ")
    if retyped := [path for path in a.shapes if a.dtype(path) != b.dtype(path)]:
        which = f"such as {retyped[0]}: {a.dtype(retyped[0])} in A, {b.dtype(retyped[0])} in B"
        typer.echo(f"{len(retyped)} parameters have another dtype, {which}; a delta leaves the dtype as it is")
    if output:
        _write(a, b, differing, updates, output, undone)


def _write(
    a: Checkpoint, b: Checkpoint, differing: list[Difference], updates: dict[str, Update], output: Path, undone: Path
) -> None:
    """Write the delta and its undo file. Raises ModelError if nothing differs, or differing weights are not finite."""
    from fastedit.delta import WeightDelta, versions
    from fastedit.undo import Undo

    stale = f"; what is in {output} is older" if output.exists() else ""
    if not differing:
        raise ModelError(f"{a.folder} and {b.folder} have the same weights, so no delta was written{stale}")
    if broken := [f"{each.path} ({each.broken})" for each in differing if each.broken]:
        raise ModelError(
            f"{len(broken)} parameters differ in weights that are NaN or infinite, which no delta can add: "
            f"{listed(broken)}; no delta was written{stale}"
        )
    metadata = {"method": "diff", "fingerprint": a.fingerprint(), "versions": versions()}
    WeightDelta(updates, metadata).save(output)
    wrote(output)
    undo = Undo()
    for name in list(updates):
        undo.keep(name, a.read(name), b.read(name), updates.pop(name))
    undo.save(undone)
    wrote(undone)
    typer.echo(f"the delta from A to B was written to {output}")


def _rank(difference: Difference, update: Tensor) -> str:
    from fastedit.checkpoints import rank_of

    if difference.broken or update.ndim > 2:
        return ""
    rank = rank_of(update)
    return "> 256" if rank is None else str(rank)


def _show(differing: list[Difference], ranks: list[str]) -> None:
    from rich import box
    from rich.table import Table

    more = f"and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else None
    table = Table("parameter", "weights that differ", "relative", "largest", "rank", box=box.SIMPLE_HEAD, caption=more)
    for difference, rank in zip(differing[:_SHOWN], [*ranks, *[""] * _SHOWN], strict=False):
        share, relative = f"{difference.changed:.1%}", f"{difference.relative:.2e}"
        broken = f", {difference.broken} not finite" if difference.broken else ""
        table.add_row(difference.path, share, relative, f"{difference.largest:.2e}{broken}", rank)
    show(table)
