"""Questions about edit requests: prompts and answers, each tokenized once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fastedit.errors import Problem, RequestError, listed
from fastedit.evaluation.generate import Stop
from fastedit.evaluation.texts import inner_ends
from fastedit.models import SENTENCE_ENDS, Model, PairError, Samples, encode, special_tokens, without_rows
from fastedit.requests import EditRequest

_NEW_TOKENS = 32  # tokens of a generated answer, as published (arXiv 2502.11177; LocFT-BF)
_MORE_TOKENS = 8  # to generate beyond the length of longer answers, to see whether they end there
_WINDOW = 2048  # tokens of a window of text, at most: attention masks grow with the square

# kind -> (prompt, answer, competing answer) for each of a request's prompts
_QUESTIONS: dict[str, Callable[[EditRequest], Iterable[tuple[str, str, str | None]]]] = {
    "rewrite": lambda r: [(r.prompt, r.target, r.true_target)],
    "paraphrase": lambda r: [(prompt, r.target, r.true_target) for prompt in r.paraphrases],
    "neighbour": lambda r: [(prompt, answer, r.target) for prompt, answer in r.neighbours],
    "portability": lambda r: [(prompt, answer, None) for prompt, answer in r.portability],
    "forgotten": lambda r: [(prompt, r.forget, r.target) for prompt in (r.prompt, *r.paraphrases) if r.forget],
}
KINDS = tuple(_QUESTIONS)

Asked = tuple[int, str, str]
"""Edit, prompt, answer; the edit is 0 if the model runs without per-request updates."""


@dataclass(frozen=True)
class Questions:
    """All questions, with equal ones once.

    Attributes:
        asked: (kind, place of the request, prompt, answer, competing answer) in the order of the requests.
        owners: each (edit, prompt, answer) once -> the request that asks it first, for messages.
        stops: (edit, prompt) -> where its generated text ends at the latest.
        samples: one for each of `owners`.
        documents: the windows of the text for the perplexity.
        n_requests: number of requests.
    """

    asked: list[tuple[str, int, str, str, str | None]]
    owners: dict[Asked, str]
    stops: dict[tuple[int, str], Stop]
    samples: Samples
    documents: Samples
    n_requests: int


def kinds_in(edits: Sequence[EditRequest]) -> set[str]:
    """The kinds of prompts that these edits have."""
    return {kind for kind, questions in _QUESTIONS.items() if any(map(list, map(questions, edits)))}


def read_to(kind: str, answer: str, other: str | None) -> str:
    """The text that generation must be long enough for; an answer to be forgotten may still follow the refusal."""
    return f"{(other or '').rstrip(SENTENCE_ENDS)}. {answer}" if kind == "forgotten" else answer


def ask(
    model: Model,
    edits: Sequence[EditRequest],
    *,
    kinds: Sequence[str] = KINDS,
    text: Sequence[str] = (),
    by_edit: bool = False,
) -> Questions:
    """Tokenize all questions, and check that all of them can be asked.

    Args:
        kinds: kinds of prompts, some of `KINDS`.
        text: documents for the perplexity; a str is one document.
        by_edit: the prompts of edit i run with edit i alone, so that equal prompts are separate questions.

    Raises:
        RequestError: prompts and answers do not fit the model's context, have no tokens, or have
            tokens without a row in the model; names all of them.
    """
    asked = [(k, i, *q) for k in kinds for i, request in enumerate(edits) for q in _QUESTIONS[k](request)]
    owners: dict[Asked, str] = {}
    for kind, i, prompt, answer, other in asked:
        edit = i if by_edit else 0
        for completion in filter(None, (answer, other)):
            owners.setdefault((edit, prompt, completion), f"request {edits[i].id or i}, {kind}")
    context = model.topology.context_length
    try:
        pairs = [(prompt, completion) for _, prompt, completion in owners]
        samples = model.tokenize(pairs, append_eos=False)
    except PairError as error:
        names = list(owners.values())
        problems = {names[p.pair]: Problem(names[p.pair], p.sentence()) for p in reversed(error.problems)}
        raise RequestError.of(list(reversed(problems.values())), "prompts") from None
    documents = _windows(model, [text] if isinstance(text, str) else text, context)
    return Questions(asked, owners, _stops(asked, owners, samples, by_edit), samples, documents, len(edits))


def _stops(
    asked: Sequence[tuple[str, int, str, str, str | None]], owners: Iterable[Asked], samples: Samples, by_edit: bool
) -> dict[tuple[int, str], Stop]:
    """Where the texts of all prompts end: after the longest answer that is looked for."""
    sizes = dict(zip(owners, (samples.lengths - samples.target_start).tolist(), strict=True))
    stops: dict[tuple[int, str], Stop] = {}
    for kind, i, prompt, answer, other in asked:
        edit = i if by_edit else 0
        tokens = sizes[edit, prompt, answer] + (sizes[edit, prompt, other] if kind == "forgotten" and other else 0)
        stop = stops.get((edit, prompt), Stop(0, _NEW_TOKENS))
        stops[edit, prompt] = Stop(
            max(stop.ends, inner_ends(read_to(kind, answer, other))),
            max(stop.tokens, tokens + _MORE_TOKENS if tokens > _NEW_TOKENS else 0),
        )
    return stops


def prompt_notes(model: Model, edits: Sequence[EditRequest]) -> list[str]:
    """Notes for the user on special and unknown tokens in prompts and answers, and on a template that is not used."""
    notes = []
    if model.chat is None and getattr(model.tokenizer, "chat_template", None):
        notes.append(
            "the tokenizer has a chat template, and prompts go to the model without it, as plain text; to edit what it "
            "answers in a chat, use the template: chat_template=True (--chat)"
        )
    special = [token for token in special_tokens(model.tokenizer) if token.strip()]
    used: dict[str, None] = {}
    names: dict[str, None] = {}
    for i, request in enumerate(edits):
        for kind, questions in _QUESTIONS.items():
            for prompt, answer, _ in questions(request):
                if held := [token for token in special if token in prompt or token in answer]:
                    used |= dict.fromkeys(map(repr, held))
                    names[f"request {request.id or i}, {kind}"] = None
    if names:
        notes.append(
            f"{len(names)} prompts or answers hold special tokens of the tokenizer ({listed([*used])}). The model "
            "reads them as such, and a generated text shows none. If they come from a chat template, give the words of "
            f"user and answer alone, with chat_template=True (--chat): {listed([*names])}"
        )
    return [*notes, *_unknown(model, edits)]


def _unknown(model: Model, edits: Sequence[EditRequest]) -> list[str]:
    """A note on edits with text that the tokenizer does not know; most know every byte, and are not asked."""
    token, unknown = (getattr(model.tokenizer, name, None) for name in ("unk_token", "unk_token_id"))
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if (
        unknown is None
        or unknown == model.tokenizer.eos_token_id
        or getattr(backend and backend.model, "byte_fallback", False)
    ):
        return []
    encoded = encode(model.tokenizer, [(request.prompt, request.target) for request in edits])
    affected = [
        str(request.id or i)
        for i, (request, ids) in enumerate(zip(edits, encoded, strict=True))
        if unknown in ids and str(token) not in request.prompt + request.target
    ]
    if not affected:
        return []
    text = "edits have text that the tokenizer does not know, for which the model reads and learns"
    return [f"{len(affected)} {text} {token!r}: {listed(affected)}"]


def _windows(model: Model, text: Sequence[str], context: int) -> Samples:
    """Cut documents into windows; every token but a document's first is a label exactly once."""
    size = min(context, _WINDOW)
    encoded = encode(model.tokenizer, text)
    for number, ids in enumerate(encoded):
        if missing := without_rows(model.tokenizer, ids, model.vocabulary):
            raise RequestError(f"document {number} (counted from 0) of the text for perplexity: {missing}")
    pieces = [ids[i : i + size + 1] for ids in encoded for i in range(0, len(ids) - 1, size)]
    flat = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
    offsets = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    return Samples(flat, offsets, torch.ones(len(pieces), dtype=torch.int64))
