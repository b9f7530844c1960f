"""Contexts that the model writes."""

from __future__ import annotations

import copy
from typing import Any

from helpers import tiny_model
from tokenizers.processors import TemplateProcessing

from fastedit.methods import contexts
from fastedit.models import Model


def test_contexts_are_many_and_different(tokenizer: Any) -> None:
    texts = contexts.sample_contexts(Model.of(tiny_model("llama"), tokenizer), 23, seed=1)
    assert len(texts) == 23
    assert len(set(texts)) > 15
    assert texts != contexts.sample_contexts(Model.of(tiny_model("llama"), tokenizer), 23, seed=2)


def test_contexts_are_written_without_dropout(tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    texts = contexts.sample_contexts(Model.of(model, tokenizer), 10, seed=1)
    model.train()
    assert contexts.sample_contexts(Model.of(model, tokenizer), 10, seed=1) == texts
    assert all(part.training for part in model.modules())


def test_contexts_follow_neither_the_model_s_generation_config_nor_an_eos(tokenizer: Any) -> None:
    """The generation settings that a chat checkpoint ships; and a tokenizer that ends every text."""
    model, ended = tiny_model("llama"), copy.deepcopy(tokenizer)
    texts = contexts.sample_contexts(Model.of(model, tokenizer), 10, seed=1)
    ended.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert ended("The").input_ids[-1] == ended.eos_token_id
    assert contexts.sample_contexts(Model.of(model, ended), 10, seed=1) == texts
    own = model.generation_config
    own.num_beams, own.repetition_penalty, own.suppress_tokens = 2, 5.0, list(range(20, 60))
    assert contexts.sample_contexts(Model.of(model, tokenizer), 10, seed=1) == texts
    assert model.generation_config is own
