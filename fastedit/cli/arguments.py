"""Flags that several commands share, with the same meaning everywhere, and the reading of their files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from fastedit.errors import ConfigError, ModelError, RequestError
from fastedit.files import read_text

if TYPE_CHECKING:
    from fastedit.checkpoints import Checkpoint
    from fastedit.cli.bars import Bars
    from fastedit.delta import WeightDelta
    from fastedit.editor import Editor
    from fastedit.evaluation.predict import Predictions
    from fastedit.requests import EditRequest

JSON_DOCUMENTS = (
    "A .json, .jsonl or .ndjson file is a JSON array or JSON Lines of documents, each a text or an object with a text "
    "field."
)
"""How each `--text` reads such a file."""


class Dtype(str, Enum):
    """A dtype of weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Offload(str, Enum):
    """The part of a model that stays in the checkpoint's files."""

    prefix = "prefix"


def _log_to_stderr(verbose: bool) -> bool:
    log = logging.getLogger("fastedit")
    log.handlers = []
    if verbose:
        from rich.console import Console
        from rich.logging import RichHandler

        log.handlers = [RichHandler(console=Console(stderr=True), show_path=False)]
    log.setLevel(logging.INFO if verbose else logging.NOTSET)
    return verbose


ModelFlag = Annotated[
    str, typer.Option("--model", help="Folder or hub name of a Hugging Face causal language model, or a GGUF file.")
]
RequestsFlag = Annotated[
    Path,
    typer.Option("--requests", help="File of edit requests: JSON, JSON Lines, CSV or Parquet, in any known format."),
]
SkipBadFlag = Annotated[
    bool,
    typer.Option("--skip-bad", help="Leave out records that cannot be used, with a warning, and use the others."),
]
TextFlag = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help=f"Text for perplexity, read in windows of the model's context. {JSON_DOCUMENTS} A file with any other "
        "name is UTF-8 text, one document as a whole.",
    ),
]
EvaluateFlag = Annotated[
    str,
    typer.Option(
        "--evaluate",
        metavar="all|sample:N",
        help="Requests to measure: all, or at most N of them, drawn with seed 0, with 95 % intervals.",
    ),
]
ConfigFlag = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="JSON file with the method and fields of its configuration, as `fastedit tune` writes it; flags "
        "override the file.",
    ),
]
LayersFlag = Annotated[str | None, typer.Option("--layers", help="Layers, such as 0-7 or 3,5,8-11; by default all.")]
DtypeFlag = Annotated[Dtype, typer.Option("--dtype", help="Dtype of the weights; auto keeps the checkpoint's.")]
DeviceFlag = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …; by default the GPU if there is one.")
]
OffloadFlag = Annotated[
    Offload | None,
    typer.Option(
        "--offload",
        help="For a model larger than the memory: prefix leaves the blocks below the lowest edited one in the "
        "checkpoint's files, and reads each when it runs.",
    ),
]
ChatFlag = Annotated[
    bool,
    typer.Option(
        "--chat", help="Put prompts into the tokenizer's chat template, as a user's turn; for instruct models."
    ),
]
JsonFlag = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
VerboseFlag = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_log_to_stderr, help="Log what is done and chosen.")
]


def check_backend() -> None:
    """Raise ConfigError for an unknown FASTEDIT_BACKEND; operations would notice it only when they are called."""
    if "FASTEDIT_BACKEND" in os.environ:  # otherwise there is no need to import torch
        from fastedit.ops.registry import environment_backend

        environment_backend()


def read_requests(path: Path, skip_bad: bool) -> list[EditRequest]:
    """Read the edits of a file; prints conflicts, duplicates and unchanged facts on stderr."""
    from fastedit.requests import find_conflicts, load_requests

    edits = load_requests(path, skip_bad=skip_bad)
    if (findings := find_conflicts(edits)).any:
        typer.echo(str(findings), err=True)
    return edits


def tell_of_old(old: str, new: str) -> None:
    """Say on stderr that a spelling of version 0.1 has become another."""
    typer.echo(f"{old} is an old spelling of {new}", err=True)


