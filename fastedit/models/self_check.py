"""Whether this package computes with a model what the model computes itself: a few samples, both ways.

Types of models on the list are covered by the tests. Any other is measured when it is loaded: logits and a gradient
of a small ragged batch, by the passes that an edit makes, against the model's own forward pass, one sample at a time.
What changes the numbers is left out (shared rows, blocks in parts, replayed blocks); a model whose numbers still
differ is refused.
"""

from __future__ import annotations

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
from fastedit.models.fingerprint import fingerprint
from fastedit.models.forward import at_tokens, resume, run_from_tokens
from fastedit.models.frozen import FrozenPart
from fastedit.models.held_tokens import HeldTokens
from fastedit.models.hooks import eval_mode, only_trainable, plain_state
from fastedit.models.prefix_cache import PrefixCache
from fastedit.models.quantized import check_plain, has_quantized, is_quantized
from fastedit.models.tokens import Rows, Samples, pack
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
"""Types of models that the tests cover, so that they are not measured when they are loaded."""
_LENGTHS = (21, 4, 33, 9, 2, 14)  # tokens of the samples; they fill two rows


@dataclass(frozen=True)
class Flags:
    """What a pass may do with a model; `Topology` says what they mean."""

    shares_rows: bool = True
    runs_in_parts: bool = True
    replays_blocks: bool = True

    def of(self, found: Topology) -> Topology:
        """The parts of the model with these flags."""
        return replace(
            found,
            shares_rows=self.shares_rows,
            runs_in_parts=self.runs_in_parts,
            replays_blocks=self.replays_blocks,
        )

    def __str__(self) -> str:
        rows = "samples sharing rows" if self.shares_rows else "a row for each sample"
        return f"{rows}, {'blocks in parts' if self.runs_in_parts else 'whole blocks'}"


@dataclass(frozen=True)
class SelfCheck:
    """What was measured of a model.

    Attributes:
        layer: the block from which passes resumed, and whose matrix ``path`` had its gradient compared.
        flags: what a pass may do with the model.
        logits, gradient: largest difference from the model's own, as a share of the largest value.
        problem: why the model cannot be edited; None if it can.
        notes: why a flag was taken back.
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
    """What the model itself computes: logits [M, V] at the target rows, and the gradient of a matrix of some dtype."""

    logits: Tensor
    gradient: Tensor
    dtype: torch.dtype


class _DiffersError(Exception):
    """Numbers that are not the model's own; says which."""


_known: dict[tuple[str, ...], SelfCheck] = {}


def checked(found: Topology) -> Topology:
    """The model's parts with what a pass may do; a type of model that is not verified is measured.

    Raises:
        ModelError: this package does not compute what the model does; says what differs.
    """
    if found.config.model_type in VERIFIED and not has_quantized(found.model):
        return found
    check = self_check(found)
    if check.problem is not None:
        raise ModelError(check.problem)
    return check.flags.of(found)


@plain_state
def self_check(found: Topology) -> SelfCheck:
    """Measure a model; once in a process for the same weights in the same dtype at the same place.

    Raises:
        ModelError: no block has a matrix to edit; weights that this package cannot edit.
    """
    dtype = next(found.backbone.parameters()).dtype
    config = found.config  # the same weights are another model in another family
    key = (
        fingerprint(found.model),
        config.to_json_string(),
        str(dtype),
        str(found.device),
        str(config._attn_implementation),
    )
    if key not in _known:
        with torch.inference_mode(False), torch.enable_grad():
            _known[key] = _measure(found)
    return _known[key]


def _measure(found: Topology) -> SelfCheck:
    layer, path, module = _place(found)
    samples = _samples(found)
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    with only_trainable(found.model, [weight]):
        own = _own(found, samples, weight)
        notes: list[str] = []
        for shared, parts in product((True, False), repeat=2):
            flags = Flags(shared, parts)
            candidate = flags.of(found)
            if shared and not candidate.packs:
                continue  # that is known without a pass
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
    problem = f"{found.name} cannot be edited: {why}" if why else None
    return SelfCheck(layer, path, flags, numbers.logits, numbers.gradient, problem, tuple(notes))


