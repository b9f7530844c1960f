"""The work of LocFT-BF, and where an epoch spends its time: kernels by name, and what none accounts for."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

GAPS = "host gaps"
# the first that is found in a name counts; on a GPU names are those of kernels, on a CPU those of operators, and the
# products of the head are in its kernels on a GPU and count as matrix products on a CPU
CLASSES = (
    (GAPS, r"^autograd::|^torch::autograd|^\w*Backward\d*$|^Optimizer\.|^Profiler"),
    ("attention", r"flash|fmha|sdpa|[Aa]ttention|mem_eff|_safe_softmax"),
    ("Adam", r"[Aa]dam"),
    (
        "head and loss",
        r"^_(exponentials|settle|accumulate|finish)(_|$)|[Ss]oft[Mm]ax|nll_loss|cross_entropy|aten::max$",
    ),
    (
        "matrix products",
        r"gemm|gemv|nvjet|xmma|cutlass|split_?[Kk]|mkldnn_linear|^aten::(mm|addmm|bmm|baddbmm|mv|addmv)$",
    ),
    ("other elementwise", r""),
)
NAMES = (*(name for name, _ in CLASSES[1:]), GAPS)
_COMPILED = [(name, re.compile(pattern)) for name, pattern in CLASSES]


def class_of(name: str) -> str:
    """The class of a kernel or operator."""
    return next(kind for kind, pattern in _COMPILED if pattern.search(name))


def shares(times: Mapping[str, float], wall: float) -> dict[str, float]:
    """Class -> share of `wall` for the time of each kernel or operator, in the same unit; they sum to 1.

    Where the times are more than `wall`, because kernels overlapped, they are shares of their sum.
    """
    share_of = dict.fromkeys(NAMES, 0.0)
    for name, spent in times.items():
        share_of[class_of(name)] += spent
    share_of[GAPS] = 0.0  # what autograd and the like take is the rest of the time
    whole = max(wall, sum(share_of.values()))
    share_of = {name: spent / whole for name, spent in share_of.items()}
    return share_of | {GAPS: max(0.0, 1 - sum(share_of.values()))}


class EpochProfile:
    """A `Progress` for an edit of three epochs by LocFT-BF: profiles the second, and times the third without profiling.

    The first warms up and fills the cache of the frozen part. At the end of each epoch training waits for the device,
    so that the clock is right.
    """

    EPOCHS = 3

    def __init__(self, device: torch.device | str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        # on a GPU its kernels alone: to note the host's calls would take the host time
        kind = torch.profiler.ProfilerActivity.CUDA if self._on_gpu else torch.profiler.ProfilerActivity.CPU
        self._profiler: Any = torch.profiler.profile(activities=[kind])
        self._mark, self._walls = 0.0, dict[int, float]()

    def __call__(self, stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage != "train":
            return
        self._walls[done] = time.perf_counter() - self._mark
        if done == 1:
            self._profiler.start()
        elif done == 2:
            self._profiler.stop()
        self._mark = time.perf_counter()

    def shares(self) -> dict[str, float]:
        """Share of each class in the epoch; on a GPU, of the time of the epoch that was not profiled."""
        times: dict[str, float] = {}
        for event in self._profiler.key_averages():
            taken = event.self_device_time_total if self._on_gpu else event.self_cpu_time_total
            times[event.key] = times.get(event.key, 0.0) + taken / 1e6
        if not sum(times.values()):
            raise RuntimeError("the profiler saw no kernel; may this process read the GPU's counters?")
        return shares(times, self._walls[3 if self._on_gpu else 2])


def training_flops(config: Any, inputs: Tensor, starts: Tensor, layer: int, epochs: int) -> float:
    """Count the floating-point operations of the matrix products that LocFT-BF of one `down_proj` needs.

    A product of [a, b] and [b, c] counts as 2abc. T is the number of input tokens, R that of target tokens, and a token
    attends to itself and those before it, with two products forward and four backward.

    - Once: the blocks below `layer` for T tokens, forward; and that block without its down_proj, forward.
    - In every epoch: the down_proj for T tokens, forward and the gradient of its weight; the blocks above for T tokens,
      forward and the gradients of their inputs, which take as much; in the last block only keys and values for T
      tokens, all else for R; the head for R tokens, forward and the gradient of its input.

    What an implementation does beyond that (pads, scores that are computed again) is not counted; nor is Adam.

    Args:
        inputs: [N] input tokens of each sample.
        starts: [N] place of the first target token of each sample; the token before predicts it.
        layer: the edited block, not the last one.
    """
    h, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or h // heads
    T, R = int(inputs.sum()), int((inputs - starts + 1).sum())
    query_and_output, key_and_value = 4 * h * heads * width, 4 * h * config.num_key_value_heads * width
    mlp, down = 6 * h * inner, 2 * h * inner
    block = query_and_output + key_and_value + mlp
    of_all = int((inputs * (inputs + 1)).sum()) // 2 * 4 * heads * width  # attention of all tokens
    of_targets = of_all - int(((starts - 1) * starts).sum()) // 2 * 4 * heads * width
    once = layer * (T * block + of_all) + T * (block - down) + of_all
    above = (config.num_hidden_layers - layer - 2) * (2 * T * block + 3 * of_all)
    last = 2 * (R * (query_and_output + mlp) + T * key_and_value) + 3 * of_targets
    head = 2 * R * 2 * h * config.vocab_size
    return float(once + epochs * (2 * T * down + above + last + head))
