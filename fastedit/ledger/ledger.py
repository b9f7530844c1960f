"""The Ledger: add, forget and replace facts, and keep a model that holds the current ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fastedit import parallel
from fastedit.compose import Composition, added
from fastedit.delta import WeightDelta, versions
from fastedit.editor import Editor, Requests
from fastedit.errors import ConfigError, FileError, ModelError
from fastedit.evaluation.sampling import draw
from fastedit.ledger.blame import Likeness, likenesses
from fastedit.ledger.making import refuse_taken, sorted_out, with_ids, write
from fastedit.ledger.records import NAME, Entry, Fact, Records, check_place, state_of
from fastedit.methods import DEFAULT_METHOD, METHODS
from fastedit.models import fingerprint
from fastedit.requests import EditRequest, as_requests

# fields of a configuration about folders and memory, which do not change an edit
PLACES = ("statistics", "targets", "state", "save_every", "cache_bytes", "keep_partial")


def check_model(folder: Path, header: Mapping[str, Any], now: str) -> None:
    """Raise ModelError if a model with the fingerprint `now` is not the one of the ledger with this header."""
    if header["fingerprint"] != now:
        raise ModelError(
            f"the ledger {folder} is of a model with fingerprint {header['fingerprint']}, this one has {now}; load the "
            "unedited model that it was begun with"
        )


class Ledger:
    """All facts that were ever edited into a model, in a folder; the Editor's model holds the current ones.

    A fact stands from when it is added until it is forgotten, replaced or rolled back. An entry's total delta to the
    unedited model depends only on that model, the facts that stand and the configuration, so a forgotten fact leaves
    no trace. The solvers (rome, memit, emmet, alphaedit) optimize the target z of each fact once, keep it, and
    solve again for all facts that stand. LocFT-BF starts again from the unedited model and trains all of them. With
    ``buffered`` it trains only the new ones, on the current weights; if one is forgotten, later ones are trained again.

    The folder is locked until `close`, or the end of a ``with`` block. An entry that was cut off leaves nothing.

    Args:
        folder: the folder of the ledger; it is made if it is missing.
        editor: an Editor of the unedited model, with the method and the configuration of the ledger.
        buffered: for locft-bf: train only new facts. None is what the ledger was begun with, else False.
        at: go back to this entry first, as `rollback` does; for a ledger with a damaged newest delta.

    Raises:
        ModelError: the model is edited, or is not the ledger's. ConfigError: another method or configuration; several
            processes of torch.distributed.
        FileError: another process is using the folder (names it); a newer format; a damaged file; a folder that holds a
            model.
    """

    def __init__(
        self, folder: str | Path, editor: Editor, *, buffered: bool | None = None, at: int | None = None
    ) -> None:
        if parallel.world() > 1:
            raise ConfigError("a ledger is kept by one process; start it without torchrun")
        if editor.deltas:
            raise ModelError("the model holds edits that are not the ledger's; revert them first")
        self.editor, self._held = editor, list[Composition]()
        self._records = Records(folder, write=True)
        try:
            self._header = self._checked_header(buffered)
            self._now = self._header["fingerprint"]
            if at is not None:
                self._records.roll_back(at)
            self._hold(self.delta())
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: str | Path,
        method: str | None = None,
        *,
        buffered: bool | None = None,
        at: int | None = None,
        **options: Any,
    ) -> Ledger:
        """Load the model and open the ledger, with the ledger's method and configuration unless others are given.

        Args:
            model: folder or hub name of the unedited model.
            options: those of `Editor.from_pretrained`, and fields of the configuration.

        Raises:
            ModelError, ConfigError, FileError: as for the class, and for `Editor.from_pretrained`.
        """
        header = None
        check_place(Path(folder))
        if (Path(folder) / NAME).is_file():  # errors about the ledger come before the model is loaded
            records = Records(folder, write=True)
            header = records.header
            records.close()
        if header:
            method = method or header["method"]
            own = {"dtype": header["dtype"], "chat_template": header["chat_template"]}
            options = own | (header["config"] if method == header["method"] else {}) | options
        return cls(folder, Editor.from_pretrained(model, method or DEFAULT_METHOD, **options), buffered=buffered, at=at)

    def close(self) -> None:
        """Unlock the folder. The model keeps what it holds."""
        self._records.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def facts(self) -> list[Fact]:
        """The facts that stand, in the order in which they were added."""
        return self._records.standing()

    def log(self) -> list[Entry]:
        """All entries, oldest first."""
        return self._records.entries()

    def delta(self, entry: int | None = None) -> WeightDelta | None:
        """The total delta after an entry, by default the newest; None if no fact stands.

        Raises:
            RequestError: there is no such entry. FileError: its file is damaged.
        """
        return self._records.delta(self._records.last if entry is None else entry)

    def add(self, requests: Requests, *, source: str | None = None, evaluate: bool | int = False) -> Entry:
        """Add facts. A fact with the prompt of one that stands replaces it, and the entry's notes say so.

        It stands already if its target, its subject and what it forgets are the same, too.

        Args:
            requests: as for `Editor.edit`. The ledger gives an id ("f1", "f2", …) to those without one.
            source: where the facts are from; by default the path, if `requests` is one.
            evaluate: measure the edited model on these facts, or on at most this many of them, and keep the result in
                the entry's checks.

        Raises:
            RequestError: requests that cannot be used; ids of other facts; all of these facts stand already.
            ConfigError, ModelError, EditError, FileError: as for `Editor.edit`; model and ledger are as they were.
        """
        if isinstance(requests, str | Path):
            source = source or str(requests)
        standing = self.facts
        new, replaced, notes = sorted_out(as_requests(requests, numbered=False), standing)
        return self._enter("add", new, replaced, source, evaluate, notes)

    def forget(self, facts: str | Sequence[str], *, evaluate: bool | int = False) -> Entry:
        """Remove facts: the model becomes the one in which they were never added.

        Args:
            facts: ids or prompts.

        Raises:
            RequestError: some facts do not stand; similar ones are named. Others as for `add`.
        """
        gone = self._records.find([facts] if isinstance(facts, str) else facts)
        return self._enter("forget", [], gone, None, evaluate, [])

    def replace(self, fact: str, target: str, *, source: str | None = None, evaluate: bool | int = False) -> Entry:
        """Give a fact another target: it is forgotten, and added again under the same id.

        Args:
            fact: its id or its prompt.

        Raises:
            RequestError: the fact does not stand, or has this target already. Others as for `add`.
        """
        (old,) = self._records.find([fact])
        new, replaced, _ = sorted_out([replace(old.request, target=target)], self.facts)
        return self._enter("replace", new, replaced, source or old.source, evaluate, [])

    def rollback(self, entry: int) -> Entry:
        """Go back to the delta of an earlier entry, bit for bit; 0 is the unedited model.

        Raises:
            RequestError: there is no such entry. FileError: its file is damaged.
        """
        then = self._records.delta(entry)
        with self._as_it_was():
            self._hold(then)
            return self._records.roll_back(entry)

    def blame(self, prompt: str, *, subject: str | None = None) -> list[Likeness]:
        """How near the key of a prompt is to those of the facts that stand, the nearest first.

        Args:
            subject: read the prompt's key there; by default at its last token or a fact's subject, whatever is nearer.

        Raises:
            RequestError: the subject is not in the prompt.
        """
        facts = self.facts
        if not facts:
            return []
        config = self.log()[-1].about["config"]
        return likenesses(self.editor.parts, config, facts, prompt, subject)

    def _enter(
        self,
        kind: str,
        new: Sequence[EditRequest],
        gone: Sequence[Fact],
        source: str | None,
        evaluate: bool | int,
        notes: list[str],
    ) -> Entry:
        """Make an entry that removes some facts and adds others."""
        records, started = self._records, time.perf_counter()
        sample = None if evaluate is True else evaluate or None
        draw((), sample)  # refuses a sample that cannot be drawn before the edit
        left = {fact.serial for fact in gone}
        stay = [fact for fact in self.facts if fact.serial not in left]
        refuse_taken(new, stay)
        of_prompt = {fact.request.prompt: fact.id for fact in gone}
        new = [r if r.id else replace(r, id=of_prompt.get(r.prompt)) for r in new]
        serial, number = records.last_serial + 1, records.last + 1
        requests = with_ids(new, [fact.id for fact in stay], serial)
        fresh = [Fact(serial + i, request, source, number) for i, request in enumerate(requests)]
        with self._as_it_was():
            state, file, about, sought = self._make([*stay, *fresh], number)
            about["notes"] = notes + about["notes"]
            if evaluate and (asked := requests or [fact.request for fact in stay]):
                about["checks"]["measures"] = self.editor.evaluate(asked, sample=sample).to_dict()
            about["seconds"] = time.perf_counter() - started
            placed = {fact.serial: fact for fact in sought}
            new_facts = [placed.pop(fact.serial, fact) for fact in fresh]
            changes: dict[str, Any] = {"new": new_facts, "gone": gone, "sought": placed.values()}
            return records.commit(kind, state, file, about, **changes, header=self._header)

    def _make(self, facts: list[Fact], number: int) -> tuple[str, str | None, dict[str, Any], list[Fact]]:
        """Let the model hold exactly these facts.

        Returns:
            Their state, the file of the total delta, what an entry says about it, and the facts with new targets.
        """
        records, rounds = self._records, self._rounds(facts)
        about: dict[str, Any] = {"config": asdict(self.editor.config), "notes": [], "checks": {}}
        state, done, total, file = state_of(rounds), 0, None, None
        for n in range(len(rounds), 0, -1):
            entry = records.with_state(state_of(rounds[:n]))
            if entry is None:
                continue
            try:
                total, file, done = records.delta(entry.number), entry.delta, n
            except FileError:  # damaged: it is made again
                continue
            about["config"], about["checks"] = entry.about["config"], dict(entry.about["checks"])
            break
        self._hold(total)
        if done == len(rounds):
            return state, file, about, []
        unlearned: list[dict[str, Any]] = []
        sought: list[Fact] = []
        for group in rounds[done:]:
            written = write(self.editor, group, records, self._header, f"{number:08}.targets.safetensors")
            result = written.result
            total = result.delta if total is None else self._on_top(total, result.delta)
            self._hold(total)
            self._header |= {"lr": written.lr, "statistics": self._header["statistics"] | written.statistics}
            sought += written.sought
            unlearned += [{"id": group[place].id, "why": why} for place, why in result.unlearned.items()]
            about["notes"] += result.notes
            about["config"] = result.delta.metadata["config"]
        assert total is not None
        about["checks"] = {"edits": sum(map(len, rounds[done:])), "unlearned": unlearned, "measures": None}
        file = f"{number:08}.delta.safetensors"
        total.save(records.tensors(file))
        return state, file, about, sought

    def _rounds(self, facts: list[Fact]) -> list[list[Fact]]:
        """The facts in groups that are written together."""
        if not self._header["buffered"]:
            return [facts] if facts else []
        rounds: dict[int, list[Fact]] = {}
        for fact in facts:
            rounds.setdefault(fact.entry, []).append(fact)
        return list(rounds.values())

    def _on_top(self, below: WeightDelta, delta: WeightDelta) -> WeightDelta:
        """The sum of two deltas; the second was made on top of the first."""
        metadata = delta.metadata | {"fingerprint": self._header["fingerprint"]}
        return WeightDelta(added([below, delta]), metadata)

    def _hold(self, total: WeightDelta | None) -> None:
        """Let the model hold a total delta and no other. Raises ModelError if something else has changed it."""
        if (now := fingerprint(self.editor.model)) != self._now:
            raise ModelError(
                f"something else has changed the ledger's model: its fingerprint is {now}, and was {self._now}; undo "
                "that, or load the unedited model and open the ledger again"
            )
        try:
            while self._held:
                self._held[-1].revert()
                self._held.pop()
            if total is not None and total.updates:
                self._held.append(self.editor.apply_deltas([total]))
        finally:
            self._now = fingerprint(self.editor.model)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """On an exception in the block, let the model hold the delta of the newest entry."""
        before, number = self._held[-1].deltas[0] if self._held else None, self._records.last
        header = dict(self._header)
        self._hold(before)  # raises if something else has changed the model
        try:
            yield
        except BaseException:
            self._header = header
            self._hold(before if self._records.last == number else self.delta())
            raise

    def _checked_header(self, buffered: bool | None) -> dict[str, Any]:
        """The settings that all entries share, of this ledger or for a new one. Raises an error if they differ."""
        editor, header = self.editor, self._records.header
        config = {name: value for name, value in asdict(editor.config).items() if name not in PLACES}
        if header is None and buffered and METHODS[editor.method].solves_each:
            raise ConfigError(f"buffered is for locft-bf; {editor.method} solves all facts again, from their targets")
        now: dict[str, Any] = {
            "fingerprint": fingerprint(editor.model),
            "method": editor.method,
            "config": {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()},
            "chat_template": editor.parts.chat is not None,
            "dtype": str(next(editor.topology.backbone.parameters()).dtype).removeprefix("torch."),
            "buffered": bool(buffered),
            "lr": None,
            "statistics": {},
            "versions": versions(),
        }
        if header is None:
            return now
        check_model(self._records.folder, header, now["fingerprint"])
        if buffered is None:
            now["buffered"] = header["buffered"]
        differing = [name for name in ("method", "chat_template", "dtype", "buffered") if header[name] != now[name]]
        texts = [f"{name} was {header[name]!r} and is {now[name]!r}" for name in differing]
        if not differing:
            old, new = header["config"], now["config"]
            texts = [
                f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in new if old.get(name) != new[name]
            ]
        if texts:
            raise ConfigError(
                f"the ledger {self._records.folder} was begun otherwise: {'; '.join(texts)}. All its facts are written "
                "in one way; leave these as they were, or begin another ledger"
            )
        return header
