"""Predictions of a model for the prompts of edit requests, teacher-forced and generated, and its perplexity.

Teacher forcing flatters (arXiv 2502.11177), so whatever is measured with it is also measured of greedy generation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import StoppingCriteriaList

from fastedit.errors import EditError
from fastedit.evaluation.first_token import Head
from fastedit.evaluation.questions import KINDS, ask
from fastedit.evaluation.score import score
from fastedit.evaluation.texts import begins_with, cut, inner_dots, normalize
from fastedit.models import Factors, Model, generate_by, no_autocast, pass_tokens, per_sample_updates, trailing
from fastedit.progress import Progress, no_progress
from fastedit.requests import EditRequest

_NEW_TOKENS = 32  # of a generated answer, as published (arXiv 2502.11177; LocFT-BF)
_ALWAYS = 2**20  # more dots than any answer holds


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's answer to one prompt.

    For each token of the answer, without EOS, ``argmax`` holds the likeliest token id and ``hits`` whether it
    is the answer's. ``logp`` is the mean log-probability (nats) of an answer's token, ``other_logp`` that of
    the competing answer (None: there is none). ``generated`` is the greedy continuation, cut at its stop.
    ``first`` is the final hidden state [h] that the answer's first token is predicted from (of neighbours only).
    """

    prompt: str
    answer: str
    argmax: tuple[int, ...]
    hits: tuple[bool, ...]
    logp: float
    other_logp: float | None
    generated: str | None
    first: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def matches(self) -> bool | None:
        """Whether the generated text is the answer, both normalized."""
        return None if self.generated is None else normalize(self.generated) == normalize(self.answer)

    @property
    def begins(self) -> bool | None:
        """Whether the generated text begins with the answer, both normalized."""
        return None if self.generated is None else begins_with(self.generated, self.answer)

    @property
    def preferred(self) -> bool | None:
        """Whether the answer is likelier than the competing one."""
        return None if self.other_logp is None else self.logp > self.other_logp


Answers = Mapping[str, Sequence[Prediction]]  # of one request, by kind


@dataclass(frozen=True)
class Predictions:
    """A model's answers to each request's prompts, its perplexity on text (None: no text), and its head."""

    answers: Sequence[Answers]
    perplexity: float | None
    head: Head | None = field(default=None, repr=False, compare=False)


@no_autocast
@torch.no_grad()
def predict(
    model: Model,
    requests: Sequence[EditRequest],
    *,
    generate: bool = True,
    kinds: Sequence[str] = KINDS,
    text: Sequence[str] = (),
    updates: Mapping[nn.Module, Factors] | None = None,
    batch_tokens: int | None = None,
    keep_head: bool = False,
    progress: Progress = no_progress,
) -> Predictions:
    """Everything that is measured of the model as it is now; equal prompts run once.

    With ``updates``, request i meets the model under edit i alone, and equal prompts run once for each edit.

    Log-probabilities are fp32 whatever the model's dtype. Generation is greedy, takes at most 32 tokens and
    stops at EOS, a newline or "."; a "." inside the wanted answer ("St. Louis") is let through.

    Args:
        kinds: of prompts, some of `KINDS`.
        text: documents for the perplexity, exp(mean NLL of all tokens but each document's first), read in
            windows of the model's context, 2,048 tokens at most.
        updates: linear map -> factors of one edit a request (`models.per_sample_updates`); without ``text``,
            which belongs to no request.
        batch_tokens: tokens of a forward pass, None for what suits the device; generation keeps four times as many
            in its cache.
        keep_head: copy the head of the model, because an edit between this and what it is compared with changes it.
        progress: called after each batch, with the stages "answers", "text" and "generation".

    Raises:
        RequestError: as `questions.ask`.
        EditError: the model gives NaN, or an answer a probability of 0; an update is not finite.
        ValueError: ``updates`` of another number of edits, or with ``text``.
    """
    if updates:
        _check(updates, requests, text)
    topology = model.topology
    batch_tokens = batch_tokens or pass_tokens(topology.device)
    questions = ask(model, requests, kinds=kinds, text=text, by_edit=bool(updates))
    owners, samples, documents = questions.owners, questions.samples, questions.documents

    edits = torch.tensor([edit for edit, _, _ in owners], dtype=torch.int64)
    neighbours = {(i if updates else 0, p, answer) for kind, i, p, answer, _ in questions.asked if kind == "neighbour"}
    wanted = torch.tensor([asked in neighbours for asked in owners], dtype=torch.bool)
    found = score(topology, samples, batch_tokens, partial(progress, "answers"), updates or {}, edits, wanted)
    sizes = samples.lengths - samples.target_start
    mean = torch.zeros(len(samples), dtype=torch.float64)
    mean.index_add_(0, torch.repeat_interleave(sizes), found.logp.double()).div_(sizes)
    _finite(mean, list(owners.values()))
    targets = torch.repeat_interleave(samples.offsets[1:] - sizes.cumsum(0), sizes) + torch.arange(len(found.best))
    hits = found.best == samples.input_ids[targets]
    each = zip(*(torch.split(x, sizes.tolist()) for x in (found.best, hits)), mean.tolist(), strict=True)
    scored = dict(zip(owners, ((tuple(b.tolist()), tuple(h.tolist()), p) for b, h, p in each), strict=True))
    firsts = dict(zip((asked for asked in owners if asked in neighbours), found.first, strict=True))

    perplexity = None
    if len(documents):
        none = torch.zeros(len(documents), dtype=torch.int64)
        logp = score(topology, documents, batch_tokens, partial(progress, "text"), {}, none, none.bool()).logp
        _finite(logp.mean()[None], ["the text for perplexity"])
        perplexity = math.exp(min(-logp.double().mean().item(), 700.0))  # JSON has no infinity
    texts = _generate(model, questions.dots, batch_tokens, progress, updates or {}) if generate and owners else {}

    answers: list[dict[str, list[Prediction]]] = [{kind: [] for kind in KINDS} for _ in requests]
    for kind, i, prompt, answer, other in questions.asked:
        edit = i if updates else 0
        rival = scored[edit, prompt, other][2] if other and other != answer else None  # no rival of itself
        generated = cut(texts[edit, prompt], inner_dots(answer)) if generate else None
        first = firsts.get((edit, prompt, answer)) if kind == "neighbour" else None
        answers[i][kind].append(Prediction(prompt, answer, *scored[edit, prompt, answer], rival, generated, first))
    return Predictions(answers, perplexity, Head(topology, keep=keep_head) if neighbours else None)


