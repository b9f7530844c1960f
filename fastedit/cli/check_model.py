"""`fastedit check-model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fastedit.cli import arguments
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins
from fastedit.errors import ConfigError, FastEditError, ModelError

if TYPE_CHECKING:
    from fastedit.models import SelfCheck, Topology


def check_model(
    folder: Annotated[str | None, typer.Argument(help="The same as --model.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or hub name of a Hugging Face causal language model.")
    ] = None,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Find out whether a model can be edited: show its parts, and compare numbers for a few samples with its own.

    The exit code is 0 if it can. `edit` makes the same check for every model type that the tests do not cover.

    Example: fastedit check-model ./SmolLM3-3B
    """
    if (name := model or folder) is None:
        raise ConfigError("Missing option '--model'; give the folder or hub name of a model")
    network = arguments.load_network(name, dtype, device)
    from rich.table import Table

    from fastedit.models import self_check, topology

    parts = topology(network)
    work_begins()
    check = self_check(parts)
    table = Table(show_header=False, box=None)
    for row in _rows(parts, check):
        table.add_row(*row)
    show(table)
    if check.problem is not None:
        raise ModelError(check.problem)
    typer.echo("this model can be edited")


def _rows(parts: Topology, check: SelfCheck) -> list[tuple[str, str]]:
    path, flags = check.path, check.flags
    rows = [
        ("model", f"{parts.name}, {parts.n_blocks} blocks ({parts.blocks_path})"),
        ("parts", ", ".join(f"{name} {module}" for name, module in _parts(parts, check.layer))),
        ("compared with", f"the model's own forward pass, one sample at a time; block {check.layer}"),
        ("logits", f"differ by {check.logits:.1e} of the largest, at most"),
        ("gradient", f"of {path} differs by {check.gradient:.1e} of the largest, at most"),
        ("samples", "share rows" if flags.of(parts).packs else "have a row each"),
        ("blocks", "run in parts where that is enough" if flags.runs_in_parts else "run whole"),
        ("memit's targets", "hold the tokens in front" if flags.replays_blocks else "run all tokens in each step"),
    ]
    rows += [("left out", note) for note in check.notes]
    from fastedit.methods import METHODS

    return rows + [(method, _applies(parts, method)) for method in METHODS]


def _parts(parts: Topology, layer: int) -> list[tuple[str, str]]:
    """The short names of a block's parts, and their paths in the block."""
    named_paths = []
    for name in ("attn", "mlp", "gate_proj", "up_proj", "down_proj"):
        try:
            path, _ = parts.resolve(layer, name)
        except ModelError:
            continue
        named_paths.append((name, path.removeprefix(f"{parts.blocks_path}.{layer}.")))
    return named_paths


def _applies(parts: Topology, method: str) -> str:
    """Where a method edits the model with its defaults, or why it cannot."""
    from fastedit.methods import METHODS
    from fastedit.methods.locate_then_edit.recipes import resolve
    from fastedit.methods.locft_bf.recipes import reads_facts
    from fastedit.methods.presets import locate_then_edit_preset, locft_bf_preset
    from fastedit.models import check_plain

    chosen = METHODS[method]
    try:
        if chosen.recipe is None:
            preset, published = locft_bf_preset(parts)
            spread = not published and reads_facts(parts)
            layers = locate_then_edit_preset(parts)[0].layers if spread else (preset.layer,)
            module = "down_proj" if spread else preset.module
        else:
            recipe = resolve(parts, chosen.config(), chosen.recipe)
            layers, module = tuple(recipe.layers), recipe.config.module
        check_plain(parts.model, (parts.resolve(layer, module)[0] for layer in layers))
        paths = [parts.resolve(layer, module)[0] for layer in layers]
    except FastEditError as error:
        return f"not with its defaults: {error}"
    return f"edits {', '.join(paths)}"
