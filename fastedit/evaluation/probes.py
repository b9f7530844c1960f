"""Harder questions about edits, each as a separate request: after other text, negated, and as multiple choice.

`predict` asks them together with the requests that they are about, in the same passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastedit.evaluation.texts import normalize
from fastedit.models import Model, encode, joined
from fastedit.requests import EditRequest

PREFIXES = (20, 100, 200)  # tokens before a prompt (up to 200, as in EAMET, arXiv 2505.11876)
PROBE_KINDS = (*(f"prefix_{n}" for n in PREFIXES), "negation", "choice")

_OPTIONS = 4  # answers of a multiple choice, at most
_ANSWER = 33  # tokens to leave for the answer after a prefix: 32 are generated
_LOWERED = ("The", "A", "An", "In", "On", "At", "By", "When", "Where", "Who", "What", "Which", "It")
_COPULA = re.compile(r"\b(is|was|are|were)$")


@dataclass(frozen=True)
class Probe:
    """A harder question about the request at ``place``; ``request`` is what is asked."""

    kind: str
    place: int
    request: EditRequest


@dataclass(frozen=True)
class Probes:
    """All probes of some requests; ``left_out`` says for a kind why there are none."""

    probes: list[Probe]
    left_out: dict[str, str]


def probes_of(model: Model, edits: Sequence[EditRequest], text: Sequence[str]) -> Probes:
    """Make the probes of edits.

    After other text: passages of ``text`` that end in a full stop, a different one for each edit. Negated: "It is
    not true that" before a prompt and, if it ends in a form of "to be", "not" after it; only for English statements in
    one line (arXiv 2510.00625). Multiple choice: the target, the true target and targets of other edits, at the
    first paraphrase, or at the prompt if there is none (after arXiv 2604.05995).
    """
    probes: list[Probe] = []
    left_out: dict[str, str] = {}
    for n in PREFIXES:
        after_text = _after_text(model, edits, text, n)
        if isinstance(after_text, str):
            left_out[f"prefix_{n}"] = after_text
        else:
            probes += after_text
    for place, request in enumerate(edits):
        if request.forget:  # a refusal is not wrong for the negated prompt, and not a fact to choose
            continue
        probes += [_probe("negation", place, request, prompt, request.target) for prompt in negations(request.prompt)]
        prompt, options = next(iter(request.paraphrases), request.prompt), _options(edits, place)
        if len(options) > 1:
            probes += [_probe("choice", place, request, prompt, option) for option in options]
    kinds = {probe.kind for probe in probes}
    reasons = {
        "negation": "no prompt is an English statement in one line",
        "choice": "there is no other answer to choose from",
    }
    return Probes(probes, {kind: why for kind, why in reasons.items() if kind not in kinds} | left_out)


def negations(prompt: str) -> list[str]:
    """The negated forms of a prompt; none for a question, for several lines, or for a script other than Latin."""
    letters = [c for c in prompt if c.isalpha()]
    if prompt.endswith(("?", ":")) or "\n" in prompt or not letters or not all(ord(c) < 0x250 for c in letters):
        return []
    lowered = prompt[0].lower() + prompt[1:] if prompt.split(" ", 1)[0] in _LOWERED else prompt
    return [f"It is not true that {lowered}", *([f"{prompt} not"] if _COPULA.search(prompt) else [])]


def _options(edits: Sequence[EditRequest], place: int) -> list[str]:
    """The target first, then the true target, then targets of the next edits, without repetition."""
    request = edits[place]
    others = (edits[(place + i) % len(edits)].target for i in range(1, len(edits)))
    options: dict[str, str] = {}
    for answer in (request.target, request.true_target, *others):
        if answer and len(options) < _OPTIONS:
            options.setdefault(normalize(answer), answer)
    return [*options.values()]


def _after_text(model: Model, edits: Sequence[EditRequest], text: Sequence[str], n: int) -> list[Probe] | str:
    """Probes after n tokens of text, or why there are none."""
    lengths = [len(ids) for ids in encode(model.tokenizer, [(r.prompt, r.target) for r in edits])]
    context = model.topology.context_length
    if n + max(lengths) + _ANSWER > context:
        return f"{n} tokens, a prompt and its answer do not fit into the model's {context} tokens"
    passages = list(_passages(model, text, n, len(edits)))
    if not passages:
        return f"the text has no passage of {n} tokens"
    return [
        _probe(f"prefix_{n}", i, request, joined(passages[i % len(passages)], request.prompt), request.target)
        for i, request in enumerate(edits)
    ]


def _passages(model: Model, text: Sequence[str], n: int, wanted: int) -> Iterator[str]:
    """Up to ``wanted`` passages of about n tokens, in the order of the text; each ends in a full stop."""
    tokenizer = model.tokenizer
    ids = tokenizer(" ".join(" ".join(text).split()), add_special_tokens=False, verbose=False)["input_ids"]
    step = max(1, (len(ids) - n) // max(1, wanted - 1)) if wanted > 1 else len(ids)
    for first in range(0, len(ids) - n + 1, step)[:wanted]:
        passage = tokenizer.decode(ids[first : first + n - 1], skip_special_tokens=True).replace("\ufffd", "").strip()
        yield passage if passage.endswith(".") else f"{passage}."


def _probe(kind: str, place: int, request: EditRequest, prompt: str, answer: str) -> Probe:
    name = request.id if request.id is not None else place
    return Probe(kind, place, EditRequest(prompt, answer, id=f"{name}, {kind.replace('_', ' of ')}"))
