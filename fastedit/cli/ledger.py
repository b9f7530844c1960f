"""`fastedit ledger add | forget | replace | log | blame | rollback | export`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli import arguments
from fastedit.cli.edit import check_checkpoint
from fastedit.cli.flags import configuration, configured
from fastedit.cli.output import show
from fastedit.cli.phase import work_begins
from fastedit.errors import ConfigError, RequestError
from fastedit.files import check_directory, check_file, replacing

if TYPE_CHECKING:
    from fastedit.ledger import Entry, Fact, Ledger
    from fastedit.ledger.blame import Likeness

LedgerArgument = Annotated[Path, typer.Argument(metavar="LEDGER", help="Folder of the ledger.", show_default=False)]
MeasureFlag = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="all|sample:N",
        help="Measure the edited model on these facts: all, or at most N of them, drawn with seed 0.",
    ),
]
_OWN = ("state", "save_every", "keep_partial", "targets")  # the ledger has its own ways for these
_SHOWN = 10


def add(
    ledger: LedgerArgument,
    model: arguments.ModelFlag,
    requests: arguments.RequestsFlag,
    method: Annotated[
        str | None, typer.Option(help="The editing method of a new ledger; by default that of --config, else locft-bf.")
    ] = None,
    config: arguments.ConfigFlag = None,
    buffered: Annotated[
        bool,
        typer.Option("--buffered", help="For a new ledger with locft-bf: train new facts alone, on top of the others."),
    ] = False,
    source: Annotated[str | None, typer.Option(help="Where the facts are from; by default the file.")] = None,
    skip_bad: arguments.SkipBadFlag = False,
    evaluate: MeasureFlag = None,
    chat: arguments.ChatFlag = False,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
    **given: Any,
) -> None:
    """Add facts to a ledger, which is made if it is missing. A fact replaces one with the same prompt.

    Example: fastedit ledger add ./ledger --model ./Llama-3-8B --requests facts.json --method memit

    --model is the unedited model, which is not changed. Give the method and settings once: later calls use those that
    the ledger was begun with.
    """
    from fastedit.requests import load_requests

    measured, facts = _measured(evaluate), load_requests(requests, skip_bad=skip_bad, numbered=False)
    begun = _header(ledger)
    options: dict[str, Any] = {"buffered": True if buffered else None}
    if begun is None or method or config or given:
        method, chat, fields = configuration(config, method or (begun or {}).get("method"), chat, given)
        options |= fields
    if chat or begun is None:
        options["chat_template"] = chat
    with _opened(ledger, model, dtype, device, method=method, **options) as opened:
        _tell(opened.add(facts, source=source or str(requests), evaluate=measured), opened)


def forget(
    ledger: LedgerArgument,
    facts: Annotated[list[str], typer.Argument(help="Ids or prompts of facts that stand.", show_default=False)],
    model: arguments.ModelFlag,
    evaluate: MeasureFlag = None,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Remove facts: the model becomes the one in which they were never added.

    Example: fastedit ledger forget ./ledger f12 f13 --model ./Llama-3-8B
    """
    measured = _measured(evaluate)
    with _opened(ledger, model, arguments.Dtype.auto, device, new=False) as opened:
        _tell(opened.forget(facts, evaluate=measured), opened)


