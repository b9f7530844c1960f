"""The prefix cache: resuming equals the plain model on every sample alone, in values and in gradients."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, alone, ragged_samples, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit.errors import ModelError
from fastedit.models import Budget, PrefixCache, Rows, forward, pack, resume, run_from_tokens, token_states, topology
from fastedit.models.rows_file import RowsFile

LENGTHS = [2, 18, 7, 3, 12, 9, 18, 5, 2, 4]  # 1 … 17 inputs
SAMPLES = ragged_samples(LENGTHS)
SELECT = [7, 1, 0, 8, 4, 2, 6]
LAST = 3


def rows_for(model: Any, select: list[int] = SELECT) -> Rows:
    return pack(SAMPLES, select, packed=topology(model).packs, min_row=24)


def expected(model: Any, select: list[int] = SELECT) -> Tensor:
    return torch.cat([alone(model, SAMPLES, i) for i in select])


def assert_equal_to_1e5(found: Tensor, wanted: Tensor) -> None:
    """Equal to 1e-5 of the largest value: single values near zero carry the rounding of large ones."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_equals_the_plain_model_on_each_sample(family: str) -> None:
    model = tiny_model(family)
    parts, rows, wanted = topology(model), rows_for(model), expected(model)
    for layer in (0, 2, LAST):
        with PrefixCache(parts, SAMPLES, layer, batch_tokens=30) as cache, torch.no_grad():
            found = resume(parts, cache.hidden(rows), rows, layer)
            assert_equal_to_1e5(parts.logits(found), wanted)
    with torch.no_grad():
        assert_equal_to_1e5(parts.logits(run_from_tokens(parts, rows)), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [1, LAST])
def test_gradients_equal_those_of_the_plain_model(family: str, layer: int) -> None:
    model = tiny_model(family)
    parts, rows = topology(model), rows_for(model)
    weights = [parts.resolve(layer, name)[1].get_parameter("weight") for name in ("down_proj", "up_proj")]
    weights += [p for p in parts.attn(layer).parameters() if p.ndim > 1]
    wanted = torch.autograd.grad(nll(expected(model), rows), weights)
    with PrefixCache(parts, SAMPLES, layer) as cache:
        hidden = cache.hidden(rows)
    found = torch.autograd.grad(nll(parts.logits(resume(parts, hidden, rows, layer)), rows), weights)
    for one, other in zip(found, wanted, strict=True):
        assert_equal_to_1e5(one, other)


def nll(logits: Tensor, rows: Rows) -> Tensor:
    return nn.functional.cross_entropy(logits, rows.labels)


