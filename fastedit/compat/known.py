"""The record of a model between calls of other editing code; it is freed with the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fastedit.methods.base import Memo
from fastedit.methods.contexts import context_templates
from fastedit.models import Model, fingerprint
from fastedit.tensorfile import checksums


@dataclass
class Known:
    """The values that calls on one model share.

    Attributes:
        fingerprint: fingerprint of the model at the first call; statistics belong to that model.
        memo: cache of the methods, and of matrices made from a caller's tensors or from files.
        contexts: templates that the model wrote, by the lengths and numbers that were asked for.
        written: path of a parameter -> keys [n, d] of the edits that it holds, and its checksum after the last edit.
    """

    fingerprint: str
    memo: Memo = field(default_factory=Memo)
    contexts: dict[Any, tuple[str, ...]] = field(default_factory=dict)
    written: dict[str, tuple[Tensor, str]] = field(default_factory=dict)

    def own_contexts(self, model: Model, lengths: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
        """Templates that the model writes at the first call, with seed 0; `lengths` has (tokens, how many) pairs."""
        if lengths not in self.contexts:
            groups = (context_templates(model, n, seed=0, n_tokens=tokens) for tokens, n in lengths)
            self.contexts[lengths] = tuple(template for group in groups for template in group)
        return self.contexts[lengths]

    def standing(self, network: nn.Module) -> dict[str, Tensor]:
        """Keys of the edits that the parameters hold; empty if a parameter changed after the last edit."""
        now = _sums(network, self.written)  # `Tensor._version` does not show what is written through `.data`
        if any(now[path] != then for path, (_, then) in self.written.items()):
            self.written.clear()
        return {path: keys for path, (keys, _) in self.written.items()}

    def note(self, network: nn.Module, keys: dict[str, Tensor]) -> None:
        """Note that the parameters hold edits with these keys now."""
        now = _sums(network, keys)
        self.written = {path: (of_path, now[path]) for path, of_path in keys.items()}


def _sums(network: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    parameters = dict(network.named_parameters())
    return checksums({path: parameters[path] for path in paths})


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known_of(model: nn.Module, parts: Model) -> Known:
    """The record of a model, which is begun at the first call."""
    if model not in _KNOWN:
        _KNOWN[model] = Known(fingerprint(parts.network))
    return _KNOWN[model]


def copied(known: Known, source: nn.Module, model: nn.Module, network: nn.Module) -> Known:
    """Keep the same about a copy of a model."""
    keys = known.standing(source)
    _KNOWN[model] = replace(known)
    _KNOWN[model].note(network, keys)
    return _KNOWN[model]
