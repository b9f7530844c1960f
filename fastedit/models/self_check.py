"""Check on a few samples that this package computes the same as the model itself.

The tests cover the model types in the list below. Any other type is measured when it is loaded: logits and a gradient
of a small ragged batch, by the passes that an edit makes, against the model's own forward pass, one sample at a time.
Shortcuts that change the numbers are turned off (shared rows, blocks in parts, replayed blocks); if the numbers still
differ, the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastedit.errors import ModelError
from fastedit.models.block_calls import BlockCalls
from fastedit.models.block_parts import holds_experts
from fastedit.models.editable import blocks_elsewhere
from fastedit.models.fingerprint import fingerprint
from fastedit.models.forward import at_tokens, resume, run_from_tokens
from fastedit.models.frozen import FrozenPart
from fastedit.models.held_tokens import HeldTokens
from fastedit.models.hooks import eval_mode, only_trainable, own_forward, plain_state
from fastedit.models.offload import load_weights, offloaded_prefix
from fastedit.models.prefix_cache import PrefixCache
from fastedit.models.quantized import check_plain, has_quantized, is_quantized
from fastedit.models.tokens import Samples, pack
from fastedit.models.topology import Topology

VERIFIED = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
)
"""Model types that the tests cover; they are not measured when they are loaded."""
_LENGTHS = (21, 4, 33, 9, 2, 14)  # tokens of the samples; they fill two rows


@dataclass(frozen=True)
class Flags:
    """The ways in which a pass may run a model; see `Topology`."""

    shares_rows: bool = True
    runs_in_parts: bool = True
    replays_blocks: bool = True

    def of(self, topology: Topology) -> Topology:
        """The topology with these flags."""
        return replace(
            topology,
            shares_rows=self.shares_rows,
            runs_in_parts=self.runs_in_parts,
            replays_blocks=self.replays_blocks,
        )

    def __str__(self) -> str:
        rows = "samples sharing rows" if self.shares_rows else "a row for each sample"
        return f"{rows}, {'blocks in parts' if self.runs_in_parts else 'whole blocks'}"


@dataclass(frozen=True)
class SelfCheck:
    """The results for a model.

    Attributes:
        layer: the block from which passes resumed.
        path: the matrix in that block whose gradient was compared.
        flags: what a pass may do with the model.
        logits, gradient: largest difference from the model's own, as a share of the largest value.
        problem: why the model cannot be edited; None if it can.
        notes: why flags were turned off.
    """

    layer: int
    path: str
    flags: Flags
    logits: float
    gradient: float
    problem: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Own:
    """The model's own results: logits [M, V] at the target rows, and the gradient of a matrix of some dtype."""

    logits: Tensor
    gradient: Tensor
    dtype: torch.dtype


class _DiffersError(Exception):
    """Numbers differ from the model's own; says which."""


_known: dict[tuple[str, ...], SelfCheck] = {}


def checked(topology: Topology) -> Topology:
    """The topology with what a pass may do; measured unless the model's type is in `VERIFIED` and nothing was changed.

    Raises:
        ModelError: this package computes other numbers than the model; says which.
    """
    # encoders of a listed type have these fields
    sees_ahead = getattr(topology.config, "use_bidirectional_attention", False) or not getattr(
        topology.config, "is_causal", True
    )
    if (
        topology.config.model_type in VERIFIED
        and not sees_ahead
        and _unchanged(topology)
        and not has_quantized(topology.model)
    ):
        return topology
    check = self_check(topology)
    if check.problem is not None:
        raise ModelError(check.problem)
    return check.flags.of(topology)


def _unchanged(topology: Topology) -> bool:
    """Whether a model's modules are of torch and transformers, with the `forward` of their class and without hooks."""
    return all(
        type(module).__module__.partition(".")[0] in ("torch", "transformers")
        and own_forward(module) is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in topology.model.modules()
    )


