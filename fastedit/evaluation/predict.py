"""Predictions of a model for the prompts of edit requests, teacher-forced and generated, and its perplexity.

Teacher forcing overestimates (arXiv 2502.11177), so everything that it measures is also measured by greedy generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fastedit import parallel
from fastedit.errors import ConfigError, EditError, TensorError
from fastedit.evaluation.first_token import Head
from fastedit.evaluation.generate import generated_texts
from fastedit.evaluation.questions import KINDS, Asked, Questions, ask, read_to
from fastedit.evaluation.score import score
from fastedit.evaluation.texts import begins_with, cut, normalize, says
from fastedit.models import Factors, Model, Topology, pass_tokens, plain_state
from fastedit.progress import Progress, no_progress
from fastedit.requests import EditRequest


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's answer to one prompt.

    For each token of the answer, without EOS, ``argmax`` holds the likeliest token id, and ``hits`` whether it
    is the answer's. ``logp`` is the mean log-probability (nats) of the answer's tokens, ``other_logp`` that of
    the competing answer (None: there is none). ``generated`` is the greedy continuation up to its stop.
    ``first`` is the final hidden state [h] that predicts the answer's first token (only for neighbours).
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
    def said(self) -> bool | None:
        """Whether the answer occurs anywhere in the generated text, both normalized."""
        return None if self.generated is None else says(self.generated, self.answer)

    @property
    def preferred(self) -> bool | None:
        """Whether the answer is likelier than the competing one."""
        return None if self.other_logp is None else self.logp > self.other_logp


Answers = Mapping[str, Sequence[Prediction]]  # of one request, by kind


@dataclass(frozen=True)
class Predictions:
    """A model's answers to each request's prompts, its perplexity on text (None: no text), and its head.

    ``chat_template``: the prompts were a user's turn in the tokenizer's chat template.
    """

    answers: Sequence[Answers]
    perplexity: float | None
    head: Head | None = field(default=None, repr=False, compare=False)
    chat_template: bool = False


@plain_state
@parallel.together()
@torch.no_grad()
def predict(
    model: Model,
    edits: Sequence[EditRequest],
    *,
    generate: bool = True,
    kinds: Sequence[str] = KINDS,
    text: Sequence[str] = (),
    updates: Mapping[nn.Module, Factors] | None = None,
    batch_tokens: int | None = None,
    keep_head: bool = False,
    progress: Progress = no_progress,
) -> Predictions:
    """Measure the model with its current weights; equal prompts run once.

    With ``updates``, the prompts of edit i run with edit i alone, and equal prompts run once for each edit.

    Log-probabilities are fp32, whatever the model's dtype. Generation is greedy, takes at most 32 tokens (8 more than
    the wanted answer, if that is longer than 32), and stops at EOS, a newline or the end of a sentence, in any script,
    but not at those inside the wanted answer ("St. Louis").

    With torch.distributed, all processes must make the same call; they share the work and return the same.

    Args:
        kinds: kinds of prompts, some of `KINDS`.
        text: documents for the perplexity, exp(mean NLL of all tokens but each document's first), read in
            windows of the model's context, 2,048 tokens at most.
        updates: linear map -> factors of each edit (`models.per_sample_updates`); not with ``text``,
            which belongs to no edit.
        batch_tokens: tokens per forward pass; None chooses what suits the device. Generation keeps four times as many
            in its cache.
        keep_head: copy the model's head; needed if an edit changes the head before these results are compared.
        progress: called after each batch, or generated text, with the stages "answers", "text" and "generation".

    Raises:
        RequestError: as for `questions.ask`.
        EditError: the model computes NaN, or a probability of 0 for an answer; an update is not finite.
        ConfigError: ``updates`` together with ``text``. TensorError: ``updates`` of another number of edits.
    """
    if updates:
        _check(updates, edits, text)
    topology = model.topology
    batch_tokens = batch_tokens or pass_tokens(topology.device)
    questions = ask(model, edits, kinds=kinds, text=text, by_edit=bool(updates))
    documents = questions.documents
    scored = _scored(topology, questions, batch_tokens, partial(progress, "answers"), updates or {})

    perplexity = None
    if len(documents):
        zeros = torch.zeros(len(documents), dtype=torch.int64)
        of_text = score(topology, documents, batch_tokens, partial(progress, "text"), {}, zeros, zeros.bool()).logp
        _finite(of_text.mean()[None], ["the text for perplexity"])
        perplexity = math.exp(min(-of_text.double().mean().item(), 700.0))  # JSON has no infinity
    stops = questions.stops if generate else {}
    texts = generated_texts(model, stops, 4 * batch_tokens, partial(progress, "generation"), updates or {})

    answers: list[dict[str, list[Prediction]]] = [{kind: [] for kind in KINDS} for _ in edits]
    for kind, i, prompt, answer, other in questions.asked:
        edit = i if updates else 0
        rival = scored[edit, prompt, other][2] if other and other != answer else None  # not a rival of itself
        generated = cut(texts[edit, prompt], read_to(kind, answer, other)) if generate else None
        best, hits, logp, first = scored[edit, prompt, answer]
        answers[i][kind].append(Prediction(prompt, answer, best, hits, logp, rival, generated, first))
    head = Head(topology, keep=keep_head) if any(kind == "neighbour" for kind, *_ in questions.asked) else None
    return Predictions(answers, perplexity, head, model.chat is not None)


def _scored(
    topology: Topology,
    questions: Questions,
    batch_tokens: int,
    progress: Callable[[int, int], None],
    updates: Mapping[nn.Module, Factors],
) -> dict[Asked, tuple[tuple[int, ...], tuple[bool, ...], float, Tensor | None]]:
    """Likeliest ids, hits and mean log P of every answer; for neighbours also the state that predicts its beginning."""
    owners, samples = list(questions.owners), questions.samples
    edits = torch.tensor([edit for edit, _, _ in owners], dtype=torch.int64)
    neighbours = {(i if updates else 0, p, answer) for kind, i, p, answer, _ in questions.asked if kind == "neighbour"}
    wanted = [asked in neighbours for asked in owners]
    scores = score(topology, samples, batch_tokens, progress, updates, edits, torch.tensor(wanted, dtype=torch.bool))
    sizes = samples.lengths - samples.target_start
    mean = torch.zeros(len(samples), dtype=torch.float64)
    mean.index_add_(0, torch.repeat_interleave(sizes), scores.logp.double()).div_(sizes)
    _finite(mean, list(questions.owners.values()))
    targets = torch.repeat_interleave(samples.offsets[1:] - sizes.cumsum(0), sizes) + torch.arange(len(scores.best))
    hits = scores.best == samples.input_ids[targets]
    best, hit = ([tuple(x.tolist()) for x in torch.split(flat, sizes.tolist())] for flat in (scores.best, hits))
    first = iter(scores.first)
    firsts = [next(first) if keep else None for keep in wanted]
    return dict(zip(owners, zip(best, hit, mean.tolist(), firsts, strict=True), strict=True))


def _check(updates: Mapping[nn.Module, Factors], edits: Sequence[EditRequest], text: Sequence[str]) -> None:
    if text:
        raise ConfigError("text belongs to no request; measure its perplexity without updates")
    for factor in (factor for factors in updates.values() for factor in factors):
        if len(factor) != len(edits):
            raise TensorError(f"updates of {len(factor)} edits do not fit {len(edits)} requests")
        broken = factor.flatten(1).isfinite().all(1).logical_not().nonzero().flatten().tolist()
        if broken:
            shown = ", ".join(str(edits[i].id or i) for i in broken[:5])
            raise EditError(f"the updates of {len(broken)} requests are not finite ({shown}); leave them out")


def _finite(values: Tensor, names: Sequence[str]) -> None:
    """Raise EditError if log-probabilities [N] are not finite; `names` says what was asked."""
    broken = list(dict.fromkeys(names[i] for i in values.isfinite().logical_not().nonzero().flatten().tolist()))
    if broken:
        shown = "; ".join([*broken[:5], "…"] if len(broken) > 5 else broken)
        raise EditError(f"the model gives NaN or infinity ({shown}); try a lower learning rate, or bf16 or fp32")
