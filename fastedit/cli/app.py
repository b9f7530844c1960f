"""The command line: `fastedit edit | evaluate | demo | locate | covariance | env`, also `python -m fastedit`.

Exit codes: 0 it worked; 1 it failed while it ran, or Ctrl-C; 2 bad usage or bad input, told in one line
on stderr. torch, transformers and matplotlib are imported inside commands only, so that `--help` is quick.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from fastedit.bars import Bars
from fastedit.cli_common import (
    Dtype,
    check_backend,
    documents_of,
    edit_all,
    inputs_of,
    load,
    measure,
    ranges,
    requests_of,
    save,
    show,
    summary,
)
from fastedit.flags import LARGEST, config_flags, spelled_out
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from typer.core import TyperGroup

from fastedit.errors import ConfigError, EditError, FastEditError, ModelError, RequestError
from fastedit.files import check_directory, check_file, check_writable


class _Group(TyperGroup):
    """Gives a command in `_CONFIGURED` its flags when it is called, and turns errors into exit codes."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _CONFIGURED:
            function, left_out, methods = _CONFIGURED[name]
            alone = typer.Typer(add_completion=False)
            alone.command(name)(spelled_out(function, config_flags(left_out, methods)))
            command = typer.main.get_command(alone)
        if command and command.callback:
            command.callback = _in_known_surroundings(command.callback)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            message, code = "interrupted; nothing was written", 1
        except FastEditError as error:
            message, code = str(error), 2 if isinstance(error, (RequestError, ModelError, ConfigError)) else 1
        except Exception as error:
            if not hasattr(error, "format_message"):  # click's, which typer brings along since 0.2x
                raise
            message, code = f"{error.format_message()} (--help shows an example)", 2
        typer.echo("fastedit: " + " ".join(message.split("\n")), err=True)
        raise typer.Exit(code)


def _in_known_surroundings(command: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(command)
    def run(**given: Any) -> Any:
        check_backend()
        return command(**given)

    return run


app = typer.Typer(
    cls=_Group,
    help="Fast knowledge editing of large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point of the console script."""
    app(prog_name="fastedit")


def _log_to_stderr(verbose: bool) -> bool:
    log = logging.getLogger("fastedit")
    log.handlers = [RichHandler(console=Console(stderr=True), show_path=False)] if verbose else []
    log.setLevel(logging.INFO if verbose else logging.NOTSET)
    return verbose


_Model = Annotated[str, typer.Option("--model", help="Folder or hub name of a Hugging Face causal language model.")]
_Requests = Annotated[
    Path, typer.Option("--requests", help="File of edit requests: JSON or JSON Lines, any known format.")
]
_Text = Annotated[
    Path | None,
    typer.Option("--text", help="UTF-8 text for perplexity, read in windows of the model's context."),
]
_DtypeFlag = Annotated[Dtype, typer.Option("--dtype", help="Of the weights; auto is the checkpoint's own.")]
_Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …; by default the GPU if there is one.")
]
_Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
_Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_log_to_stderr, help="Log what is done and chosen.")
]


def edit(
    model: _Model,
    requests: _Requests,
    output: Annotated[
        Path,
        typer.Option(help="Folder for checkpoint, delta.safetensors, report.json; replaces a checkpoint."),
    ],
    method: Annotated[str, typer.Option(help="The editing method.")] = "locft-bf",
    text: _Text = None,
    measured: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure the model before and after the edit.")
    ] = True,
    delta_only: Annotated[
        bool, typer.Option("--delta-only", help="Do not write the checkpoint, only the delta and the report.")
    ] = False,
    dtype: _DtypeFlag = Dtype.auto,
    device: _Device = None,
    verbose: _Verbose = False,
    **config: Any,
) -> None:
    """Edit a model and write it as a checkpoint that appears whole or not at all.

    Example: fastedit edit --model ./Llama-3-8B --requests facts.json --output ./edited

    Every field of the method's configuration is a flag: --layer 22 --lr 5e-4 --batch-size 100 …
    """
    from fastedit.methods.plan import PAIRS

    from fastedit.methods import METHODS
    from fastedit.methods.locate_then_edit import checked_plan
    from fastedit.models import fingerprint

    if method not in METHODS:
        raise ConfigError(f"--method {method}: unknown; known methods: {', '.join(METHODS)}")
    config_type = METHODS[method][0]
    known = [field.name for field in fields(config_type)]
    for name in config:
        if name not in known:
            raise ConfigError(f"{method} has no field {name!r}; its fields: {', '.join(known)}")
    config_type(**config)  # refuses values before any work starts
    edits, documents = requests_of(requests), documents_of(text)
    folders = {name: config.get(name) for name in ("statistics", "targets")}
    check_directory(output, inputs_of(model, requests=requests, text=text, **folders))
    if folders["targets"]:
        check_writable(Path(folders["targets"]))
    editor = load(model, dtype, device, method=method, **config)
    layer, module = config.get("layer"), config.get("module", "block")
    if layer is not None or "." not in module:
        editor.topology.resolve(layer or 0, module)  # before the model is measured, which takes a while
    if method in PAIRS:
        checked_plan(editor.topology, edits, editor.config, method, fingerprint(editor.model))
    with Bars() as bars:
        before = measure(editor, edits, documents, bars, "before") if measured else None
        result = edit_all(editor, edits, bars)
        after = measure(editor, edits, documents, bars, "after") if measured else None
    for note in result.notes:
        typer.echo(f"{method}: {note}", err=True)
    report = None
    if after:
        from fastedit.evaluate import compare

        report = compare(edits, after, before)
        show(report)
    save(output, editor, result, report, checkpoint=not delta_only)
    typer.echo(f"{summary(result)}; written to {output}")
    if result.interrupted:
        raise typer.Exit(1)


