"""A Hugging Face causal language model with its tokenizer and its structure, as every method takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastedit.errors import ConfigError
from fastedit.models.chat import Chat
from fastedit.models.editable import check_editable
from fastedit.models.encode import Text
from fastedit.models.hooks import own_forward
from fastedit.models.self_check import checked
from fastedit.models.tokens import Samples, last_tokens, prompt_tokens, tokenize
from fastedit.models.topology import Topology, topology


@dataclass(frozen=True, eq=False)
class Model:
    """A model's topology and its tokenizer. With ``chat``, prompts are a user's turn, else plain text."""

    topology: Topology
    tokenizer: Any
    chat: Chat | None = None
    _made_of: list[Any] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, network: Any, tokenizer: Any, *, chat_template: bool = False) -> Model:
        """Find the parts of a model that can be edited.

        Args:
            network: a causal language model, as it is or inside wrappers that keep it as a sub-module.
            tokenizer: the model's tokenizer.
            chat_template: treat prompts as a user's turn in the tokenizer's chat template.

        Raises:
            ModelError: not a causal language model, or one for which this package computes other numbers than the
                model itself; an adapter that is not merged; weights on several devices;
                quantized weights outside the linear maps of the blocks.
            ConfigError: not a tokenizer, or one without a chat template if `chat_template` is set.
        """
        parts = topology(network)
        check_editable(parts)
        if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
            kind = type(tokenizer).__name__
            raise ConfigError(f"tokenizer is a {kind}; give the model's, as AutoTokenizer.from_pretrained loads it")
        return cls(checked(parts), tokenizer, Chat.of(tokenizer) if chat_template else None, _made_of(network))

    def holds(self, network: Any, tokenizer: Any) -> bool:
        """Whether these are the parts of a network as it is now: no module, hook or `forward` in it was exchanged."""
        return self.tokenizer is tokenizer and self._made_of == _made_of(network)

    def tokenize(self, pairs: Sequence[tuple[str, str]], *, append_eos: bool) -> Samples:
        """`tokens.tokenize` with this model's context length, vocabulary and chat template."""
        limits: dict[str, Any] = {"max_length": self.topology.context_length, "vocabulary": self.vocabulary}
        return tokenize(self.tokenizer, pairs, append_eos=append_eos, chat=self.chat, **limits)

    def last_tokens(self, texts: Sequence[Text], ends: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """`tokens.last_tokens` with this model's chat template."""
        return last_tokens(self.tokenizer, texts, ends, chat=self.chat)

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """`tokens.prompt_tokens` with this model's chat template."""
        return prompt_tokens(self.tokenizer, prompts, chat=self.chat)

    @property
    def network(self) -> nn.Module:
        """The Hugging Face model itself."""
        return self.topology.model

    @property
    def vocabulary(self) -> int:
        """How many tokens have a row in both embedding and head; the tokenizer may have more tokens."""
        network: Any = self.network
        head: Any = self.topology.head
        return min(len(network.get_input_embeddings().weight), len(head.weight))

    @property
    def device(self) -> torch.device:
        return self.topology.device


def _made_of(network: nn.Module) -> list[Any]:
    return [
        (module, type(module), own_forward(module), *module._forward_hooks, *module._forward_pre_hooks)
        for module in network.modules()
    ]
