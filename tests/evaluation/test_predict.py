"""Batched measures against the plain model, one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from asking import CONTEXT, TWO, all_of, alone, ids_of, measured, prompts, some_requests, tokenizer
from helpers import VOCAB, tiny_model

import fastedit.evaluation.generate as generating
import fastedit.evaluation.questions as questions
import fastedit.evaluation.score as scoring
from fastedit.errors import EditError, RequestError
from fastedit.evaluation.predict import Predictions, predict
from fastedit.evaluation.report import evaluate
from fastedit.models import Continuations, Model
from fastedit.requests import EditRequest


@torch.no_grad()
def greedy(model: Any, prompt: str, ends: tuple[int, ...], most: int) -> str:
    """The greedy continuation by the plain model, without a cache, up to so many tokens or an end token."""
    ids = ids_of(prompt)
    start = len(ids)
    for _ in range(min(most, CONTEXT + 1 - start)):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    text: str = tokenizer().decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def stopped(text: str, dots: int) -> str:
    """``text`` up to its first newline or the end of a sentence after ``dots``."""
    kept = ""
    for c in text:
        if c == "\n" or (c in ".!?" and sum(map(kept.count, ".!?")) == dots):
            break
        kept += c
    return kept.strip()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_teacher_forced_as_one_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS", 7 * VOCAB)  # several chunks of rows a batch
    model, requests = tiny_model(family), some_requests()
    predictions = measured(model, requests, generate=False, batch_tokens=150)
    for r, found in zip(requests, predictions.answers, strict=True):
        asked: list[tuple[str, str, str | None]] = [(r.prompt, r.target, r.true_target)]
        asked += [(p, r.target, r.true_target) for p in r.paraphrases]
        asked += [(p, a, r.target) for p, a in r.neighbours] + [(p, a, None) for p, a in r.portability]
        for p, (prompt, answer, other) in zip(all_of(Predictions([found], None)), asked, strict=True):
            best, hits, logp = alone(model, prompt, answer)
            assert (p.prompt, p.answer, p.argmax, p.hits, p.generated) == (prompt, answer, best, hits, None)
            assert p.logp == pytest.approx(logp, abs=2e-5)
            assert (p.other_logp is None) == (other is None)
            if other:
                assert p.other_logp == pytest.approx(alone(model, prompt, other)[2], abs=2e-5)


def test_log_probabilities_of_a_bf16_model_are_fp32() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    for request in some_requests():
        one = [EditRequest(request.prompt, request.target)]  # alone in its row: nothing else may differ
        (found,) = all_of(measured(model, one, generate=False))
        assert found.logp == pytest.approx(alone(model, found.prompt, found.answer)[2], abs=1e-5)


@pytest.mark.parametrize(("family", "ends_texts"), [("llama", False), ("llama", True), ("gpt2", False), ("opt", False)])
def test_generated_text_as_one_at_a_time(family: str, ends_texts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests, most = tiny_model(family, seed=3), some_requests(), 32
    if family != "llama":  # they repeat themselves
        monkeypatch.setattr(questions, "_NEW_TOKENS", most := 16)
    end_of_turn = ids_of(" Lo")[1]
    own = model.generation_config
    own.update(repetition_penalty=9.0, do_sample=True, temperature=5.0, min_new_tokens=9, suppress_tokens=[5])
    own.eos_token_id = [1, end_of_turn]
    model.train()  # dropout would show
    predictions = predict(Model.of(model, tokenizer(ends_texts)), requests, batch_tokens=60)
    assert model.training
    assert model.generation_config is own
    model.eval()
    cases, asked = set(), {p.prompt for p in all_of(predictions)}  # by several questions each
    texts = {prompt: greedy(model, prompt, (1, end_of_turn), most) for prompt in asked}
    for p in all_of(predictions):
        dots = {"St. Louis": 1, "D.C.": 1, "b.c.d end": 2}.get(p.answer, 0)
        text = texts[p.prompt]
        kept = stopped(text, dots)
        assert p.generated == kept
        limit = min(most, CONTEXT + 1 - len(ids_of(p.prompt)))
        if kept != text.strip():
            cases.add("newline" if text.strip()[len(kept)] == "\n" else f"{dots} dots")
        else:
            cases.add("EOS" if len(ids_of(text)) - 1 < limit else "context" if limit < 32 else "32 tokens")
    if family == "llama":
        assert cases >= {"32 tokens", "EOS", "context", "newline", "0 dots", "1 dots", "2 dots"}


def spy_on_generation(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, ...]], list[int]]:
    """Lists that will hold the prompts that are run, and the number of tokens after each."""
    run, steps = [], []

    class Spy(Continuations):
        def __iter__(self) -> Iterator[tuple[int, list[int]]]:
            run.extend(map(tuple, self._prompts))
            found = dict(super().__iter__())
            steps.extend(len(found[i]) for i in range(len(self._prompts)))
            yield from found.items()

    monkeypatch.setattr(generating, "Continuations", Spy)
    return run, steps


def test_every_prompt_is_generated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = spy_on_generation(monkeypatch)
    measured(tiny_model("llama"), TWO, generate=False)
    assert not run
    predictions = measured(tiny_model("llama"), some_requests() * 2)
    assert sorted(run) == sorted({tuple(ids_of(p.prompt)) for p in all_of(predictions)})


def test_a_model_that_knows_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [  # and what the model goes on with; after nothing, EOS
        ("capital a", "St. Louis", ". is the sea"),
        ("capital of b", "A D.C.", " is the sea"),
        ("a capital of c", "Lo Lo", "\nSt"),
        ("the a capital of d", "red sea", ""),
    ]
    model = tiny_model("llama")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(120):
        prompt, answer, more = facts[step % 4]
        ids = torch.tensor([[*ids_of(f"{prompt} {answer}{more}"), 1]])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    requests = [EditRequest(p, a, None, None, "blue", (p,), ((p, "blue"),)) for p, a, _ in facts]
    wrong = replace(requests[0], target="St. is")
    steps = spy_on_generation(monkeypatch)[1]
    report = evaluate(model, tokenizer(), [*requests, wrong])
    sizes = [len(ids_of(f"{p} {a}")) - len(ids_of(p)) for p, a, _ in facts]
    assert steps == [sizes[0] + 1, sizes[1], sizes[2] + 1, sizes[3] + 1]  # none after its stop
    assert report.metrics["reliability"]["generated"] == 4 / 5
    assert [row["reliability"]["generated"] for row in report.rows] == [1, 1, 1, 1, 0]
    assert [row["generated"] for row in report.rows[:4]] == ["St. Louis", "A D.C", "Lo Lo", "red sea"]
    assert report.metrics["generalization"] == report.metrics["reliability"]
    hits = alone(model, wrong.prompt, wrong.target)[1]
    assert 0 < sum(hits) < len(hits) == 4
    assert report.metrics["reliability"]["teacher_forced"] == pytest.approx((4 + sum(hits) / 4) / 5)
    assert [report.metrics[name] for name in ("es", "ps", "ns", "score")] == [1, 1, 0, 0]
    assert report.metrics["locality"] == {"teacher_forced": None, "generated": None}
    assert report.metrics["neighbour_accuracy"]["generated"] == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_perplexity(family: str) -> None:
    model = tiny_model(family)
    text = [" ".join(prompts(6)), next(prompts(1, seed=5)), "", " ".join(prompts(2, seed=6))]
    assert len(ids_of(text[0])) > 2 * CONTEXT
    nll = []
    for ids in map(ids_of, text):
        for t in range(1, len(ids)):
            window = torch.tensor([ids[(t - 1) // CONTEXT * CONTEXT : t]])
            logits = model(input_ids=window, use_cache=False).logits[0, -1]
            nll.append(-logits.log_softmax(-1)[ids[t]].item())
    found = measured(model, [], text=text, batch_tokens=100)
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert measured(model, [], text=text[1]).perplexity == measured(model, [], text=text[1:2]).perplexity
    assert measured(model, []).perplexity is None


def test_a_model_without_settings_of_generation_is_measured() -> None:
    model, wanted = tiny_model("llama"), evaluate(tiny_model("llama"), tokenizer(), TWO).to_dict()
    model.generation_config = None
    assert evaluate(model, tokenizer(), TWO).to_dict() == wanted


def test_nan_is_an_error() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[3, 3] = math.nan
    for requests, text in (some_requests(), []), ([], ["the red sea"]):
        with pytest.raises(EditError, match="the model gives NaN"):
            measured(model, requests, text=text)


def test_a_prompt_longer_than_the_context_is_named() -> None:
    long = " ".join("x" * 70)
    model, fine = tiny_model("gpt2"), some_requests()
    with pytest.raises(RequestError, match=r"^request r7, rewrite: .*context of 64"):
        measured(model, [*fine[:3], replace(fine[3], id="r7", prompt=long)])
    with pytest.raises(RequestError, match=r"^request 3, neighbour: .*context of 64"):
        measured(model, [*fine[:3], replace(fine[3], id=None, neighbours=((long, "x"),))])
    # all of them, and a prompt that is asked with two answers once
    spoiled = [replace(fine[0], prompt=long), *fine[1:4], replace(fine[4], paraphrases=(f"y{long}",))]
    named = r"^2 prompts cannot be used: request r0, rewrite: [^|]* \| request r4, paraphrase: [^|]*$"
    with pytest.raises(RequestError, match=named):
        measured(model, spoiled)


def test_progress_reaches_its_end() -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        seen.setdefault(stage, []).append((done, total))

    options = {"text": ["the sea"] * 3, "batch_tokens": 150, "progress": progress}
    found = measured(tiny_model("llama"), some_requests(), **options)
    assert list(seen) == ["answers", "text", "generation"]
    assert seen["text"][-1] == (3, 3)
    assert seen["generation"][-1][1] == len({p.prompt for p in all_of(found)})
    for steps in seen.values():
        done = [n for n, _ in steps]
        assert done == sorted({*done, steps[0][1]})  # rises to the total
    assert len(seen["answers"]) > 2
