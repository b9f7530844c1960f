"""What scripts do: whether spaces stand between their words, and how their sentences end."""

from __future__ import annotations

import re
import unicodedata

SENTENCE_ENDS = ".。．｡！？।॥۔؟։።፧။។༎‼⁇⁈⁉"
"""Marks that end a sentence whatever the language; "!" and "?" are not among them, which names in English hold."""

_SPACELESS = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "FULLWIDTH"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)
_CLOSES = re.compile(rf"[{re.escape(SENTENCE_ENDS)},;:!?%،؛、，；：…)\]}}»”’）」』】》〉](?:\s|$)")


def spaceless(c: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return unicodedata.name(c, "").startswith(_SPACELESS)


def joined(prompt: str, target: str) -> str:
    """The prompt and what comes after it as one text, with a space between them where their script has one.

    There is none where both are of scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer,
    Burmese, Tibetan), as told by the last letter of the prompt and the first one of the target, if it has any; nor in
    front of a mark that closes what stands before it, such as a comma. Whitespace at the border is text like any other:
    the space is put beside it.
    """
    last = next((c for c in reversed(prompt) if c.isalpha()), " ")
    first = next((c for c in target if c.isalpha()), last)
    if _CLOSES.match(target) or (spaceless(last) and spaceless(first)):
        return prompt + target
    return f"{prompt} {target}"
