"""Write an edit to disk: its delta and report as soon as it is made, the checkpoint last.

So the edit is not lost if something fails after it: a measurement, writing the checkpoint, or Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.cli.processes import speaks
from fastedit.cli.status import memory
from fastedit.errors import EditError, FastEditError, FileError, ModelError, reason
from fastedit.files import BY_CHECKPOINT, BY_DELTA, replacing, replacing_directory
from fastedit.progress import StageClock, no_progress

if TYPE_CHECKING:
    from fastedit.evaluation.report import EvaluationReport
    from fastedit.models import Model
    from fastedit.requests import EditRequest
    from fastedit.results import EditResult

log = logging.getLogger(__name__)

_DELTA, _REPORT, _PAGE = "delta.safetensors", "report.json", "report.html"
# stage of a progress -> its name in the report
_STAGES = {"plan": "planning", "train": "training", "epoch": "training", "keys": "solving", "edits": "solving"}
_STAGES |= {"covariance": "statistics", "rest": "other"}


@contextmanager
def keeping(
    directory: Path, result: EditResult, about: Mapping[str, Any] | None = None, clock: StageClock | None = None
) -> Iterator[Outcome]:
    """Write the delta and report of an edit immediately; the block then finishes the outcome.

    If the block fails or is interrupted, they stay in the folder that the message names.

    Args:
        about: other fields of the report about the edit.
        clock: has the seconds of stages that are not part of the edit itself.

    Raises:
        FileError: the delta could not be written, or the outcome not be finished.
        EditError: Ctrl-C, or another failure in the block.
    """
    outcome = Outcome(directory, result, about or {}, clock or StageClock(no_progress))
    try:
        outcome.keep()
        yield outcome
    except KeyboardInterrupt:
        raise EditError(f"interrupted; {outcome.where()}") from None
    except FastEditError as error:
        error.add(outcome.where())
        raise
    except Exception as error:
        log.info("the edit was made, what followed failed", exc_info=True)
        raise EditError(f"{reason(error)}; {outcome.where()}") from error


class Outcome:
    """An edit and the folder that it is to be written to.

    Args:
        directory: folder for checkpoint, delta and report. Its old content is replaced when all of them are written;
            until then delta and report are beside it.
        result: the edit.
        about, clock: as for `keeping`.
    """

    def __init__(self, directory: Path, result: EditResult, about: Mapping[str, Any], clock: StageClock) -> None:
        self.directory, self.result, self._about, self._clock = directory, result, about, clock
        self._place = _free(directory.resolve())

    def keep(self) -> None:
        """Write the delta, and a report without measures. Raises FileError."""
        if not speaks():
            return
        with self._saving():
            with self._clock.stage("saving"), replacing_directory(self._place) as temporary:
                self.result.delta.save(temporary / _DELTA)
            self._report(None)

    def finish(self, report: EvaluationReport | None, model: Model | None) -> None:
        """Write the report, then put everything into the folder, with a checkpoint of `model` if it is given.

        Raises:
            FileError: something cannot be written, or the checkpoint would not load as the same model.
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
                    with self._clock.stage("saving"):
                        write_checkpoint(model, temporary)
                        copy_undo_files(_earlier(model), temporary, below=True)
                        self.result.delta.save_undo(temporary / UNDO)
                    self._report(report)  # again, with the time that this took
                for name in (_DELTA, _REPORT, _PAGE):
                    _link(self._place / name, temporary / name)
        if self._place != directory:
            shutil.rmtree(self._place, ignore_errors=True)

    def where(self) -> str:
        """Where the edit is on disk, for messages."""
        there = [name for name in (_DELTA, _REPORT) if (self._place / name).is_file()]
        if not there:
            return "nothing was written"
        return f"the edit is not lost: {self._place} holds {' and '.join(there)}, but no checkpoint was written"

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ModelError) as error:
            why = error.__cause__ if isinstance(error, FileError) else None  # a FileError names a file inside it
            raise FileError(self.directory, f"could not be saved: {why or error}") from error

    def _report(self, report: EvaluationReport | None) -> None:
        from fastedit.evaluation.edit_page import edit_page

        did = self._did()
        content = {"edit": did} | ({**report.to_dict(), "requests": report.rows} if report else {})
        with replacing(self._place / _REPORT) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        with replacing(self._place / _PAGE) as temporary:
            temporary.write_text(edit_page(did, report), encoding="utf-8")

    def _did(self) -> dict[str, Any]:
        """The "edit" part of the report."""
        result, requests, findings = self.result, self.result.requests, self.result.conflicts
        did: dict[str, Any] = {**result.delta.metadata, **self._about, "requested": len(requests)}
        did |= {"seconds": result.seconds, "losses": result.losses, "learned": result.learned, "notes": result.notes}
        did["interrupted"] = result.interrupted
        did["unlearned"] = [
            {"id": requests[place].id, "prompt": requests[place].prompt, "why": why}
            for place, why in result.unlearned.items()
        ]
        did["conflicts"], did["duplicates"] = (
            [[requests[i].id for i in group] for group in groups]
            for groups in (findings.conflicts, findings.duplicates)
        )
        did["conflicting"] = [_conflict([requests[i] for i in group]) for group in findings.conflicts]
        stages: dict[str, float] = {}
        for name, seconds in {**result.stages, **self._clock.seconds}.items():
            name = _STAGES.get(name, name)
            stages[name] = stages.get(name, 0.0) + seconds
        did |= {"stages": stages, "slowest": max(stages, key=stages.__getitem__, default=None)}
        did["memory"] = {**memory(), "file": result.cached.get("file", 0), "cached states": dict(result.cached)}
        return did


def _conflict(edits: Sequence[EditRequest]) -> dict[str, Any]:
    """The targets of one prompt, each with the ids of its edits."""
    ids: dict[str, list[str | None]] = {}
    for request in edits:
        ids.setdefault(request.target, []).append(request.id)
    return {"prompt": edits[0].prompt, "targets": [{"target": t, "ids": of_target} for t, of_target in ids.items()]}


def _earlier(model: Model) -> list[Path]:
    """The undo files of the checkpoint that the model was loaded from."""
    from fastedit.undo import undo_files

    network: Any = model.network
    source = str(network.config._name_or_path)  # empty if it was not loaded
    return undo_files(Path(source)) if source else []


def _free(directory: Path) -> Path:
    """The folder if it is empty or does not exist, else a new one beside it."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return directory
    names = (f"{directory.name}.delta{n}" for n in ("", *(f"-{i}" for i in range(2, 10_000))))
    return next(folder for name in names if not (folder := directory.with_name(name)).exists())


def _link(source: Path, target: Path) -> None:
    """Link a file under a second name, or copy it if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