def replace(
    ledger: LedgerArgument,
    fact: Annotated[str, typer.Argument(help="Id or prompt of a fact that stands.", show_default=False)],
    target: Annotated[str, typer.Argument(help="Its new target.", show_default=False)],
    model: arguments.ModelFlag,
    source: Annotated[str | None, typer.Option(help="Where the target is from.")] = None,
    evaluate: MeasureFlag = None,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Give a fact another target.

    Example: fastedit ledger replace ./ledger f12 Lisbon --model ./Llama-3-8B
    """
    measured = _measured(evaluate)
    with _opened(ledger, model, arguments.Dtype.auto, device, new=False) as opened:
        _tell(opened.replace(fact, target, source=source, evaluate=measured), opened)


def log(
    ledger: LedgerArgument,
    as_json: arguments.JsonFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """List all entries: what was added and removed, when, and whether it was learned.

    Example: fastedit ledger log ./ledger --json log.json
    """
    if as_json:
        check_file(as_json, {"the ledger": ledger})
    with _records(ledger) as records:
        entries = records.entries()
    work_begins()
    if as_json:
        with replacing(as_json) as temporary:
            text = json.dumps([entry.to_dict() for entry in entries], ensure_ascii=False, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
    table = _table("entry", "time (UTC)", "what", "facts", "learned", "stand", "seconds")
    for entry in entries:
        learned = _learned(entry)
        seconds = f"{entry.about['seconds']:.1f}" if entry.kind != "rollback" else ""
        what = f"to {entry.about['to']}" if entry.kind == "rollback" else _changed(entry)
        table.add_row(str(entry.number), entry.time[:16], entry.kind, what, learned, str(entry.standing), seconds)
    show(table)


def blame(
    ledger: LedgerArgument,
    prompt: Annotated[str, typer.Argument(help="A prompt whose answer is in question.", show_default=False)],
    model: arguments.ModelFlag,
    subject: Annotated[
        str | None, typer.Option(help="Read the prompt at the last token of this; by default wherever it is nearest.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Facts to list.")] = _SHOWN,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """List the facts that a prompt is nearest to, by the inputs of the edited projection; the ledger is only read.

    Example: fastedit ledger blame ./ledger "The capital of Portugal is" --model ./Llama-3-8B
    """
    with _records(ledger) as records:
        header, facts, entries = records.header, records.standing(), records.entries()
    nearest: list[Likeness] = []
    if header and facts:
        from fastedit.ledger.blame import likenesses
        from fastedit.ledger.ledger import check_model
        from fastedit.models import fingerprint

        dtype = arguments.Dtype(header["dtype"])
        editor = arguments.load(model, dtype, device, chat_template=header["chat_template"])
        check_model(ledger, header, fingerprint(editor.model))
        nearest = likenesses(editor.parts, entries[-1].about["config"], facts, prompt, subject)
    table = _table("cosine", "fact", "prompt", "target", "entry", "source", "read at")
    for like in nearest[:most]:
        request, fact = like.fact.request, like.fact
        last = fact.id, request.prompt, request.target, str(fact.entry), fact.source or "", like.at or "last token"
        table.add_row(f"{like.cosine:+.3f}", *last)
    show(table)


def rollback(
    ledger: LedgerArgument,
    entry: Annotated[
        int, typer.Argument(min=0, help="Number of the entry; 0 is the unedited model.", show_default=False)
    ],
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Go back to the delta of an earlier entry, bit for bit; this is an entry, too.

    Example: fastedit ledger rollback ./ledger 3
    """
    _header(ledger, new=False)
    with _records(ledger, write=True) as records:
        made = records.roll_back(entry)
    typer.echo(f"entry {made.number}: rolled back to entry {entry}; {made.standing} facts stand")


def export(
    ledger: LedgerArgument,
    delta: Annotated[Path | None, typer.Option(help="Write the total delta to this file.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the edited model to this folder; replaces a checkpoint. Needs --model.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The unedited model, for --output.")] = None,
    entry: Annotated[int | None, typer.Option(min=1, help="The entry to write; by default the newest.")] = None,
    device: arguments.DeviceFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Write the facts that stand as a delta, for `fastedit export` and `fastedit apply`, or as a checkpoint.

    Example: fastedit ledger export ./ledger --output ./edited --model ./Llama-3-8B
    """
    if (delta is None) == (output is None):
        raise ConfigError("expected --delta FILE or --output DIR, one of them")
    if output and model is None:
        raise ConfigError("--output needs --model, the unedited model of the ledger")
    inputs = arguments.inputs_of(model or "") | {"the ledger": ledger}
    check_file(delta, inputs) if delta else check_directory(output or Path(), inputs)
    with _records(ledger) as records:
        total_delta, dtype = (
            records.delta(records.last if entry is None else entry),
            (records.header or {}).get("dtype"),
        )
    if total_delta is None:
        raise RequestError("no fact stands there, so there is nothing to export")
    if delta:
        work_begins()
        total_delta.save(delta)
        typer.echo(f"the delta was written to {delta}")
        return
    editor = arguments.load(str(model), arguments.Dtype(dtype), device)
    total_delta.check(editor.model)
    check_checkpoint(editor, output or Path(), "export the delta alone: --delta FILE")
    work_begins()
    total_delta.apply(editor.model)
    editor.save_model(output or Path())
    typer.echo(f"the edited model was written to {output}")


LEDGER: dict[str, Callable[..., None]] = {
    "add": configured(add, _OWN),
    "forget": forget,
    "replace": replace,
    "log": log,
    "blame": blame,
    "rollback": rollback,
    "export": export,
}
"""The commands, by name."""


@contextmanager
def _opened(
    folder: Path, model: str, dtype: arguments.Dtype, device: str | None, *, new: bool = True, **options: Any
) -> Iterator[Ledger]:
    """Open the ledger with its model. The work begins with the first progress report; earlier errors are bad input."""
    _header(folder, new=new)
    from fastedit.cli.bars import Bars
    from fastedit.ledger import Ledger

    if dtype is not arguments.Dtype.auto:
        options["dtype"] = dtype.value
    with arguments.loading(model):
        ledger = Ledger.open(folder, model, device=device, **options)
    with ledger, Bars() as bars:
        report = bars.callback("")

        def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
            work_begins()
            report(stage, done, total, loss)

        ledger.editor.progress = progress
        yield ledger


@contextmanager
def _records(folder: Path, *, write: bool = False) -> Iterator[Any]:
    from fastedit.ledger import Records

    records = Records(folder, write=write)
    try:
        yield records
    finally:
        records.close()


def _header(folder: Path, *, new: bool = True) -> dict[str, Any] | None:
    """The header of a ledger; None if there is no ledger yet and `new` allows that."""
    from fastedit.ledger.records import NAME

    if new and not (folder / NAME).is_file():
        return None
    with _records(folder, write=new) as records:  # writing makes tables that an interrupted first run did not make
        header: dict[str, Any] | None = records.header
    return header


def _tell(entry: Entry, ledger: Ledger) -> None:
    """Print what an entry did on stdout, and its notes on stderr."""
    arguments.tell(entry.notes, ledger.editor.method)
    learned = f", learned {learned}" if (learned := _learned(entry)) else ""
    said = f"{_changed(entry)}{learned}, {entry.standing} facts stand"
    typer.echo(f"entry {entry.number}: {said}; {entry.about['seconds']:.1f} s")
    for kind, shares in (entry.about["checks"].get("measures") or {}).items():
        if isinstance(shares, dict) and isinstance(share := shares.get("generated"), float):
            typer.echo(f"{kind}: {share:.1%} generated")


def _measured(evaluate: str | None) -> bool | int:
    """Translate `--evaluate` for the ledger: False for none, True for all, or a number. Raises ConfigError."""
    return evaluate is not None and (arguments.sample_size(evaluate) or True)


def _changed(entry: Entry) -> str:
    return "; ".join(f"{sign}{_ids(facts)}" for sign, facts in (("+", entry.added), ("−", entry.gone)) if facts)


def _ids(facts: Sequence[Fact]) -> str:
    return facts[0].id if len(facts) == 1 else f"{len(facts)} ({facts[0].id} … {facts[-1].id})"


def _learned(entry: Entry) -> str:
    checks = entry.about.get("checks") or {}
    return f"{checks['edits'] - len(checks['unlearned'])} of {checks['edits']}" if checks else ""


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD)
