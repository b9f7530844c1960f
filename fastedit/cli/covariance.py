"""`fastedit covariance`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastedit.cli import arguments
from fastedit.cli.flags import layer_list
from fastedit.cli.phase import work_begins, wrote
from fastedit.cli.processes import speaks
from fastedit.errors import ConfigError, FileError, RequestError
from fastedit.files import check_writable

if TYPE_CHECKING:
    from fastedit.models import Topology
    from fastedit.progress import Progress
    from fastedit.statistics.collect import Doubling
    from fastedit.statistics.moment import StreamingCovariance


def covariance(
    model: Annotated[str | None, typer.Argument(hidden=True)] = None,
    model_option: Annotated[
        str | None,
        typer.Option("--model", help="Folder or hub name of a Hugging Face causal language model; required."),
    ] = None,
    text: Annotated[
        Path,
        typer.Option(
            help=f"Text to collect them from. {arguments.JSON_DOCUMENTS} A file with any other name is UTF-8 text, "
            "with blank lines between its documents (the --text of other commands is one document as a whole).",
            show_default=False,
        ),
    ] = ...,  # type: ignore[assignment]  # typer's way to require an option after one that is not
    layers: Annotated[str, typer.Option(help="Layers, such as 3-8 or 3,5,8-11.", show_default=False)] = ...,  # type: ignore[assignment]
    text_column: Annotated[
        str | None, typer.Option(help='Field of JSON that holds the text; by default "text".')
    ] = None,
    module: Annotated[str, typer.Option(help="The projection whose inputs are the keys.")] = "down_proj",
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after about this many tokens; by default at the end of the text."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the statistics; by default where editing looks, in the user's cache.")
    ] = None,
    until_converged: Annotated[
        bool, typer.Option("--until-converged", help="Stop when doubling the text no longer changes them.")
    ] = False,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a pass, in whole rows of the context (2,048 at most), one at least.")
    ] = 8192,
    dtype: arguments.DtypeFlag = arguments.Dtype.auto,
    device: arguments.DeviceFlag = None,
    offload: arguments.OffloadFlag = None,
    verbose: arguments.VerboseFlag = False,
) -> None:
    """Collect the statistics of a model that rome, memit, emmet and alphaedit need: the second moments of its keys.

    An interrupted run continues where it was last saved. Under torchrun each process reads its share of the text.

    Example: fastedit covariance --model ./Llama-3-8B --text wiki.jsonl --layers 4-8 --tokens 2000000 --until-converged
    """
    from fastedit.statistics.documents import read_documents

    if model is not None:
        arguments.tell_of_old("a model without --model", f"--model {model}")
    if (name := model_option or model) is None:
        raise ConfigError("Missing option '--model'; give the folder or hub name of a model")
    wanted = layer_list(layers)
    if next(read_documents(text, text_column), None) is None:
        raise RequestError(f"{text}: expected text, but it is empty")
    if output and speaks():  # only one: processes would remove folders that others try to make
        check_writable(output)
    editor = arguments.load(name, dtype, device, offload)
    from fastedit.cli.bars import Bars
    from fastedit.models import fingerprint
    from fastedit.statistics.collect import Collection
    from fastedit.statistics.store import user_directory

    topology = editor.topology
    folder = output or user_directory(fingerprint(topology.model))
    if speaks():
        check_writable(folder)
    collection = Collection(
        editor.parts,
        wanted,
        module=module,
        max_tokens=tokens,
        batch_tokens=batch_tokens,
        until_converged=until_converged,
        directory=folder,
    )
    started = time.perf_counter()
    observed = False

    def begins(report: Progress) -> Progress:
        """Until the first report, a run only reads: it compares the text with that of the saved statistics."""

        def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
            nonlocal observed
            observed = True
            work_begins()
            report(stage, done, total, loss)

        return progress

    with _told_how_to_go_on(topology, folder, wanted, module), Bars() as bars:
        documents = read_documents(text, text_column)
        moments = collection.run(documents, progress=begins(bars.callback("")), on_doubling=_tell_doubling)
    wrote(folder)
    said = f"in {time.perf_counter() - started:.1f} s" if observed else "that were there already"
    _tell(moments, f"{said}; written to {folder}", module, until_converged)


@contextmanager
def _told_how_to_go_on(topology: Topology, folder: Path, layers: Sequence[int], module: str) -> Iterator[None]:
    """Say after Ctrl-C, or if the disk is full, from where the same command would continue."""
    from safetensors import SafetensorError

    from fastedit.statistics.store import statistics_path

    def saved() -> str:
        names = [statistics_path(topology, "", layer, module).name for layer in layers]
        if any((directory / name).exists() for directory in (folder, *folder.glob("part-*")) for name in names):
            return "the same command continues where the statistics were last saved"
        return "nothing was saved yet: the same command starts again; after 5 minutes, it continues where it was saved"

    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"fastedit: interrupted; {saved()}", err=True)
        raise typer.Exit(1) from None
    except FileError as error:
        if not isinstance(error.__cause__, (OSError, SafetensorError)):  # not about writing
            raise
        text = f"the statistics could not be saved: {error.__cause__}; {saved()}"
        raise FileError(folder, text) from error


def _tell_doubling(doubling: Doubling) -> None:
    typer.echo(
        f"{doubling.tokens} tokens: twice the text changed C by {doubling.change:.2%}, its leading directions by "
        f"{doubling.subspace:.2%}",
        err=True,
    )


def _tell(moments: dict[int, StreamingCovariance], said: str, module: str, until_converged: bool) -> None:
    """Print what was collected, with a warning if it is too little."""
    moment = min(moments.values(), key=lambda each: each.count)
    if moment.count < moment.dim:
        typer.echo(
            f"{moment.count} tokens are fewer than the width {moment.dim}: C is singular; collect {10 * moment.dim}",
            err=True,
        )
    elif until_converged and not moment.metadata.get("converged"):
        typer.echo("not converged: more text than this would still change the statistics", err=True)
    listed = ",".join(map(str, sorted(moments)))
    typer.echo(f"{module} of layers {listed}: {moment.count} tokens {said}")
