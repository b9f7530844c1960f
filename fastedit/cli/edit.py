"""`fastedit edit`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli import arguments
from fastedit.cli.flags import configuration
from fastedit.cli.output import show, summary
from fastedit.cli.phase import work_begins
from fastedit.errors import FileError
from fastedit.files import check_directory, check_writable, replacing_directory

if TYPE_CHECKING:
    from fastedit.editor import Editor
    from fastedit.evaluation.report import EvaluationReport
    from fastedit.results import EditResult


def edit(
    model: arguments.ModelFlag,
    requests: arguments.RequestsFlag,
    output: Annotated[
        Path,
        typer.Option(help="Folder for checkpoint, delta.safetensors, report.json; replaces a checkpoint."),
    ],
    method: Annotated[
        str | None, typer.Option(help="The editing method; by default that of --config, else locft-bf.")
    ] = None,
    config: arguments.ConfigFlag = None,
    skip_bad: arguments.SkipBadFlag = False,
    text: arguments.TextFlag = None,
    evaluate: arguments.EvaluateFlag = "all",
    unmeasured: Annotated[
        bool, typer.Option("--no-evaluate", help="Do not measure the model before and after the edit.")
    ] = False,
    delta_only: Annotated[
        bool, typer.Option("--delta-only", help="Do not write the checkpoint, only the delta and the report.")
    ] = False,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
    **given: Any,
) -> None:
    """Edit a model and write it as a checkpoint that appears whole or not at all.

    Example: fastedit edit --model ./Llama-3-8B --requests facts.json --output ./edited

    Every field of the method's configuration is a flag: --layers 22 --lr 5e-4 --batch-size 100 …
    """
    method, fields = configuration(config, method, given)
    sample, measured = arguments.sample_size(evaluate), not unmeasured
    edits, documents = arguments.read_requests(requests, skip_bad), arguments.read_text(text)
    folders = {name: fields.get(name) for name in ("statistics", "targets")}
    check_directory(output, arguments.inputs_of(model, requests=requests, text=text, config=config, **folders))
    if folders["targets"]:
        check_writable(Path(folders["targets"]))
    editor = arguments.load(model, dtype, device, method=method, **fields)
    from fastedit.cli.bars import Bars
    from fastedit.evaluation.report import compare
    from fastedit.evaluation.sampling import draw

    asked = draw(edits, sample)
    with Bars() as bars:
        if measured:
            check_questions(editor, asked, documents)
        plan = editor.plan(edits)
        work_begins()
        before = arguments.measure(editor, asked, documents, bars, "before") if measured else None
        editor.progress = bars.callback("", len(edits))
        result = editor.run(plan)
        after = arguments.measure(editor, asked, documents, bars, "after") if measured else None
    for note in result.notes:
        typer.echo(f"{method}: {note}", err=True)
    report = compare(asked, after, before, of=len(edits)) if after else None
    if report:
        show(report)
    save(output, editor, result, report, checkpoint=not delta_only)
    typer.echo(f"{summary(result)}; written to {output}")
    if result.interrupted:
        raise typer.Exit(1)


def check_questions(editor: Editor, edits: list[Any], documents: list[str]) -> None:
    """Refuse prompts that could not be measured, before the work begins."""
    from fastedit.evaluation.questions import ask

    ask(editor.parts, edits, text=documents)


def save(
    directory: Path, editor: Editor, result: EditResult, report: EvaluationReport | None, *, checkpoint: bool
) -> None:
    """Write checkpoint, delta and report in one folder that appears whole or not at all.

    Raises:
        FileError: `directory` exists by now and is not a checkpoint; it cannot be written; the disk is full.
    """
    from safetensors import SafetensorError

    did: dict[str, Any] = dict(result.delta.metadata)
    did |= {"seconds": result.seconds, "losses": result.losses, "notes": result.notes}
    did["interrupted"] = result.interrupted
    did["conflicts"], did["duplicates"] = (
        [[result.requests[i].id for i in group] for group in groups]
        for groups in (result.conflicts.conflicts, result.conflicts.duplicates)
    )
    content: Mapping[str, Any] = {"edit": did}
    if report:
        content = {**content, **report.to_dict(), "requests": report.rows}
    try:
        with replacing_directory(directory) as temporary:
            if checkpoint:
                editor.topology.model.save_pretrained(temporary)  # type: ignore[operator]
                editor.tokenizer.save_pretrained(temporary)
            result.delta.save(temporary / "delta.safetensors")
            written = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (temporary / "report.json").write_text(written, encoding="utf-8")
    except (OSError, SafetensorError, FileError) as error:
        reason = error.__cause__ or error  # a FileError is about a part of the folder
        raise FileError(directory, f"could not be saved: {reason}; nothing was written") from error
