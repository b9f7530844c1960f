"""Generate answers: greedy continuations of prompts, up to the end of the text that is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastedit import parallel
from fastedit.evaluation.texts import weight
from fastedit.models import Continuations, Factors, Model

_ALWAYS = 2**50  # more than any answer's ends weigh


class Stop(NamedTuple):
    """Where generation stops: when the ends of sentences and lines weigh more than these, or after so many tokens."""

    ends: int
    tokens: int


def generated_texts(
    model: Model,
    stops: Mapping[tuple[int, str], Stop],
    capacity: int,
    progress: Callable[[int, int], None],
    updates: Mapping[nn.Module, Factors],
) -> dict[tuple[int, str], str]:
    """Greedy continuations of (edit, prompt) pairs, each with its edit, up to their stops.

    Every process generates its share of them.
    """
    share = parallel.share(len(stops))
    own = dict([*stops.items()][share.start : share.stop])
    parts = parallel.gathered(_generated(model, own, capacity, progress, updates))
    return {prompt: text for part in parts for prompt, text in part.items()}


def _generated(
    model: Model,
    stops: Mapping[tuple[int, str], Stop],
    capacity: int,
    progress: Callable[[int, int], None],
    updates: Mapping[nn.Module, Factors],
) -> dict[tuple[int, str], str]:
    prompts, tokenizer = list(stops), model.tokenizer
    if not prompts:
        return {}
    encoded = model.prompt_tokens([prompt for _, prompt in prompts])
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    final = _final(model)
    weights = _weights(model, final, decode).to(model.device)  # [V]
    allowed = torch.tensor([stop.ends for stop in stops.values()], device=model.device)
    spent = torch.zeros_like(allowed)

    def ended(which: Tensor, tokens: Tensor) -> Tensor:
        which = which.to(model.device)
        spent[which] += weights[tokens]
        return spent[which] > allowed[which]

    # the last token is never read
    longest = model.topology.context_length + 1
    limits = [min(stop.tokens, longest - len(ids)) for stop, ids in zip(stops.values(), encoded, strict=True)]
    edits = torch.tensor([edit for edit, _ in prompts])
    options: dict[str, Any] = {"capacity": capacity, "updates": updates, "edits": edits}
    answered: dict[int, list[int]] = {}
    for i, continuation in Continuations(model.topology, encoded, limits, ended, **options):
        answered[i] = [token for token in continuation if token not in final]  # others that stop may begin with text
        progress(len(answered), len(prompts))
    return dict(zip((prompts[i] for i in answered), decode(list(answered.values())), strict=True))


def _final(model: Model) -> set[int]:
    """Tokens that end a text, including those that end a chat model's turn."""
    own = getattr(getattr(model.network, "generation_config", None), "eos_token_id", None)
    turn = model.chat.end if model.chat else None
    return {model.tokenizer.eos_token_id, turn, *(own if isinstance(own, list | tuple) else [own])} - {None}


def _weights(model: Model, final: set[int], decode: Callable[[list[list[int]]], list[str]]) -> Tensor:
    """The weight of the ends in each token's text [V]; `_ALWAYS` for tokens that always end a text."""
    spellings = decode([[i] for i in range(len(model.tokenizer))])
    table = [weight(s) for s in spellings]
    table += [0] * (max(model.topology.config.vocab_size, *(token + 1 for token in final)) - len(table))
    for token in final:
        table[token] = _ALWAYS
    return torch.tensor(table)
