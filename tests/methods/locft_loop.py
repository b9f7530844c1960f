"""The published loop of LocFT-BF, and runs of ours beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from fastedit import EditRequest, ops
from fastedit.methods import LocFTBFConfig
from fastedit.methods.base import MethodResult
from fastedit.methods.locft_bf.method import plan
from fastedit.models import Model

Pairs = Sequence[tuple[str, str]]
DOWN_PROJ = "model.layers.2.mlp.down_proj"  # of llama
PLAIN: dict[str, Any] = {"lr": 3e-3, "batch_size": 4, "epochs": 4, "skip_loss": 0.0, "stop_loss": 0.0}


@dataclass
class Published:
    """The results of the published loop."""

    updates: dict[str, Tensor]
    losses: list[float]
    batch_losses: list[float]

    def check(self, result: MethodResult) -> None:
        """In fp64 the result is the same, every weight and every epoch's loss.

        The key bias needs most of the 1e-9: rounding of 1e-17 over Adam's epsilon. Others come out to 1e-13.
        """
        assert result.updates.keys() == self.updates.keys()
        size = torch.stack([wanted.norm() for wanted in self.updates.values()]).norm()
        for name, wanted in self.updates.items():
            assert wanted.dtype == result.updates[name].dtype == torch.float64
            assert (result.updates[name] - wanted).norm() <= 1e-9 * size, name
        assert result.losses == pytest.approx(self.losses, rel=1e-12)


def published(
    model: nn.Module,
    tokenizer: Any,
    pairs: Pairs,
    prefix: str,
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    skip_loss: float,
    stop_loss: float,
    loss_average: str = "sample",
    weight_decay: float = 0.0,
    lr_schedule: str = "constant",
) -> Published:
    """The published loop: padded batches, the whole model every step, logits at all positions."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")]
    weights = [model.get_parameter(name).requires_grad_() for name in names]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=lr, weight_decay=weight_decay)
    n_steps = epochs * -(-len(pairs) // batch_size) if lr_schedule == "linear" else None
    rate = LambdaLR(optimizer, lambda step: 1 - step / n_steps if n_steps else 1.0)
    run = Published({}, [], [])
    for _ in range(epochs):
        total = 0.0
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            nll, counts = padded_nll(model, tokenizer, batch)
            loss = (nll.sum(1) / counts).mean() if loss_average == "sample" else nll.sum() / counts.sum()
            run.batch_losses.append(loss.item())
            total += loss.item() * len(batch)
            if loss.item() < skip_loss:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        run.losses.append(total / len(pairs))
        if run.losses[-1] < stop_loss:
            break
    run.updates = {n: w.detach() - b for n, w, b in zip(names, weights, before, strict=True)}
    return run


def padded_nll(model: nn.Module, tokenizer: Any, batch: Pairs) -> tuple[Tensor, Tensor]:
    """NLL of the target tokens and EOS [B, L-1], 0 elsewhere, and their number [B]."""
    eos = tokenizer.eos_token_id
    prompts = [tokenizer(prompt).input_ids for prompt, _ in batch]
    targets = [[*tokenizer(target).input_ids, eos] for _, target in batch]
    longest = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
    ids = torch.full((len(batch), longest), eos)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (p, t) in enumerate(zip(prompts, targets, strict=True)):
        ids[i, : len(p) + len(t)] = torch.tensor(p + t)
        labels[i, len(p) : len(p) + len(t)] = torch.tensor(t)
        mask[i, : len(p) + len(t)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    nll = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return nll, torch.tensor([len(t) for t in targets])


def pairs_of(edits: Sequence[EditRequest]) -> list[tuple[str, str]]:
    return [(edit.prompt, edit.target) for edit in edits]


def run(
    model: nn.Module, tokenizer: Any, edits: Sequence[EditRequest], progress: Any = None, **config: Any
) -> MethodResult:
    settings = {"layer": 2, "module": "down_proj", "shuffle": False} | PLAIN | config
    options = {"progress": progress} if progress else {}
    return plan(Model.of(model, tokenizer), edits, LocFTBFConfig(**settings), **options).run()


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of weights that are not bitwise what they were; NaN equals itself."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    return {name for name in before if not torch.equal(bits(now[name]), bits(before[name]))}


def interrupted_after(n: int) -> Callable[..., Any]:
    """target_cross_entropy, with Ctrl-C in its n-th call."""
    calls, real = 0, ops.target_cross_entropy

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return function
