"""What the commands of the command line share: arguments read, models loaded, folders checked and written."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from fastedit.bars import Bars
from fastedit.errors import ConfigError, ModelError, RequestError

if TYPE_CHECKING:
    from fastedit.editor import Editor, EditResult
    from fastedit.evaluate import EvaluationReport
    from fastedit.predictions import Predictions
    from fastedit.requests import EditRequest


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def ranges(text: str, flag: str = "--blocks") -> list[int]:
    """Numbers of a list such as 3,5,8-11."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"{flag} {text}: expected numbers and ranges such as 0-7 or 3,5,8-11")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


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


class _Possible(Exception):  # noqa: N818  # no error: it ends a trial before anything takes effect
    pass


def check_folder(path: Path, model: str) -> None:
    """Refuse now what `save` would refuse hours later."""
    from fastedit.files import replacing_directory

    if path.exists() and Path(model).exists() and path.samefile(model):
        raise ModelError(f"{path} is the model that is edited; give another folder for the edited one")
    _try(path, replacing_directory)


def check_files(*paths: Path | None) -> None:
    """Refuse now what could not be written at the end."""
    from fastedit.files import replacing

    for path in filter(None, paths):
        if path.is_dir():
            raise ModelError(f"{path} is a folder; give the name of a file")
        _try(path, replacing)


def _try(path: Path, replacing: Callable[[Path], Any]) -> None:
    created = [parent for parent in path.parents if not parent.exists()]
    try:
        with replacing(path):
            raise _Possible
    except _Possible:
        pass
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()


def load(model: str, dtype: Dtype, device: str | None, **config: Any) -> Editor:
    """`Editor.from_pretrained`, its failures as a ModelError."""
    import torch
    from transformers.utils import logging as transformers_logging

    from fastedit.editor import Editor

    if not logging.getLogger("fastedit").isEnabledFor(logging.INFO):
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device}: {str(error).splitlines()[0]}") from error
    chosen = "auto" if dtype is Dtype.auto else getattr(torch, dtype.value)
    try:
        return Editor.from_pretrained(model, dtype=chosen, device=device, **config)
    except RuntimeError as error:
        causes = "of other shapes than config.json says, or too large for the device"
        raise ModelError(f"{model}: its weights cannot be loaded ({causes}?): {error}") from error


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
    return f"{n} edits in {result.seconds:.1f} s, {n / result.seconds:.1f} edits/s"


def save(
    directory: Path, editor: Editor, result: EditResult, report: EvaluationReport | None, *, checkpoint: bool
) -> None:
    """Write checkpoint, delta and report in one folder that appears whole or not at all.

    Raises:
        ModelError: `directory` exists and is no checkpoint; it cannot be written; the disk is full.
    """
    from safetensors import SafetensorError

    from fastedit.files import replacing_directory

    did: dict[str, Any] = dict(result.delta.metadata)
    did |= {"seconds": result.seconds, "losses": result.losses, "notes": result.notes}
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
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: could not be saved: {error}; nothing was written") from error
