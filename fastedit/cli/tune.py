"""`fastedit tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli import arguments
from fastedit.cli.flags import config_of
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins, wrote
from fastedit.configs import LARGEST_INT
from fastedit.errors import FileError
from fastedit.files import check_file, check_writable, replacing
from fastedit.methods import DEFAULT_METHOD

if TYPE_CHECKING:
    from fastedit.evaluation.tune import TuneReport

OWN = ("seed", "keep_partial", "targets", "state", "save_every")
"""Fields of the configurations that are not flags of this command."""


def tune(
    model: arguments.ModelFlag,
    requests: arguments.RequestsFlag,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for config.json, report.json, front.png and the trials; continues earlier trials there."
        ),
    ],
    method: Annotated[str, typer.Option(help="The editing method.")] = DEFAULT_METHOD,
    sample: Annotated[int, typer.Option(min=1, help="Edits in each trial.")] = 50,
    minutes: Annotated[
        float, typer.Option(help="Minutes to search; no trial begins that would likely end later.")
    ] = 30.0,
    trials: Annotated[int | None, typer.Option(min=1, help="At most this many trials in all.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_INT, help="Seed for the sample and the edits.")] = 0,
    skip_bad: arguments.SkipBadFlag = False,
    text: arguments.TextFlag = None,
    chat: arguments.ChatFlag = False,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
    **given: Any,
) -> None:
    """Find a configuration that writes your edits and preserves the rest, by trying some on a sample.

    Example: fastedit tune --model ./SmolLM2 --requests facts.json --text wiki.txt --output ./tuned

    Then edit with it: fastedit edit --config ./tuned/config.json … The fields of the method's configuration are flags;
    all trials share the given ones.
    """
    config = config_of(method, given)
    edits, documents = arguments.read_requests(requests, skip_bad), arguments.documents_of(text)
    inputs = arguments.inputs_of(model, requests=requests, text=text)
    for name in ("config.json", "report.json", "front.png", "trials.jsonl"):
        check_file(output / name, inputs)
    if any(output.glob("*.safetensors")):
        raise FileError(output, "{path} holds weights, whose config.json would be replaced; give another folder")
    check_writable(output)
    from fastedit.cli.bars import Bars
    from fastedit.evaluation.tune import Search

    editor = arguments.load(model, dtype, device, chat_template=chat)
    options: dict[str, Any] = {"sample": sample, "minutes": minutes, "trials": trials, "seed": seed, "text": documents}
    search = Search(editor.parts, edits, method=method, journal=output / "trials.jsonl", **options, **config)
    arguments.tell_of_prompts(editor, search.edits)
    work_begins()
    with Bars() as bars:
        report = search.run(bars.callback("", len(search.edits)), lambda so_far: _save(so_far, output, chat))
    _save(report, output, chat)
    show(report)
    try:
        report.draw(output / "front.png")
    except ModuleNotFoundError:
        typer.echo("no picture: matplotlib is not installed (pip install 'fastedit-llm[plot]')", err=True)
    typer.echo(f"trial {report.trials.index(report.best)} is chosen: fastedit edit --config {output / 'config.json'} …")


def _save(report: TuneReport, folder: Path, chat: bool) -> None:
    """Write the best configuration so far, and all figures."""
    best = report.best.settings | ({"chat_template": True} if chat else {})
    for name, content in (("config.json", best), ("report.json", report.to_dict())):
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        wrote(folder / name)
