"""Texts that mean the same answer: normal forms, beginnings, cuts."""

from __future__ import annotations

import re
import string
import unicodedata

_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks; a text of nothing else keeps them."""
    text = unicodedata.normalize("NFC", text).lower().strip()
    kept = "".join(c for c in text if not _is_punctuation(c))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split()) or text


def _is_punctuation(c: str) -> bool:
    return c in string.punctuation or unicodedata.category(c)[0] == "P"


def begins_with(text: str, answer: str) -> bool:
    """Whether a beginning of the text, up to a word boundary, is the answer, both normalized.

    In scripts that put no spaces between words every character ends at a boundary.
    """
    text, wanted = unicodedata.normalize("NFC", text).strip(), normalize(answer)
    return any(normalize(text[:i]) == wanted for i in range(1, len(text) + 1) if _word_ends(text, i))


def _word_ends(text: str, i: int) -> bool:
    """Whether a word may end in front of character i."""
    if i == len(text):
        return True
    before, behind = text[i - 1], text[i]
    if before.isspace() or _is_punctuation(before):  # it has ended already
        return False
    if unicodedata.category(behind)[0] == "M":  # an accent or a vowel sign belongs to the letter in front
        return False
    if unicodedata.name(behind, "").startswith(_SPACELESS) or unicodedata.name(before, "").startswith(_SPACELESS):
        return True
    inside = behind == "." or (behind == "," and before.isdigit())  # as in U.S.A, 3.5 and 1,000
    if inside and before.isalnum() and text[i + 1 : i + 2].isalnum():
        return False
    return not (_in_word(before) and _in_word(behind))


def _in_word(c: str) -> bool:
    return c.isalnum() or unicodedata.category(c)[0] == "M"


def cut(text: str, dots: int) -> str:
    """Text up to the first newline or the "." after ``dots`` of them."""
    return ".".join(text.partition("\n")[0].split(".")[: dots + 1]).strip()


def inner_dots(answer: str) -> int:
    """The "." that generation goes past; at one that ends the answer it may as well stop."""
    return answer.rstrip(".").count(".")
