"""`fastedit locate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastedit.cli import arguments
from fastedit.cli.flags import layer_list
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins, wrote
from fastedit.configs import LARGEST_INT
from fastedit.files import check_file

OWN = ("layer", "module", "seed", "keep_partial", "state", "save_every")
"""Fields of LocFT-BF's configuration that are not flags of this command."""


def locate(
    model: arguments.ModelFlag,
    requests: arguments.RequestsFlag,
    layers: arguments.LayersFlag = None,
    modules: Annotated[str, typer.Option(help="Modules to try, such as down_proj,up_proj.")] = "down_proj",
    sample: Annotated[int, typer.Option(help="Edits to make at each place.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_INT, help="Seed for the sample and the edits.")] = 0,
    skip_bad: arguments.SkipBadFlag = False,
    text: arguments.TextFlag = None,
    chat: arguments.ChatFlag = False,
    capability: Annotated[
        Path | None, typer.Option(help="File of requests whose targets are known already and should stay so.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Measure generated answers (slower).")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the heat map to this PNG file.")] = None,
    json_file: arguments.JsonFlag = None,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
    **config: Any,
) -> None:
    """Find where to edit: make a sample of the edits at each layer and module, measure, and revert them.

    Example: fastedit locate --model ./Llama-3-8B --requests facts.json --layers 0-31 --picture heat.png
    """
    from fastedit.requests import load_requests

    wanted = None if layers is None else layer_list(layers)
    edits, documents = arguments.read_requests(requests, skip_bad), arguments.documents_of(text)
    known = [(r.prompt, r.target) for r in load_requests(capability, skip_bad=skip_bad)] if capability else []
    inputs = arguments.inputs_of(model, requests=requests, text=text, capability=capability)
    for name, path in (("the output of --picture", picture), ("the output of --json", json_file)):
        if path:
            check_file(path, inputs)
            inputs[name] = path
    from fastedit.cli.bars import Bars
    from fastedit.evaluation import locate as locating

    editor = arguments.load(model, dtype, device, chat_template=chat)
    names = [name.strip() for name in modules.split(",")]
    sweep = locating.Sweep(
        editor.parts,
        edits,
        layers=wanted,
        modules=names,
        sample=sample,
        seed=seed,
        text=documents,
        capability=known,
        generate=generate,
        **config,
    )
    arguments.tell_of_prompts(editor, sweep.edits)
    work_begins()
    with Bars() as bars:
        report = sweep.run(bars.callback("", len(sweep.edits) * len(sweep.places)))
    if json_file:
        report.save(json_file)
        wrote(json_file)
    if picture:
        report.draw(picture)
        wrote(picture)
    show(report)
