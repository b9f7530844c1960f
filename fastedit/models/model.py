"""A Hugging Face causal language model with its tokenizer and its structure: what every method takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastedit.errors import ConfigError
from fastedit.models.self_check import checked
from fastedit.models.topology import Topology, check_editable, topology


@dataclass(frozen=True, eq=False)
class Model:
    """A model's topology and its tokenizer."""

    topology: Topology
    tokenizer: Any

    @classmethod
    def of(cls, network: Any, tokenizer: Any) -> Model:
        """Find the parts of a model that can be edited.

        Args:
            network: a causal language model, as it is or inside wrappers that keep it as a sub-module.
            tokenizer: the model's.

        Raises:
            ModelError: no causal language model, or one with which this package does not compute what it does itself;
                an adapter that is not merged; quantized or offloaded weights, or weights on several devices.
            ConfigError: not a tokenizer.
        """
        found = topology(network)
        check_editable(found)
        if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
            given = type(tokenizer).__name__
            raise ConfigError(f"tokenizer is a {given}; give the model's, as AutoTokenizer.from_pretrained loads it")
        return cls(checked(found), tokenizer)

    @property
    def network(self) -> nn.Module:
        """The Hugging Face model itself."""
        return self.topology.model

    @property
    def vocabulary(self) -> int:
        """The tokens that the model has rows for, in its embedding and in its head; a tokenizer may have more."""
        network: Any = self.network
        head: Any = self.topology.head
        return min(len(network.get_input_embeddings().weight), len(head.weight))

    @property
    def device(self) -> torch.device:
        return self.topology.device
