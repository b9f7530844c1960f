"""Where the subjects of edits are in their prompts."""

from __future__ import annotations

import re
import unicodedata

from fastedit.methods.base import Edit
from fastedit.models import PARTICLES, Span, in_word

_PARTICLES = re.compile(PARTICLES)
_ALIKE = {
    "'": "\u2018\u2019\u201a\u201b\u02bc\u2032",
    '"': "\u201c\u201d\u201e\u201f\u2033",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2212",
}  # quotation marks and hyphens, and the other characters that people or editors put for them
_PLAIN = {ord(c): plain for plain, alike in _ALIKE.items() for c in alike}


def no_subject(edit: Edit) -> str:
    """Why an edit's subject was not found, and what to do."""
    if not edit.subject:
        reason = "it has no subject, and this method reads a fact at the last token of its subject"
        return f"{reason}; give the words of the prompt that the fact is about"
    return f"the subject {edit.subject!r} is not in the prompt {edit.prompt!r:.80}; give it as it is written there"


def subject_spans(edit: Edit) -> list[Span]:
    """All occurrences of an edit's subject in its prompt, in characters, ascending; empty without any.

    If some occurrences are whole words, those inside other words do not count; Korean particles are no part of a word.
    A subject that is not in the prompt as it is written may be there in other characters for the same text: composed or
    not, with other spaces, quotation marks or hyphens, or with invisible marks. An edit that was made from a template
    may know its one place, as `subject_end`.
    """
    if not edit.subject:
        return []
    if (subject_end := getattr(edit, "subject_end", None)) is not None:
        return [(subject_end - len(edit.subject), subject_end)]
    if (spans := _occurrences(edit.subject, edit.prompt)) or (edit.subject + edit.prompt).isascii():
        return spans
    (subject, _), (prompt, places) = _spelled_out(edit.subject), _spelled_out(edit.prompt)
    return [
        (places[start], places[end - 1] + 1)
        for start, end in (_occurrences(subject, prompt) if subject else [])
        if places[start - 1 : start] != [places[start]] and places[end : end + 1] != [places[end - 1]]
    ]


def _occurrences(subject: str, prompt: str) -> list[Span]:
    """Where a text stands in another one: as whole words if there are such places, else anywhere."""
    spans = [m.span() for m in re.finditer(re.escape(subject), prompt)]
    whole_words = [
        (start, end)
        for start, end in spans
        if not _in_word(prompt[start - 1 : start])
        and (not _in_word(prompt[end : end + 1]) or _PARTICLES.match(prompt, end))
    ]
    return whole_words or spans


def _in_word(c: str) -> bool:
    return bool(c) and (in_word(c) or c == "_")


def _spelled_out(text: str) -> tuple[str, list[int]]:
    """A text in plain characters, accents by themselves and without invisible marks, and where each one comes from."""
    characters = [(plain, place) for place, c in enumerate(text) for plain in unicodedata.normalize("NFKD", c)]
    characters = [
        (plain.translate(_PLAIN), place) for plain, place in characters if unicodedata.category(plain) != "Cf"
    ]
    return "".join(plain for plain, _ in characters), [place for _, place in characters]
