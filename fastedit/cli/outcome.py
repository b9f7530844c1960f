"""What an edit leaves on disk: its delta and report as soon as it is made, the checkpoint last.

So nothing that comes after the edit can lose it: a measure that fails, a checkpoint that cannot be written, Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.cli.processes import speaks
from fastedit.errors import EditError, FastEditError, FileError, ModelError, reason
from fastedit.files import BY_CHECKPOINT, BY_DELTA, replacing, replacing_directory

if TYPE_CHECKING:
    from fastedit.evaluation.report import EvaluationReport
    from fastedit.models import Model
    from fastedit.results import EditResult

log = logging.getLogger(__name__)

_DELTA, _REPORT = "delta.safetensors", "report.json"


@contextmanager
def keeping(directory: Path, result: EditResult) -> Iterator[Outcome]:
    """Write delta and report of an edit at once; the block then finishes the outcome.

    If it fails, or is interrupted, they stay in the folder that the message names.

    Raises:
        FileError: not even the delta could be written, or the outcome not be finished.
        EditError: Ctrl-C, or what else failed in the block.
    """
    outcome = Outcome(directory, result)
    try:
        outcome.keep()
        yield outcome
    except KeyboardInterrupt:
        raise EditError(f"interrupted; {outcome.kept()}") from None
    except FastEditError as error:
        error.text += f"; {outcome.kept()}"
        raise
    except Exception as error:
        log.info("the edit was made, what followed failed", exc_info=True)
        raise EditError(f"{reason(error)}; {outcome.kept()}") from error


class Outcome:
    """An edit and the folder that it is to be written to.

    Args:
        directory: where checkpoint, delta and report go. What stands there is replaced when all of them are written;
            until then delta and report are beside it.
        result: the edit.
    """

    def __init__(self, directory: Path, result: EditResult) -> None:
        self.directory, self.result = directory, result
        self._place = _free(directory.resolve())

    def keep(self) -> None:
        """Write the delta, and a report without measures. Raises FileError."""
        if not speaks():
            return
        with self._saving():
            with replacing_directory(self._place) as temporary:
                self.result.delta.save(temporary / _DELTA)
            self._report(None)

    def finish(self, report: EvaluationReport | None, model: Model | None) -> None:
        """Write the report, then all of it to the folder: with the checkpoint of a model, if there is one.

        Raises:
            FileError: it cannot be written, or not so that it is read as it is.
        """
        from fastedit.saving import write_checkpoint
        from fastedit.undo import UNDO, copy_undo_files

        if not speaks():
            return
        directory = self.directory.resolve()
        with self._saving():
            self._report(report)
            if model is None and self._place == directory:
                return
            over = BY_DELTA if model is None else BY_CHECKPOINT
            with replacing_directory(directory, over) as temporary:
                if model is not None:
                    write_checkpoint(model, temporary)
                    copy_undo_files(_earlier(model), temporary, below=True)
                    self.result.delta.save_undo(temporary / UNDO)
                for name in (_DELTA, _REPORT):
                    _link(self._place / name, temporary / name)
        if self._place != directory:
            shutil.rmtree(self._place, ignore_errors=True)

    def kept(self) -> str:
        """What is on disk now, for messages."""
        there = [name for name in (_DELTA, _REPORT) if (self._place / name).is_file()]
        if not there:
            return "nothing was written"
        return f"the edit is not lost: {self._place} holds {' and '.join(there)}, but no checkpoint was written"

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ModelError) as error:
            why = error.__cause__ if isinstance(error, FileError) else None  # a FileError is about a part of the folder
            raise FileError(self.directory, f"could not be saved: {why or error}") from error

    def _report(self, report: EvaluationReport | None) -> None:
        result = self.result
        did: dict[str, Any] = dict(result.delta.metadata)
        did |= {"seconds": result.seconds, "losses": result.losses, "notes": result.notes}
        did["interrupted"] = result.interrupted
        did["unlearned"] = [
            {"id": result.requests[place].id, "prompt": result.requests[place].prompt, "why": why}
            for place, why in result.unlearned.items()
        ]
        did["conflicts"], did["duplicates"] = (
            [[result.requests[i].id for i in group] for group in groups]
            for groups in (result.conflicts.conflicts, result.conflicts.duplicates)
        )
        content = {"edit": did} | ({**report.to_dict(), "requests": report.rows} if report else {})
        path = self._place / _REPORT
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _earlier(model: Model) -> list[Path]:
    """The undo files of the checkpoint that the model was loaded from."""
    from fastedit.undo import undo_files

    network: Any = model.network
    source = str(network.config._name_or_path)  # empty if it was not loaded
    return undo_files(Path(source)) if source else []


def _free(directory: Path) -> Path:
    """The folder if nothing stands there, else one beside it that does not exist."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return directory
    names = (f"{directory.name}.delta{n}" for n in ("", *(f"-{i}" for i in range(2, 10_000))))
    return next(place for name in names if not (place := directory.with_name(name)).exists())


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where a file has one name only."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
