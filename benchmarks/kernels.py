"""The operations against plain torch code: localized Adam, rank-k solves, cross-entropy, parts of frozen blocks.

    python benchmarks/kernels.py --device cuda

On a GPU the sizes are those of an 8B model; on a CPU they are small, and our functions use torch, too. The floor is the
time for the operation's least bytes and flops, at the rates of a copy and a matrix product in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular
from torch.optim.adam import adam

if not __package__:  # run as a file: from its folder, this kernels.py would hide the PyPI package `kernels`
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from benchmarks.harness import Case, Inputs, Suite
from fastedit import ops
from fastedit.errors import ConfigError
from fastedit.ops.registry import Backend

Provider = Callable[..., Sequence[Tensor]]
LR, STEP, EPS, BETAS = 1e-2, 10, 1e-8, (0.9, 0.999)

# (out, in, T, dtype of W, G and X, dtype of both moments)
ADAM = {
    "cuda": [
        (4096, 14336, 512, "bfloat16", "float32"),
        (4096, 14336, 512, "bfloat16", "bfloat16"),
        (4096, 14336, 2048, "bfloat16", "float32"),
        (4096, 14336, 128, "float32", "float32"),
    ],
    "cpu": [(512, 1792, 256, "float32", "float32")],
}
# (groups, N, d, h), in fp64; smaller numbers of groups show where the kernel becomes faster
SOLVES = {
    "cuda": [(256, n, 4096, 4096) for n in (16, 32, 64, 128)] + [(g, n, 4096, 4096) for g in (4, 32) for n in (16, 64)],
    "cpu": [(16, 16, 256, 256), (16, 64, 256, 256)],
}
# (rows, h, vocabulary, dtype)
CROSS_ENTROPY = {
    "cuda": [(rows, 4096, 128_256, "bfloat16") for rows in (32, 128, 512, 2048)],
    "cpu": [(128, 512, 50_304, "float32")],
}
# (rows, width, dtype)
NORMS = {"cuda": [(8192, 4096, "bfloat16"), (8192, 8192, "bfloat16")], "cpu": [(512, 512, "float32")]}
GATED = {"cuda": [(2048, 14336, "bfloat16"), (8192, 14336, "bfloat16")], "cpu": [(512, 1792, "float32")]}

# provider -> (package, its function of hidden states, head and labels that returns the mean loss)
ANCHORS = {
    "Liger": ("liger_kernel", "transformers.functional.liger_fused_linear_cross_entropy"),
    "QuACK": ("quack", "linear_cross_entropy.chunked_linear_cross_entropy"),
}


def served(function: Callable[[Backend], Provider], device: torch.device) -> dict[str, Provider]:
    """Ours as users get it, and on a GPU also the kernel, to see when the kernel should be chosen instead of torch."""
    return {"ours": function("auto")} | ({"ours, triton": function("triton")} if device.type == "cuda" else {})


def adam_fused(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor) -> Sequence[Tensor]:
    """Call what `torch.optim.Adam(fused=True).step()` calls; it needs moments in the weight's dtype."""
    adam(
        [weight], [grad], [m], [v], [], [step], fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1],
        lr=LR, weight_decay=0.0, eps=EPS, maximize=False,
    )  # fmt: skip
    return weight, m, v


def adam_torch(
    weight: Tensor, G: Tensor, X: Tensor, m: Tensor, v: Tensor, step: Tensor, *_: Tensor
) -> Sequence[Tensor]:
    return adam_fused(weight, G.T @ X, m, v, step)


def adam_master(
    weight: Tensor, G: Tensor, X: Tensor, m: Tensor, v: Tensor, step: Tensor, master: Tensor
) -> list[Tensor]:
    adam_fused(master, (G.T @ X).float(), m, v, step)
    return [weight.copy_(master), m, v]


def adam_unfused(weight: Tensor, G: Tensor, X: Tensor, m: Tensor, v: Tensor, *_: Tensor) -> Sequence[Tensor]:
    g = (G.T @ X).float()
    first, second = BETAS[0] * m.float() + (1 - BETAS[0]) * g, BETAS[1] * v.float() + (1 - BETAS[1]) * g * g
    size = (second / (1 - BETAS[1] ** STEP)).sqrt() + EPS
    weight.copy_(weight.float() - LR / (1 - BETAS[0] ** STEP) * first / size)
    return weight, m.copy_(first), v.copy_(second)


