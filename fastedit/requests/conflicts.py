"""Find prompts with several targets, edits that are given twice, and edits that change nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fastedit.errors import listed
from fastedit.requests.request import EditRequest
from fastedit.requests.values import Pair

_SHOWN = 10  # groups that a report lists before it only counts the rest


@dataclass(frozen=True, slots=True)
class RequestReport:
    """The findings of `find_conflicts`; `str()` shows the first ten groups of each kind.

    `conflicts` holds, for each prompt with several targets, the positions of its requests in `requests`; `duplicates`
    the positions of equal edits (prompt and target); `unchanged` those of edits whose target is their true target.
    """

    requests: Sequence[EditRequest]
    conflicts: tuple[tuple[int, ...], ...]
    duplicates: tuple[tuple[int, ...], ...]
    unchanged: tuple[int, ...] = ()

    @property
    def any(self) -> bool:
        """Whether there is something to report."""
        return bool(self.conflicts or self.duplicates or self.unchanged)

    def __str__(self) -> str:
        lines = []
        used = Counter(request.id for request in self.requests)
        names = [
            str(position) if r.id is None else r.id if used[r.id] == 1 else f"{r.id} of record {position}"
            for position, r in enumerate(self.requests)
        ]
        for groups, meaning in (
            (self.conflicts, "prompt(s) with more than one target; an edit can reach only one of them"),
            (self.duplicates, "edits are given more than once"),
        ):
            if groups:
                lines += [f"{len(groups)} {meaning}:", *(self._line(group, names) for group in groups[:_SHOWN])]
            if len(groups) > _SHOWN:
                lines.append(f"  and {len(groups) - _SHOWN} more")
        if self.unchanged:
            same = listed([names[position] for position in self.unchanged])
            lines.append(f"{len(self.unchanged)} edits have their true_target as target: id {same}")
        if lines and any(count > 1 for id_, count in used.items() if id_ is not None):
            lines.append("(some ids are given more than once; records are counted from 0)")
        return "\n".join(lines) or f"no conflicts and no duplicates among {len(self.requests)} requests"

    def _line(self, group: tuple[int, ...], names: Sequence[str]) -> str:
        ids: defaultdict[str, list[str]] = defaultdict(list)
        for position in group:
            ids[self.requests[position].target].append(names[position])
        targets = [f"{target!r:.80} (id {listed(of_target)})" for target, of_target in ids.items()]
        return f"  {self.requests[group[0]].prompt!r:.80}: {listed(targets)}"


def find_conflicts(requests: Sequence[EditRequest]) -> RequestReport:
    """Find prompts with several targets, edits (prompt and target) given more than once, and edits without a change.

    Conflicts limit the reliability that any editor can reach. Prompts and targets are compared as exact text.
    """
    by_prompt: defaultdict[str, list[int]] = defaultdict(list)
    by_edit: defaultdict[Pair, list[int]] = defaultdict(list)
    for position, request in enumerate(requests):
        by_prompt[request.prompt].append(position)
        by_edit[request.prompt, request.target].append(position)
    conflicts = (tuple(same) for same in by_prompt.values() if len({requests[p].target for p in same}) > 1)
    duplicates = (tuple(same) for same in by_edit.values() if len(same) > 1)
    unchanged = (position for position, request in enumerate(requests) if request.target == request.true_target)
    return RequestReport(requests, tuple(conflicts), tuple(duplicates), tuple(unchanged))
