"""Where neighbours' answers begin: the likeliest token and the divergence of two models, against plain passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import WORDS, random_edits, tiny_model

import fastedit.evaluation.first_token as first_token
from fastedit import EditRequest, WeightDelta
from fastedit.evaluation.predict import Predictions, predict
from fastedit.evaluation.report import compare
from fastedit.models import Model
from fastedit.weights import LowRank

_WORDS = list(zip(WORDS[::2], WORDS[1::2], strict=False))
ASKED = [
    EditRequest(e.prompt, e.target, id=e.id, neighbours=((f"w9 {e.target}", one), (e.target, other)))
    for e, (one, other) in zip(random_edits(6, 1), _WORDS[:6], strict=True)
]
ASKED[3] = EditRequest("w9 w10", "w11", neighbours=ASKED[0].neighbours)  # equal questions
ASKED[4] = EditRequest("w9 w10 w12", "w11")  # no neighbours


@torch.no_grad()
def distributions(model: Any, tokenizer: Any) -> list[list[torch.Tensor]]:
    """Log-probabilities of the next token after each neighbour prompt, one plain pass each."""
    return [
        [
            model(tokenizer(p, return_tensors="pt").input_ids).logits[0, -1].float().log_softmax(-1)
            for p, _ in r.neighbours
        ]
        for r in ASKED
    ]


def wanted(before: Any, after: Any) -> tuple[float, float]:
    """Share of equal likeliest tokens, and the mean divergence, over requests of the means over prompts."""
    shares, divergences = [], []
    for olds, news in zip(before, after, strict=True):
        if olds:
            pairs = list(zip(olds, news, strict=True))
            shares.append(sum(int(a.argmax() == b.argmax()) for a, b in pairs) / len(pairs))
            divergences.append(sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / len(pairs))
    return sum(shares) / len(shares), sum(divergences) / len(divergences)


def measured(model: Any, tokenizer: Any, **options: Any) -> Predictions:
    return predict(Model.of(model, tokenizer), ASKED, generate=False, **options)


def nudge(model: Any, path: str, seed: int = 3) -> WeightDelta:
    rng = torch.Generator().manual_seed(seed)
    out, inner = dict(model.named_parameters())[path].shape
    factors = torch.randn(out, 1, generator=rng), 0.2 * torch.randn(1, inner, generator=rng)
    return WeightDelta({path: LowRank(*factors)}, {})


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_post_norm", "gemma2"])
def test_first_tokens_as_one_at_a_time(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_token, "LOGITS", 3 * 97)  # several chunks
    model = tiny_model(family)
    before, old = measured(model, tokenizer, kinds=("neighbour",), batch_tokens=30), distributions(model, tokenizer)
    path = next(p for p, x in model.named_parameters() if "1." in p and x.ndim == 2)
    delta = nudge(model, path)
    delta.apply(model, force=True)
    report = compare(ASKED, measured(model, tokenizer), before)
    share, kl = wanted(old, distributions(model, tokenizer))
    assert kl > 1e-3
    assert report.metrics["first_token"] == pytest.approx(share)
    assert report.metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert report.rows[4]["kl"] is report.rows[4]["first_token"] is None
    assert report.rows[3]["kl"] == report.rows[0]["kl"]
    assert report.before is not None
    assert report.before["kl"] is report.before["first_token"] is None
    lines = [line.split() for line in str(report).splitlines()]
    assert ["KL,", "nats", f"{report.metrics['kl']:.3g}"] in lines
    assert ["first", "token", f"{share:.1%}"] in lines


def test_the_same_model_is_not_apart(tokenizer: Any) -> None:
    model = tiny_model("llama")
    report = compare(ASKED, measured(model, tokenizer), measured(model, tokenizer))
    assert (report.metrics["first_token"], report.metrics["kl"]) == (1, 0)
    alone = compare(ASKED, measured(model, tokenizer))
    assert alone.metrics["kl"] is alone.metrics["first_token"] is None


def test_two_models_read_their_own_heads(tokenizer: Any) -> None:
    one, other = (tiny_model("llama", seed=seed) for seed in (0, 1))
    report = compare(ASKED, measured(other, tokenizer), measured(one, tokenizer))
    share, kl = wanted(distributions(one, tokenizer), distributions(other, tokenizer))
    assert report.metrics["first_token"] == pytest.approx(share)
    assert report.metrics["kl"] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_edit_of_the_head_needs_the_head_before(family: str, tokenizer: Any) -> None:
    """Tied to the embedding or not; without a copy nothing is said, rather than something wrong."""
    model = tiny_model(family)
    path = "lm_head.weight" if family == "llama" else "model.embed_tokens.weight"
    kept, not_kept = measured(model, tokenizer, keep_head=True), measured(model, tokenizer)
    old, delta = distributions(model, tokenizer), nudge(model, path)
    head = model.get_output_embeddings()
    assert delta.changes(model, head)
    assert not nudge(model, "model.layers.1.mlp.down_proj.weight").changes(model, head)
    delta.apply(model, force=True)
    after = measured(model, tokenizer)
    kl = wanted(old, distributions(model, tokenizer))[1]
    assert kl > 1e-3
    assert compare(ASKED, after, kept).metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert compare(ASKED, after, not_kept).metrics["kl"] is None


def test_equal_neighbours_are_compared_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_model("llama"), 0
    own = first_token.Head.log_probabilities

    def spy(head: Any, states: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(states)
        return own(head, states)

    monkeypatch.setattr(first_token.Head, "log_probabilities", spy)
    compare(ASKED, measured(model, tokenizer), measured(model, tokenizer))
    assert seen == 2 * len({pair for r in ASKED for pair in r.neighbours})