def adam_case(device: torch.device, out: int, width: int, T: int, name: str, moments: str) -> Case:
    """The baseline holds what ours holds: torch's fused step if all is of one dtype, else its formula, compiled."""
    dtype, kept = getattr(torch, name), getattr(torch, moments)

    def setup() -> Inputs:
        weight = (torch.randn(out, width, device=device) * 0.01).to(dtype)
        G, X = torch.randn(T, out, device=device).to(dtype), torch.randn(T, width, device=device).to(dtype)
        m, v = torch.randn_like(weight, dtype=torch.float32), torch.rand_like(weight, dtype=torch.float32) * 10
        return weight, G, X, m.to(kept), v.to(kept), torch.full((), STEP - 1.0, device=device), weight.float()

    def reference(weight: Tensor, G: Tensor, X: Tensor, m: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        g = G.double().T @ X.double()
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        size = (v / (1 - BETAS[1] ** STEP)).sqrt() + EPS
        return weight - LR * m / (1 - BETAS[0] ** STEP) / size, m, v

    def ours(backend: Backend) -> Provider:
        def run(weight: Tensor, G: Tensor, X: Tensor, m: Tensor, v: Tensor, *_: Tensor) -> Sequence[Tensor]:
            seed = 0 if dtype == torch.bfloat16 else None
            ops.localized_adam_(weight, G, X, m, v, STEP, lr=LR, betas=BETAS, eps=EPS, seed=seed, backend=backend)
            return weight, m, v

        return run

    compiled = cache(lambda: torch.compile(adam_unfused, dynamic=False))
    plain = {
        "torch": adam_torch if kept == dtype else adam_unfused,
        "torch, compiled": lambda *inputs: compiled()(*inputs),
        "torch, fp32 master": adam_master,
    }
    names = ["torch"] if kept == dtype or device.type == "cpu" else []
    if device.type == "cuda":
        names.append("torch, compiled")
    if kept != dtype:
        names.append("torch, fp32 master")
    return Case(
        "localized_adam",
        setup,
        reference,
        served(ours, device) | {name: plain[name] for name in names},
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,
        mode="adam" if kept == torch.float32 else f"adam, {moments} moments",
        shape=f"{out}×{width}, T={T}",
        dtype=name,
        bytes=out * width * (2 * dtype.itemsize + 4 * kept.itemsize) + T * (out + width) * dtype.itemsize,
        flops=2.0 * T * out * width,
        rate=name,
    )


def solve_case(device: torch.device, groups: int, N: int, d: int, h: int, mode: str) -> Case:
    """Mode "solve" is the kernel's part, from whitened keys on; "update" is all of `ops.rank_k_update`, where two
    triangular solves with the d × d factor, which ours and torch share, take most of the time."""
    dtype, ridge = torch.float64, d / 4

    def setup() -> Inputs:
        keys, values = (torch.randn(groups, N, n, dtype=dtype, device=device) for n in (d, h))
        factor = torch.randn(d, d, dtype=torch.float64, device=device).mul_(0.1 / d**0.5).tril_()
        factor.diagonal().copy_(torch.rand(d, device=device) + 1)
        return keys, values, factor

    def whitened(keys: Tensor, factor: Tensor) -> Tensor:
        if mode == "solve":
            return keys
        return solve_triangular(factor.T, keys.double().reshape(-1, d), upper=True, left=False).reshape(keys.shape)

    def finished(left: Tensor, right: Tensor, factor: Tensor) -> Sequence[Tensor]:
        if mode == "update":
            right = solve_triangular(factor, right.reshape(-1, d), upper=False, left=False).reshape(right.shape)
        return left.mT, right

    def system(white: Tensor) -> Tensor:
        S = white @ white.mT
        S.diagonal(dim1=-2, dim2=-1).add_(ridge)
        return S

    def reference(keys: Tensor, values: Tensor, factor: Tensor) -> Sequence[Tensor]:
        white = whitened(keys, factor).double()
        root = torch.linalg.cholesky(system(white))
        left, right = (torch.linalg.solve(root, x) for x in (values.double(), white))
        return finished(left, right, factor)

    def torch_way(keys: Tensor, values: Tensor, factor: Tensor) -> Sequence[Tensor]:
        white = whitened(keys, factor)
        root, _ = cholesky_ex(system(white))
        left, right = (solve_triangular(root, x.to(white.dtype), upper=False) for x in (values, white))
        left, right = finished(left, right, factor)
        return left.to(dtype), right.to(dtype)

    def update(backend: Backend) -> Provider:
        return lambda keys, values, factor: ops.rank_k_update(keys, values, factor, ridge=ridge, backend=backend)

    def kernel(keys: Tensor, values: Tensor, factor: Tensor) -> Sequence[Tensor]:
        from fastedit.kernels import rank_k_solve

        left, right, _ = rank_k_solve.rank_k_solve(keys, values, ridge)
        return left.mT, right

    triangular = 2 * groups * N * d * d if mode == "update" else 0  # for whitening and back
    return Case(
        "rank_k_solve",
        setup,
        reference,
        (served(update, device) if mode == "update" else {"ours": kernel}) | {"torch": torch_way},
        tolerance=1e-10,
        mode=mode,
        shape=f"{groups} groups, N={N}, d={d}, h={h}",
        dtype="float64",
        bytes=2.0 * groups * N * (d + h) * dtype.itemsize + (4 * d * d if mode == "update" else 0),
        flops=triangular + groups * (N * N * d + N**3 / 3 + N * N * (d + h)),
        rate="float64",
    )


def anchor(name: str) -> Provider:
    """Another package's linear cross-entropy and its gradient; ConfigError, so "not measured", if it cannot run."""
    package, function = ANCHORS[name]

    def run(hidden: Tensor, head: Tensor, labels: Tensor, _: Tensor) -> Sequence[Tensor]:
        hidden = hidden.detach().requires_grad_()
        try:
            module, _, attribute = f"{package}.{function}".rpartition(".")
            loss = getattr(import_module(module), attribute)(hidden, head, labels)
            return loss.detach(), torch.autograd.grad(loss, hidden)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of another version, or for other GPUs
            raise ConfigError(f"{package}: {error!r}") from error

    return run


def cross_entropy_case(device: torch.device, rows: int, h: int, vocabulary: int, name: str) -> Case:
    dtype = getattr(torch, name)

    def setup() -> Inputs:
        hidden = torch.randn(rows, h, device=device).to(dtype)
        head = (torch.randn(vocabulary, h, device=device) / h**0.5).to(dtype)
        labels = torch.randint(vocabulary, (rows,), device=device)
        return (
            hidden,
            head,
            labels,
            torch.full((rows,), 1 / rows, device=device),
        )  # the mean: the anchors have no others

    def reference(hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor) -> Sequence[Tensor]:
        logp = (hidden.double() @ head.double().T).log_softmax(-1)
        loss = -(logp.gather(1, labels[:, None])[:, 0] * weight).sum()
        p = logp.exp_()
        p[torch.arange(rows, device=device), labels] -= 1
        return loss, (p @ head.double()) * weight[:, None]

    def ours(backend: Backend) -> Provider:
        return lambda *inputs: ops.target_cross_entropy(*inputs, backend=backend)

    def whole(hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor) -> Sequence[Tensor]:
        hidden = hidden.detach().requires_grad_()
        losses = torch.nn.functional.cross_entropy((hidden @ head.T).float(), labels, reduction="none")
        loss = (losses * weight).sum()
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    # on a CPU ours is the chunked way
    torch_ways = {"torch, chunked": ours("torch")} if device.type == "cuda" else {}
    torch_ways["torch, all logits"] = whole
    if device.type == "cuda":
        torch_ways |= {name: anchor(name) for name, (package, _) in ANCHORS.items() if find_spec(package)}
    return Case(
        "target_cross_entropy",
        setup,
        reference,
        served(ours, device) | torch_ways,
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,
        shape=f"{rows} rows, h={h}, V={vocabulary}",
        dtype=name,
        bytes=2.0 * (vocabulary + rows) * h * dtype.itemsize,  # the head twice: no cache holds it between the products
        flops=4.0 * rows * h * vocabulary,
        rate=name,
    )


def with_gradients(function: Callable[..., Tensor], n: int) -> Provider:
    """The value of a function of the inputs but the last, and its gradients in the first n of them by the last."""

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        arguments, grad = inputs[:-1], inputs[-1]
        leaves = [x.detach().requires_grad_() for x in arguments[:n]]
        y = function(*leaves, *arguments[n:])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    return run


def norm_as_in_models(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def block_case(device: torch.device, op: str, rows: int, width: int, name: str) -> Case:
    """A part of a frozen block, forward and backward: "rms_norm", or "gated_activation"."""
    dtype, normed = getattr(torch, name), op == "rms_norm"
    plain, n = (norm_as_in_models, 1) if normed else (silu_and_mul, 2)

    def setup() -> Inputs:
        sizes = [(rows, width), (width,) if normed else (rows, width), (rows, width)]
        return tuple(torch.randn(*size, device=device).to(dtype) for size in sizes)

    def ours(backend: Backend) -> Provider:
        if normed:
            return with_gradients(lambda x, weight: ops.rms_norm(x, weight, eps=1e-6, backend=backend), n)
        return with_gradients(lambda gate, up: ops.gated_activation(gate, up, backend=backend), n)

    providers = served(ours, device) | {"torch": with_gradients(plain, n)}
    if device.type == "cuda":
        compiled = cache(lambda: with_gradients(torch.compile(plain, dynamic=False), n))
        providers["torch, compiled"] = lambda *inputs: compiled()(*inputs)
    return Case(
        op,
        setup,
        lambda *inputs: with_gradients(plain, n)(*(x.double() for x in inputs)),
        providers,
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,
        shape=f"{rows}×{width}",
        dtype=name,
        bytes=(5 if normed else 8) * rows * width * dtype.itemsize,
        rate=name,
    )


def cases(device: torch.device) -> list[Case]:
    kind = device.type
    all_cases = [adam_case(device, *sizes) for sizes in ADAM[kind]]
    all_cases += [cross_entropy_case(device, *sizes) for sizes in CROSS_ENTROPY[kind]]
    all_cases += [block_case(device, "rms_norm", *sizes) for sizes in NORMS[kind]]
    all_cases += [block_case(device, "gated_activation", *sizes) for sizes in GATED[kind]]
    modes = ("solve", "update") if kind == "cuda" else ("update",)
    return all_cases + [solve_case(device, *sizes, mode) for mode in modes for sizes in SOLVES[kind]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing for each provider of a case")
    parser.add_argument("--only", help="benchmarks whose name holds this")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    suite = Suite.of(args)
    for case in cases(torch.device(args.device)):
        if not args.only or args.only in case.benchmark:
            suite.run(case)
    suite.close()


if __name__ == "__main__":
    main()
