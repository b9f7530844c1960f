"""Compare texts as answers: normal forms, beginnings, cuts."""

from __future__ import annotations

import re
import string
import unicodedata

from fastedit.models import LINE_ENDS, PARTICLES, SENTENCE_ENDS, hangul, in_word, spaceless

_ARTICLES = ("a", "an", "the")
_WEIGHTS = dict.fromkeys(SENTENCE_ENDS, 1) | dict.fromkeys(LINE_ENDS, 2**20)
_ENDS = SENTENCE_ENDS + "!?…"  # these also occur in names, so that generation goes on after them
_LINE = re.compile(f"\r\n|[{LINE_ENDS}]")
_PARTICLES = re.compile(PARTICLES)


def normalize(text: str) -> str:
    """Remove case, width, punctuation, invisible characters, English articles and extra blanks.

    Accents and vowel signs stay. If nothing would be left, punctuation and the like stay, too.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i")  # the Turkish capital has a dot
    text = unicodedata.normalize("NFKC", folded).strip()
    plain = "".join(c for c in text if not _is_punctuation(c) and unicodedata.category(c) != "Cf")
    return " ".join(word for word in plain.split() if word not in _ARTICLES) or text


def _is_punctuation(c: str) -> bool:
    return c in string.punctuation or unicodedata.category(c)[0] == "P"


def begins_with(text: str, answer: str) -> bool:
    """Whether the text begins with the answer, up to a word boundary, both normalized.

    In scripts without spaces between words there is a boundary after every character, and in Korean before particles.
    """
    text, wanted = unicodedata.normalize("NFC", text).strip(), normalize(answer)
    return any(normalize(text[:i]) == wanted for i in range(1, len(text) + 1) if _word_ends(text, i))


def says(text: str, answer: str) -> bool:
    """Whether the answer occurs in the text, between word boundaries, both normalized."""
    text = unicodedata.normalize("NFC", text).strip()
    starts = (
        i
        for i, c in enumerate(text)
        if i == 0 or not in_word(text[i - 1]) or (_word_ends(text, i) and not (hangul(c) and hangul(text[i - 1])))
    )
    return any(begins_with(text[i:], answer) for i in starts)


def _word_ends(text: str, i: int) -> bool:
    """Whether a word may end before character i."""
    if i == len(text):
        return True
    before, after = text[i - 1], text[i]
    if before.isspace() or _is_punctuation(before):  # the word ended before
        return False
    if unicodedata.category(after)[0] == "M":  # an accent or a vowel sign belongs to the letter before it
        return False
    if spaceless(after) or spaceless(before):
        return True
    if hangul(after) and before.isalnum():  # what is attached to a name or number of another script is no part of it
        return not hangul(before) or _PARTICLES.match(text, i) is not None
    inside = after == "." or (after == "," and before.isdigit())  # as in U.S.A, 3.5 and 1,000
    if inside and before.isalnum() and text[i + 1 : i + 2].isalnum():
        return False
    return not (in_word(before) and in_word(after))


def cut(text: str, answer: str) -> str:
    """Cut a text at the end of a line or of a sentence, after as many of them as there are inside the answer."""
    lines = [m.start() for m in _LINE.finditer(text)][len(_LINE.findall(answer)) :]
    sentences = re.split(f"([{re.escape(_ENDS)}])", text[: lines[0]] if lines else text)
    return "".join(sentences[: 2 * sum(c in _ENDS for c in answer.rstrip(_ENDS)) + 1]).strip()


def inner_ends(answer: str) -> int:
    """The `weight` of all ends inside an answer; sentence ends at its end do not count, generation may stop there."""
    return weight(answer.rstrip(SENTENCE_ENDS))


def weight(text: str) -> int:
    """The number of sentence ends in a text, among which each line end counts as more than all sentences."""
    return sum(_WEIGHTS.get(c, 0) for c in text)
