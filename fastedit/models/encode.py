"""Tokens of texts, and of pairs of a prompt and a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastedit.errors import listed
from fastedit.models.scripts import joined

Text = str | tuple[str, str]
"""A text, or a prompt and what comes after it, to be joined."""
Span = tuple[int, int]
"""Characters of a token: the first one, and the one after the last; (0, 0) for a special token."""


def encode(tokenizer: Any, texts: Sequence[Text], *, templated: bool = False) -> list[list[int]]:
    """Tokens of texts, including the special tokens that the tokenizer adds; its settings stay as they are.

    Those that it puts after a text are left out, such as [SEP], unless they are EOS: the text goes on there.

    ``templated``: the prompts are already in a chat template (`chat.Chat`), so no special tokens are added around
    them, and no space after them.
    """
    encoded = _call(tokenizer, _whole(texts, templated), templated=templated)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def encode_with_spans(
    tokenizer: Any, texts: Sequence[Text], *, templated: bool = False
) -> tuple[list[list[int]], list[list[Span]]]:
    """As `encode`, with the characters of each token; for fast tokenizers.

    A token could reach across the border between a prompt and what follows it, if there is no space between them, or
    if the tokenizer has tokens of several words, or some that take up the spaces beside them. The prompt then gets the
    tokens that it has by itself, as when the model answers it. A templated prompt always gets these, because the line
    breaks at its end could be tokenized differently before a target.
    """
    whole = _whole(texts, templated)
    encoded = _call(tokenizer, whole, spans=True, templated=templated)
    ids: list[list[int]] = encoded["input_ids"]
    spans: list[list[Span]] = encoded["offset_mapping"]
    for i, text in enumerate(texts):
        if isinstance(text, str):
            continue
        edge = len(text[0])
        if templated or any(first < edge < end for first, end in spans[i]):
            ids[i], spans[i] = _in_parts(tokenizer, text[0], whole[i][edge:], ids[i], spans[i], templated)
    return ids, spans


def _whole(texts: Sequence[Text], templated: bool) -> list[str]:
    return [text if isinstance(text, str) else "".join(text) if templated else joined(*text) for text in texts]


def _in_parts(
    tokenizer: Any, prompt: str, following: str, ids: list[int], spans: list[Span], templated: bool
) -> tuple[list[int], list[Span]]:
    """Tokens of a pair of which none crosses the border; the given ones if the tokenizer cannot separate the two."""
    # after a newline, a tokenizer puts nothing in front of a text and does not merge anything with it
    parts = _call(tokenizer, [prompt, f"\n{following}"], spans=True, templated=templated)
    (head, tail), (head_spans, tail_spans) = parts["input_ids"], parts["offset_mapping"]
    n_head = len(head) - (0 if templated else trailing(head, tokenizer.eos_token_id))
    ends = 0 if templated else trailing(ids, tokenizer.eos_token_id)
    if ids[:n_head] == head[:n_head] and n_head < len(ids) - ends:  # the prompt's last token only took up the space
        return ids, [*head_spans[:n_head], *spans[n_head:]]
    if any(first < 1 < end for first, end in tail_spans):
        return ids, spans
    after = [t for t, (_, end) in enumerate(tail_spans) if end > 1]
    shift = len(prompt) - 1
    moved = [(tail_spans[t][0] + shift, tail_spans[t][1] + shift) for t in after]
    pair_ids = [*head[:n_head], *(tail[t] for t in after), *ids[len(ids) - ends :]]
    return pair_ids, [*head_spans[:n_head], *moved, *spans[len(ids) - ends :]]


class MissingRows(NamedTuple):
    """Why tokens cannot be used, and what to do."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def without_rows(tokenizer: Any, ids: Sequence[int], vocabulary: int) -> MissingRows | None:
    """Tell of the tokens that have no row in a model with `vocabulary` rows; None if all have one."""
    if not ids or max(ids) < vocabulary:
        return None
    missing = [f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in dict.fromkeys(ids) if i >= vocabulary]
    return MissingRows(
        f"the model's embedding has {vocabulary} rows and none for {listed(missing)}",
        "call model.resize_token_embeddings(len(tokenizer)) and train the new rows, or take the tokenizer that the "
        "model has",
    )


def trailing(ids: Sequence[int], token: int | None) -> int:
    """How many times a token is repeated at the end; some tokenizers end every text with EOS."""
    return next((n for n, token_id in enumerate(reversed(ids)) if token_id != token), len(ids))


def _call(tokenizer: Any, texts: Sequence[str], *, spans: bool = False, templated: bool = False) -> Any:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    with _settings_kept(tokenizer):
        appended = 0 if templated else _appended(tokenizer)
        encoded = tokenizer(
            list(texts),
            add_special_tokens=not templated,
            return_offsets_mapping=spans,
            return_attention_mask=False,
            verbose=False,
        )
    if appended:
        for name in ("input_ids", "offset_mapping") if spans else ("input_ids",):
            for tokens in encoded[name]:
                del tokens[-appended:]
    if not templated and (bos := getattr(tokenizer, "bos_token", None)):
        for i, text in enumerate(texts):  # a text that begins with BOS does not get another one
            twice = text.startswith(bos) and not text.startswith(bos * 2)
            if twice and encoded["input_ids"][i][:2] == [tokenizer.bos_token_id] * 2:
                del encoded["input_ids"][i][0]
                if spans:
                    del encoded["offset_mapping"][i][0]
    return encoded


def _appended(tokenizer: Any) -> int:
    """How many tokens the tokenizer puts after every text; 0 if they are EOS."""
    (whole,), (bare,) = (tokenizer(["a"], add_special_tokens=added)["input_ids"] for added in (True, False))
    starts = (i for i in range(len(whole) - len(bare) + 1) if bare and whole[i : i + len(bare)] == bare)
    added = whole[next(starts, len(whole)) + len(bare) :]
    return 0 if {*added} <= {tokenizer.eos_token_id} else len(added)


@contextmanager
def _settings_kept(tokenizer: Any) -> Iterator[None]:
    """Restore the truncation and padding of a fast tokenizer; a call that asks for none resets them."""
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (core.truncation, core.padding) if core is not None else (None, None)
    try:
        yield
    finally:
        if truncation is not None:
            core.enable_truncation(**truncation)
        if padding is not None:
            core.enable_padding(**padding)
