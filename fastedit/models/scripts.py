"""Rules of scripts: whether they put spaces between words, and how their sentences end."""

from __future__ import annotations

import re
import unicodedata

SENTENCE_ENDS = (
    ".。．｡！？।॥۔؟։።፧။។៕‼⁇⁈⁉"
    "\u0f0d\u0f0e\u0f0f\u0f10\u0f11"  # Tibetan
    "\u1803\u1809"  # Mongolian
    "\u0700\u0701\u0702"  # Syriac
    "\u07f9"  # N'Ko
    "\u0df4"  # Sinhala
    "\u166e"  # Canadian syllables
    "\u1735\u1736"  # the Philippines
    "\u1944\u1945"  # Limbu
    "\u1aa8\u1aa9\u1aaa\u1aab"  # Tai Tham
    "\u1b5e\u1b5f"  # Balinese
    "\u1c3b\u1c3c"  # Lepcha
    "\u1c7e\u1c7f"  # Ol Chiki
    "\u2cf9"  # Coptic
    "\ua4ff"  # Lisu
    "\ua60e\ua60f"  # Vai
    "\ua6f3\ua6f7"  # Bamum
    "\ua876\ua877"  # Phags-pa
    "\ua8ce\ua8cf"  # Saurashtra
    "\ua92f"  # Kayah Li
    "\ua9c9"  # Javanese
    "\uaa5d\uaa5e\uaa5f"  # Cham
    "\uaaf0\uaaf1\uabeb"  # Meetei
    "\U00011141\U00011142"  # Chakma
    "\ufe12\ufe15\ufe16\ufe52\ufe56\ufe57"  # forms for columns and small ones
)
"""Marks that end a sentence in any language; without "!" and "?", which also occur in English names."""
LINE_ENDS = "\n\r\v\f\x85\u2028\u2029"
"""Characters that end a line."""

_SPACELESS = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "FULLWIDTH"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)
# the syllables and words with which Korean particles and forms of "to be" begin, and those with which they go on
_ATTACHED = (
    "[이가은는을를에의와과로도만께나뿐랑라란다였며입]|"
    "으로|까지|부터|처럼|보다|한테|하고|조차|마저|밖에|예요|인데|인지|인가"
)
PARTICLES = rf"(?:{_ATTACHED})(?:{_ATTACHED}|[서게고었습니까요지네죠야던든데므])*(?!\w)"
"""Pattern of what Korean attaches to a noun, whole or cut off, to the end of the written word: it follows 서울 in
서울입니다, 서울에서는 and 서울입니, and not in 서울특별시."""
_JOINERS = "\u200c\u200d"  # occur inside words of Persian and of languages of India
_CLOSES = re.compile(rf"[{re.escape(SENTENCE_ENDS)},;:!?%،؛、，；：…)\]}}»”’）」』】》〉](?:\s|$)")


def spaceless(c: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return unicodedata.name(c, "").startswith(_SPACELESS)


def in_word(c: str) -> bool:
    """Whether a character is part of a word: letters, digits, the accents and vowel signs on them, and joiners.

    Python's `\\w` has no accents and vowel signs, and words of Hindi or Tamil are full of them.
    """
    return c.isalnum() or c in _JOINERS or unicodedata.category(c)[0] == "M"


def hangul(c: str) -> bool:
    """Whether a character is of the Korean script."""
    return unicodedata.name(c, "").startswith("HANGUL")


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