@plain_state
def self_check(topology: Topology) -> SelfCheck:
    """Measure a model, once per process for the same weights in the same dtype on the same device.

    One with other modules or hooks than its type says is measured each time.

    Raises:
        ModelError: no block has a matrix to edit; this package cannot edit the weights.
    """
    dtype = next(topology.backbone.parameters()).dtype
    config = topology.config  # the same weights with another config are another model
    key = (
        fingerprint(topology.model),
        config.to_json_string(),
        str(dtype),
        str(topology.device),
        str(config._attn_implementation),
    )
    known = _known if _unchanged(topology) else {}
    if key not in known:
        with torch.inference_mode(False), torch.enable_grad():
            known[key] = _measure(topology)
    return known[key]


def _measure(topology: Topology) -> SelfCheck:
    layer, path, module = _place(topology)
    samples = _samples(topology)
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    with only_trainable(topology.model, [weight]):
        own = _own(topology, samples, weight)
        notes: list[str] = []
        for shared, parts in product((True, False), repeat=2):
            flags = Flags(shared, parts)
            candidate = flags.of(topology)
            if shared and not candidate.packs:
                continue  # known without a pass
            numbers = _Numbers(candidate, samples, layer, module, own)
            why = numbers.problem(numbers.compare_training)
            if why is None:
                break
            notes.append(f"{flags}: {why}")
        if why is None:
            replayed = _Numbers(candidate, samples, layer, module, own)
            if no_replay := replayed.problem(replayed.compare_replayed):
                flags = replace(flags, replays_blocks=False)
                notes.append(f"blocks replayed: {no_replay}")
    problem = f"{topology.name} cannot be edited: {why}" if why else None
    return SelfCheck(layer, path, flags, numbers.logits, numbers.gradient, problem, tuple(notes))


