"""Several edits of one model: their sum, where they overlap, and which ones were made on top of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from torch import nn

from fastedit.delta import WeightDelta, versions
from fastedit.errors import ConfigError, ModelError, listed
from fastedit.models import fingerprint, plain_state, topology
from fastedit.models.fingerprint import FP16
from fastedit.undo import identity
from fastedit.weights import Update, inner, norm, summed

Given = WeightDelta | str | Path


@dataclass(frozen=True)
class Overlap:
    """A parameter that two deltas change.

    Attributes:
        one, other: the places of the two deltas in the list, from 0.
        path: the parameter.
        cosine: cosine of the two updates; near 0 they do not interfere, at 1 they point in the same direction.
    """

    one: int
    other: int
    path: str
    cosine: float

    def __str__(self) -> str:
        return f"deltas {self.one + 1} and {self.other + 1} both change {self.path}, cosine {self.cosine:+.3f}"


def read(given: Sequence[Given]) -> list[WeightDelta]:
    """Return the deltas; those that are given as files are loaded.

    Raises:
        ConfigError: no list, an empty list, or a delta that is given twice. FileError: a file is not a delta.
    """
    if isinstance(given, str | Path | WeightDelta) or not given:
        raise ConfigError(f"deltas are {given!r}; give a list of deltas or of their files")
    deltas = [delta if isinstance(delta, WeightDelta) else WeightDelta.load(delta) for delta in given]
    names = [
        f"delta {i + 1}" + ("" if isinstance(delta, WeightDelta) else f" ({delta})") for i, delta in enumerate(given)
    ]
    first: dict[str, int] = {}
    pairs = [(first.setdefault(_identity(delta), i), i) for i, delta in enumerate(deltas)]
    if twice := [f"{names[i]} is {names[one]}" for one, i in pairs if one != i]:
        raise ConfigError(
            f"{len(twice)} of the {len(given)} deltas repeat others: {listed(twice)}; give each of them once"
        )
    return deltas


def _identity(delta: WeightDelta) -> str:
    """A text that identifies an edit by its updates and the model that they were made for."""
    updates = {path: identity(update) for path, update in sorted(delta.updates.items())}
    return f"{delta.metadata.get('fingerprint')} {updates}"


def overlaps(deltas: Sequence[WeightDelta]) -> list[Overlap]:
    """Find the parameters that two deltas change, for every pair of deltas."""
    overlapping = []
    for (i, one), (j, other) in combinations(enumerate(deltas), 2):
        for path in one.updates.keys() & other.updates.keys():
            if one.updates[path].shape == other.updates[path].shape:
                u, v = one.updates[path], other.updates[path]
                overlapping.append(Overlap(i, j, path, inner(u, v) / max(norm(u) * norm(v), 1e-300)))
    return sorted(overlapping, key=lambda overlap: (overlap.one, overlap.other, overlap.path))


def added(deltas: Sequence[WeightDelta]) -> dict[str, Update]:
    """Path of each parameter -> the sum of its updates, which does not depend on the order of the deltas."""
    paths = dict.fromkeys(path for delta in deltas for path in delta.updates)
    return {path: summed([d.updates[path] for d in deltas if path in d.updates]) for path in paths}


def stacked(deltas: Sequence[WeightDelta], now: str, put: Callable[[WeightDelta], str]) -> None:
    """Apply deltas to a model: first the sum of those made for it, then of those made on top of that, and so on.

    Args:
        now: the fingerprint of the model.
        put: applies a sum and returns the model's new fingerprint.

    Raises:
        ModelError: some deltas were made for another model; sums of those before them may be applied already.
    """
    fingerprints, group, strangers = [now], list[WeightDelta](), list[int]()

    def put_group() -> str:
        parts = [delta.metadata for delta in group]
        metadata = {"method": "composed", "fingerprint": fingerprints[-1], "versions": versions(), "parts": parts}
        return put(WeightDelta(added(group), metadata))

    for i, delta in enumerate(deltas):
        made_for = delta.metadata.get("fingerprint")
        if made_for not in fingerprints and group and not strangers:
            fingerprints.append(put_group())
            group = []
        if made_for in fingerprints:
            group.append(delta)
        else:
            strangers.append(i)
    if strangers:
        origins = [f"delta {i + 1} was made for {deltas[i].metadata.get('fingerprint')}" for i in strangers]
        after = f", and after the deltas before {listed(fingerprints[1:])}" if len(fingerprints) > 1 else ""
        raise ModelError(
            f"{len(strangers)} of the deltas ({len(deltas)}) cannot be put on this model, whose fingerprint is {now}"
            f"{after}: {listed(origins)}. Give deltas of one model; one that was made on top of another goes right "
            f"after it ({FP16})"
        )
    if group:
        put_group()


class Composition:
    """Several deltas that a model holds together.

    Attributes:
        deltas: the deltas that the model holds now, in the order in which they were given.
        overlaps: where two of them change the same parameter.
    """

    def __init__(
        self, given: Sequence[Given], model: nn.Module, note: Callable[[WeightDelta], object] = lambda _: None
    ) -> None:
        """Apply the deltas to the model; `note` is called with each sum that was applied."""
        self.deltas = read(given)
        if applied := [str(i + 1) for i, delta in enumerate(self.deltas) if delta.applied]:
            raise ModelError(f"a model already holds delta {listed(applied)} of the list; revert it first")
        for i, delta in enumerate(self.deltas):
            try:
                delta.check(model, force=True)
            except ModelError as error:
                raise error.at(f"delta {i + 1}") from None
        self.overlaps = overlaps(self.deltas)
        self._model, self._note, self._unedited = topology(model).model, note, fingerprint(model)
        self._sums: list[WeightDelta] = []
        self._apply(self.deltas)

    @plain_state
    def revert(self, place: int | None = None) -> None:
        """Revert all deltas bit for bit, or one of them as if it had never been in the list.

        Args:
            place: place in `deltas`, from 0, of the one to revert; None reverts all.

        Raises:
            ModelError: all were reverted before; other edits were made on top, in this list or later. Nothing is
                changed then.
            ConfigError: there is no such place.
        """
        if not self._sums:
            raise ModelError("these deltas were reverted; there is nothing to revert")
        if place is not None and not 0 <= place < len(self.deltas):
            raise ConfigError(f"there is no delta {place}: the list has {len(self.deltas)}, counted from 0")
        remaining = [] if place is None else [delta for i, delta in enumerate(self.deltas) if i != place]
        before, reverted = self._sums, list[WeightDelta]()
        try:
            for delta in reversed(before):
                delta.revert()
                reverted.append(delta)
            if remaining and fingerprint(self._model) != self._unedited:
                raise ModelError("another edit was made after these deltas were applied; revert it first")
            self._apply(remaining)
        except BaseException:
            self._sums = before
            while reverted:
                reverted.pop().apply(self._model, force=True)
            raise
        self.deltas, self.overlaps = remaining, overlaps(remaining)

    def _apply(self, deltas: Sequence[WeightDelta]) -> None:
        sums: list[WeightDelta] = []

        def put(delta: WeightDelta) -> str:
            delta.apply(self._model)
            sums.append(delta)
            return fingerprint(self._model)

        try:
            stacked(deltas, self._unedited, put)
        except BaseException:
            for delta in reversed(sums):
                delta.revert()
            raise
        for delta in sums:
            self._note(delta)
        self._sums = sums
