"""`fastedit export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli import arguments
from fastedit.cli.edit import check_checkpoint, check_questions, show_last
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins, wrote
from fastedit.errors import ConfigError
from fastedit.files import BY_ADAPTER, BY_CHECKPOINT, check_directory, check_file

if TYPE_CHECKING:
    from fastedit.compat.peft import Adapter
    from fastedit.delta import WeightDelta
    from fastedit.editor import Editor


def export(
    delta: Annotated[Path, typer.Argument(help="A delta, as `fastedit edit` writes it.", show_default=False)],
    peft: Annotated[
        Path | None,
        typer.Option(help="Write a LoRA adapter to this folder, for peft, vLLM and others; replaces an adapter."),
    ] = None,
    merge: Annotated[
        Path | None, typer.Option(help="Write the edited model to this folder; replaces a checkpoint.")
    ] = None,
    dense: Annotated[
        Path | None, typer.Option(help="Write the updates to this safetensors file, in fp32 by parameter.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The unedited model, by folder or hub name; --dense does not need it.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the adapter, at most; LocFT-BF's edits need one, such as 64.")
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Edit requests to measure: what the adapter loses against the whole delta.")
    ] = None,
    chat: arguments.ChatFlag = False,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Write a saved edit in a form that other programs read: a LoRA adapter, a checkpoint, or plain tensors.

    Example: fastedit export edited/delta.safetensors --peft ./adapter --model ./Llama-3-8B
    """
    ways = {"--peft": peft, "--merge": merge, "--dense": dense}
    if len(chosen := [way for way, path in ways.items() if path is not None]) != 1:
        raise ConfigError(f"expected one of --peft, --merge and --dense, got {' and '.join(chosen) or 'none'}")
    of_peft = {"--rank": rank, "--requests": requests, "--chat": chat}
    if not peft and (alone := [name for name, value in of_peft.items() if value]):
        raise ConfigError(f"{' and '.join(alone)} belong to --peft; {chosen[0]} writes the whole delta")
    if chat and not requests:
        raise ConfigError("--chat is for the prompts of --requests, and there are none")
    of_model = {"--model": model, "--dtype": dtype is not arguments.Dtype.auto, "--device": device}
    if dense and (unread := [name for name, value in of_model.items() if value]):
        raise ConfigError(f"{' and '.join(unread)} belong to --peft and --merge; --dense reads the delta alone")
    if model is None and not dense:
        raise ConfigError(f"{chosen[0]} needs --model, the model that the delta was made for")
    inputs = arguments.inputs_of(model or "", delta=delta, requests=requests)
    over = BY_ADAPTER if peft else BY_CHECKPOINT
    check_file(dense, inputs) if dense else check_directory(peft or merge or Path(), inputs, over)
    from fastedit.delta import WeightDelta
    from fastedit.undo import undo_files

    change = WeightDelta.load(delta)
    if dense:
        work_begins()
        change.save_dense(dense)
        wrote(dense)
        typer.echo(f"{len(change.updates)} updates written to {dense}")
        return
    editor = arguments.load(str(model), dtype, device, chat_template=chat)
    change.check(editor.model)
    if merge:
        check_checkpoint(editor, merge, "export the updates: --dense")
        work_begins()
        change.apply(editor.model)
        editor.save_model(merge)
        wrote(merge)
        typer.echo(f"the edited model was written to {merge}")
        if undo_files(Path(str(model))):
            arguments.tell([f"the undo files of earlier edits stay in {model}: they do not travel with --merge"])
    elif peft:
        _adapter(change, editor, peft, rank, requests)


def _adapter(change: WeightDelta, editor: Editor, folder: Path, rank: int | None, requests: Path | None) -> None:
    from fastedit.cli.bars import Bars
    from fastedit.compat.peft import as_adapter
    from fastedit.evaluation.report import compare

    edits = arguments.read_requests(requests, skip_bad=False) if requests else []
    check_questions(editor, edits, [])
    if edits:
        arguments.tell_of_chat(change, editor.parts.chat is not None)
        arguments.tell_of_prompts(editor, edits)
    adapter = as_adapter(change, editor.model, rank=rank)
    work_begins()
    adapter.save(folder)
    wrote(folder)
    show(_table(adapter))
    highest = max(adapter.ranks.values())
    typer.echo(
        f"a LoRA adapter of rank {highest} was written to {folder} (vllm serve --max-lora-rank {_step(highest)})"
    )
    if not edits:
        return
    predictions: list[Any] = []
    with Bars() as bars:
        for delta, when in ((change, "whole"), (adapter.delta, "adapter")):
            delta.apply(editor.model)
            try:
                predictions.append(arguments.measure(editor, edits, [], bars, when))
            finally:
                delta.revert()
    whole, cut = predictions
    report = compare(edits, cut, whole)
    typer.echo("the whole delta → the adapter; locality is between these two")
    show_last(report, folder)
    for name in ("reliability", "generalization"):
        if (now := report.metrics[name]["generated"]) is not None and report.before:
            lost = 100 * (report.before[name]["generated"] - now)
            typer.echo(f"{name} lost by the adapter: {lost:.1f} points, generated")


def _table(adapter: Adapter) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("matrix", "rank", "relative error", box=box.SIMPLE_HEAD)
    for path, rank in adapter.ranks.items():
        error = adapter.errors[path]
        table.add_row(path, str(rank), f"{error:.2e}" if error else "none, the edit's own factors")
    return table


def _step(rank: int) -> int:
    """The lowest of vLLM's few ranks that is at least this rank."""
    return next((step for step in (8, 16, 32, 64, 128, 256, 320, 512) if step >= rank), rank)
