"""Texts that mean the same answer: normal forms, beginnings, cuts."""

from __future__ import annotations

import re
import string
import unicodedata

from fastedit.models import LINE_ENDS, SENTENCE_ENDS, spaceless

_ARTICLES = ("a", "an", "the")
_OTHER_ENDS = "!?…"  # of sentences, but in the Latin script they stand in names
_LINE = re.compile(f"[{LINE_ENDS}]")
_JOINERS = "\u200c\u200d"  # stand inside words of Persian and of India


def normalize(text: str) -> str:
    """Without case, width, punctuation, invisible characters, English articles and extra blanks.

    Accents and vowel signs count. A text of nothing else keeps what it has of these.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).strip()
    kept = "".join(c for c in text if not _is_punctuation(c) and unicodedata.category(c) != "Cf")
    return " ".join(word for word in kept.split() if word not in _ARTICLES) or text


def _is_punctuation(c: str) -> bool:
    return c in string.punctuation or unicodedata.category(c)[0] == "P"


def begins_with(text: str, answer: str) -> bool:
    """Whether a beginning of the text, up to a word boundary, is the answer, both normalized.

    In scripts that put no spaces between words every character ends at a boundary.
    """
    text, wanted = unicodedata.normalize("NFC", text).strip(), normalize(answer)
    return any(normalize(text[:i]) == wanted for i in range(1, len(text) + 1) if _word_ends(text, i))


def says(text: str, answer: str) -> bool:
    """Whether the answer stands in the text, between word boundaries, both normalized."""
    text = unicodedata.normalize("NFC", text).strip()
    starts = (i for i in range(len(text)) if i == 0 or not text[i - 1].isalnum() or _word_ends(text, i))
    return any(begins_with(text[i:], answer) for i in starts)


def _word_ends(text: str, i: int) -> bool:
    """Whether a word may end in front of character i."""
    if i == len(text):
        return True
    before, behind = text[i - 1], text[i]
    if before.isspace() or _is_punctuation(before):  # it has ended already
        return False
    if unicodedata.category(behind)[0] == "M":  # an accent or a vowel sign belongs to the letter in front
        return False
    if spaceless(behind) or spaceless(before):
        return True
    inside = behind == "." or (behind == "," and before.isdigit())  # as in U.S.A, 3.5 and 1,000
    if inside and before.isalnum() and text[i + 1 : i + 2].isalnum():
        return False
    return not (_in_word(before) and _in_word(behind))


def _in_word(c: str) -> bool:
    return c.isalnum() or unicodedata.category(c)[0] == "M" or c in _JOINERS


def cut(text: str, answer: str, prompt: str = "") -> str:
    """Text up to the end of its first line, or to the end of a sentence behind as many as stand inside the answer.

    "!" and "?" end sentences unless the answer, or the prompt of one without letters, ends in the Latin script.
    """
    last = next((c for c in reversed(prompt + answer) if c.isalpha()), "a")
    marks = SENTENCE_ENDS if "LATIN" in unicodedata.name(last, "") else SENTENCE_ENDS + _OTHER_ENDS
    sentences = re.split(f"([{re.escape(marks)}])", _LINE.split(text, 1)[0])
    return "".join(sentences[: 2 * _inner(answer, marks) + 1]).strip()


def inner_ends(answer: str) -> int:
    """The marks inside an answer that may end a sentence; at one that ends the answer generation may as well stop."""
    return _inner(answer, SENTENCE_ENDS)


def _inner(answer: str, marks: str) -> int:
    return sum(c in marks for c in answer.rstrip(marks))
