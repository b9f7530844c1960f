"""Where the subject of an edit stands: in its prompt, and among the tokens of texts around the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastedit.errors import ConfigError, RequestError
from fastedit.methods.base import Edit
from fastedit.models import PairError

BARE = "{}"
"""The template that leaves a prompt as it is."""

_CHUNK = 8192  # texts a tokenizer call: bounds the Python lists of offsets that are alive at once


def name_of(edit: Edit, place: int) -> str:
    """How messages call an edit: by its id, or by its place among the edits."""
    return f"edit {edit.id if edit.id is not None else place}"


def named(edits: Sequence[Edit], places: Sequence[int], shown: int = 10) -> str:
    """Names of the edits at these places, the first ones if they are many."""
    names = ", ".join(name_of(edits[i], i) for i in places[:shown])
    return names + (f" and {len(places) - shown} more" if len(places) > shown else "")


def behind(name: str, context: str, error: PairError) -> RequestError:
    """The error of an edit whose texts, behind a context or ("") alone, cannot be tokenized."""
    remedy = error.remedy
    if context:
        name += f", behind the context {context[:60]!r}"
        remedy = remedy.partition(" that begins")[0] + ", or take shorter contexts, or none"
    return RequestError(f"{name}: {error.reason}; {remedy}")


def subject_ends(edits: Sequence[Edit]) -> tuple[list[int], list[str]]:
    """The end of each edit's subject in its prompt, in characters, and notes for the user.

    The last occurrence counts; one that stands as whole words goes before one inside other words.

    Raises:
        RequestError: an edit without a subject, or whose prompt does not hold it; names the edit.
    """
    ends, repeated = [], []
    for i, edit in enumerate(edits):
        if not edit.subject:
            raise RequestError(
                f"{name_of(edit, i)} has no subject, and this method reads a fact at the last token of its "
                "subject; give the words of the prompt that the fact is about"
            )
        literal = re.escape(edit.subject)
        found = [m.end() for m in re.finditer(rf"(?<!\w){literal}(?!\w)", edit.prompt)]
        found = found or [m.end() for m in re.finditer(literal, edit.prompt)]
        if not found:
            raise RequestError(
                f"{name_of(edit, i)}: the subject {edit.subject!r} does not stand in the prompt "
                f"{edit.prompt!r:.80}; give it as it is written there"
            )
        ends.append(found[-1])
        if len(found) > 1:
            repeated.append(i)
    note = f"the subject stands in the prompt more than once, the last place counts: {named(edits, repeated)}"
    return ends, [note] if repeated else []


def in_templates(edits: Sequence[Edit], ends: Sequence[int], templates: Sequence[str]) -> tuple[list[str], list[int]]:
    """All prompts in the first template, then all in the second, …, and the end of the subject in each text.

    Raises:
        ConfigError: a template that does not hold "{}" exactly once.
    """
    texts, places = [], []
    for template in templates:
        before, *after = template.split(BARE)
        if len(after) != 1:
            raise ConfigError(f'the context {template!r} needs exactly one "{BARE}", where the prompt goes')
        texts += [before + edit.prompt + after[0] for edit in edits]
        places += [len(before) + end for end in ends]
    return texts, places


def last_tokens(tokenizer: Any, texts: Sequence[str], ends: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Tokens of each text, and the index of the last one that begins before character ``ends[i]``.

    By character offsets for fast tokenizers; otherwise it is the last token of the text cut at the end, or
    the one where the whole text's tokens leave those of the cut text.
    """
    all_ids: list[list[int]] = []
    last: list[int] = []
    fast = getattr(tokenizer, "is_fast", False)
    for first in range(0, len(texts), _CHUNK):
        chunk, cuts = list(texts[first : first + _CHUNK]), ends[first : first + _CHUNK]
        encoded = tokenizer(chunk, return_offsets_mapping=fast, return_attention_mask=False, verbose=False)
        all_ids += encoded["input_ids"]
        if fast:
            for spans, end in zip(encoded["offset_mapping"], cuts, strict=True):
                last.append(max(t for t, (a, b) in enumerate(spans) if a < min(b, end)))
        else:
            heads = [text[:end] for text, end in zip(chunk, cuts, strict=True)]
            parts = tokenizer(heads, return_attention_mask=False, verbose=False)["input_ids"]
            eos = tokenizer.eos_token_id
            last += [_last_shared(ids, part, eos) for ids, part in zip(encoded["input_ids"], parts, strict=True)]
    return all_ids, last


def _last_shared(ids: list[int], part: list[int], eos: int | None) -> int:
    """Index of the last token of ``part``, an EOS apart, or of the first of ``ids`` that differs from it."""
    length = len(part)
    while length and part[length - 1] == eos:
        length -= 1
    return next((t for t in range(min(length, len(ids))) if ids[t] != part[t]), length - 1)
