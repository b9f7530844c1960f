"""What `fastedit covariance` does: read documents, collect their statistics, tell what came of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from fastedit.bars import Bars

from fastedit.errors import EditError, ModelError, RequestError
from fastedit.files import check_writable

if TYPE_CHECKING:
    from fastedit.collect import Doubling

    from fastedit.models import Topology

_JSON_LINES = (".jsonl", ".ndjson")


def read_documents(path: Path, column: str | None = None) -> Iterator[str]:
    """Documents of a UTF-8 file, one after the other: separated by blank lines, or a field of JSON Lines.

    Args:
        column: of JSON Lines; by default "text", and only in files whose name ends in .jsonl or .ndjson.

    Raises:
        RequestError: unreadable, not UTF-8, no JSON, or a record without that text; names the line.
    """
    name = column or "text"
    paragraph: list[str] = []
    number = 0
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                line.encode()  # an error here knows the line, one of the reading would not
                if column or path.suffix in _JSON_LINES:
                    if line.strip():
                        yield _field(line, name, path, number)
                elif line.strip():
                    paragraph.append(line)
                elif paragraph:
                    yield "".join(paragraph).strip()
                    paragraph = []
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeEncodeError:
        raise RequestError(f"{path}: line {number} is not UTF-8; save as UTF-8") from None
    if paragraph:
        yield "".join(paragraph).strip()


def _field(line: str, name: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{path}: line {number} is no JSON: {error}") from None
    text = record.get(name) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise RequestError(f"{path}: line {number} has no text in the field {name!r}; name it with --text-column")
    return text


def processes() -> tuple[int, int]:
    """(local rank, number of processes) as torchrun tells them."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device_of(local_rank: int) -> str:
    """Where a process of torchrun computes."""
    import torch

    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"


def collect_statistics(
    topology: Topology,
    tokenizer: object,
    documents: Iterator[str],
    layers: Sequence[int],
    output: Path | None,
    *,
    module: str,
    tokens: int | None,
    batch_tokens: int,
    until_converged: bool,
) -> None:
    """Collect, keep in `output` (None: the user's cache) and print what there is now."""
    from fastedit.collect import collect
    from safetensors import SafetensorError
    from torch import distributed

    from fastedit.models import fingerprint
    from fastedit.statistics import statistics_path, user_directory

    world = processes()[1]
    if world > 1:
        distributed.init_process_group("nccl" if topology.device.type == "cuda" else "gloo")
    directory = output or user_directory(fingerprint(topology.model))
    speaks = world == 1 or distributed.get_rank() == 0
    if speaks:
        check_writable(directory)

    def kept() -> str:
        names = [statistics_path(topology, "", layer, module).name for layer in layers]
        if any((folder / name).exists() for folder in (directory, *directory.glob("part-*")) for name in names):
            return "the same command goes on where the statistics were last saved"
        return "nothing was saved yet: the same command starts anew, and goes on where it was saved from 5 minutes on"

    def report(found: Doubling) -> None:
        typer.echo(
            f"{found.tokens} tokens: twice the text changed C by {found.change:.2%}, its leading directions by "
            f"{found.subspace:.2%}",
            err=True,
        )

    started = time.perf_counter()
    fresh = 0
    try:
        with Bars() as bars:
            show = bars.of("")

            def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
                nonlocal fresh
                fresh += 1
                if speaks:
                    show(stage, done, total, loss)

            moments = collect(
                topology,
                tokenizer,
                documents,
                layers,
                module=module,
                max_tokens=tokens,
                batch_tokens=batch_tokens,
                until_converged=until_converged,
                directory=directory,
                progress=progress,
                on_doubling=report,
            )
    except KeyboardInterrupt:
        typer.echo(f"fastedit: interrupted; {kept()}", err=True)
        raise typer.Exit(1) from None
    except ModelError as error:
        if not fresh or not isinstance(error.__cause__, (OSError, SafetensorError)):
            raise
        raise EditError(f"{directory}: the statistics could not be saved: {error.__cause__}; {kept()}") from error
    finally:
        if world > 1:
            distributed.destroy_process_group()
    if not speaks:
        return
    seconds = time.perf_counter() - started
    moment = min(moments.values(), key=lambda each: each.count)
    if moment.count < moment.dim:
        typer.echo(
            f"{moment.count} tokens are fewer than the width {moment.dim}: C is singular; collect {10 * moment.dim}",
            err=True,
        )
    elif until_converged and not moment.metadata.get("converged"):
        typer.echo("not converged: more text than this would still change the statistics", err=True)
    said = f"in {seconds:.1f} s" if fresh else "that were there already"
    listed = ",".join(map(str, sorted(moments)))
    typer.echo(f"{module} of layers {listed}: {moment.count} tokens {said}; written to {directory}")


def check(text: Path, column: str | None) -> None:
    """Refuse before the model is loaded a text without a first document."""
    if next(read_documents(text, column), None) is None:
        raise RequestError(f"{text}: expected text, but it is empty")