def evaluate(
    model: _Model,
    requests: _Requests,
    text: _Text = None,
    delta: Annotated[
        Path | None,
        typer.Option(help="An edit to apply; measures before and after it, and with both the locality."),
    ] = None,
    json_file: _Json = None,
    dtype: _DtypeFlag = Dtype.auto,
    device: _Device = None,
    verbose: _Verbose = False,
) -> None:
    """Measure a model on edit requests: reliability, generalization, locality, portability, perplexity.

    Example: fastedit evaluate --model ./Llama-3-8B --delta ./edited/delta.safetensors --requests facts.json
    """
    edits, documents = requests_of(requests), documents_of(text)
    if json_file:
        check_file(json_file, inputs_of(model, requests=requests, text=text, delta=delta))
    if delta and delta.is_dir():
        raise ModelError(f"--delta {delta} is a folder; give its file, such as {delta / 'delta.safetensors'}")
    from fastedit.evaluate import compare

    from fastedit.delta import WeightDelta

    change = WeightDelta.load(delta) if delta else None
    editor = load(model, dtype, device)
    before = None
    with Bars() as bars:
        if change:
            before = measure(editor, edits, documents, bars, "before")
            change.apply(editor.model)
        after = measure(editor, edits, documents, bars, "after" if change else "")
    report = compare(edits, after, before)
    show(report)
    if json_file:
        report.save(json_file)


@app.command()
def demo(
    n: Annotated[int, typer.Option("--n", min=1, help="Counterfactual edits to make.")] = 500,
    output: Annotated[
        Path | None,
        typer.Option(help="Also write checkpoint, delta and report to this folder; replaces a checkpoint."),
    ] = None,
    verbose: _Verbose = False,
) -> None:
    """Edit the small trained model that ships with the package, measure it, and take the edit back.

    Example: fastedit demo --n 500
    """
    from fastedit.demo import World, checkpoint_path

    world, path = World(), checkpoint_path()
    if n > len(world.people):
        raise ConfigError(f"--n {n}: the fact world has {len(world.people)} people to make an edit about")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no model; train it: python -m fastedit.demo.train --output {path}")
    if output:
        check_directory(output, inputs_of(str(path)))
    import torch
    from fastedit.evaluate import compare
    from fastedit.predictions import predict

    from fastedit.demo.world import Draw
    from fastedit.requests import EditRequest

    started = time.perf_counter()
    edits, prose = world.requests(n), world.prose(200)
    edited = {request.subject for request in edits}
    others = world.questions("trained", [fact for fact in world.facts if fact.subject not in edited])
    asked = [EditRequest(prompt, answer) for prompt, answer in Draw("demo").shuffled(others)[:500]]
    # the weights are stored in bf16; CPUs compute in fp32 faster
    editor = load(str(path), Dtype.float32, None)

    def accuracy(bars: Bars, when: str) -> float:
        progress = bars.of(f"facts not edited, {when}")
        found = predict(editor.topology, editor.tokenizer, asked, kinds=("rewrite",), progress=progress)
        share: float = compare(asked, found).metrics["reliability"]["generated"]
        return share

    originals = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    with Bars() as bars:
        before, kept_before = measure(editor, edits, prose, bars, "before"), accuracy(bars, "before")
        result = edit_all(editor, edits, bars)
        after, kept_after = measure(editor, edits, prose, bars, "after"), accuracy(bars, "after")
    report = compare(edits, after, before)
    if output:
        save(output, editor, result, report, checkpoint=True)
    result.revert()
    now = editor.model.state_dict()
    restored = all(torch.equal(tensor, now[name]) for name, tensor in originals.items())
    show(report)
    typer.echo(f"facts not edited  {kept_before:.1%} → {kept_after:.1%} of {len(asked)} questions answered")
    typer.echo(f"time              {summary(result)}; {time.perf_counter() - started:.0f} s with measuring")
    if not restored:
        raise EditError("revert did not restore the weights bit for bit; this is a bug, please report it")
    typer.echo("revert            all weights restored, bit for bit")


