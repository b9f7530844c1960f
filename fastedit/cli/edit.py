"""`fastedit edit`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli import arguments
from fastedit.cli.flags import configuration
from fastedit.cli.outcome import keeping
from fastedit.cli.output import show, summary
from fastedit.cli.phase import work_begins, wrote
from fastedit.cli.processes import speaks
from fastedit.cli.resume import check_apart, resumable, run_folder
from fastedit.cli.status import Status
from fastedit.errors import EditError, FileError, ModelError, RequestError, listed, reason
from fastedit.files import BY_CHECKPOINT, BY_DELTA, check_directory, check_writable
from fastedit.methods import METHODS
from fastedit.progress import StageClock, no_progress

if TYPE_CHECKING:
    from fastedit.editor import Editor, EditPlan
    from fastedit.evaluation.report import EvaluationReport
    from fastedit.requests import EditRequest


def edit(
    model: arguments.ModelFlag,
    requests: arguments.RequestsFlag,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for checkpoint, delta.safetensors, report.json and report.html; replaces a checkpoint."
        ),
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
        bool,
        typer.Option(
            "--delta-only",
            help="Write only the delta and the report, not the checkpoint; may replace an earlier delta folder.",
        ),
    ] = False,
    chat: arguments.ChatFlag = False,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    offload: arguments.OffloadFlag = None,
    verbose: arguments.VerboseFlag = False,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue an edit that was interrupted: its --output (or --state), and no other flag."),
    ] = None,
    **given: Any,
) -> None:
    """Edit a model and write it as a checkpoint, which appears whole or not at all.

    Example: fastedit edit --model ./Llama-3-8B --requests facts.json --output ./edited

    The state of a long run is saved to OUTPUT.run every --save-every seconds. The same command again continues from
    there, and ends with the same bits; so does --resume OUTPUT.

    Several processes share the work: torchrun --nproc-per-node 2 -m fastedit edit …

    Every field of the method's configuration is a flag: --layers 22 --lr 5e-4 --batch-size 100 …
    """
    method, chat, fields = configuration(config, method, chat, given)
    sample, measured = arguments.sample_size(evaluate), not unmeasured
    edits, documents = arguments.read_requests(requests, skip_bad), arguments.documents_of(text)
    folders = {name: fields.get(name) for name in ("statistics", "targets")}
    inputs = arguments.inputs_of(model, requests=requests, text=text, config=config, **folders)
    if speaks():  # only one: processes would remove folders that others try to make
        check_directory(output, inputs, BY_DELTA if delta_only else BY_CHECKPOINT)
        if folders["targets"]:
            check_writable(Path(folders["targets"]))
    state = Path(fields.get("state") or run_folder(output))
    check_apart(state, output)
    if hasattr(METHODS[method].config, "state"):
        fields["state"] = str(state)
    editor = arguments.load(model, dtype, device, offload, method=method, chat_template=chat, **fields)
    from fastedit.cli.bars import Bars
    from fastedit.evaluation.report import compare
    from fastedit.evaluation.sampling import draw

    clock = StageClock(no_progress)
    with ExitStack() as stack, Bars() as bars:
        if not delta_only and speaks():
            check_checkpoint(editor, output, "write the delta alone: --delta-only")
        plan = plan_of(editor, edits, skip_bad)
        edits = plan.requests
        asked = draw(edits, sample)
        if measured:
            check_questions(editor, asked, documents)
        stack.enter_context(resumable(output, state))
        sources = {"model": model, "requests": str(requests)}
        told = {**sources, "method": method, "edits": len(edits), "output": str(output.resolve())}
        if speaks():
            bars.status = stack.enter_context(Status(state, **told))
        work_begins()
        with clock.stage("evaluation"):
            before = arguments.measure(editor, asked, documents, bars, "before") if measured else None
        editor.progress = bars.callback("", len(edits))
        result = editor.run(plan)
        with keeping(output, result, sources, clock) as outcome:
            with clock.stage("evaluation"):
                after = arguments.measure(editor, asked, documents, bars, "after") if measured else None
            report = compare(asked, after, before, total=len(edits)) if after else None
            outcome.finish(report, None if delta_only else editor.parts)
            wrote(output)
    arguments.tell(result.notes, method)
    if report:
        show_last(report, output)
    typer.echo(f"{summary(result)}; written to {output}")
    if result.interrupted:
        raise typer.Exit(1)


def plan_of(editor: Editor, edits: list[EditRequest], skip_bad: bool) -> EditPlan:
    """Plan some edits; with `skip_bad`, leave out those that this model cannot take, with a note."""
    from fastedit.methods.naming import edit_name

    try:
        return editor.plan(edits)
    except RequestError as error:
        good = [edit for place, edit in enumerate(edits) if edit_name(edit, place) not in error.edits]
        if not skip_bad or not good or len(good) == len(edits):
            raise
        left_out = f"{len(edits) - len(good)} of {len(edits)} edits are left out"
        arguments.tell([f"{left_out}: {listed(error.sentences, ' | ')}"])
    return plan_of(editor, good, skip_bad)


def check_questions(editor: Editor, edits: list[Any], documents: list[str]) -> None:
    """Check before the work begins that all prompts can be measured. Raises RequestError."""
    from fastedit.evaluation.questions import ask

    ask(editor.parts, edits, text=documents)


def show_last(report: EvaluationReport, output: Path) -> None:
    """Print the table after everything is written, because a terminal may not support its characters."""
    try:
        show(report)
    except Exception as error:
        raise EditError(f"the table could not be printed: {reason(error)}; all is written to {output}") from error


def check_checkpoint(editor: Editor, output: Path, instead: str) -> None:
    """Check before the work begins that the model can be written at the end. The error says what to do instead."""
    from fastedit.saving import check_saves

    try:
        check_saves(editor.parts, output)
    except FileError:
        raise
    except ModelError as error:
        raise ModelError(f"the model could not be saved: {error}; mend that, or {instead}") from error
