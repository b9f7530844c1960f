"""The state of a run on disk, from which the same run goes on to the same bits after a crash."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit import parallel
from fastedit.errors import FileError, listed
from fastedit.files import check_writable, locked
from fastedit.methods.base import Edit, History
from fastedit.models import Model, fingerprint
from fastedit.tensorfile import checksum, load_tensors, save_tensors, writing
from fastedit.version import version_of

_TAG = "fastedit-run-1"
_ABOUT = "run.json"
# what may lie in the folder: of a run and of the command that began it; written in part, if the process was killed
_OURS = re.compile(r"\.?(command\.json|run\.json|status\.json|lock|\d+\.safetensors)(\.[0-9a-f]+)?")
_WHAT = "the state of the run"
State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and what else there is to know, JSON-able."""


class SavedRun:
    """A folder of numbered states of one run; a state appears whole or not at all.

    Of several processes the first one reads and writes. A run may go on in another number of processes: sums are then
    made in another order, and a note says so.

    Args:
        folder: of this run alone; it is made with the first state.
        depends: JSON-able, by name: all that the bits of the run depend on.
        every: seconds between two states.

    Attributes:
        notes: states that were damaged, for the user.

    Raises:
        FileError: the folder holds another run that is not finished, and which of its parts differs, or files that are
            no part of a run; another process is at work there; it cannot be written.
    """

    def __init__(self, folder: str | Path, depends: Mapping[str, Any], every: float) -> None:
        self._folder, self._every = Path(folder), every
        self._depends = json.loads(json.dumps(depends))
        lasting = {name: value for name, value in self._depends.items() if name not in ("processes", "threads")}
        self._run = sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:32]
        self.notes: list[str] = []
        files = []
        if parallel.first():
            check_alone(self._folder)
            check_writable(self._folder)
            with locked(self._folder):  # from here to its end, a run is kept alone by who runs it
                pass
            if self._files():
                same, self.notes = _same(self._folder / _ABOUT, self._depends)
                if not same:
                    remove_state(self._folder)
            files = self._files()
        self._next = 1 + max((int(file.stem) for file in files), default=0)
        self._saved = time.monotonic()
        self._pending: list[State] = []
        self._failed = False
        self._appended: deque[State] | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        edits: Sequence[Edit],
        config: Any,
        history: History,
        statistics: Callable[[], Mapping[str, str]] = dict,
    ) -> SavedRun | None:
        """The saved run of these edits as a configuration has it; None if it has no folder for one.

        Args:
            statistics: gives the digests of the second moments that the run reads.

        Raises:
            FileError: as the class.
        """
        if config.state is None:
            return None
        texts = [[edit.prompt, edit.target, edit.subject, edit.id] for edit in edits]
        settings = {n: v for n, v in asdict(config).items() if n not in ("state", "save_every", "keep_partial")}
        device = model.topology.device
        depends = settings | {
            "model": fingerprint(model.network),
            "unedited model": history.fingerprint,
            "earlier keys": {path: str(checksum(keys)) for path, keys in history.keys.items()},
            "second moments": dict(statistics()),
            "chat_template": model.chat is not None,
            "dtype": str(next(model.topology.backbone.parameters()).dtype),
            "number of edits": len(edits),
            "edits": sha256(json.dumps(texts).encode()).hexdigest()[:32],
            "versions": {name: version_of(name) for name in ("fastedit", "torch", "transformers")},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "processes": parallel.world(),
        }
        return cls(config.state, depends, config.save_every)

    @property
    def due(self) -> bool:
        """Whether it is time for the next state."""
        return time.monotonic() - self._saved >= self._every

    def replace(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a state that stands for all before it, of which one stays in case that this one is damaged.

        If it cannot be written (a full disk, say), the run goes on without it, and a note says so.
        """
        if self._write(tensors, about):
            for old in self._files()[:-2]:
                with suppress(OSError):
                    old.unlink()

    def newest(self) -> State | None:
        """The newest state that is whole, or None."""
        return parallel.of_first(self._newest)

    def _newest(self) -> State | None:
        states = (self._load(file) for file in reversed(self._files()))
        return next((state for state in states if state is not None), None)

    def next(self) -> State | None:
        """The next of the states that were appended before the run was cut off, or None behind the last one.

        A damaged one ends them: it and those behind it are removed.
        """
        return parallel.of_first(self._next_appended)

    def _next_appended(self) -> State | None:
        if self._appended is None:
            self._appended = self._all_appended()
        return self._appended.popleft() if self._appended else None

    def append(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Add a state to those before it; it is written with the next ones when that is due, or by `flush`."""
        self._pending.append((dict(tensors), dict(about)))
        if self.due:
            self.flush()

    def flush(self) -> None:
        """Write the states that were appended; those that cannot be are tried again with the next ones."""
        tensors = {f"{i}/{name}": x for i, (some, _) in enumerate(self._pending) for name, x in some.items()}
        if self._pending and self._write(tensors, {"appended": [about for _, about in self._pending]}):
            self._pending = []

    def finish(self) -> None:
        """Note that the run is done: its state stays, for the same run, until another one needs the folder."""
        if parallel.first() and self._files():
            with suppress(FileError):
                self._describe(done=True)

    def _all_appended(self) -> deque[State]:
        found: deque[State] = deque()
        files = self._files()
        for number, file in enumerate(files, 1):
            state = self._load(file) if int(file.stem) == number else None
            if state is None:
                for rest in files[number - 1 :]:
                    rest.unlink()
                self._next = number
                break
            tensors, about = state
            for i, part in enumerate(about["appended"]):
                mine = f"{i}/"
                found.append(({n.removeprefix(mine): x for n, x in tensors.items() if n.startswith(mine)}, part))
        return found

    def _write(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bool:
        """Whether the state was written."""
        self._saved = time.monotonic()
        if not parallel.first():
            return True
        try:
            if not self._files():
                self._describe(done=False)
            about = {"run": self._run, **about}
            save_tensors(self._folder / f"{self._next:08}.safetensors", tensors, _TAG, about, _WHAT)
        except FileError as error:
            if not self._failed:
                self.notes.append(f"after a crash this run could not go on from all that was done: {error}")
            self._failed = True
            return False
        self._next += 1
        return True

    def _describe(self, *, done: bool) -> None:
        with writing(self._folder / _ABOUT, f"{_WHAT} could not be saved") as temporary:
            temporary.write_text(json.dumps({"done": done, **self._depends}, indent=1) + "\n", encoding="utf-8")

    def _files(self) -> list[Path]:
        return sorted(file for file in self._folder.glob("*.safetensors") if file.stem.isdecimal())

    def _load(self, file: Path) -> State | None:
        try:
            tensors, about, _ = load_tensors(file, (_TAG,), _WHAT)
        except FileError as error:
            self.notes.append(f"a state of the run is damaged, the one before it is used: {error}")
            return None
        if about.pop("run") != self._run:  # begun after this one was planned
            raise FileError(file.parent, "{path} by now holds the state of another run; give a folder of its own")
        return tensors, about


def check_alone(folder: Path) -> None:
    """Refuse a folder with files that are no part of a run. Raises FileError."""
    others = sorted(file.name for file in folder.iterdir() if not _OURS.fullmatch(file.name)) if folder.is_dir() else []
    if others:
        raise FileError(
            folder, f"{{path}} is to hold the state of a run alone, but has {listed(others)}; give a folder of its own"
        )


def remove_state(folder: Path) -> None:
    """Remove the state of a run, and the folder if nothing else is in it."""
    with suppress(OSError):
        for file in folder.iterdir():
            if _OURS.fullmatch(file.name):
                file.unlink()
        folder.rmdir()


def _same(path: Path, wanted: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether the run that a folder holds is this one, with a note if its processes were others; if not, it is done.

    Raises:
        FileError: it is another run that is not done.
    """
    notes = []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        done = found.pop("done")
        before, now = found.pop("processes", 1), wanted.get("processes", 1)
        wanted = {name: value for name, value in wanted.items() if name != "processes"}
        if before != now:  # which have fewer threads each
            notes = [f"the run was begun by {before} processes and goes on in {now}: the same edit, but not to the bit"]
            found["threads"] = wanted.get("threads")
        differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    except (OSError, ValueError, TypeError) as error:
        raise FileError(path, f"{{path}} is damaged ({error}); delete {path.parent} to begin anew") from error
    if differing and not done:
        parts = "; ".join(f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}" for name in differing)
        raise FileError(
            path.parent,
            f"{{path}} holds the state of another run, which cannot go on as this one: {parts}. Make these the same "
            "again, or delete the folder to begin anew",
        )
    return not differing, notes
