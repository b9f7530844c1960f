"""`fastedit check`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli import arguments
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins, wrote
from fastedit.errors import ConfigError, EditError, FastEditError, ModelError
from fastedit.files import check_file

if TYPE_CHECKING:
    from fastedit.delta import WeightDelta
    from fastedit.editor import Editor
    from fastedit.evaluation.check import CheckReport
    from fastedit.models import Model
    from fastedit.requests import EditRequest


def check(
    model: arguments.ModelFlag,
    requests: arguments.RequestsFlag,
    base: Annotated[
        str | None,
        typer.Option(help="The unedited model, folder or hub name; measures before and after. Both are in memory."),
    ] = None,
    delta: Annotated[
        Path | None,
        typer.Option(help="An edit to apply: --model is then the unedited model; measures before and after."),
    ] = None,
    skip_bad: arguments.SkipBadFlag = False,
    text: arguments.TextFlag = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            help='JSON or TOML of what has to hold, such as {"reliability": {"min": 0.95}}; else exit code 1.'
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, such as arc_easy,hellaswag; needs lm-eval.")] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own for --tasks, as lm-eval's --include_path.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for check.json and check.html.")] = None,
    evaluate: arguments.EvaluateFlag = "all",
    chat: arguments.ChatFlag = False,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Find out whether an edited model still works: its facts, harder questions about them, and everything else.

    Example: fastedit check --model ./edited --base ./Llama-3-8B --requests facts.json --output ./checked

    Facts are asked for plainly, after up to 200 tokens of other text, negated, and as multiple choice. Without --text
    the unedited model writes the text. With --thresholds the exit code is 1 if one is missed.
    """
    if base and delta:
        raise ConfigError("--base and --delta are two ways to give the unedited model; give one of them")
    names, sample = [name.strip() for name in tasks.split(",") if name.strip()], arguments.sample_size(evaluate)
    edits, documents = arguments.read_requests(requests, skip_bad), arguments.documents_of(text)
    inputs = arguments.inputs_of(model, requests=requests, text=text, delta=delta, thresholds=thresholds)
    for name in ("check.json", "check.html") if output else ():
        check_file(output / name, inputs)  # type: ignore[operator]
    from fastedit.delta import WeightDelta
    from fastedit.evaluation.check import MEASURES, SHARES, check_bounds
    from fastedit.evaluation.questions import ask
    from fastedit.evaluation.sampling import draw
    from fastedit.evaluation.tasks import check_tasks, run_tasks
    from fastedit.evaluation.thresholds import load_thresholds

    asked = draw(edits, sample)
    try:
        bounds = load_thresholds(thresholds, MEASURES, SHARES) if thresholds else {}
        check_bounds(bounds, asked, compared=bool(base or delta), tasks=names)
    except FastEditError as error:
        raise error.at("--thresholds") from None
    check_tasks(names, include_path)
    change = WeightDelta.load(delta) if delta else None
    editor = arguments.load(model, dtype, device, chat_template=chat)
    unedited = arguments.load(base, dtype, device, chat_template=chat) if base else editor
    ask(editor.parts, asked, text=documents)
    if change:
        change.check(editor.model)
        arguments.tell_of_chat(change, chat)
    arguments.tell_of_prompts(editor, asked)
    if base:
        check_base(unedited.parts, editor.parts)
    settings = {"model": model, "base": base, "delta": delta and str(delta), "chat_template": chat}
    work_begins()
    options: dict[str, Any] = {"text": documents, "total": len(edits), "bounds": bounds, "about": settings}
    report = _measured(
        editor, unedited, change, asked, partial(run_tasks, tasks=names, include_path=include_path), **options
    )
    if output:
        report.save(output)
        wrote(output / "check.json", output / "check.html")
    show(report)
    if output:
        typer.echo(f"written to {output / 'check.json'} and {output / 'check.html'}")
    if report.broken:
        typer.echo(f"fastedit: the edited model cannot be measured: {report.broken}", err=True)
    elif not report.passed:
        missed = ", ".join(f"{m.name} {m.shown(m.value)} (wanted {m.wanted})" for m in report.missed)
        typer.echo(f"fastedit: {len(report.missed)} of {len(bounds)} thresholds missed: {missed}", err=True)
    if not report.passed:
        raise typer.Exit(1)


def _measured(
    editor: Editor,
    unedited: Editor,
    change: WeightDelta | None,
    edits: list[EditRequest],
    tasks: Callable[[Model], dict[str, float]],
    *,
    text: list[str],
    total: int,
    **what: Any,
) -> CheckReport:
    """Measure the unedited model, if there is one, and the edited one.

    `tasks` runs those of lm-eval; `what` has bounds and other report fields.
    """
    from fastedit.cli.bars import Bars
    from fastedit.evaluation.check import Check, broken_report

    before, tasks_before, questions = None, {}, None
    asked: dict[str, Any] = {}

    def ask() -> Check:
        new_check = Check(unedited.parts, edits, text=text, of=total)
        asked.update(edits=new_check.requests, text=new_check.text, bars=bars)
        return new_check

    with Bars() as bars:
        if change or unedited is not editor:
            questions = ask()
            of_head = change is not None and change.changes(editor.model, editor.topology.head)
            before = arguments.measure(unedited, **asked, when="before", keep_head=of_head)
            tasks_before = tasks(unedited.parts)
        if change:
            change.apply(editor.model)
        try:
            questions = questions or ask()
            after = arguments.measure(editor, **asked, when="after" if before else "")
        except (EditError, ModelError) as error:  # NaN or infinity
            old = questions.report(before) if questions and before else None
            return broken_report(str(error), old, total=total, **what)
        return questions.report(after, before, tasks=(tasks(editor.parts), tasks_before), **what)


def check_base(base: Model, edited: Model) -> None:
    """Check that the edited model can have been made from the base, and print a note if the two seem equal.

    Raises:
        ModelError: the base has other parameters or another vocabulary.
    """
    from fastedit.models import fingerprint

    shapes = [{name: p.shape for name, p in model.network.named_parameters()} for model in (base, edited)]
    if shapes[0] != shapes[1] or base.tokenizer.get_vocab() != edited.tokenizer.get_vocab():
        what = "vocabulary" if shapes[0] == shapes[1] else "parameters"
        raise ModelError(f"--base has other {what} than --model; give the model that was edited")
    if fingerprint(base.network) == fingerprint(edited.network):
        typer.echo("--base and --model seem to be the same model: the weights that were compared are equal", err=True)
