"""What is known of a model from one call of other editing code to the next; gone with the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fastedit.methods.base import Memo
from fastedit.methods.contexts import context_templates
from fastedit.models import Model, fingerprint


@dataclass
class Known:
    """What calls on one model share.

    Attributes:
        fingerprint: of the model when it was first met, to which statistics belong.
        memo: of the methods, and of matrices that are made of what a caller holds or a file has.
        contexts: the model's own, by the lengths and numbers that were asked for.
        written: path of a parameter -> keys [n, d] of the edits that it holds, and its version behind the last one.
    """

    fingerprint: str
    memo: Memo = field(default_factory=Memo)
    contexts: dict[Any, tuple[str, ...]] = field(default_factory=dict)
    written: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def own_contexts(self, model: Model, lengths: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
        """Templates that the model wrote when it was first asked, of (tokens, how many) each, from seed 0."""
        if lengths not in self.contexts:
            found = (context_templates(model, n, seed=0, n_tokens=tokens) for tokens, n in lengths)
            self.contexts[lengths] = tuple(template for some in found for template in some)
        return self.contexts[lengths]

    def standing(self, network: nn.Module) -> dict[str, Tensor]:
        """Keys of the edits that the parameters hold: none if anybody wrote to one of these after the last of them."""
        parameters = dict(network.named_parameters())
        if any(parameters[path]._version != version for path, (_, version) in self.written.items()):
            self.written.clear()
        return {path: keys for path, (keys, _) in self.written.items()}

    def note(self, network: nn.Module, keys: dict[str, Tensor]) -> None:
        """The parameters hold edits with these keys now."""
        parameters = dict(network.named_parameters())
        self.written = {path: (of_path, parameters[path]._version) for path, of_path in keys.items()}


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known_of(model: nn.Module, parts: Model) -> Known:
    """What is known of a model."""
    if model not in _KNOWN:
        _KNOWN[model] = Known(fingerprint(parts.network))
    return _KNOWN[model]


def copied(known: Known, source: nn.Module, model: nn.Module, network: nn.Module) -> Known:
    """The same of a copy."""
    keys = known.standing(source)
    _KNOWN[model] = replace(known)
    _KNOWN[model].note(network, keys)
    return _KNOWN[model]