class _Numbers:
    """Passes of this package over the samples, compared with the model's own."""

    def __init__(self, topology: Topology, samples: Samples, layer: int, module: nn.Module, own: _Own) -> None:
        self._topology, self._samples, self._layer, self._module, self._own = topology, samples, layer, module, own
        self.logits = self.gradient = 0.0

    def problem(self, compare: Callable[[], None]) -> str | None:
        """What differs, or why there are no numbers; None if they are the model's own."""
        try:
            compare()
        except _DiffersError as error:
            return str(error)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a module raises that is not called as it wants to be
            said = next(iter(str(error).splitlines()), "")
            return f"its blocks cannot be run by themselves ({type(error).__name__}: {said})"
        return None

    def compare_training(self) -> None:
        """The logits from the tokens and from a block on, and the gradient of the module, with its frozen parts too."""
        topology, layer, module, samples = self._topology, self._layer, self._module, self._samples
        weight: Any = module.weight
        select = torch.arange(len(samples))
        rows = pack(samples, select, packed=topology.packs).to(topology.device)
        with torch.no_grad():
            self._compare(run_from_tokens(topology, rows), rows, "the logits")
        with PrefixCache(topology, samples, layer) as cache:
            stand_ins = FrozenPart(topology, cache, module).overrides(rows)
            for epoch, overrides in (("", []), (", with what its frozen parts gave before,", stand_ins)):
                states = resume(topology, cache.hidden(rows), rows, layer, overrides)
                logits = self._compare(states, rows, f"the logits from block {layer} on{epoch}")
                loss = cross_entropy(logits, rows.labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, [weight])
                apart = _difference(gradient, self._own.gradient)
                self.gradient = max(self.gradient, apart)
                self._expect(apart, f"the gradient of block {layer}{epoch}")

    @torch.no_grad()
    def compare_replayed(self) -> None:
        """The logits of blocks that are called again, behind tokens of which keys and values are held."""
        topology, layer, samples = self._topology, self._layer, self._samples
        select = torch.arange(len(samples))
        with PrefixCache(topology, samples, layer) as cache:
            held = HeldTokens(topology, cache, samples, (samples.target_start - 1) // 2)
            held.record(select)
            rows, past = held.remaining(select)
            rows = rows.to(topology.device)
            calls = BlockCalls(topology, rows, layer, at_tokens(topology, rows, layer + 1), past)
            for _ in range(2):
                self._compare(calls.resume(cache.hidden(rows)), rows, f"the logits from block {layer} on")

    def _compare(self, states: Tensor, rows: Rows, what: str) -> Tensor:
        """The logits [M, V] of states [M, h]."""
        logits = self._topology.logits(states).float()
        apart = _difference(logits, self._own.logits)
        self.logits = max(self.logits, apart)
        self._expect(apart, what)
        return logits

    def _expect(self, difference: float, what: str) -> None:
        # models round to fp32 inside, whatever they are in; NaN is a difference too
        precision = max(torch.finfo(dtype).eps for dtype in (self._own.dtype, torch.float32))
        if not difference <= precision**0.5:
            verb = "differs" if what.startswith("the gradient") else "differ"
            raise _DiffersError(f"{what} {verb} by {difference:.2g} of the largest from the model's own")


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    apart, size = (found.detach().float() - wanted.float()).abs().max(), wanted.abs().max().float()
    return float(apart / size.clamp(min=torch.finfo(torch.float32).tiny))


def _own(found: Topology, samples: Samples, weight: nn.Parameter) -> _Own:
    """By the model's own forward pass, one sample at a time; raises ModelError for numbers that are not finite."""
    kept, gradient = [], torch.zeros_like(weight, dtype=torch.float32)
    for i, start in enumerate(samples.target_start.tolist()):
        ids = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].to(found.device)
        with eval_mode(found.model):
            output: Any = found.model(input_ids=ids[None, :-1], use_cache=False)
        logits: Tensor = output.logits[0, start - 1 :].float()
        (part,) = torch.autograd.grad(cross_entropy(logits, ids[start:], reduction="sum"), [weight])
        gradient += part.float()
        kept.append(logits.detach())
    # to what quantized maps round is their own affair, and may depend on the rows beside one
    dtype = torch.bfloat16 if has_quantized(found.model) else weight.dtype
    own = _Own(torch.cat(kept), gradient, dtype)
    if not (own.logits.isfinite().all() and gradient.isfinite().all()):
        raise ModelError(f"{found.name} cannot be edited: its logits of random tokens are not finite")
    return own


def _samples(found: Topology) -> Samples:
    """Random samples of a few tokens, half of them targets."""
    lengths = torch.tensor([min(n, found.context_length) for n in _LENGTHS])
    embedding: Any = found.model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = min(found.config.vocab_size, len(embedding.weight))
    ids = torch.randint(vocabulary, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Samples(ids, offsets, (lengths // 2).clamp(min=1))


def _place(found: Topology) -> tuple[int, str, nn.Module]:
    """A block, as MEMIT's rule for the lowest quarter has it, and a matrix of it: the MLP's last, else an attention's.

    Raises:
        ModelError: there is none.
    """
    paths = {module: path for path, module in found.model.named_modules()}
    quantized: list[str] = []
    first = min(max(1, found.n_blocks // 4), found.n_blocks - 1)
    for layer in (*range(first, found.n_blocks), *range(first)):
        writers = [module for module in found.writers(layer) if not holds_experts(module)]
        quantized += [paths[module] for module in writers if is_quantized(module)]
        if plain := [module for module in writers if not is_quantized(module)]:
            return layer, paths[plain[0]], plain[0]
    check_plain(found.model, quantized[:1])
    raise ModelError(f"{found.name} cannot be edited: no block has a projection to the model's width")
