"""Rules of scripts: whether they put spaces between words, and how their sentences end."""

from __future__ import annotations

import re
import unicodedata

SENTENCE_ENDS = ".。．｡！？।॥۔؟։።፧။។༎‼⁇⁈⁉"
"""Marks that end a sentence in any language; without "!" and "?", which also occur in English names."""

_SPACELESS = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "FULLWIDTH"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)
_CLOSES = re.compile(rf"[{re.escape(SENTENCE_ENDS)},;:!?%،؛、，；：…)\]}}»”’）」』】》〉](?:\s|$)")


def spaceless(c: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return unicodedata.name(c, "").startswith(_SPACELESS)


def joined(prompt: str, target: str) -> str:
    """Join a prompt and what comes after it, with a space between them if their script uses one.

    There is no space if both are in scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer,
    Burmese, Tibetan), judged by the last letter of the prompt and the first letter of the target, if it has one. Nor is
    there one before a closing mark such as a comma. Whitespace at the border does not matter: the space is added to it.
    """
    last = next((c for c in reversed(prompt) if c.isalpha()), " ")
    first = next((c for c in target if c.isalpha()), last)
    if _CLOSES.match(target) or (spaceless(last) and spaceless(first)):
        return prompt + target
    return f"{prompt} {target}"