def test_gradients_reach_the_hidden_state() -> None:
    model = tiny_model("llama")
    parts, rows = topology(model), rows_for(model)
    with PrefixCache(parts, SAMPLES, 1) as cache:
        hidden = cache.hidden(rows).requires_grad_()
    resume(parts, hidden, rows, 1).square().sum().backward()
    flat = hidden.grad.view(-1, 32)
    pads = torch.ones(len(flat), dtype=torch.bool)
    pads[rows.token_rows] = False
    assert pads.any()
    assert not flat[pads].any()
    assert flat[rows.target_rows].any(-1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_advance_equals_a_new_cache(family: str) -> None:
    parts = topology(tiny_model(family))
    rows = rows_for(parts.model)
    done: list[int] = []
    with PrefixCache(parts, SAMPLES, 0, batch_tokens=30, progress=done.append) as cache:
        for layer in (1, LAST, LAST):
            cache.advance(layer)
            with PrefixCache(parts, SAMPLES, layer, batch_tokens=30) as new:
                real = rows.token_rows
                assert torch.equal(cache.hidden(rows).view(-1, 32)[real], new.hidden(rows).view(-1, 32)[real])
        with pytest.raises(ModelError, match="cannot go back"):
            cache.advance(1)
    assert sum(done) == len(SAMPLES)
    assert len(done) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gptj", "gemma3"])
def test_the_state_is_the_models_own_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    parts = topology(model)
    rows = pack(SAMPLES, range(len(SAMPLES)), packed=parts.packs)
    seen: list[Tensor] = []
    handle = parts.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(rows.input_ids, position_ids=rows.position_ids, use_cache=False)
    handle.remove()
    with PrefixCache(parts, SAMPLES, 2) as cache:
        state = cache.hidden(rows)
    assert state.dtype == dtype
    flat = (x.view(-1, 32)[rows.token_rows] for x in (state, seen[0]))
    assert torch.equal(*flat)


@pytest.mark.parametrize("family", ["llama", "gptj", "opt"])
def test_nothing_is_left_on_the_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    model.train()
    model.get_submodule(topology(model).blocks_path)[0].eval()  # flags that differ stay different
    parts, rows = topology(model), rows_for(model)
    wrapped = parts.mlp(LAST) if family != "opt" else parts.resolve(LAST, "down_proj")[1]
    own = wrapped.forward
    wrapped.forward = lambda x: own(x)  # as accelerate does; it must still stand there
    before = attributes(model)
    hidden = torch.zeros(*rows.input_ids.shape, 32)

    def use() -> None:
        with PrefixCache(parts, SAMPLES, 1) as cache:
            cache.advance(2)
        resume(parts, hidden, rows, 2)
        run_from_tokens(parts, rows)

    use()
    assert attributes(model) == before

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in (parts.blocks[1], parts.attn(LAST)):
        with monkeypatch.context() as patch:
            patch.setattr(type(place), "forward", functools.wraps(type(place).forward)(fail))
            for run in (use, lambda: resume(parts, hidden, rows, 1), lambda: run_from_tokens(parts, rows)):
                with pytest.raises(KeyboardInterrupt):
                    run()
        assert attributes(model) == before


def attributes(model: nn.Module) -> list[Any]:
    """The traces that overrides, hooks and modes leave on the modules."""
    return [
        (m.training, m.__dict__.get("forward"), list(m._forward_pre_hooks), list(m._forward_hooks))
        for m in model.modules()
    ]


def test_dropout_is_off_inside() -> None:
    model = tiny_model("gpt2")
    assert model.config.resid_pdrop > 0
    parts, rows, wanted = topology(model), rows_for(model), expected(model)
    model.train()
    with PrefixCache(parts, SAMPLES, 1) as cache, torch.no_grad():
        assert_equal_to_1e5(parts.logits(resume(parts, cache.hidden(rows), rows, 1)), wanted)
    assert model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_read_runs(family: str) -> None:
    parts = topology(tiny_model(family))
    rows = rows_for(parts.model)
    ran: dict[str, int] = {}  # projection -> rows of its input
    entered: list[Tensor] = []

    def counting(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            ran[name] = x.numel() // x.shape[-1]
            return forward(x)

        return run

    for name, module in parts.blocks.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.forward = counting(name, module.forward)
    for block in parts.blocks[:2]:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))

    with PrefixCache(parts, SAMPLES, 1) as cache:
        hidden = cache.hidden(rows)
    assert {name[0] for name in ran} == {"0"}
    ran.clear()
    entered.clear()
    with torch.no_grad():
        resume(parts, hidden, rows, 2)
    assert torch.equal(*entered)  # blocks that are skipped pass on what they get
    keys = ("k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
    assert {name[0] for name in ran} == {"2", "3"}
    for name, count in ran.items():
        all_rows = name[0] == "2" or name.endswith(keys)
        assert count == (rows.input_ids.numel() if all_rows else len(rows.target_rows)), name


def test_a_rebuilt_last_block_runs_whole() -> None:
    model = tiny_model("llama")
    rows, wanted = rows_for(model), expected(model)

    class Rebuilt(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    mlp = topology(model).mlp(LAST)
    mlp.down_proj = Rebuilt(mlp.down_proj.weight)
    parts = topology(model)
    with torch.no_grad():
        assert_equal_to_1e5(parts.logits(run_from_tokens(parts, rows)), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tiers_of_a_cuda_model_hold_the_same_state_and_gather_without_a_sync() -> None:
    parts = topology(tiny_model("llama").to("cuda"))
    rows = rows_for(parts.model).to("cuda", non_blocking=True)
    budgets = {"device": Budget(), "pinned": Budget(0), "file": Budget(0, 0)}
    states = []
    for tier, budget in budgets.items():
        with PrefixCache(parts, SAMPLES, 2, budget=budget) as cache:
            assert cache.tier == tier
            torch.cuda.set_sync_debug_mode("error")
            try:
                states.append(cache.hidden(rows))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert states[0].is_cuda
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_tiers_hold_the_same_state(tmp_path: Path) -> None:
    parts = topology(tiny_model("llama", dtype=torch.bfloat16))
    rows = rows_for(parts.model)
    needed = len(SAMPLES.input_ids) * 32 * 2
    with (
        PrefixCache(parts, SAMPLES, 2, budget=Budget(host_bytes=needed)) as host,
        PrefixCache(parts, SAMPLES, 1, budget=Budget(host_bytes=needed - 1, directory=tmp_path)) as mapped,
    ):
        mapped.advance(2)
        assert (host.tier, mapped.tier) == ("host", "file")
        assert host.nbytes == mapped.nbytes == needed
        assert torch.equal(host.hidden(rows), mapped.hidden(rows))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="closed"):
        mapped.hidden(rows)
    with PrefixCache(parts, SAMPLES, 1) as cache:  # half of what is free is plenty
        assert cache.tier == "host"


def test_a_full_disk_names_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = topology(tiny_model("llama"))

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    budget = Budget(host_bytes=0, directory=tmp_path)
    needed = len(SAMPLES.input_ids) * 32 * 4
    with pytest.raises(ModelError, match=rf"needs {needed} bytes in .*: No space left on device"):
        PrefixCache(parts, SAMPLES, 1, budget=budget)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"bytes in .*absent: No such file"):
        PrefixCache(parts, SAMPLES, 1, budget=Budget(host_bytes=0, directory=tmp_path / "absent"))


def test_a_failed_run_closes_the_cache(tmp_path: Path) -> None:
    parts = topology(tiny_model("llama"))
    cache = PrefixCache(parts, SAMPLES, 0, budget=Budget(host_bytes=0, directory=tmp_path), batch_tokens=30)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.advance(2, progress=stop)
    with pytest.raises(ModelError, match="closed"):
        cache.advance(2)
    for layer in (-1, 4):
        with pytest.raises(ModelError, match=rf"layer {layer} does not exist"):
            PrefixCache(parts, SAMPLES, layer)


def test_varlen_attention_gets_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Varlen attention reads restarting positions in batches of one row: rows are joined for it."""
    model = tiny_model("llama")
    parts, rows, wanted = topology(model), rows_for(model), expected(model)
    shapes = []
    parts.blocks[2].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    monkeypatch.setattr(forward, "_BATCHED_ATTENTION", frozenset())
    with PrefixCache(parts, SAMPLES, 2) as cache, torch.no_grad():
        assert_equal_to_1e5(parts.logits(resume(parts, cache.hidden(rows), rows, 2)), wanted)
    assert shapes[-1] == (1, rows.input_ids.numel(), 32)


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": 10**9, "memory.current": 7 * 10**8, "memory.stat": "anon 1\ninactive_file 50000000\n"},
        {
            "memory/memory.limit_in_bytes": 10**9,
            "memory/memory.usage_in_bytes": 7 * 10**8,
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50000000\n",
        },
    ],
    ids=["cgroup 2", "cgroup 1"],
)
def test_a_containers_limit_is_what_is_free(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine may have a hundred times as much."""
    monkeypatch.setattr(token_states, "_GROUPS", tmp_path)
    assert token_states.free_bytes(torch.device("cpu")) > 4 * 10**8
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(str(value))
    assert token_states.free_bytes(torch.device("cpu")) == 35 * 10**7


def test_a_file_gives_rows_in_any_order_and_number(tmp_path: Path, rng: torch.Generator) -> None:
    held = RowsFile((50, 6), torch.bfloat16, tmp_path)
    wanted = torch.zeros(50, 6, dtype=torch.bfloat16)
    for n in (50, 1, 13, 0, 30):
        rows = torch.randperm(50, generator=rng)[:n].sort().values
        values = torch.randn(n, 6, generator=rng).bfloat16()
        wanted[rows] = values
        held.write(rows, values)
        taken = torch.randperm(50, generator=rng)[:20].sort().values
        held.ahead(taken, taken + 1)
        assert torch.equal(held.read(taken), wanted[taken])
    assert not list(tmp_path.iterdir())


def test_the_rows_of_the_next_batch_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, first, n, advice: asked.append((first, n)))
    parts, width = topology(tiny_model("llama")), 32 * 4
    with PrefixCache(parts, SAMPLES, 1, budget=Budget(host_bytes=0, directory=tmp_path)) as cache:
        cache.ahead(torch.tensor([1, 4]))
    assert asked == [(2 * width, 18 * width), (30 * width, 12 * width)]
    with PrefixCache(parts, SAMPLES, 1) as cache:  # in memory, there is nothing to be read
        cache.ahead(torch.tensor([1, 4]))
    assert len(asked) == 2


def test_a_tally_counts_what_there_is_at_one_time() -> None:
    model, budget = tiny_model("llama"), Budget()
    for _ in range(2):
        with PrefixCache(topology(model), SAMPLES, 1, budget=budget) as cache:
            one, tier = cache.nbytes, cache.tier
    assert budget.tally.most == {tier: one}
    caches = [PrefixCache(topology(model), SAMPLES, layer, budget=budget) for layer in (1, 2)]
    assert budget.tally.most == {tier: 2 * one}
    assert len(caches) == 2
