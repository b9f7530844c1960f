"""Where the subjects of edits are in their prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastedit.errors import RequestError, listed
from fastedit.methods.base import Edit
from fastedit.methods.naming import edit_name
from fastedit.models import PARTICLES


def repeated_note(names: Sequence[str]) -> list[str]:
    """The note on edits whose subject is in the prompt more than once; no note without names."""
    note = f"the subject stands in the prompt more than once, the last place counts: {listed(names)}"
    return [note] if names else []


def find_subjects(edits: Sequence[Edit]) -> tuple[list[int], list[int]]:
    """The end of each edit's subject in its prompt, in characters, and the places of edits that repeat their subject.

    The last occurrence counts; whole words take precedence over parts of words.

    Raises:
        RequestError: edits without a subject, or with one that is not in the prompt; names all of them.
    """
    ends: list[int] = []
    repeated: list[int] = []
    problems: list[tuple[str, str]] = []
    for place, edit in enumerate(edits):
        name = edit_name(edit, place)
        if not edit.subject:
            text = f"{name} has no subject, and this method reads a fact at the last token of its subject; give the "
            problems.append((name, text + "words of the prompt that the fact is about"))
            continue
        found = subject_ends(edit)
        if not found:
            text = f"{name}: the subject {edit.subject!r} does not stand in the prompt {edit.prompt!r:.80}; give it "
            problems.append((name, text + "as it is written there"))
            continue
        ends.append(found[-1])
        if len(found) > 1:
            repeated.append(place)
    if problems:
        raise RequestError.of(problems)
    return ends, repeated


def subject_ends(edit: Edit) -> list[int]:
    """The ends of all occurrences of an edit's subject in its prompt, in characters, ascending; empty without any.

    If some occurrences are whole words, those inside other words do not count; Korean particles are no part of a word.
    An edit that was made from a template may know its one place, as `subject_end`.
    """
    if not edit.subject:
        return []
    if (known := getattr(edit, "subject_end", None)) is not None:
        return [known]
    literal = re.escape(edit.subject)
    found = [m.end() for m in re.finditer(rf"(?<!\w){literal}(?:(?!\w)|(?={PARTICLES}))", edit.prompt)]
    return found or [m.end() for m in re.finditer(literal, edit.prompt)]
