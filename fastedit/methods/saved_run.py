"""The state of a run on disk. After a crash the same run continues from it and ends with the same bits."""

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
_IDENTITY = "run.json"
# files that may be in the folder: of a run, of the command that started it, and unfinished ones of a killed process
_OURS = re.compile(
    r"\.?(command\.json|run\.json|status\.json|lock|\d+\.safetensors)(\.[0-9a-f]+)?"
    r"|\.tmp\w+"  # safetensors writes to such a file first, and a process that is killed leaves it
)
_WHAT = "the state of the run"
State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and everything else, serializable to JSON."""


class SavedRun:
    """A folder with the numbered states of one run; each state appears whole or not at all.

    With several processes, the first one reads and writes. A run may continue with another number of processes: sums
    are then in another order, and a note says so.

    Args:
        folder: used by this run alone; it is made with the first state.
        depends: everything that the bits of the run depend on, by name; serializable to JSON.
        every: seconds between two states.

    Attributes:
        notes: notes for the user, such as on damaged states.

    Raises:
        FileError: the folder holds another unfinished run (names what differs), or files that do not belong to a run;
            another process is using it; it cannot be written.
    """

    def __init__(self, folder: str | Path, depends: Mapping[str, Any], every: float) -> None:
        self._folder, self._every = Path(folder), every
        self._depends = json.loads(json.dumps(depends))
        lasting = {name: value for name, value in self._depends.items() if name not in ("processes", "threads")}
        self._run = _digest(json.dumps(lasting, sort_keys=True))
        self.notes: list[str] = []
        self._stale: list[Path] = []  # of another run, which is finished; they stay until this one has a state
        files = []
        if parallel.first():
            check_alone(self._folder)
            check_writable(self._folder)
            with locked(self._folder):  # fails if another process is using the folder; the caller of `run` locks it
                pass
            if self._files():
                same, self.notes = _same(self._folder / _IDENTITY, self._depends)
                if not same:
                    self._stale = self._files()
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
        """The saved run of these edits with this configuration; None if the configuration has no folder for it.

        Args:
            statistics: returns the digests of the second moments that the run reads.

        Raises:
            FileError: as for the class.
        """
        if config.state is None:
            return None
        texts = [[edit.prompt, edit.target, edit.subject, edit.id] for edit in edits]
        settings = {n: v for n, v in asdict(config).items() if n not in ("state", "save_every", "keep_partial")}
        device = model.topology.device
        depends = settings | {
            "model": history.now or fingerprint(model.network),
            "unedited model": history.fingerprint,
            "earlier keys": {path: str(checksum(keys)) for path, keys in history.keys.items()},
            "second moments": dict(statistics()),
            "chat_template": None if model.chat is None else _digest(repr(model.chat)),
            "tokenizer": _tokenizer_digest(model.tokenizer),
            "dtype": str(next(model.topology.backbone.parameters()).dtype),
            "number of edits": len(edits),
            "edits": _digest(json.dumps(texts)),
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

    def replace(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write a state that replaces all before it; only the previous one is kept, in case this one is damaged.

        If it cannot be written (a full disk, say), the run continues without it, and a note says so.
        """
        if self._write(tensors, metadata):
            for old in self._files()[:-2]:
                with suppress(OSError):
                    old.unlink()

    def newest(self) -> State | None:
        """The newest state that is not damaged, or None."""
        return parallel.of_first(self._newest)

    def _newest(self) -> State | None:
        states = (self._load(file) for file in reversed(self._files()))
        return next((state for state in states if state is not None), None)

    def next(self) -> State | None:
        """The next of the states that were appended before the run was cut off, or None after the last one.

        A damaged state ends the list: it and those after it are removed.
        """
        return parallel.of_first(self._next_appended)

    def _next_appended(self) -> State | None:
        if self._appended is None:
            self._appended = self._all_appended()
        return self._appended.popleft() if self._appended else None

    def append(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Add a state after those before; it is written together with others when that is due, or by `flush`."""
        self._pending.append((dict(tensors), dict(metadata)))
        if self.due:
            self.flush()

    def flush(self) -> None:
        """Write the appended states; those that cannot be written are tried again with the next ones."""
        tensors = {f"{i}/{name}": x for i, (state, _) in enumerate(self._pending) for name, x in state.items()}
        if self._pending and self._write(tensors, {"appended": [metadata for _, metadata in self._pending]}):
            self._pending = []

    def finish(self) -> None:
        """Note that the run is finished. Its state stays for the same run, until another run needs the folder."""
        if parallel.first() and self._files():
            with suppress(FileError):
                self._describe(done=True)

    def _all_appended(self) -> deque[State]:
        states: deque[State] = deque()
        files = self._files()
        for number, file in enumerate(files, 1):
            state = self._load(file) if int(file.stem) == number else None
            if state is None:
                for later in files[number - 1 :]:
                    later.unlink()
                self._next = number
                break
            tensors, metadata = state
            for i, entry in enumerate(metadata["appended"]):
                prefix = f"{i}/"
                states.append(({n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}, entry))
        return states

    def _write(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bool:
        """Write a state; returns whether it was written."""
        self._saved = time.monotonic()
        if not parallel.first():
            return True
        try:
            for file in self._stale:
                file.unlink(missing_ok=True)
            self._stale = []
            if not self._files():
                self._describe(done=False)
            metadata = {"run": self._run, **metadata}
            save_tensors(self._folder / f"{self._next:08}.safetensors", tensors, _TAG, metadata, _WHAT)
        except FileError as error:
            if not self._failed:
                self.notes.append(f"after a crash this run could not go on from all that was done: {error}")
            self._failed = True
            return False
        self._next += 1
        return True

    def _describe(self, *, done: bool) -> None:
        with writing(self._folder / _IDENTITY, f"{_WHAT} could not be saved") as temporary:
            temporary.write_text(json.dumps({"done": done, **self._depends}, indent=1) + "\n", encoding="utf-8")

    def _files(self) -> list[Path]:
        files = sorted(file for file in self._folder.glob("*.safetensors") if file.stem.isdecimal())
        return [file for file in files if file not in self._stale]

    def _load(self, file: Path) -> State | None:
        try:
            tensors, metadata, _ = load_tensors(file, (_TAG,), _WHAT)
        except FileError as error:
            self.notes.append(f"a state of the run is damaged, the one before it is used: {error}")
            return None
        if metadata.pop("run") != self._run:  # another run began after this one was planned
            raise FileError(file.parent, "{path} by now holds the state of another run; give a folder of its own")
        return tensors, metadata


def check_alone(folder: Path) -> None:
    """Raise FileError if a folder holds files that do not belong to a run."""
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


def _tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's rules; if it is not by the tokenizers package, of its class and size."""
    rules: Any = getattr(tokenizer, "backend_tokenizer", None)
    return _digest(rules.to_str() if rules is not None else f"{type(tokenizer).__name__} {len(tokenizer)}")


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]


def _same(path: Path, wanted: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a folder holds this run, with a note if the number of processes changed; otherwise its run is finished.

    Raises:
        FileError: it holds another run that is not finished.
    """
    notes = []
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        done = saved.pop("done")
        before, now = saved.pop("processes", 1), wanted.get("processes", 1)
        wanted = {name: value for name, value in wanted.items() if name != "processes"}
        if before != now:  # threads are counted per process, so they may differ
            notes = [f"the run was begun by {before} processes and goes on in {now}: the same edit, but not to the bit"]
            saved["threads"] = wanted.get("threads")
        differing = sorted(name for name in {*saved, *wanted} if saved.get(name) != wanted.get(name))
    except (OSError, ValueError, TypeError) as error:
        raise FileError(path, f"{{path}} is damaged ({error}); delete {path.parent} to begin anew") from error
    if differing and not done:
        changes = "; ".join(f"{name} was {saved.get(name)!r} and is {wanted.get(name)!r}" for name in differing)
        raise FileError(
            path.parent,
            f"{{path}} holds the state of another run, which cannot go on as this one: {changes}. Make these the same "
            "again, or delete the folder to begin anew",
        )
    return not differing, notes
