"""The optimization of targets z: many edits in one batch, each with its own δ, Adam state, clamp and stop.

Edits that are done leave the batch and waiting ones enter. Tokens before the subject's last one do not depend on δ, so
only their keys and values are used. The head runs at target positions and at the position of the KL term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastedit import ops
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.config import TargetConfig
from fastedit.models import BlockCalls, HeldTokens, PrefixCache, Rows, at_tokens, free_bytes, hooked, observe, pack

RELATIVE_LR = 0.5
"""Adam's rate without a preset, as a share of a typical h₀'s root mean square (a step moves every coordinate)."""
_BETAS, _EPS = (0.9, 0.999), 1e-8
_LOOK_EVERY = {"cuda": 4}  # steps between checks of which edits are done: each check waits for the GPU
_BATCH_TOKENS = 1024  # most tokens of a step on a CPU: larger batches do not fit its caches


def relative_lr(h0: Tensor) -> float:
    """Adam's rate, if none is given, from the states [N, h] of the edits; NaN if none of them is finite."""
    return RELATIVE_LR * float(h0.norm(dim=1).nanmedian()) / math.sqrt(h0.shape[1])


@dataclass
class _State:
    """The state of each of the F edits in flight; all on the model's device."""

    edit: Tensor  # [F] int64, the edit's place among all edits
    h0: Tensor  # [F, h] fp32
    initial: Tensor  # [F, V] fp32, log P at the KL row before any step; set by the first step
    delta: Tensor  # [F, h] fp32
    mean: Tensor  # [F, h] Adam's moments
    square: Tensor  # [F, h]
    steps: Tensor  # [F] int64
    loss: Tensor  # [F]
    probability: Tensor  # [F]
    alive: Tensor  # [F] bool

    @classmethod
    def fresh(cls, edit: Tensor, h0: Tensor, vocabulary: int) -> _State:
        initial = h0.new_zeros(len(h0), vocabulary)
        delta, mean, square = torch.zeros(3, *h0.shape, device=h0.device)
        loss, probability = h0.new_zeros(2, len(h0))
        steps, alive = torch.zeros_like(edit), torch.ones_like(edit, dtype=torch.bool)
        return cls(edit, h0, initial, delta, mean, square, steps, loss, probability, alive)

    def select(self, index: Tensor) -> _State:
        return _State(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))

    def join(self, other: _State) -> _State:
        return _State(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


@dataclass
class _LaidOut:
    """The rows of the edits in flight, fixed until one leaves or enters: C rewriting rows and one KL row per edit."""

    rows: Rows
    hidden: Tensor  # [B, R, h]
    positions: Tensor  # [B] flat position of the subject's last token
    weight: Tensor  # [M] for each target token 1 / (C · target tokens of its row), for each KL row the KL factor
    calls: BlockCalls
    scratch: Tensor | None  # for the logits of a step


class TargetLoop:
    """The optimization: `run` fills z, loss, probability and steps."""

    def __init__(self, batch: Batch, cache: PrefixCache, z_layer: int, config: TargetConfig) -> None:
        self.topology, self.cache, self.progress = batch.model.topology, cache, batch.progress
        self.samples, self.last = batch.rewriting
        self.n, self.z_layer, self.config, self.device = len(batch), z_layer, config, self.topology.device
        topology, samples, last, n = self.topology, self.samples, self.last, self.n
        self.n_rewriting = len(samples) // n - 1
        # [N] tokens that run in a step, of each edit's longest row
        self.n_run = (samples.lengths - 1 - last).view(-1, n).amax(0)
        self.held = HeldTokens(topology, cache, samples, last)
        self.site: nn.Module | None = None
        if (
            config.site == "mlp"
        ):  # the output of the MLP is that of its last projection, even if the MLP is not a module
            self.site = topology.resolve(z_layer, "down_proj")[1]
        self.h0 = self._initial_states()
        self.lr = relative_lr(self.h0) if config.lr is None else config.lr
        self.z = self.h0.clone()
        self.loss, self.probability = (self.h0.new_full((n,), torch.nan) for _ in range(2))
        self.steps = torch.zeros(n, dtype=torch.int64, device=self.device)

    def run(self, in_flight: int | None, memory: int | None) -> None:
        """Optimize all edits; `find_targets` describes the arguments."""
        waiting = self.n_run.sort(descending=True, stable=True).indices  # edits of similar length share a batch
        capacity = in_flight or self._capacity(memory)
        suits = in_flight is None and self.device.type == "cpu"
        look_every = _LOOK_EVERY.get(self.device.type, 1)
        state: _State | None = None
        while state is not None or len(waiting):
            flying = waiting[:0] if state is None else state.edit.cpu()
            most = capacity
            if suits:  # what a CPU's caches hold; edits wait in order of length, so the longest is among these
                longest = self.n_run[torch.cat([flying, waiting[:1]])].max()
                most = min(capacity, max(1, _BATCH_TOKENS // int(longest * (self.n_rewriting + 1))))
            room = most - len(flying)
            if room > 0 and len(waiting):
                entering, waiting = self._enter(waiting[:room]), waiting[room:]
                state = entering if state is None else state.join(entering)
            assert state is not None
            laid_out = self._lay_out(state.edit.cpu())
            while True:
                for _ in range(look_every):
                    self._step(state, laid_out)
                alive = state.alive.cpu()  # waits for the GPU
                if not alive.all():
                    break
            state = self._leave(state, alive)
            self.progress("targets", self.n - len(waiting) - (0 if state is None else len(state.edit)), self.n)

    def _select(self, edits: Tensor) -> Tensor:
        """Indices of the samples of these edits [B], template by template, with the KL rows at the end."""
        return (torch.arange(self.n_rewriting + 1)[:, None] * self.n + edits).view(-1)

    @torch.no_grad()
    def _initial_states(self) -> Tensor:
        """h₀ [N, h] fp32: the state at the site, at the subject's last token of each bare prompt."""
        states = []
        for edits in torch.arange(self.n).split(64):
            rows = pack(self.samples, edits, packed=False)
            positions = torch.arange(len(edits)) * rows.index.shape[1] + self.last[edits]
            rows = replace(rows, target_rows=positions).to(self.device)
            hidden = self.cache.hidden(rows)
            if self.site is None:
                states.append(hidden.view(-1, hidden.shape[-1]).index_select(0, rows.target_rows).float())
            else:
                outputs = observe(self.topology, hidden, rows, self.cache.layer, self.site, output=True)
                states.append(outputs.float())
        return torch.cat(states)

    @torch.no_grad()
    def _enter(self, edits: Tensor) -> _State:
        """Run the tokens before these edits' subjects, whose keys and values later passes read."""
        self.held.record(self._select(edits))
        edits = edits.to(self.device)
        vocabulary = len(self.topology.head.weight)  # type: ignore[arg-type]
        return _State.fresh(edits, self.h0.index_select(0, edits), vocabulary)

    def _leave(self, state: _State, alive: Tensor) -> _State | None:
        """Store the results of the edits that are done; returns the state of the others."""
        done = state.select((~alive).nonzero()[:, 0].to(self.device))
        self.z.index_copy_(0, done.edit, done.h0 + done.delta)
        for name in ("loss", "probability", "steps"):
            getattr(self, name).index_copy_(0, done.edit, getattr(done, name))
        return state.select(alive.nonzero()[:, 0].to(self.device)) if alive.any() else None

    def _lay_out(self, edits: Tensor) -> _LaidOut:
        select = self._select(edits)
        self.held.keep(select)
        rows, past = self.held.remaining(select)
        # the subject's last token is the first one that is not held (see `HeldTokens`)
        positions = torch.arange(len(select)) * rows.index.shape[1] + (self.last[select] if past is None else 0)
        of_rewriting = rows.sample_of[: -len(edits)]
        weight = 1 / (of_rewriting.bincount() * float(self.n_rewriting))[of_rewriting]
        weight = torch.cat([weight, weight.new_full((len(edits),), self.config.kl_factor)])
        rows = rows.to(self.device)
        hidden = self.cache.hidden(rows)
        # only from the first block that reads δ: the hook at the site needs the subject at its place in the rows
        overrides = at_tokens(self.topology, rows, self.z_layer + 1)
        calls = BlockCalls(self.topology, rows, self.cache.layer, overrides, past)
        scratch = None  # not for a GPU: its allocator reuses memory, and the kernel needs none
        if self.device.type == "cpu":
            scratch = ops.logits_buffer(self.topology.head.weight, len(weight), len(edits))  # type: ignore[arg-type]
        return _LaidOut(rows, hidden, positions.to(self.device), weight.to(self.device), calls, scratch)

    def _states(self, laid_out: _LaidOut, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [M, h] at the target rows, and the leaf tensor [B, h] that carries δ at the subjects."""
        hidden = laid_out.hidden
        flat = hidden.view(-1, hidden.shape[-1])
        shift = delta.repeat(self.n_rewriting + 1, 1)
        if self.site is None:
            leaf = (flat.index_select(0, laid_out.positions).float() + shift).to(flat.dtype).requires_grad_()
            moved = flat.index_copy(0, laid_out.positions, leaf).view_as(hidden)
            return laid_out.calls.resume(moved), leaf
        leaf = shift.requires_grad_()

        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            rows = output.reshape(-1, output.shape[-1])
            at = (rows.index_select(0, laid_out.positions).float() + leaf).to(rows.dtype)
            return rows.index_copy(0, laid_out.positions, at).view_as(output)

        with hooked([self.site.register_forward_hook(add)]):
            return laid_out.calls.resume(hidden), leaf

    def _step(self, state: _State, laid_out: _LaidOut) -> None:
        """Evaluate the loss of every edit, stop those that are done, update the others. Nothing waits for a GPU."""
        config, n = self.config, len(state.edit)
        with torch.enable_grad():
            states, leaf = self._states(laid_out, state.delta)
        rows, head = laid_out.rows, self.topology.head
        losses, grad = ops.target_cross_entropy(
            states.detach(),
            head.weight,  # type: ignore[arg-type]
            rows.labels[:-n],
            laid_out.weight,
            bias=getattr(head, "bias", None),
            softcap=self.topology.logit_softcap,
            others=partial(self._kl, state),
            per_row=True,
            scratch=laid_out.scratch,
        )
        losses, kl = losses.split([len(losses) - n, n])
        per_row = losses.new_zeros(self.n_rewriting * n).index_add_(0, rows.sample_of[:-n], losses)
        nll = per_row.view(self.n_rewriting, n)
        size, scale = state.delta.norm(dim=1), config.weight_decay / state.h0.square().sum(1)
        loss = nll.sum(0) + kl + scale * size
        alive = state.alive
        state.loss = torch.where(alive, loss, state.loss)
        state.probability = torch.where(alive, (-self.n_rewriting * nll).exp().mean(0), state.probability)
        state.alive = alive & (loss >= config.stop_loss) & (state.steps < config.steps - 1)  # NaN is not >=
        if self.device.type == "cpu" and not state.alive.any():
            return  # the last evaluation needs no gradient; asking a GPU would wait for it
        (slope,) = torch.autograd.grad(states, leaf, grad)
        slope = slope.float().view(-1, *state.delta.shape).sum(0)
        slope += state.delta * torch.where(size > 0, scale / size, 0)[:, None]
        self._update(state, slope)

    @staticmethod
    def _kl(state: _State, logits: Tensor) -> tuple[Tensor, Tensor]:
        """KL(now ‖ before) [F] of the distributions at the KL rows, and its gradient in their logits [F, V]."""
        now = logits.log_softmax(1)
        # before the first step δ is zero, so this is the distribution before the edit
        state.initial = torch.where(state.steps[:, None] == 0, now, state.initial)
        moved, p = now - state.initial, now.exp()
        kl = (p * moved).sum(1)
        return kl, p * (moved - kl[:, None])

    def _update(self, state: _State, slope: Tensor) -> None:
        """Take Adam's step and clamp δ, for the edits that are not done."""
        state.steps += state.alive
        state.mean = torch.lerp(slope, state.mean, _BETAS[0])
        state.square = torch.lerp(slope.square(), state.square, _BETAS[1])
        steps = state.steps.double()
        first, second = ((1 - beta**steps).float()[:, None] for beta in _BETAS)
        moved = state.delta - self.lr * (state.mean / first) / ((state.square / second).sqrt() + _EPS)
        limit = self.config.clamp * state.h0.norm(dim=1)
        moved *= (limit / moved.norm(dim=1)).clamp(max=1)[:, None]
        state.delta = torch.where(state.alive[:, None], moved, state.delta)

    def _capacity(self, memory: int | None) -> int:
        """How many edits fit in memory at once, from what autograd keeps for the longest of them.

        Measured are the edit that is longest in all, and the one that is longest after its subject.
        """
        longest = self.samples.lengths.view(-1, self.n).amax(0).argmax()
        edits = torch.stack([longest, self.n_run.argmax()]).unique()
        saved_for_backward: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if type(tensor.data) is Tensor:  # parts of a quantized weight have no data_ptr
                saved_for_backward[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # an operation that keeps its own output would keep itself alive

        parameters = (p for p in self.topology.model.parameters() if p.device == self.device)
        weights = {p.untyped_storage().data_ptr() for p in parameters if type(p.data) is Tensor}
        state = self._enter(edits)
        laid_out = self._lay_out(edits)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._states(laid_out, state.delta)
        # logits and their softmax at the KL row exist about four times over
        saved = sum(n for address, n in saved_for_backward.items() if address not in weights)
        needed = (1.5 * saved + 2 * self.held.nbytes + 4 * state.initial.nbytes) / len(edits)
        fit = int((free_bytes(self.device) // 2 if memory is None else memory) / needed)
        return max(1, min(fit, self.n))
