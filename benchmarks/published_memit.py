"""MEMIT as published (arXiv 2210.07229 and its code), and ROME and EMMET in the same way: the baseline of our figures.

It optimizes one target at a time with the full model, padded rows and logits of the whole vocabulary at every position.
Keys take a pass from the bottom for every layer, and every layer and batch takes a d×d solve in fp64. ROME makes one
edit per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Requests:
    """Tokenize as the published code does: one padded batch per call, subjects found by their last token."""

    def __init__(self, tokenizer: Any, contexts: Sequence[str], device: torch.device) -> None:
        self.tokenizer, self.templates, self.device = tokenizer, ["{}", *contexts], device

    def encode(self, texts: Sequence[str], ends: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Padded inputs and, for each text, the index of the last token that begins before character `end`."""
        batch = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, padding_side="right", return_offsets_mapping=True
        )
        spans = batch.pop("offset_mapping")
        cut = torch.tensor(ends)[:, None]
        inside = (spans[..., 0] < torch.minimum(spans[..., 1], cut)) & batch.attention_mask.bool()
        at = (inside * torch.arange(inside.shape[1])).argmax(1)
        return dict(batch.to(self.device)), at.to(self.device)


def find_target(
    model: Any,
    requests: Requests,
    prompt: str,
    subject: str,
    target: str,
    layer: int,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    clamp: float,
    kl_factor: float,
    stop_loss: float,
    site: str = "block",
) -> tuple[Tensor, int]:
    """Optimize z [h] of one edit, at the output of a block or of its MLP; returns it and the number of updates."""
    end = prompt.rindex(subject) + len(subject)
    texts = [t.replace("{}", f"{prompt} {target}") for t in requests.templates] + [f"{subject} is a"]
    offsets = [t.index("{}") for t in requests.templates]
    encoded, at = requests.encode(texts, [o + end for o in offsets] + [len(subject)])
    ids = encoded["input_ids"]
    lengths = encoded["attention_mask"].sum(1).tolist()
    n_target = [
        n - len(requests.tokenizer(t.replace("{}", prompt)).input_ids)
        for n, t in zip(lengths, requests.templates, strict=False)
    ]
    labels = torch.full_like(ids, -100)
    for row, n in enumerate(n_target):
        labels[row, lengths[row] - n : lengths[row]] = ids[row, lengths[row] - n : lengths[row]]
    rows, counts = torch.arange(len(texts), device=model.device), torch.tensor(n_target, device=model.device)
    delta = torch.zeros(model.config.hidden_size, device=model.device, requires_grad=True)
    first: dict[str, Tensor] = {}

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        first.setdefault("h0", hidden[0, at[0]].detach().clone())
        moved = hidden.clone()
        moved[rows, at] += delta
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    optimizer = torch.optim.Adam([delta], lr=lr)
    for p in model.parameters():
        p.requires_grad_(False)
    taken = 0
    for step in range(steps):
        optimizer.zero_grad()
        handle = place(model, layer, site).register_forward_hook(add)
        logits = model(**encoded, use_cache=False).logits
        handle.remove()
        kl_now = logits[-1, at[-1]].log_softmax(-1)
        first.setdefault("kl", kl_now.detach().clone())
        logp = logits[:-1, :-1].log_softmax(-1)
        wanted = labels[:-1, 1:]
        mask = wanted != -100
        nll = -(logp.gather(-1, wanted.clamp(min=0)[..., None])[..., 0] * mask).sum(1) / counts
        kl = (kl_now.exp() * (kl_now - first["kl"])).sum()
        size = delta.norm() / first["h0"].norm() ** 2
        loss = nll.mean() + kl_factor * kl + weight_decay * size
        if loss < stop_loss or step == steps - 1:
            break
        loss.backward()
        optimizer.step()
        taken += 1
        with torch.no_grad():
            limit = clamp * first["h0"].norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    return first["h0"] + delta.detach(), taken


def place(model: Any, layer: int, site: str) -> Any:
    block = model.model.layers[layer]
    return block if site == "block" else block.mlp


@torch.no_grad()
def observed(
    model: Any,
    requests: Requests,
    module: Any,
    edits: Sequence[tuple[str, str, str]],
    templates: Sequence[str],
    out: bool,
) -> Tensor:
    """Inputs or outputs of a module at the subjects [templates, edits, width]; the whole model runs."""
    seen: dict[str, Tensor] = {}

    def note(_: Any, args: Any, output: Any) -> None:
        seen["x"] = (output[0] if isinstance(output, tuple) else output) if out else args[0]

    found = []
    handle = module.register_forward_hook(note)
    for template in templates:
        texts = [template.replace("{}", prompt) for prompt, _, _ in edits]
        offset = template.index("{}")
        ends = [offset + prompt.rindex(subject) + len(subject) for prompt, subject, _ in edits]
        encoded, at = requests.encode(texts, ends)
        model(**encoded, use_cache=False)
        found.append(seen["x"][torch.arange(len(edits)), at])
    handle.remove()
    return torch.stack(found)


def memit(
    model: Any,
    tokenizer: Any,
    edits: Sequence[tuple[str, str, str]],
    contexts: Sequence[str],
    layers: Sequence[int],
    covariances: Sequence[Tensor],
    *,
    cov_weight: float,
    alpha: float | None = None,
    site: str = "block",
    direction: bool = False,
    **target: Any,
) -> tuple[Tensor, list[int]]:
    """Edit the model with (prompt, subject, target) triples; returns z [N, h] and the number of updates of each.

    With alpha it is an equality (EMMET, arXiv 2403.14236; ROME for one edit and alpha 0). With `direction`, keys are
    uniform means over all contexts, and the equality holds at the bare prompt's key (ROME).
    """
    requests = Requests(tokenizer, contexts, model.device)
    z_layer = layers[-1]
    pairs = [find_target(model, requests, *edit, z_layer, site=site, **target) for edit in edits]
    z = torch.stack([p[0] for p in pairs])
    for i, (layer, C) in enumerate(zip(layers, covariances, strict=True)):
        projection = model.model.layers[layer].mlp.down_proj
        keys = observed(model, requests, projection, edits, requests.templates, out=False)
        K = (keys.mean(0) if direction else 0.5 * keys[0] + 0.5 * keys[1:].mean(0)).double().T  # [d, N]
        at = keys[0].double().T if direction else K
        now = observed(model, requests, place(model, z_layer, site), edits, ["{}"], out=True)[0]
        R = (z - now).double().T / (len(layers) - i)  # [h, N]
        if alpha is None:
            update = R @ torch.linalg.solve(cov_weight * C.double() + K @ K.T, K).T
        else:
            white = torch.linalg.inv(cov_weight * C.double()) @ K
            update = torch.linalg.solve(white.T @ at + alpha * torch.eye(len(edits)).to(K), R, left=False) @ white.T
        with torch.no_grad():
            projection.weight += update.float()
    return z, [p[1] for p in pairs]
