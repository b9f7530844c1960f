"""The records of a ledger on disk: SQLite for facts and entries, safetensors for deltas and targets.

An entry counts as soon as SQLite has committed it. Its tensors are on disk by then. Tensors of an entry that was cut
off belong to no entry, and the next process removes them. Files are written once and never changed.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from difflib import get_close_matches
from hashlib import sha256
from numbers import Integral
from pathlib import Path
from typing import Any

from fastedit.delta import WeightDelta
from fastedit.errors import FileError, Problem, RequestError
from fastedit.files import check_writable, locked
from fastedit.requests import EditRequest

NAME = "ledger.sqlite"
_FILE = re.compile(r"\.?\d+\.(delta|targets)\.safetensors(\.[0-9a-f]+)?")  # also with a temporary name
_OPEN: set[Path] = set()  # ledgers that this process writes: a lock keeps out only other processes
_VERSION = 1
_SCHEMA = (
    "CREATE TABLE header (one INTEGER PRIMARY KEY CHECK (one = 1), content TEXT NOT NULL)",
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, kind TEXT NOT NULL, time TEXT NOT NULL, state TEXT NOT NULL, "
    "standing INTEGER NOT NULL, delta TEXT, about TEXT NOT NULL)",
    "CREATE TABLE facts (serial INTEGER PRIMARY KEY, request TEXT NOT NULL, source TEXT, "
    "entry INTEGER NOT NULL REFERENCES entries, targets TEXT, place INTEGER)",
    "CREATE TABLE changes (fact INTEGER NOT NULL REFERENCES facts, entry INTEGER NOT NULL REFERENCES entries, "
    "stands INTEGER NOT NULL, PRIMARY KEY (fact, entry)) WITHOUT ROWID",
    "CREATE INDEX states ON entries (state)",
    "CREATE INDEX of_entry ON changes (entry)",
    f"PRAGMA user_version = {_VERSION}",
)
# the facts whose last change up to an entry says that they stand
_STANDING = (
    "SELECT facts.* FROM facts JOIN changes ON changes.fact = facts.serial WHERE changes.stands AND changes.entry = "
    "(SELECT max(entry) FROM changes WHERE fact = facts.serial AND entry <= ?) ORDER BY facts.serial"
)


@dataclass(frozen=True)
class Fact:
    """A fact of a ledger.

    Attributes:
        serial: its number among all facts that were ever added, from 1.
        request: the whole request.
        source: where it is from, such as a file.
        entry: number of the entry that added it.
        targets: the file of its target z, if the method has targets.
        place: its row in that file.
    """

    serial: int
    request: EditRequest
    source: str | None
    entry: int
    targets: str | None = None
    place: int | None = None

    @property
    def id(self) -> str:
        """The id of its request; the ledger gives one if there is none."""
        return str(self.request.id)


@dataclass(frozen=True)
class Entry:
    """One change of a ledger.

    Attributes:
        number: from 1; 0 is the unedited model.
        kind: add, forget, replace or rollback.
        time: UTC, ISO 8601.
        added: facts that stand since this entry; after a rollback, those that stand again.
        gone: facts that no longer stand.
        standing: how many facts stand after it.
        state: a digest of the facts that stand, and of the order in which they were written.
        delta: the file of the total delta to the unedited model; None if no fact stands.
        about: serializable to JSON: "config" with every choice made, "seconds", "notes", and "checks": how many edits
            were made ("edits"), which of them are "unlearned" and why, and the "measures" if they were asked for.
    """

    number: int
    kind: str
    time: str
    added: tuple[Fact, ...]
    gone: tuple[Fact, ...]
    standing: int
    state: str
    delta: str | None
    about: Mapping[str, Any]

    @property
    def notes(self) -> list[str]:
        """Notes on the entry for the user."""
        return list(self.about.get("notes", ()))

    def to_dict(self) -> dict[str, Any]:
        """The entry for JSON."""
        fields = asdict(self)
        for name, facts in (("added", self.added), ("gone", self.gone)):
            fields[name] = [asdict(fact.request) | {"id": fact.id, "source": fact.source} for fact in facts]
        return fields


def check_place(folder: Path) -> None:
    """Raise FileError for a folder that holds a model instead of a ledger."""
    if not (folder / NAME).is_file() and ((folder / "config.json").exists() or any(folder.glob("*.safetensors"))):
        raise FileError(folder, "{path} holds a model; give the ledger a folder of its own")


class Records:
    """The folder of a ledger.

    Args:
        write: hold the lock, make a ledger if there is none, and remove what an interrupted process left.

    Raises:
        FileError: there is no ledger, it is damaged or of a newer version, the folder holds a model, or another process
            holds the lock.
    """

    def __init__(self, folder: str | Path, *, write: bool = False) -> None:
        self.folder = Path(folder)
        path = self.folder / NAME
        check_place(self.folder)
        if not write and not path.is_file():
            raise FileError(
                self.folder, f"{{path}} is not a ledger: it holds no {NAME}; `fastedit ledger add` makes one"
            )
        self._db: sqlite3.Connection | None = None
        self._kept = ExitStack()  # what `close` releases, in reverse order
        try:
            if write:
                self._lock()
            with self._readable():
                self._db = sqlite3.connect(path, isolation_level=None, timeout=60)
                self._kept.callback(self._db.close)
                self._check_version(path, write)
                self._db.execute("PRAGMA foreign_keys = ON")
                self._db.execute("PRAGMA synchronous = FULL")
            if write:
                self._sweep()
                self._kept.callback(self._tidy)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        folder = self.folder.resolve()
        if folder in _OPEN:
            raise FileError(self.folder, "{path} is open in this process already; use that ledger, or close it first")
        check_writable(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)  # `locked` does not make it on a system without locks
        self._kept.enter_context(locked(self.folder))
        _OPEN.add(folder)
        self._kept.callback(_OPEN.discard, folder)

    def _check_version(self, path: Path, write: bool) -> None:
        ((version,),) = self._all("PRAGMA user_version")
        if version > _VERSION:
            text = f"{{path}} has format {version}, and this fastedit knows {_VERSION}; install a newer fastedit"
            raise FileError(path, text)
        if version == _VERSION:
            return
        if self._all("SELECT name FROM sqlite_master"):
            raise FileError(path, "{path} is a database of something else; give another folder")
        if not write:
            raise FileError(self.folder, "{path} is an empty ledger; `fastedit ledger add` fills it")
        with self._transaction():
            for statement in _SCHEMA:
                self._all(statement)

    def close(self) -> None:
        """Release the lock; remove files of failed entries, and the ledger if it has no entry."""
        self._kept.close()
        self._db = None

    @property
    def header(self) -> dict[str, Any] | None:
        """The ledger's model and settings; None while it has no entry."""
        rows = self._all("SELECT content FROM header")
        return json.loads(rows[0][0]) if rows else None

    @property
    def last(self) -> int:
        """The number of the newest entry; 0 if there is none."""
        ((number,),) = self._all("SELECT ifnull(max(number), 0) FROM entries")
        return int(number)

    @property
    def last_serial(self) -> int:
        """The serial of the newest fact; 0 if there is none."""
        ((serial,),) = self._all("SELECT ifnull(max(serial), 0) FROM facts")
        return int(serial)

    def entries(self, only: int | None = None) -> list[Entry]:
        """All entries, oldest first; or only one of them, as a list that is empty if it does not exist."""
        where, values = ("", ()) if only is None else ("WHERE {} = ?", (only,))
        changes: dict[int, tuple[list[Fact], list[Fact]]] = {}
        for entry, stands, *fact in self._all(
            "SELECT changes.entry, stands, facts.* FROM changes JOIN facts ON serial = fact "
            f"{where.format('changes.entry')} ORDER BY serial",
            *values,
        ):
            changes.setdefault(entry, ([], []))[not stands].append(_fact(fact))
        entries = []
        rows = self._all(f"SELECT * FROM entries {where.format('number')} ORDER BY number", *values)
        for number, kind, time, state, standing, delta, about in rows:
            added, gone = changes.get(number, ([], []))
            entries.append(
                Entry(number, kind, time, tuple(added), tuple(gone), standing, state, delta, json.loads(about))
            )
        return entries

    def entry(self, number: int) -> Entry:
        """An entry by its number. Raises RequestError if there is none."""
        entries = self.entries(number)
        if not entries:
            raise RequestError(f"there is no entry {number}; the entries are 1 to {self.last}, 0 is the unedited model")
        return entries[0]

    def with_state(self, state: str) -> Entry | None:
        """The newest entry with this state, or None."""
        rows = self._all("SELECT max(number) FROM entries WHERE state = ?", state)
        return None if rows[0][0] is None else self.entry(rows[0][0])

    def standing(self, number: int | None = None) -> list[Fact]:
        """The facts that stand after an entry, by default the newest, in the order in which they were added."""
        return [_fact(row) for row in self._all(_STANDING, self.last if number is None else number)]

    def find(self, names: Sequence[str]) -> list[Fact]:
        """Find facts that stand by id or prompt.

        Raises:
            RequestError: no names, or some that are no texts; some facts do not stand (names similar ones); a name is
                the id of one fact and the prompt of another.
        """
        if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
            raise RequestError(f"facts are {names!r:.80}; give ids or prompts, at least one")
        standing, problems = self.standing(), list[Problem]()
        of_prompt = {fact.request.prompt: fact for fact in standing}
        known = of_prompt | {fact.id: fact for fact in standing}
        for name in names:
            if name in of_prompt and of_prompt[name] is not known[name]:
                cause = f"it is the id of one fact and the prompt of another, {of_prompt[name].id}"
                problems.append(Problem(repr(name), f"{cause}; give the first one's prompt, or the other's id"))
            elif name not in known:
                near = [known[other].id for other in get_close_matches(name, known, n=3, cutoff=0.4)]
                hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "`log` lists them"
                problems.append(Problem(repr(name), f"no fact with this id or prompt stands; {hint}"))
        if problems:
            raise RequestError.of(problems, "facts")
        return list({known[name].serial: known[name] for name in names}.values())

    def tensors(self, name: str) -> Path:
        """The path of a file of tensors."""
        return self.folder / "tensors" / name

    def delta(self, number: int) -> WeightDelta | None:
        """The total delta after an entry; None if no fact stands there.

        Raises:
            RequestError: there is no such entry, or it is no whole number.
            FileError: its file is damaged; says what to do.
        """
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise RequestError(f"the entry is {number!r}; give its number, as `log` shows it")
        if number == 0 or (file := self.entry(number).delta) is None:
            return None
        try:
            return WeightDelta.load(self.tensors(file))
        except FileError as error:
            before = [entry for entry in self.entries() if entry.delta != file and entry.number < number]
            way = f"`fastedit ledger rollback {self.folder} {before[-1].number if before else 0}`"
            text = f"the delta of entry {number} is damaged ({error}); go back to the entry before: {way}"
            raise FileError(self.folder, text) from error

    def commit(
        self,
        kind: str,
        state: str,
        delta: str | None,
        about: Mapping[str, Any],
        *,
        new: Sequence[Fact] = (),
        back: Iterable[Fact] = (),
        gone: Iterable[Fact] = (),
        sought: Iterable[Fact] = (),
        header: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Make an entry, whole or not at all; its files must be written already.

        Args:
            new: facts that were never added before.
            back: facts that stand again.
            gone: facts that no longer stand.
            sought: facts whose targets are in other files now.
            header: header of the ledger, for its first entry.
        """
        number, back, gone = self.last + 1, list(back), list(gone)
        standing = len(self.standing()) + len(new) + len(back) - len(gone)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self._transaction():
            if header is not None:
                self._all("INSERT OR IGNORE INTO header VALUES (1, ?)", json.dumps(header))
            row = number, kind, now, state, standing, delta, json.dumps(about)
            self._all("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", *row)
            for fact in new:
                values = json.dumps(asdict(fact.request)), fact.source, fact.entry, fact.targets, fact.place
                self._all("INSERT INTO facts VALUES (?, ?, ?, ?, ?, ?)", fact.serial, *values)
            for fact in sought:
                self._all(
                    "UPDATE facts SET targets = ?, place = ? WHERE serial = ?", fact.targets, fact.place, fact.serial
                )
            for stands, facts in ((1, [*new, *back]), (0, gone)):
                for fact in facts:
                    self._all("INSERT INTO changes VALUES (?, ?, ?)", fact.serial, number, stands)
        return self.entry(number)

    def roll_back(self, number: int) -> Entry:
        """Make an entry that goes back to an earlier one, with the same file.

        Raises:
            RequestError, FileError: as for `delta`.
        """
        self.delta(number)  # raises if it is damaged
        then = self.entry(number) if number else None
        before, now = ({fact.serial: fact for fact in self.standing(n)} for n in (number, None))
        about = dict(then.about) if then else {}
        about["notes"], about["to"] = [], number
        back = [fact for serial, fact in before.items() if serial not in now]
        gone = [fact for serial, fact in now.items() if serial not in before]
        state, delta = (then.state, then.delta) if then else (state_of([]), None)
        return self.commit("rollback", state, delta, about, back=back, gone=gone)

    def _sweep(self) -> None:
        """Remove files that belong to no entry and no fact, such as those of an interrupted entry."""
        rows = self._all("SELECT delta FROM entries UNION SELECT targets FROM facts")
        used = {name for (name,) in rows}
        for file in self.tensors("").glob("*"):
            if _FILE.fullmatch(file.name) and file.name not in used:
                with suppress(OSError):
                    file.unlink()

    def _tidy(self) -> None:
        with suppress(FileError, OSError):
            self._sweep()
            if not self.last:
                (self.folder / NAME).unlink()
                self.tensors("").rmdir()

    def _all(self, statement: str, *values: Any) -> list[Any]:
        if self._db is None:
            raise FileError(self.folder, "{path} is closed; open the ledger again")
        with self._readable():
            return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            text = f"{{path}} cannot be read or written ({error}); if it is damaged, put a copy in its place"
            raise FileError(self.folder / NAME, text) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._all("BEGIN IMMEDIATE")
        try:
            yield
            self._all("COMMIT")
        except BaseException:
            with suppress(FileError):
                self._all("ROLLBACK")
            raise


def _fact(row: Sequence[Any]) -> Fact:
    serial, request, *others = row
    return Fact(serial, EditRequest(**json.loads(request)), *others)


def state_of(rounds: Sequence[Sequence[Fact]]) -> str:
    """A digest of facts and of the groups in which they are written."""
    return sha256(json.dumps([[fact.serial for fact in group] for group in rounds]).encode()).hexdigest()[:32]