class Command(TyperCommand):
    """A command that also takes the flags of version 0.1, and says how they are spelled now.

    `--evaluate` without a value meant all; `--layers` was `--layer` or `--blocks`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        taken = {spelling for parameter in self.params for spelling in parameter.opts}
        translated = []
        for argument, following in zip(args, [*args, "--"][1:], strict=True):
            flag, equals, value = argument.partition("=")
            if flag in ("--layer", "--blocks") and "--layers" in taken:
                tell_of_old(flag, "--layers")
                argument = f"--layers{equals}{value}"
            translated.append(argument)
            if argument == "--evaluate" and argument in taken and following.startswith("-"):
                tell_of_old("--evaluate without a value", "--evaluate all")
                translated.append("all")
        parsed: list[str] = super().parse_args(ctx, translated)
        return parsed

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The parts of the usage line, without hidden arguments, which click would list."""
        shown = [parameter for parameter in self.get_params(ctx) if not getattr(parameter, "hidden", False)]
        return [self.options_metavar or "", *(piece for each in shown for piece in each.get_usage_pieces(ctx))]


def sample_size(evaluate: str) -> int | None:
    """The N of `--evaluate sample:N`, None for all. Raises ConfigError."""
    word, _, size = evaluate.partition(":")
    if evaluate == "all":
        return None
    if word != "sample" or not size.isdecimal() or not int(size):
        raise ConfigError(f"--evaluate {evaluate}: expected all, or sample:N such as sample:100")
    return int(size)


def documents_of(path: Path | None) -> list[str]:
    """Read the documents of a file, for perplexity.

    Raises:
        FileError, RequestError: the file cannot be read, or is empty.
    """
    if path is None:
        return []
    from fastedit.statistics.documents import JSON, read_documents

    documents = list(read_documents(path)) if path.suffix in JSON else [read_text(path)]
    if not any(document.strip() for document in documents):
        raise RequestError(f"{path}: expected text, but it is empty")
    return documents


def inputs_of(model: str, **given: Path | str | None) -> dict[str, Path]:
    """The inputs of a command that are files or folders, by their names in messages."""
    inputs = {"the model": Path(model)} if os.path.exists(model) else {}
    return inputs | {f"the input of --{name}": Path(path) for name, path in given.items() if path is not None}


def load(model: str, dtype: Dtype, device: str | None, offload: Offload | None = None, **config: Any) -> Editor:
    """Load a model by `Editor.from_pretrained`, quietly. Raises ModelError if it is too large for the device."""
    from fastedit.editor import Editor

    with loading(model):
        return Editor.from_pretrained(
            model, dtype=dtype.value, device=device, offload=offload and offload.value, **config
        )


def tell(notes: Sequence[str], method: str = "note") -> None:
    """Print notes on stderr."""
    for note in notes:
        typer.echo(f"{method}: {note}", err=True)


def tell_of_prompts(editor: Editor, edits: Sequence[EditRequest]) -> None:
    """Print the notes on the prompts of edits on stderr."""
    from fastedit.evaluation.questions import prompt_notes

    tell(prompt_notes(editor.parts, edits))


def tell_of_chat(change: WeightDelta, chat: bool) -> None:
    """Print a note on stderr if an edit was made with the chat template and is measured without it, or vice versa."""
    if change.metadata.get("chat_template", chat) != chat:
        way = "without the chat template; measure without --chat" if chat else "with --chat; measure with it"
        tell([f"this edit was made {way} to see it as it was made"])


def load_network(model: str, dtype: Dtype, device: str | None) -> Any:
    """Load a model without an Editor, quietly; raises ModelError as `load` does."""
    from fastedit.loading import load_model

    with loading(model):
        return load_model(model, dtype=dtype.value, device=device)[0]


def load_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint as files, quietly."""
    from fastedit.checkpoints import Checkpoint

    with loading(str(folder)):
        return Checkpoint(folder)


@contextmanager
def loading(model: str) -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    if not logging.getLogger("fastedit").isEnabledFor(logging.INFO):
        transformers_logging.set_verbosity_error()
        logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except RuntimeError as error:
        raise ModelError(f"{model} cannot be moved to the device, is it too large for it? {error}") from error


def measure(
    editor: Editor, edits: Sequence[EditRequest], text: Sequence[str], bars: Bars, when: str, **options: Any
) -> Predictions:
    """Measure the model on the prompts of the edits and on the text; `options` are those of `predict`.

    Measures of an unedited model ("before") are kept, and taken from there the next time.
    """
    from fastedit.evaluation.baseline import predict_unedited
    from fastedit.evaluation.predict import predict

    function = predict_unedited if when == "before" else predict
    return function(editor.parts, edits, text=text, progress=bars.callback(when), **options)