class _Numbers:
    """Passes of this package over the samples, compared with the model's own."""

    def __init__(self, topology: Topology, samples: Samples, layer: int, module: nn.Module, own: _Own) -> None:
        self._topology, self._samples, self._layer, self._module, self._own = topology, samples, layer, module, own
        self.logits = self.gradient = 0.0

    def problem(self, compare: Callable[[], None]) -> str | None:
        """Say what differs, or why nothing could be computed; None if all numbers agree."""
        try:
            compare()
        except _DiffersError as error:
            return str(error)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a module that is called in the wrong way may raise anything
            said = next(iter(str(error).splitlines()), "")
            return f"its blocks cannot be run by themselves ({type(error).__name__}: {said})"
        return None

    def compare_training(self) -> None:
        """Compare the logits from the tokens and from a block on, and the module's gradient, also with a FrozenPart."""
        topology, layer, module, samples = self._topology, self._layer, self._module, self._samples
        weight: Any = module.weight
        select = torch.arange(len(samples))
        rows = pack(samples, select, packed=topology.packs).to(topology.device)
        with torch.no_grad():
            self._compare(run_from_tokens(topology, rows), "the logits")
        with PrefixCache(topology, samples, layer) as cache:
            stand_ins = FrozenPart(topology, cache, module).overrides(rows)
            for epoch, overrides in (("", []), (", with what its frozen parts gave before,", stand_ins)):
                states = resume(topology, cache.hidden(rows), rows, layer, overrides)
                logits = self._compare(states, f"the logits from block {layer} on{epoch}")
                loss = cross_entropy(logits, rows.labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, [weight])
                apart = _difference(gradient, self._own.gradient)
                self.gradient = max(self.gradient, apart)
                self._expect(apart, f"the gradient of block {layer}{epoch}")

    @torch.no_grad()
    def compare_replayed(self) -> None:
        """Compare the logits of blocks that are replayed after tokens whose keys and values are held."""
        topology, layer, samples = self._topology, self._layer, self._samples
        select = torch.arange(len(samples))
        with PrefixCache(topology, samples, layer) as cache:
            held = HeldTokens(topology, cache, samples, (samples.target_start - 1) // 2)
            held.record(select)
            rows, past = held.remaining(select)
            rows = rows.to(topology.device)
            calls = BlockCalls(topology, rows, layer, at_tokens(topology, rows, layer + 1), past)
            for _ in range(2):
                self._compare(calls.resume(cache.hidden(rows)), f"the logits from block {layer} on")

    def _compare(self, states: Tensor, what: str) -> Tensor:
        """Compare the logits [M, V] of states [M, h], and return them."""
        logits = self._topology.logits(states).float()
        apart = _difference(logits, self._own.logits)
        self.logits = max(self.logits, apart)
        self._expect(apart, what)
        return logits

    def _expect(self, difference: float, what: str) -> None:
        # models compute some parts in fp32, whatever their dtype; `not <=` counts NaN as a difference
        precision = max(torch.finfo(dtype).eps for dtype in (self._own.dtype, torch.float32))
        if not difference <= precision**0.5:
            verb = "differs" if what.startswith("the gradient") else "differ"
            raise _DiffersError(f"{what} {verb} by {difference:.2g} of the largest from the model's own")


def _difference(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    apart, size = (actual.detach().float() - wanted.float()).abs().max(), wanted.abs().max().float()
    return float(apart / size.clamp(min=torch.finfo(torch.float32).tiny))


def _own(topology: Topology, samples: Samples, weight: nn.Parameter) -> _Own:
    """Run the model's own forward pass, one sample at a time.

    Raises:
        ModelError: the numbers are not finite, or depend on later tokens.
    """
    outputs, gradient = [], torch.zeros_like(weight, dtype=torch.float32)
    for i, start in enumerate(samples.target_start.tolist()):
        ids = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].to(topology.device)
        with eval_mode(topology.model):
            output: Any = topology.model(input_ids=ids[None, :-1], use_cache=False)
        logits: Tensor = output.logits[0, start - 1 :].float()
        (sample_gradient,) = torch.autograd.grad(cross_entropy(logits, ids[start:], reduction="sum"), [weight])
        gradient += sample_gradient.float()
        outputs.append(logits.detach())
    # quantized maps round in their own way, which may depend on other rows: allow for bf16
    dtype = torch.bfloat16 if has_quantized(topology.model) else weight.dtype
    own = _Own(torch.cat(outputs), gradient, dtype)
    if not (own.logits.isfinite().all() and gradient.isfinite().all()):
        raise ModelError(f"{topology.name} cannot be edited: its logits of random tokens are not finite")
    if _sees_ahead(topology, samples.input_ids[: samples.offsets[1]].to(topology.device)):
        raise ModelError(f"{topology.name} cannot be edited: its predictions depend on later tokens; it is an encoder")
    return own


@torch.no_grad()
def _sees_ahead(topology: Topology, ids: Tensor) -> bool:
    """Whether another last token changes the predictions at those before it."""
    other = torch.cat([ids[:-1], ids[:1]])
    with eval_mode(topology.model):
        one, two = (topology.model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in (ids, other))
    return _difference(one, two) > math.sqrt(torch.finfo(one.dtype).eps)


def _samples(topology: Topology) -> Samples:
    """Random samples of a few tokens; half of each is the target."""
    lengths = torch.tensor([min(n, topology.context_length) for n in _LENGTHS])
    embedding: Any = topology.model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = min(topology.config.vocab_size, len(embedding.weight))
    ids = torch.randint(vocabulary, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Samples(ids, offsets, (lengths // 2).clamp(min=1))


def _place(topology: Topology) -> tuple[int, str, nn.Module]:
    """A block at a quarter of the depth, or the next one that fits, and its MLP's last matrix, else its attention's.

    Raises:
        ModelError: no block has such a matrix.
    """
    paths = {module: path for path, module in topology.model.named_modules()}
    quantized: list[str] = []
    first = min(max(1, topology.n_blocks // 4), topology.n_blocks - 1)
    away = max(offloaded_prefix(topology.blocks), *(i + 1 for i in blocks_elsewhere(topology)), 0)
    if away > first:  # a gradient needs the weights above it
        first = min(away, max(topology.n_blocks - 2, 0))
        load_weights(topology.blocks[first:])
    for layer in (*range(first, topology.n_blocks), *range(first)):
        writers = [
            m
            for m in topology.writers(layer)
            if not holds_experts(m) and (is_quantized(m) or "weight" in m._parameters)
        ]
        quantized += [paths[module] for module in writers if is_quantized(module)]
        if plain := [module for module in writers if not is_quantized(module)]:
            return layer, paths[plain[0]], plain[0]
    check_plain(topology.model, quantized[:1])
    raise ModelError(f"{topology.name} cannot be edited: no block has a projection to the model's width")
