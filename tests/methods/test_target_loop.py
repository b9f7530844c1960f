"""The loop that seeks targets: which edits are in flight, what runs for them, and what it costs."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import WithoutCache, last_of_subject, random_edits, tiny_model
from seeking import CONFIG, CONTEXTS, Z_LAYER, assert_same, found
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit import target_loop
from fastedit.methods.locate_then_edit.targets import find_targets
from fastedit.models import Model, topology


def test_looking_seldom_changes_no_edit(tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = random_edits(6, seed)
    wanted = found("llama", tokenizer, edits, CONFIG, in_flight=3)
    monkeypatch.setattr(target_loop, "_LOOK_EVERY", {"cpu": 4})
    watch = Watch(monkeypatch)
    assert_same(found("llama", tokenizer, edits, CONFIG, in_flight=3), wanted)
    changes = [i for i, (before, now) in enumerate(pairwise(watch.in_flight), 1) if before != now]
    assert changes
    assert all(i % 4 == 0 for i in changes)


class Watch:
    """The edits in flight at each step, and the work of the model's parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_flight: list[list[int]] = []
        self.tokens: list[int] = []  # and pads
        step = target_loop.TargetLoop._step

        def watched(loop: Any, state: Any, batch: Any) -> None:
            self.in_flight.append(state.edit.tolist())
            self.tokens.append(batch.rows.index.numel())
            step(loop, state, batch)

        monkeypatch.setattr(target_loop.TargetLoop, "_step", watched)

    @property
    def most(self) -> int:
        return max(map(len, self.in_flight))


def test_edits_that_are_done_leave_and_others_enter(tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    done: list[tuple[str, int, int]] = []

    def progress(stage: str, count: int, total: int, loss: float | None = None) -> None:
        done.append((stage, count, total))

    targets = found("llama", tokenizer, random_edits(9, seed), CONFIG, in_flight=3, progress=progress)
    assert done[-1] == ("targets", 9, 9)
    assert done == sorted(set(done))
    assert watch.most == 3
    for i, updates in enumerate(targets.steps.tolist()):  # one evaluation more than updates, and none after the stop
        assert sum(i in edits for edits in watch.in_flight) == updates + 1
    assert all(len(edits) == 3 for edits in watch.in_flight[: -CONFIG.steps])


def test_memory_decides_how_many_are_in_flight(tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edits, watch, most = random_edits(12, seed), Watch(monkeypatch), []
    for memory in (1, 10**6, 2 * 10**6, None):
        watch.in_flight.clear()
        found("llama", tokenizer, edits, replace(CONFIG, steps=2), memory=memory)
        most.append(watch.most)
    assert most[0] == 1
    assert 1 < most[1] < most[2] <= most[3] == 12


def test_nothing_stays_behind(tokenizer: Any, seed: int) -> None:
    """A run of many batches searches targets for each of them."""
    model, edits = tiny_model("llama"), random_edits(3, seed)

    def alive() -> int:
        find_targets(Batch(Model.of(model, tokenizer), edits, CONTEXTS), Z_LAYER, replace(CONFIG, steps=2))
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    before = alive()  # may see what earlier tests have left
    assert alive() <= before


def test_a_cpus_caches_decide_how_many_are_in_flight(
    tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, edits = Watch(monkeypatch), random_edits(24, seed)
    monkeypatch.setattr(target_loop, "_BATCH_TOKENS", 100)
    config = replace(CONFIG, stop_loss=0, steps=4)
    few = found("llama", tokenizer, edits, config)
    assert all(tokens <= 100 or len(edits) == 1 for tokens, edits in zip(watch.tokens, watch.in_flight, strict=True))
    assert max(watch.tokens) > 60  # no room for another one as long
    numbers = {len(edits) for edits in watch.in_flight}
    assert len(numbers) > 1, "shorter edits run side by side in larger numbers"
    monkeypatch.setattr(target_loop, "_BATCH_TOKENS", 10**6)
    many = found("llama", tokenizer, edits, config)
    assert torch.cosine_similarity(few.z, many.z).min() > 0.999
    assert watch.most == 24


def test_only_what_is_needed_runs(tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    parts, edits = topology(model), random_edits(6, seed)
    assert parts.packs  # measured once, on block 0
    tokens = [0] * 4
    head = []
    for i, block in enumerate(parts.blocks):

        def count(_: Any, args: tuple[Any, ...], i: int = i) -> None:
            tokens[i] += args[0].numel() // args[0].shape[-1]

        block.mlp.down_proj.register_forward_pre_hook(count)
    parts.head.register_forward_pre_hook(lambda _, args: head.append(len(args[0])))
    real, update, updates = target_loop.ops.target_cross_entropy, target_loop.TargetLoop._update, []

    def counted(hidden: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        head.append(len(hidden))
        found: tuple[Tensor, Tensor] = real(hidden, *args, **options)
        return found

    monkeypatch.setattr(target_loop.ops, "target_cross_entropy", counted)
    monkeypatch.setattr(target_loop.TargetLoop, "_update", lambda *args: updates.append(update(*args)))
    find_targets(Batch(Model(parts, tokenizer), edits, CONTEXTS), Z_LAYER, replace(CONFIG, stop_loss=0), in_flight=6)
    assert tokens[0] == tokens[1]  # once each
    before, after = 0, 0  # tokens of the rows in front of the subject's last, and from there on
    for edit in edits:
        end, name = last_of_subject(tokenizer, edit), len((edit.subject or "").split()) - 1
        after += len(edit.prompt.split()) - 1 - end + len(edit.target.split())
        before += name + 3 * end
        before += sum(len(context.split()) - 1 for context in CONTEXTS)
    assert tokens[2] == before + (3 * after + 6) * CONFIG.steps  # of the KL row one token
    n_targets = 3 * sum(len(edit.target.split()) for edit in edits)
    assert tokens[3] == (n_targets + 6) * CONFIG.steps
    assert head == [n_targets + 6] * CONFIG.steps  # targets and KL rows in one product
    assert len(updates) == CONFIG.steps - 1  # the last evaluation has no gradient


def test_attention_that_asks_no_cache_costs_time_and_nothing_else(tokenizer: Any, seed: int) -> None:
    edits, model = random_edits(4, seed), tiny_model("llama")
    wanted = found("llama", tokenizer, edits, CONFIG)
    model.model.layers[3].self_attn = WithoutCache(model.model.layers[3].self_attn)
    assert_same(find_targets(Batch(Model.of(model, tokenizer), edits, CONTEXTS), Z_LAYER, CONFIG), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_gpu(tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = random_edits(9, seed)
    wanted = found("llama", tokenizer, edits, CONFIG)
    step = target_loop.TargetLoop._step

    def strict(*args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(target_loop.TargetLoop, "_step", strict)
    parts = topology(tiny_model("llama").to("cuda"))
    targets = find_targets(Batch(Model(parts, tokenizer), edits, CONTEXTS), Z_LAYER, CONFIG, in_flight=4)
    assert torch.equal(targets.steps.cpu(), wanted.steps)
    assert (cosine_similarity(targets.z.cpu() - wanted.h0, wanted.z - wanted.h0) >= 0.999).all()
