"""Make deltas from facts: solve again from their targets, or train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastedit.editor import Editor
from fastedit.errors import EditError, FileError, ModelError, Problem, RequestError, listed
from fastedit.ledger.records import Fact, Records
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.method import LocateThenEditPlan
from fastedit.methods.locate_then_edit.recipes import Recipe
from fastedit.methods.locate_then_edit.targets import Targets
from fastedit.requests import EditRequest
from fastedit.results import EditResult
from fastedit.tensorfile import load_tensors, save_tensors

_TAG, _WHAT = "fastedit-ledger-targets-1", "the targets"
_MEANT = ("target", "subject", "forget")  # fields that, with the prompt, say what a fact is


@dataclass(frozen=True)
class Written:
    """The result of writing facts.

    Attributes:
        result: the edit, which the model no longer holds.
        sought: the facts whose targets were optimized for it, with the places of the targets.
        statistics: digests of the second moments that were read, by the layer's number.
        lr: the learning rate of targets, None if the method has none.
    """

    result: EditResult
    sought: list[Fact]
    statistics: dict[str, str]
    lr: float | None = None


def write(editor: Editor, facts: Sequence[Fact], records: Records, header: Mapping[str, Any], file: str) -> Written:
    """Write facts into the model with its current weights, and revert that again.

    Args:
        header: header of the ledger; has the learning rate of targets ("lr") and digests of the "statistics" so far.
        file: name of the file for new targets.

    Raises:
        RequestError, ConfigError, ModelError, EditError: as for `Editor.edit`; EditError also for facts without a
            target.
        ModelError: the statistics are not those of the earlier facts.
    """
    plan, lr = editor.plan([fact.request for fact in facts]), header["lr"]
    statistics = plan.made.digests()
    changed = [layer for layer, digest in statistics.items() if header["statistics"].get(layer, digest) != digest]
    if changed:
        raise ModelError(
            f"the statistics of {len(changed)} layers ({listed(changed)}) are not those that the ledger has used; "
            "put these back, or begin another ledger"
        )
    sought: list[Fact] = []
    notes: list[str] = []
    if isinstance(plan.made, LocateThenEditPlan):
        made = plan.made
        if made.recipe.config.lr is None and lr is not None:
            made = replace(made, recipe=made.recipe.with_lr(lr))
        targets, sought, notes = _targets(made, facts, records, file)
        lr = targets.lr
        if made.recipe.config.lr is None:
            made = replace(made, recipe=made.recipe.with_lr(lr))
        places = {fact.request.prompt: place for place, fact in enumerate(facts)}

        def find(batch: Batch, _: Recipe) -> Targets:
            return targets.select([places[edit.prompt] for edit in batch.edits])

        plan = replace(plan, made=replace(made, find=find))
    result = editor.run(plan)
    result.revert()
    if result.interrupted:
        raise EditError(f"interrupted ({result.interrupted}); the ledger takes whole changes only, nothing was written")
    result.notes += notes
    return Written(result, sought, statistics, lr)


def _targets(
    made: LocateThenEditPlan, facts: Sequence[Fact], records: Records, file: str
) -> tuple[Targets, list[Fact], list[str]]:
    """The targets of the facts, in their order; missing ones are optimized and kept in a new file.

    They are optimized with the unedited model, whatever facts stand.
    """
    device, notes = made.batch.model.device, list[str]()
    files: dict[str, list[int]] = {}
    new = [place for place, fact in enumerate(facts) if fact.targets is None]
    for place, fact in enumerate(facts):
        if fact.targets is not None:
            files.setdefault(fact.targets, []).append(place)
    parts, order = [], list[int]()
    for name, places in files.items():
        try:
            tensors, metadata, _ = load_tensors(records.tensors(name), (_TAG,), _WHAT)
            stored = Targets.of_state(tensors, metadata, device)
        except (FileError, KeyError, TypeError) as error:
            notes.append(f"the targets of {len(places)} facts are sought again, since their file is damaged: {error}")
            new += places
            continue
        parts.append(stored.select([facts[place].place or 0 for place in places]))
        order += places
    sought: list[Fact] = []
    if new:
        new.sort()
        fresh = made.find(made.batch.select(new), made.recipe)
        if fresh.dropped:
            bad = [facts[new[i]] for i in fresh.dropped]
            text = f"{len(bad)} facts have no target, because their loss is not finite: {told(bad)}; leave them out"
            raise EditError(text, edits=[fact.id for fact in bad])
        save_tensors(records.tensors(file), *_tagged(fresh))
        sought = [replace(facts[place], targets=file, place=row) for row, place in enumerate(new)]
        parts.append(fresh)
        order += new
    rows = {place: row for row, place in enumerate(order)}
    return Targets.joined(parts).select([rows[place] for place in range(len(facts))]), sought, notes


def _tagged(targets: Targets) -> tuple[dict[str, Tensor], str, dict[str, Any], str]:
    tensors, metadata = targets.state()
    return tensors, _TAG, metadata, _WHAT


def sorted_out(
    edits: Sequence[EditRequest], standing: Sequence[Fact]
) -> tuple[list[EditRequest], list[Fact], list[str]]:
    """Sort out what to add: the last edit of each prompt, unless it stands already.

    Returns:
        The edits to add, the standing facts that they replace, and notes that say so.

    Raises:
        RequestError: nothing is left.
    """
    newest = {request.prompt: request for request in edits}  # the last one is the newest
    by_prompt = {fact.request.prompt: fact for fact in standing}
    same = [
        by_prompt[prompt]
        for prompt, request in newest.items()
        if prompt in by_prompt and not _differing(by_prompt[prompt].request, request)
    ]
    standing_already = {fact.request.prompt for fact in same}
    new = [request for prompt, request in newest.items() if prompt not in standing_already]
    if not new:
        raise RequestError(f"all {len(newest)} facts stand already ({told(same)}); there is nothing to add")
    replaced = [by_prompt[request.prompt] for request in new if request.prompt in by_prompt]
    notes = [f"{len(same)} facts stand already: {told(same)}"] if same else []
    if older := [request for request in edits if newest[request.prompt] is not request]:
        notes.append(f"of requests with one prompt the last one counts; {len(older)} were left out")
    for fact in replaced:
        old, request = fact.request, newest[fact.request.prompt]
        said = [
            f"{request.target!r}",
            *(f"{name} {new!r}" for name, new in _differing(old, request) if name != "target"),
        ]
        notes.append(f"fact {fact.id}, {old.prompt!r:.80} {old.target!r}, is replaced by {', '.join(said)}")
    return new, replaced, notes


def _differing(old: EditRequest, new: EditRequest) -> list[tuple[str, str | None]]:
    """Names and new values of the fields that make another fact of a prompt."""
    return [(name, value) for name in _MEANT if (value := getattr(new, name)) != getattr(old, name)]


def with_ids(edits: Sequence[EditRequest], taken: Iterable[str], serial: int) -> list[EditRequest]:
    """Give each edit without an id one: "f1", "f2", …, by the serials of their facts."""
    used, numbered = {*taken, *(str(request.id) for request in edits)}, []
    for number, request in enumerate(edits, serial):
        id_ = request.id or next(name for name in (f"f{number}" + "'" * n for n in range(10_000)) if name not in used)
        used.add(id_)
        numbered.append(replace(request, id=id_))
    return numbered


def refuse_taken(edits: Sequence[EditRequest], standing: Sequence[Fact]) -> None:
    """Raise RequestError if an id would name two facts; names all such ids."""
    owner: dict[str, str] = {fact.id: fact.request.prompt for fact in standing}
    problems = []
    for request in edits:
        if request.id is None:
            continue
        if owner.setdefault(request.id, request.prompt) != request.prompt:
            problems.append(Problem(f"id {request.id}", f"it names the fact {owner[request.id]!r:.80} already"))
    if problems:
        raise RequestError.of(problems, "ids").add("give other ids, or forget the old facts first")


def told(facts: Sequence[Fact]) -> str:
    """The ids of facts, for a message."""
    return listed([fact.id for fact in facts])