def locate(
    model: _Model,
    requests: _Requests,
    blocks: Annotated[str | None, typer.Option(help="Such as 0-7 or 3,5,8-11; by default all.")] = None,
    modules: Annotated[str, typer.Option(help="Such as down_proj,up_proj.")] = "down_proj",
    sample: Annotated[int, typer.Option(help="Edits to make at each place.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Of the sample and of the edits.")] = 0,
    text: _Text = None,
    capability: Annotated[
        Path | None, typer.Option(help="File of requests whose targets are known already and should stay so.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Measure generated answers (slower).")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the heat map to this PNG file.")] = None,
    json_file: _Json = None,
    dtype: _DtypeFlag = Dtype.auto,
    device: _Device = None,
    verbose: _Verbose = False,
    **config: Any,
) -> None:
    """Find where to edit: make a sample of the edits at each block and module, measure, take them back.

    Example: fastedit locate --model ./Llama-3-8B --requests facts.json --blocks 0-31 --picture heat.png
    """
    from fastedit.requests import load_requests

    wanted = None if blocks is None else ranges(blocks)
    edits, documents = requests_of(requests), documents_of(text)
    known = [(r.prompt, r.target) for r in load_requests(capability)] if capability else []
    inputs = inputs_of(model, requests=requests, text=text, capability=capability)
    for name, path in (("the output of --picture", picture), ("the output of --json", json_file)):
        if path:
            check_file(path, inputs)
            inputs[name] = path
    from fastedit import locate as locating

    editor = load(model, dtype, device)
    names = [name.strip() for name in modules.split(",")]
    places = len(editor.topology.blocks if wanted is None else wanted) * len(names)
    with Bars() as bars:
        report = locating.locate(
            editor.topology,
            editor.tokenizer,
            edits,
            blocks=wanted,
            modules=names,
            sample=sample,
            seed=seed,
            text=documents,
            capability=known,
            generate=generate,
            progress=bars.of("", min(sample, len(edits)) * places),
            **config,
        )
    show(report)
    if picture:
        report.draw(picture)
    if json_file:
        report.save(json_file)


@app.command()
def covariance(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a Hugging Face causal language model.")],
    text: Annotated[
        Path, typer.Option(help="UTF-8 text with blank lines between documents, or JSON Lines with a text field.")
    ],
    layers: Annotated[str, typer.Option(help="Such as 3-8 or 3,5,8-11.")],
    text_column: Annotated[
        str | None, typer.Option(help='Field of JSON Lines that holds the text; by default "text".')
    ] = None,
    module: Annotated[str, typer.Option(help="The projection whose inputs are the keys.")] = "down_proj",
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop with the batch that reaches so many; by default at the end of the text."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the statistics; by default where editing looks, in the user's cache.")
    ] = None,
    until_converged: Annotated[
        bool, typer.Option("--until-converged", help="Stop when twice the text no longer changes them.")
    ] = False,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a pass, in whole rows of the context (2,048 at most), one at least.")
    ] = 8192,
    dtype: _DtypeFlag = Dtype.auto,
    device: _Device = None,
    verbose: _Verbose = False,
) -> None:
    """Collect what rome, memit, emmet and alphaedit need of a model: the second moments of its keys.

    A run that was interrupted goes on where it was last saved. Under torchrun each process reads its share of the text.

    Example: fastedit covariance ./Llama-3-8B --text wiki.jsonl --layers 4-8 --tokens 2000000 --until-converged
    """
    from fastedit import cli_covariance as collecting

    wanted = ranges(layers, "--layers")
    collecting.check(text, text_column)
    local, world = collecting.processes()
    if output and not local:  # each process would take away the folders that another one tries
        check_writable(output)
    editor = load(model, dtype, device or (collecting.device_of(local) if world > 1 else None))
    collecting.collect_statistics(
        editor.topology,
        editor.tokenizer,
        collecting.read_documents(text, text_column),
        wanted,
        output,
        module=module,
        tokens=tokens,
        batch_tokens=batch_tokens,
        until_converged=until_converged,
    )


@app.command()
def env() -> None:
    """Show versions, processors, and which backend each operation takes here.

    Example: fastedit env
    """
    import torch

    from fastedit.ops import registry

    table = Table(show_header=False, box=None)
    table.add_row("python", platform.python_version())
    for name in ("fastedit", "torch", "triton", "transformers"):
        table.add_row(name, torch.__version__ if name == "torch" else _version(name))  # with its build, as in +cpu
    table.add_row("CPU", f"{torch.get_num_threads()} threads on {os.cpu_count()} cores")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        table.add_row(f"GPU {i}", f"{gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}")
    if not torch.cuda.is_available():
        table.add_row("GPU", "none")
    for op, taken, why in registry.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        table.add_row(f"ops.{op}", taken + f" ({why})" * bool(why))
    show(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# name of a command -> (function, fields of configurations that are not its flags, the methods it runs: None is all)
_CONFIGURED: dict[str | None, tuple[Callable[..., None], tuple[str, ...], tuple[str, ...] | None]] = {
    "edit": (edit, (), None),
    "locate": (locate, ("layer", "module", "seed", "keep_partial"), ("locft-bf",)),
}
app.command("edit")(spelled_out(edit, ()))
app.command("evaluate")(evaluate)
app.command("locate")(spelled_out(locate, ()))
