"""What a model says to the prompts of edit requests, teacher-forced and generated, and its perplexity.

Teacher forcing flatters (arXiv 2502.11177), so whatever is measured with it is also measured of greedy generation.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig
from transformers.generation import StoppingCriteriaList

from fastedit.errors import EditError, RequestError
from fastedit.models import (
    Factors,
    Model,
    PairError,
    Samples,
    Topology,
    generate_by,
    no_autocast,
    pack,
    pass_tokens,
    per_sample_updates,
    run_from_tokens,
    tokenize,
    trailing,
)
from fastedit.progress import Progress, no_progress
from fastedit.requests import EditRequest

_NEW_TOKENS = 32  # of a generated answer, as published (arXiv 2502.11177; LocFT-BF)
_WINDOW = 2048  # tokens that a piece of text may read: attention masks grow with the square
_LOGITS = 2**25  # elements of logits alive at once
_ALWAYS = 2**20  # more dots than any answer holds

# kind -> (prompt, answer, the answer that competes with it) of a request's prompts
_QUESTIONS: dict[str, Callable[[EditRequest], Iterable[tuple[str, str, str | None]]]] = {
    "rewrite": lambda r: [(r.prompt, r.target, r.true_target)],
    "paraphrase": lambda r: [(prompt, r.target, r.true_target) for prompt in r.paraphrases],
    "neighbour": lambda r: [(prompt, answer, r.target) for prompt, answer in r.neighbours],
    "portability": lambda r: [(prompt, answer, None) for prompt, answer in r.portability],
}
KINDS = tuple(_QUESTIONS)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says to one prompt.

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


_Asked = tuple[int, str, str]  # edit, prompt, answer; the edit is 0 where the model is measured as it is
Answers = Mapping[str, Sequence[Prediction]]  # of one request, by kind


@dataclass(frozen=True)
class Predictions:
    """What a model says to each request's prompts, and its perplexity on text (None: no text)."""

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
        RequestError: prompt and answer do not fit the model's context, or one of them has no tokens.
        EditError: the model gives NaN, or an answer a probability of 0; an update is not finite.
        ValueError: ``updates`` of another number of edits, or with ``text``.
    """
    if updates:
        _check(updates, requests, text)
    topology, tokenizer = model.topology, model.tokenizer
    batch_tokens = batch_tokens or pass_tokens(topology.device)
    asked = [(k, i, *q) for k in kinds for i, request in enumerate(requests) for q in _QUESTIONS[k](request)]
    owners: dict[_Asked, str] = {}  # each once, and the request that asks it first
    dots: dict[tuple[int, str], int] = {}
    for kind, i, prompt, answer, other in asked:
        edit = i if updates else 0
        for said in filter(None, (answer, other)):
            owners.setdefault((edit, prompt, said), f"request {requests[i].id or i}, {kind}")
        dots[edit, prompt] = max(dots.get((edit, prompt), 0), _inner_dots(answer))
    samples = _samples(tokenizer, owners, topology.context_length)
    documents = _windows(tokenizer, [text] if isinstance(text, str) else text, topology.context_length)

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
    texts = _generate(model, dots, batch_tokens, progress, updates or {}) if generate and dots else {}

    answers: list[dict[str, list[Prediction]]] = [{kind: [] for kind in KINDS} for _ in requests]
    for kind, i, prompt, answer, other in asked:
        edit = i if updates else 0
        rival = scored[edit, prompt, other][2] if other and other != answer else None  # no rival of itself
        generated = _cut(texts[edit, prompt], _inner_dots(answer)) if generate else None
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


def _samples(tokenizer: Any, owners: Mapping[_Asked, str], context: int) -> Samples:
    try:
        pairs = [(prompt, said) for _, prompt, said in owners]
        return tokenize(tokenizer, pairs, append_eos=False, max_length=context)
    except PairError as error:
        names = list(owners.values())
        problems = [(names[p.pair], f"{names[p.pair]}: {p.sentence()}") for p in error.problems]
        raise RequestError.of(problems, "prompts") from None


def _windows(tokenizer: Any, text: Sequence[str], context: int) -> Samples:
    """Documents in pieces of the context; all tokens but a document's first are labels, once."""
    size = min(context, _WINDOW)
    encoded = tokenizer(list(text), return_attention_mask=False, verbose=False)["input_ids"] if text else []
    pieces = [ids[i : i + size + 1] for ids in encoded for i in range(0, len(ids) - 1, size)]
    flat = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
    offsets = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    return Samples(flat, offsets, torch.ones(len(pieces), dtype=torch.int64))


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


def _inner_dots(answer: str) -> int:
    """The "." that generation goes past; at one that ends the answer it may as well stop."""
    return answer.rstrip(".").count(".")


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
