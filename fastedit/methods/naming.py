"""Names of edits in messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized

from fastedit.errors import Problem, RequestError
from fastedit.methods.base import Edit
from fastedit.models import Model, PairError


def edit_name(edit: Edit, place: int) -> str:
    """The name of an edit: its id, or its place among the edits."""
    return f"edit {edit.id if edit.id is not None else place}"


def check_rows(model: Model, edits: Sequence[Edit]) -> None:
    """Check that the model's embedding and head have rows for all tokens of the edits.

    Raises:
        RequestError: edits with tokens that have no row, or without tokens; names all of them.
    """
    if not isinstance(model.tokenizer, Sized) or len(model.tokenizer) <= model.vocabulary:
        return
    pairs = [(edit.prompt, edit.target) for edit in edits]
    try:
        model.tokenize(pairs, append_eos=False)
    except PairError as error:
        raise named_error(error, edits, lambda pair: (pair, "")) from None


def named_error(error: PairError, edits: Sequence[Edit], source: Callable[[int], tuple[int, str]]) -> RequestError:
    """Turn an error about pairs into one about the edits that they were made from, each named once.

    Args:
        source: returns the place of a pair's edit, and the context in front of its prompt ("" for none).
    """
    problems: dict[int, Problem] = {}
    for problem in error.problems:
        place, context = source(problem.pair)
        where = f"after the context {context[:60]!r}" if context else ""
        cause = problem.sentence(in_context=bool(context))
        problems.setdefault(place, Problem(edit_name(edits[place], place), cause, where))
    return RequestError.of_edits([problems[place] for place in sorted(problems)])