def _check(updates: Mapping[nn.Module, Factors], requests: Sequence[EditRequest], text: Sequence[str]) -> None:
    if text:
        raise ValueError("text belongs to no request; measure its perplexity without updates")
    for factor in (factor for factors in updates.values() for factor in factors):
        if len(factor) != len(requests):
            raise ValueError(f"updates of {len(factor)} edits do not fit {len(requests)} requests")
        broken = factor.flatten(1).isfinite().all(1).logical_not().nonzero().flatten().tolist()
        if broken:
            named = ", ".join(str(requests[i].id or i) for i in broken[:5])
            raise EditError(f"the updates of {len(broken)} requests are not finite ({named}); leave them out")


def _finite(values: Tensor, names: Sequence[str]) -> None:
    """Refuse log-probabilities [N] of a broken model, with names of what was asked."""
    broken = list(dict.fromkeys(names[i] for i in values.isfinite().logical_not().nonzero().flatten().tolist()))
    if broken:
        named = "; ".join(broken[:5]) + "; …" * (len(broken) > 5)
        raise EditError(f"the model gives NaN or infinity ({named}); try a lower learning rate, or bf16 or fp32")


def _generate(
    model: Model,
    dots: Mapping[tuple[int, str], int],
    batch_tokens: int,
    progress: Progress,
    updates: Mapping[nn.Module, Factors],
) -> dict[tuple[int, str], str]:
    """Greedy continuations of prompts, each under its edit and to the "." after its number of dots, or further."""
    prompts, network = list(dots), cast(Any, model.network)
    topology, tokenizer = model.topology, model.tokenizer
    encoded = tokenizer([prompt for _, prompt in prompts], return_attention_mask=False, verbose=False)["input_ids"]
    by_length: defaultdict[int, list[int]] = defaultdict(list)  # equal lengths need no padding
    for i, ids in enumerate(encoded):
        del ids[max(1, len(ids) - trailing(ids, tokenizer.eos_token_id)) :]
        by_length[len(ids)].append(i)
    own = network.generation_config.eos_token_id  # where a chat model ends its turn
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])} - {None}
    decode = partial(tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # [V] the dots in each token's text; more than any answer's in one that always ends a text
    spellings = decode([[i] for i in range(len(tokenizer))])
    table = [_ALWAYS if "\n" in spelling else spelling.count(".") for spelling in spellings]
    table += [0] * (topology.config.vocab_size - len(table))
    for token in ends:
        table[token] = _ALWAYS
    weights = torch.tensor(table, device=topology.device)
    answered: dict[int, list[int]] = {}
    for length, group in by_length.items():
        new = min(_NEW_TOKENS, topology.context_length - length + 1)  # the last token is never read
        size = max(1, 4 * batch_tokens // (length + new))
        for chunk in (group[i : i + size] for i in range(0, len(group), size)):
            input_ids = torch.tensor([encoded[i] for i in chunk], device=topology.device)
            allowed = torch.tensor([dots[prompts[i]] for i in chunk], device=topology.device)
            with per_sample_updates(updates, torch.tensor([prompts[i][0] for i in chunk])):
                tokens = _continue(network, input_ids, new, weights, allowed)
            stopped = weights[tokens].cumsum(1) > allowed[:, None]
            lengths = (~stopped).sum(1) + 1  # the token that stops may begin with text
            for i, row, n in zip(chunk, tokens.tolist(), lengths.tolist(), strict=True):
                answered[i] = [token for token in row[:n] if token not in ends]
            progress("generation", len(answered), len(prompts))
    return dict(zip((prompts[i] for i in answered), decode(list(answered.values())), strict=True))


def _continue(network: Any, input_ids: Tensor, new: int, weights: Tensor, allowed: Tensor) -> Tensor:
    """Greedy tokens [B, K] after ``input_ids`` [B, R], until every row's weights pass ``allowed``."""
    start = input_ids.shape[1]

    def stop(ids: Tensor, _: Any, **__: Any) -> Tensor:
        return weights[ids[:, start:]].sum(1) > allowed

    config = GenerationConfig(max_new_tokens=new, do_sample=False, num_beams=1, use_cache=True)
    return generate_by(network, config, input_ids, stopping_criteria=StoppingCriteriaList([stop]))[:, start:]
