"""A byte-level tokenizer, requests to measure, predictions that are given, and the plain model alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from helpers import VOCAB
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import fastedit.evaluation.predict as predicting
from fastedit.evaluation.predict import Prediction, Predictions, predict
from fastedit.models import Model
from fastedit.requests import EditRequest

WORDS = "abcdefghijklmnopqrstuvwxyz ABCDSL.\n"
CONTEXT = 64
TWO = [EditRequest("p", "x", id="one"), EditRequest("p", "x", id="two")]


@lru_cache
def tokenizer(ends_texts: bool = False) -> Any:
    """97 byte-level tokens; token 0 is BOS, put before every text, 1 is EOS, put after it if wanted."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    corpus = [WORDS, "the red sea is blue", "St. Louis and D.C.", ".! !. .? ?. ... !.. ?.. ..\n \n\n"] * 9
    trainer = BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False)
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A" + " </s>" * ends_texts, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(text)["input_ids"])


def prompts(n: int, seed: int = 0) -> Iterator[str]:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(n):
        letters = torch.randint(0, 26, (int(torch.randint(3, 30, (), generator=rng)),), generator=rng)
        yield "".join(WORDS[i] + " " * (i % 4 == 0) for i in letters.tolist()).strip()


def some_requests() -> list[EditRequest]:
    p = list(prompts(40))
    answers = ["one", "St. Louis", "the red sea", "D.C.", "a"]
    return [
        EditRequest(
            prompt=p[3 * i],
            target=answers[i % 5],
            id=f"r{i}",
            true_target=None if i == 3 else answers[(i + 1) % 5],
            paraphrases=(p[3 * i + 1], p[3 * i + 2])[: i % 3],
            neighbours=((p[3 * i + 2], "blue"), (p[0], "far away"))[: 1 + i % 2],
            portability=((p[3 * i + 1], "b.c.d end"),) if i % 2 else (),
        )
        for i in range(7)
    ]


def measured(model: Any, requests: list[EditRequest], **options: Any) -> Predictions:
    return predict(Model.of(model, tokenizer()), requests, **options)


def all_of(predictions: Predictions) -> list[Prediction]:
    return [p for answers in predictions.answers for found in answers.values() for p in found]


@torch.no_grad()
def alone(model: Any, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[bool, ...], float]:
    """Argmax, hits and mean log P of an answer's tokens by the plain model on this one text."""
    encoded = tokenizer()(f"{prompt} {answer}", return_offsets_mapping=True)
    ids = encoded["input_ids"]
    n = sum(end > len(prompt) for _, end in encoded["offset_mapping"])
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -n - 1 : -1].float()
    best = tuple(logits.argmax(-1).tolist())
    logp = logits.log_softmax(-1)[range(n), ids[-n:]].mean().item()
    return best, tuple(a == b for a, b in zip(best, ids[-n:], strict=True)), logp


def said(hits: str = "1", text: str | None = "x", best: Any = (5,), other: float | None = None) -> Prediction:
    return Prediction("p", "x", best, tuple(c == "1" for c in hits), -1.0, other, text)


def answers(**kinds: list[Prediction]) -> dict[str, list[Prediction]]:
    return {kind: kinds.get(kind, []) for kind in predicting.KINDS}
