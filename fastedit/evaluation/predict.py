"""Predictions of a model for the prompts of edit requests, teacher-forced and generated, and its perplexity.

Teacher forcing flatters (arXiv 2502.11177), so whatever is measured with it is also measured of greedy generation.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig
from transformers.generation import StoppingCriteriaList

from fastedit.errors import EditError
from fastedit.evaluation.questions import KINDS, ask, inner_dots
from fastedit.models import (
    Factors,
    Model,
    Samples,
    Topology,
    generate_by,
    no_autocast,
    pack,
    pass_tokens,
    per_sample_updates,
    run_from_tokens,
    trailing,
)
from fastedit.progress import Progress, no_progress
from fastedit.requests import EditRequest

_NEW_TOKENS = 32  # of a generated answer, as published (arXiv 2502.11177; LocFT-BF)
_LOGITS = 2**25  # elements of logits alive at once
_ALWAYS = 2**20  # more dots than any answer holds


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's answer to one prompt.

    For each token of the answer, without EOS, ``argmax`` holds the likeliest token id and ``hits`` whether it
    is the answer's. ``logp`` is the mean log-probability (nats) of an answer's token, ``other_logp`` that of
    the competing answer (None: there is none). ``generated`` is the greedy continuation, cut at its stop.
    """

    prompt: str
    answer: str
    argmax: tuple[int, ...]
    hits: tuple[bool, ...]
    logp: float
    other_logp: float | None
    generated: str | None

    @property
    def matches(self) -> bool | None:
        """Whether the generated text is the answer, both normalized."""
        return None if self.generated is None else normalize(self.generated) == normalize(self.answer)

    @property
    def preferred(self) -> bool | None:
        """Whether the answer is likelier than the competing one."""
        return None if self.other_logp is None else self.logp > self.other_logp


Answers = Mapping[str, Sequence[Prediction]]  # of one request, by kind


@dataclass(frozen=True)
class Predictions:
    """A model's answers to each request's prompts, and its perplexity on text (None: no text)."""

    answers: Sequence[Answers]
    perplexity: float | None


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks; a text of nothing else keeps them."""
    text = unicodedata.normalize("NFC", text).lower().strip()
    kept = (c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", "".join(kept)).split()) or text


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
    best, logp = _score(topology, samples, batch_tokens, partial(progress, "answers"), updates or {}, edits)
    sizes = samples.lengths - samples.target_start
    mean = torch.zeros(len(samples), dtype=torch.float64)
    mean.index_add_(0, torch.repeat_interleave(sizes), logp.double()).div_(sizes)
    _finite(mean, list(owners.values()))
    targets = torch.repeat_interleave(samples.offsets[1:] - sizes.cumsum(0), sizes) + torch.arange(len(best))
    hits = best == samples.input_ids[targets]
    each = zip(*(torch.split(x, sizes.tolist()) for x in (best, hits)), mean.tolist(), strict=True)
    scored = dict(zip(owners, ((tuple(b.tolist()), tuple(h.tolist()), p) for b, h, p in each), strict=True))

    perplexity = None
    if len(documents):
        none = torch.zeros(len(documents), dtype=torch.int64)
        _, logp = _score(topology, documents, batch_tokens, partial(progress, "text"), {}, none)
        _finite(logp.mean()[None], ["the text for perplexity"])
        perplexity = math.exp(min(-logp.double().mean().item(), 700.0))  # JSON has no infinity
    texts = _generate(model, questions.dots, batch_tokens, progress, updates or {}) if generate and owners else {}

    answers: list[dict[str, list[Prediction]]] = [{kind: [] for kind in KINDS} for _ in requests]
    for kind, i, prompt, answer, other in questions.asked:
        edit = i if updates else 0
        rival = scored[edit, prompt, other][2] if other and other != answer else None  # no rival of itself
        generated = _cut(texts[edit, prompt], inner_dots(answer)) if generate else None
        answers[i][kind].append(Prediction(prompt, answer, *scored[edit, prompt, answer], rival, generated))
    return Predictions(answers, perplexity)


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


def _score(
    topology: Topology,
    samples: Samples,
    batch_tokens: int,
    progress: Callable[[int, int], None],
    updates: Mapping[nn.Module, Factors],
    edits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Likeliest ids [M] int64 and log P [M] fp32 at all target tokens, sample after sample, on the CPU.

    Sample i meets the update ``edits[i]`` of ``updates``, if there are any.
    """
    if not len(samples):
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    # similar lengths share a batch: the longest sample sets the length of its rows
    order = samples.lengths.argsort(descending=True, stable=True)
    batch = (samples.lengths[order].cumsum(0) - 1) // batch_tokens
    step = max(1, _LOGITS // topology.config.vocab_size)
    best, logp, done = [], [], 0
    for select in torch.split(order, torch.unique_consecutive(batch, return_counts=True)[1].tolist()):
        # alone in its row, the sample of an edit that broke down spoils no other
        rows = pack(samples, select, packed=topology.packs and not updates).to(topology.device, non_blocking=True)
        with per_sample_updates(updates, edits[select]):
            hidden = run_from_tokens(topology, rows, prune=not updates)
        for states, labels in zip(torch.split(hidden, step), torch.split(rows.labels, step), strict=True):
            logits = topology.logits(states).float()  # [m, V]
            best.append(logits.argmax(-1))
            logp.append(-cross_entropy(logits, labels, reduction="none"))
        done += len(select)
        progress(done, len(samples))
    owner = torch.repeat_interleave(order, (samples.lengths - samples.target_start)[order])  # [M]
    back = owner.argsort(stable=True)
    return torch.cat(best).cpu()[back], torch.cat(logp).cpu()[back]


def _finite(values: Tensor, names: Sequence[str]) -> None:
    """Refuse log-probabilities [N] of a broken model, with names of what was asked."""
    broken = list(dict.fromkeys(names[i] for i in values.isfinite().logical_not().nonzero().flatten().tolist()))
    if broken:
        named = "; ".join(broken[:5]) + "; …" * (len(broken) > 5)
        raise EditError(f"the model gives NaN or infinity ({named}); try a lower learning rate, or bf16 or fp32")


def _cut(text: str, dots: int) -> str:
    """Text up to the first newline or the "." after ``dots`` of them."""
    return ".".join(text.partition("\n")[0].split(".")[: dots + 1]).strip()


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
