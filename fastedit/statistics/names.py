"""Names of people, places and things: where a subject ends, an edit of another one must change nothing.

A second moment of text says little about such inputs, because few tokens of a text end a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.errors import ConfigError, listed
from fastedit.models import (
    Model,
    PrefixCache,
    Samples,
    encode,
    in_passes,
    observe,
    pack,
    pass_tokens,
    prompt_samples,
    without_rows,
)
from fastedit.ops import factor_covariance
from fastedit.statistics.store import StatisticsStore
from fastedit.tensorfile import checksum


@cache
def common_names() -> tuple[str, ...]:
    """The names that come with the package: 573 of people (first and last names put together), places and things."""
    return tuple(Path(__file__).with_name("names.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class StatisticsWithNames(StatisticsStore):
    """Second moments of text, to which those at the last tokens of names are added.

    Attributes:
        moments: number of a layer -> what is added to its C, [d, d] fp64. Kept eigenvectors are of these bits alone.
    """

    moments: Mapping[int, Tensor] = field(default_factory=dict)

    def covariance(self, layer: int) -> Tensor:
        """C [d, d] fp64 of text and names on the module's device; raises what it raises without names."""
        return super().covariance(layer) + self.moments[layer]

    def cholesky(self, layer: int) -> Tensor:
        """The lower Cholesky factor [d, d] fp64 of C; it is not kept. Raises what `covariance` raises."""
        return factor_covariance(self.covariance(layer), allow_few=True)  # of the text there are enough tokens

    def _place(self, layer: int, kind: str) -> tuple[Path, dict[str, Any]]:
        path, identity = super()._place(layer, f"{kind}.names")
        return path, identity | {"names": str(checksum(self.moments[layer]))}


def known_names(model: Model, names: Sequence[str] | None, but: Iterable[str] = ()) -> tuple[str, ...]:
    """The names that the model has tokens for.

    Args:
        names: any names; None is `common_names`, of which those that the tokenizer does not know are left out.
        but: names to leave out; the case of letters does not count.

    Raises:
        ConfigError: given names that the tokenizer does not know, or that have tokens without an embedding.
    """
    chosen, left_out = common_names() if names is None else tuple(names), {name.casefold() for name in but}
    tokens = encode(model.tokenizer, chosen)
    if names is not None and (missing := without_rows(model.tokenizer, sorted(set().union(*tokens)), model.vocabulary)):
        raise ConfigError(f"names: {missing}")
    special = {*getattr(model.tokenizer, "all_special_ids", ())}
    unk = getattr(model.tokenizer, "unk_token_id", None)
    known = {
        name
        for name, ids in zip(chosen, tokens, strict=True)
        if unk not in ids and not special.issuperset(ids) and max(ids) < model.vocabulary
    }
    if names is not None and (unknown := [name for name in names if name not in known]):
        raise ConfigError(f"names: the tokenizer does not know {listed(unknown)}; leave them out")
    return tuple(name for name in chosen if name in known and name.casefold() not in left_out)


def with_names(
    store: StatisticsStore, model: Model, layers: Sequence[int], names: Sequence[str], weight: float
) -> StatisticsStore:
    """Add the second moments at the last tokens of names to those of text.

    Args:
        store: second moments of the inputs of one projection.
        model: runs the blocks below, as it is.
        layers: the layers that will be asked for.
        names: names from `known_names`; without any, the store is returned.
        weight: of the mean of k kᵀ over the names, against that over the tokens of text.
    """
    if not names or not weight:
        return store
    samples = prompt_samples(*model.last_tokens(names, [len(name) for name in names]))
    moments = {layer: weight * C for layer, C in _moments(model, samples, layers, store.module).items()}
    return StatisticsWithNames(**{field.name: getattr(store, field.name) for field in fields(store)}, moments=moments)


@torch.no_grad()
def _moments(model: Model, samples: Samples, layers: Sequence[int], module: str) -> dict[int, Tensor]:
    """The mean of k kᵀ [d, d] fp64 over the samples' target rows, by layer; inputs that are not finite are left out."""
    topology, moments = model.topology, dict[int, Tensor]()
    with PrefixCache(topology, samples, min(layers), packed=False) as cache:
        for layer in sorted(layers):
            cache.advance(layer)
            _, projection = topology.resolve(layer, module)
            inputs = []
            for select in in_passes(samples.lengths, pass_tokens(topology.device)):
                rows = pack(samples, torch.tensor(select), packed=False).to(topology.device)
                inputs.append(observe(topology, cache.hidden(rows), rows, layer, projection))
            keys = torch.cat(inputs).double()
            keys = keys[keys.isfinite().all(1)]
            moments[layer] = keys.T @ keys / max(1, len(keys))
    return moments
