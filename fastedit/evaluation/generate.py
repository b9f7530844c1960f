"""Generate answers: greedy continuations of prompts, up to the end of the text that is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastedit import parallel
from fastedit.models import LINE_ENDS, SENTENCE_ENDS, Continuations, Factors, Model

_NEW_TOKENS = 32  # tokens of a generated answer, as published (arXiv 2502.11177; LocFT-BF)
_ALWAYS = 2**20  # more ends of sentences than any answer has


def generated_texts(
    model: Model,
    ends: Mapping[tuple[int, str], int],
    capacity: int,
    progress: Callable[[int, int], None],
    updates: Mapping[nn.Module, Factors],
) -> dict[tuple[int, str], str]:
    """Greedy continuations of (edit, prompt) pairs, each with its edit, until it has more than `ends` sentence ends.

    Every process generates its share of them.
    """
    share = parallel.share(len(ends))
    own = dict([*ends.items()][share.start : share.stop])
    found = parallel.gathered(_generated(model, own, capacity, progress, updates))
    return {prompt: text for part in found for prompt, text in part.items()}


def _generated(
    model: Model,
    ends: Mapping[tuple[int, str], int],
    capacity: int,
    progress: Callable[[int, int], None],
    updates: Mapping[nn.Module, Factors],
) -> dict[tuple[int, str], str]:
    prompts, tokenizer = list(ends), model.tokenizer
    if not prompts:
        return {}
    encoded = model.prompt_tokens([prompt for _, prompt in prompts])
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    final = _final(model)
    weights = _weights(model, final, decode).to(model.device)  # [V]
    allowed = torch.tensor([ends[prompt] for prompt in prompts], device=model.device)
    spent = torch.zeros_like(allowed)

    def ended(which: Tensor, tokens: Tensor) -> Tensor:
        which = which.to(model.device)
        spent[which] += weights[tokens]
        return spent[which] > allowed[which]

    # the last token is never read
    limits = [min(_NEW_TOKENS, model.topology.context_length - len(ids) + 1) for ids in encoded]
    edits = torch.tensor([edit for edit, _ in prompts])
    options: dict[str, Any] = {"capacity": capacity, "updates": updates, "edits": edits}
    answered: dict[int, list[int]] = {}
    for i, found in Continuations(model.topology, encoded, limits, ended, **options):
        answered[i] = [token for token in found if token not in final]  # others that stop may begin with text
        progress(len(answered), len(prompts))
    return dict(zip((prompts[i] for i in answered), decode(list(answered.values())), strict=True))


def _final(model: Model) -> set[int]:
    """Tokens that end a text, including those that end a chat model's turn."""
    own = cast(Any, model.network).generation_config.eos_token_id
    turn = model.chat.end if model.chat else None
    return {model.tokenizer.eos_token_id, turn, *(own if isinstance(own, list | tuple) else [own])} - {None}


def _weights(model: Model, final: set[int], decode: Callable[[list[list[int]]], list[str]]) -> Tensor:
    """The number of sentence ends in each token's text [V]; `_ALWAYS` for tokens that always end a text."""
    spellings = decode([[i] for i in range(len(model.tokenizer))])
    lines, sentences = set(LINE_ENDS), set(SENTENCE_ENDS)
    table = [sum(c in sentences for c in s) if lines.isdisjoint(s) else _ALWAYS for s in spellings]
    table += [0] * (max(model.topology.config.vocab_size, *(token + 1 for token in final)) - len(table))
    for token in final:
        table[token] = _ALWAYS
    return torch.tensor(table)
