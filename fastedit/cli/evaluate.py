"""`fastedit evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastedit.cli import arguments
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins, wrote
from fastedit.cli.processes import speaks
from fastedit.files import check_file


def evaluate(
    model: arguments.ModelFlag,
    requests: arguments.RequestsFlag,
    skip_bad: arguments.SkipBadFlag = False,
    text: arguments.TextFlag = None,
    delta: Annotated[
        Path | None,
        typer.Option(help="An edit to apply; measures before and after it, and with both the locality."),
    ] = None,
    evaluate: arguments.EvaluateFlag = "all",
    chat: arguments.ChatFlag = False,
    json_file: arguments.JsonFlag = None,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    offload: arguments.OffloadFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Measure a model on edit requests: reliability, generalization, locality, portability, perplexity.

    Example: fastedit evaluate --model ./Llama-3-8B --delta ./edited/delta.safetensors --requests facts.json
    """
    sample = arguments.sample_size(evaluate)
    edits, documents = arguments.read_requests(requests, skip_bad), arguments.documents_of(text)
    if json_file and speaks():
        check_file(json_file, arguments.inputs_of(model, requests=requests, text=text, delta=delta))
    from fastedit.cli.bars import Bars
    from fastedit.delta import WeightDelta
    from fastedit.evaluation.questions import ask
    from fastedit.evaluation.report import compare
    from fastedit.evaluation.sampling import draw

    asked = draw(edits, sample)
    change = WeightDelta.load(delta) if delta else None
    editor = arguments.load(model, dtype, device, offload, chat_template=chat)
    ask(editor.parts, asked, text=documents)
    if change:
        change.check(editor.model)
        arguments.tell_of_chat(change, chat)
    arguments.tell_of_prompts(editor, asked)
    before = None
    work_begins()
    with Bars() as bars:
        if change:
            of_head = change.changes(editor.model, editor.topology.head)
            before = arguments.measure(editor, asked, documents, bars, "before", keep_head=of_head)
            change.apply(editor.model)
        after = arguments.measure(editor, asked, documents, bars, "after" if change else "")
    report = compare(asked, after, before, total=len(edits))
    if json_file and speaks():
        report.save(json_file)
        wrote(json_file)
    show(report)
