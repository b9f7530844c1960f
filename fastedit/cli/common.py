"""What the commands of the command line share: arguments read, models loaded, folders checked and written."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from fastedit.bars import Bars
from fastedit.flags import numbers
from rich.console import Console, RenderableType

from fastedit.errors import ConfigError, EditError, ModelError, RequestError
from fastedit.files import replacing_directory

if TYPE_CHECKING:
    from fastedit.evaluate import EvaluationReport
    from fastedit.predictions import Predictions

    from fastedit.editor import Editor, EditResult
    from fastedit.requests import EditRequest


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def ranges(text: str, flag: str = "--blocks") -> list[int]:
    """Numbers of a list such as 3,5,8-11."""
    try:
        return numbers(text)
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected numbers and ranges such as 0-7 or 3,5,8-11") from None


def check_backend() -> None:
    """Refuse a backend of the environment that no operation has; the operations look only when they are called."""
    if "FASTEDIT_BACKEND" in os.environ:  # else torch is not imported for it
        from fastedit.ops.registry import of_environment

        of_environment()


def requests_of(path: Path) -> list[EditRequest]:
    """The edits of a file; tells on stderr what cannot be reached or does not need to be edited."""
    from fastedit.requests import find_conflicts, load_requests

    edits = load_requests(path)
    if (found := find_conflicts(edits)).any:
        typer.echo(str(found), err=True)
    return edits


def inputs_of(model: str, **given: Path | str | None) -> dict[str, Path]:
    """What a command reads, by its name in messages; a hub name is no path."""
    found = {"the model": Path(model)} if os.path.isdir(model) else {}
    return found | {f"the input of --{name}": Path(path) for name, path in given.items() if path is not None}


def documents_of(path: Path | None) -> list[str]:
    """The text of a file, for perplexity; RequestError where it cannot be read or is empty."""
    if path is None:
        return []
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: byte {error.start} is not UTF-8; save as UTF-8") from None
    if not text.strip():
        raise RequestError(f"{path}: expected text, but it is empty")
    return [text]


def load(model: str, dtype: Dtype, device: str | None, **config: Any) -> Editor:
    """`Editor.from_pretrained`, quietly; a model that is too large is a ModelError."""
    from transformers.utils import logging as transformers_logging

    from fastedit.editor import Editor

    if not logging.getLogger("fastedit").isEnabledFor(logging.INFO):
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return Editor.from_pretrained(model, dtype=dtype.value, device=device, **config)
    except RuntimeError as error:
        raise ModelError(f"{model} cannot be moved to the device, is it too large for it? {error}") from error


def show(what: RenderableType) -> None:
    """Print to the terminal's width, or to 120 columns of a file."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width that tables would have to fit
        console = Console(width=120)
    console.print(what)


def measure(editor: Editor, edits: Sequence[EditRequest], text: Sequence[str], bars: Bars, when: str) -> Predictions:
    from fastedit.predictions import predict

    return predict(editor.topology, editor.tokenizer, edits, text=text, progress=bars.of(when))


def edit_all(editor: Editor, edits: Sequence[EditRequest], bars: Bars) -> EditResult:
    editor.progress = bars.of("", len(edits))
    return editor.edit(edits)


def summary(result: EditResult) -> str:
    n = len(result.requests)
    if result.interrupted:
        return f"interrupted after {result.seconds:.1f} s, of {n} edits: {result.interrupted}"
    return f"{n} edits in {result.seconds:.1f} s, {n / result.seconds:.1f} edits/s"


def save(
    directory: Path, editor: Editor, result: EditResult, report: EvaluationReport | None, *, checkpoint: bool
) -> None:
    """Write checkpoint, delta and report in one folder that appears whole or not at all.

    Raises:
        EditError: `directory` exists by now and is no checkpoint; it cannot be written; the disk is full.
    """
    from safetensors import SafetensorError

    did: dict[str, Any] = dict(result.delta.metadata)
    did |= {"seconds": result.seconds, "losses": result.losses, "notes": result.notes}
    did["interrupted"] = result.interrupted
    did["conflicts"], did["duplicates"] = (
        [[result.requests[i].id for i in group] for group in groups]
        for groups in (result.conflicts.conflicts, result.conflicts.duplicates)
    )
    content: Mapping[str, Any] = {"edit": did}
    if report:
        content = {**content, **report.to_dict(), "requests": report.rows}
    try:
        with replacing_directory(directory) as temporary:
            if checkpoint:
                editor.topology.model.save_pretrained(temporary)  # type: ignore[operator]
                editor.tokenizer.save_pretrained(temporary)
            result.delta.save(temporary / "delta.safetensors")
            written = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            (temporary / "report.json").write_text(written, encoding="utf-8")
    except (OSError, SafetensorError, ModelError) as error:
        reason = error.__cause__ or error  # of the delta, it is said to have failed already
        raise EditError(f"{directory}: could not be saved: {reason}; nothing was written") from error
