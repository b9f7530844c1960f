"""Targets z against a loop that takes one edit at a time, one row after the other, through the plain model."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import last_of_subject, random_edits, tiny_model
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from fastedit import ConfigError, EditRequest, RequestError
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit import target_loop
from fastedit.methods.locate_then_edit.config import TargetConfig
from fastedit.methods.locate_then_edit.target_loop import RELATIVE_LR
from fastedit.methods.locate_then_edit.targets import Targets, find_targets
from fastedit.models import Model, topology
from fastedit.progress import no_progress

CONTEXTS = ["w20 w21 w22 . {}", "w23 . {}"]
Z_LAYER = 1
# about half of the random edits stop before the last step, and about half meet the clamp
CONFIG = TargetConfig(steps=12, lr=0.3, weight_decay=0.05, clamp=1.5, kl_factor=0.2, stop_loss=4.5)
CONFIGS = {"block": CONFIG, "mlp": replace(CONFIG, site="mlp", clamp=4.0)}


@dataclass
class One:
    z: Tensor
    h0: Tensor
    loss: float
    probability: float
    steps: int
    clamped: bool


def one_at_a_time(model: nn.Module, module: nn.Module, tokenizer: Any, edit: EditRequest, config: TargetConfig) -> One:
    """The published loop: every row alone, all tokens, all blocks, logits everywhere, torch's Adam."""
    target = tokenizer(edit.target).input_ids
    rows = []
    for template in ("{}", *CONTEXTS, None):
        if template is None:
            rows.append((torch.tensor([tokenizer(f"{edit.subject} is a").input_ids]), len(edit.subject.split()) - 1))
        else:
            ids = tokenizer(template.format(edit.prompt)).input_ids + target[:-1]
            rows.append((torch.tensor([ids]), last_of_subject(tokenizer, edit, template)))
    delta: Any = None
    first: list[Tensor] = []

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        nonlocal delta
        if delta is None:
            first.append(hidden[0, place].detach().clone())
            delta = torch.zeros_like(first[0], requires_grad=True)
        moved = hidden.clone()
        moved[0, place] += delta
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = module.register_forward_hook(add)
    before = None
    clamped = False
    for step in range(config.steps):
        nlls = []
        for ids, place in rows[:-1]:  # noqa: B007  # the hook reads it
            logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(1)
            at = range(ids.shape[1] - len(target), ids.shape[1])
            nlls.append(-logp[list(at), target].mean())
        ids, place = rows[-1]
        now = model(input_ids=ids, use_cache=False).logits[0, place].log_softmax(0)
        before = now.detach() if before is None else before
        kl = kl_div(before, now, log_target=True, reduction="sum")
        nll = torch.stack(nlls)
        loss = nll.mean() + config.kl_factor * kl + config.weight_decay * delta.norm() / first[0].norm() ** 2
        if step == 0:
            optimizer = torch.optim.Adam([delta], lr=config.lr)
        if loss < config.stop_loss or step == config.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        limit = config.clamp * first[0].norm()
        if delta.norm() > limit:
            clamped = True
            with torch.no_grad():
                delta *= limit / delta.norm()
    handle.remove()
    z = first[0] + delta.detach()
    return One(z, first[0], loss.item(), (-nll).exp().mean().item(), step, clamped)


def found(family: str, tokenizer: Any, edits: Sequence[EditRequest], config: TargetConfig, **options: Any) -> Targets:
    about = {"progress": options.pop("progress", no_progress)}
    model = Model.of(tiny_model(family), tokenizer)
    return find_targets(Batch(model, edits, CONTEXTS, **about), Z_LAYER, config, **options)


# those that are measured: factors of logits, ALiBi, recurrent blocks, a router
MEASURED = ("granite", "cohere2", "falcon", "bloom", "gpt_neo", "lfm2", "falcon_h1", "deepseek_v3")
SHORT = replace(CONFIG, steps=6)  # the reference is slow: 3 edits, of which 2 are in flight


@pytest.mark.parametrize(
    ("family", "config", "n"),
    [
        *((family, config, 6) for family in ("llama", "gpt2", "gemma2", "gptj") for config in CONFIGS.values()),
        *((family, SHORT, 3) for family in MEASURED),
    ],
    ids=lambda given: given.site if isinstance(given, TargetConfig) else str(given),
)
def test_equals_one_edit_at_a_time(family: str, config: TargetConfig, n: int, tokenizer: Any, seed: int) -> None:
    edits = random_edits(n, seed)
    targets = found(family, tokenizer, edits, config, in_flight=2 * n // 3)
    model = tiny_model(family).requires_grad_(False)
    block = topology(model).blocks[Z_LAYER]
    module = block if config.site == "block" else topology(model).resolve(Z_LAYER, "mlp")[1]
    wanted = [one_at_a_time(model, module, tokenizer, edit, config) for edit in edits]
    print([(w.steps, w.loss, w.clamped) for w in wanted])
    torch.testing.assert_close(targets.h0, torch.stack([w.h0 for w in wanted]), rtol=0, atol=1e-5)
    assert targets.steps.tolist() == [w.steps for w in wanted]
    moved, expected = targets.z - targets.h0, torch.stack([w.z - w.h0 for w in wanted])
    assert (cosine_similarity(moved, expected)[targets.steps > 0] >= 0.999).all()
    torch.testing.assert_close(moved.norm(dim=1), expected.norm(dim=1), rtol=1e-3, atol=1e-5)
    assert targets.loss.tolist() == pytest.approx([w.loss for w in wanted], rel=1e-3)
    assert targets.probability.tolist() == pytest.approx([w.probability for w in wanted], rel=1e-3)
    assert targets.dropped == ()


def assert_same(found: Targets, wanted: Targets) -> None:
    """Equal up to what another batch shape does to rounding."""
    assert torch.equal(found.steps, wanted.steps)
    for name in ("z", "h0", "loss", "probability"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=2e-3)


def test_who_shares_the_batch_changes_no_edit(tokenizer: Any, seed: int) -> None:
    edits = random_edits(9, seed)
    together = found("llama", tokenizer, edits, CONFIG)
    for in_flight in (1, 4):
        assert_same(found("llama", tokenizer, edits, CONFIG, in_flight=in_flight), together)
    backwards = found("llama", tokenizer, edits[::-1], CONFIG, in_flight=2)
    flipped = (getattr(backwards, name).flip(0) for name in ("z", "h0", "loss", "probability", "steps"))
    assert_same(Targets(*flipped, (), 0.0, ()), together)


def test_looking_seldom_changes_no_edit(tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = random_edits(6, seed)
    wanted = found("llama", tokenizer, edits, CONFIG, in_flight=3)
    monkeypatch.setattr(target_loop, "_LOOK_EVERY", {"cpu": 4})
    watch = Watch(monkeypatch)
    assert_same(found("llama", tokenizer, edits, CONFIG, in_flight=3), wanted)
    changes = [i for i, (before, now) in enumerate(pairwise(watch.in_flight), 1) if before != now]
    assert changes
    assert all(i % 4 == 0 for i in changes)


def test_the_same_run_gives_the_same_bits(tokenizer: Any, seed: int) -> None:
    one, other = (found("llama", tokenizer, random_edits(5, seed), CONFIG, in_flight=2) for _ in range(2))
    assert torch.equal(one.z, other.z)


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
    class Rebuilt(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **(kwargs | {"past_key_values": None}))

    edits, model = random_edits(4, seed), tiny_model("llama")
    wanted = found("llama", tokenizer, edits, CONFIG)
    model.model.layers[3].self_attn = Rebuilt(model.model.layers[3].self_attn)
    assert_same(find_targets(Batch(Model.of(model, tokenizer), edits, CONTEXTS), Z_LAYER, CONFIG), wanted)


def test_an_edit_whose_loss_is_not_finite_is_dropped_alone(tokenizer: Any, seed: int) -> None:
    edits = random_edits(8, seed)
    bad = 0, 3
    edits[0] = replace(edits[0], prompt=f"You {edits[0].prompt}")
    edits[3] = replace(edits[3], target="You w9")  # its h₀ is finite, and its loss is not
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("You")] = torch.nan
    targets = find_targets(Batch(Model.of(model, tokenizer), edits, CONTEXTS), Z_LAYER, CONFIG, in_flight=4)
    assert targets.dropped == bad
    assert targets.notes[-1] == "dropped, because the loss is not finite: edit e0, edit e3"
    others = [i for i in range(8) if i not in bad]
    kept = found("llama", tokenizer, [edits[i] for i in others], CONFIG)
    for name in ("z", "loss", "probability"):
        values = getattr(targets, name)
        assert values[list(bad)].isnan().all()
        torch.testing.assert_close(values[others], getattr(kept, name), rtol=1e-3, atol=2e-3)
    auto = find_targets(Batch(Model.of(model, tokenizer), edits, CONTEXTS), Z_LAYER, replace(CONFIG, lr=None))
    assert auto.dropped == bad  # the rate comes from the others


def test_an_edit_that_diverges_is_dropped(tokenizer: Any, seed: int) -> None:
    targets = found("llama", tokenizer, random_edits(3, seed), replace(CONFIG, lr=1e300, stop_loss=0))
    assert targets.dropped == (0, 1, 2)
    assert targets.steps.tolist() == [1, 1, 1]
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    targets = find_targets(Batch(Model.of(model, tokenizer), random_edits(3, seed)), Z_LAYER, CONFIG)
    assert targets.dropped == (0, 1, 2)
    assert targets.h0.isfinite().all()
    assert targets.z.isnan().all()  # no caller can take it for a target


def test_without_a_rate_steps_are_in_proportion_to_the_states(tokenizer: Any, seed: int) -> None:
    edits = random_edits(5, seed)
    config = TargetConfig(steps=2, kl_factor=0, weight_decay=0, stop_loss=0)
    targets = found("llama", tokenizer, edits, config)
    typical = targets.h0.norm(dim=1).median() / 32**0.5
    assert targets.lr == pytest.approx(RELATIVE_LR * float(typical))
    first = (targets.z - targets.h0).abs()  # Adam's first step
    assert float(first.median()) == pytest.approx(targets.lr, rel=1e-4)


def test_one_step_is_an_evaluation(tokenizer: Any, seed: int) -> None:
    targets = found("llama", tokenizer, random_edits(3, seed), replace(CONFIG, steps=1))
    assert torch.equal(targets.z, targets.h0)
    assert targets.steps.tolist() == [0, 0, 0]
    assert targets.loss.isfinite().all()


def test_half_precision_models_keep_delta_in_fp32(tokenizer: Any, seed: int) -> None:
    parts = topology(tiny_model("llama", dtype=torch.bfloat16))
    edits = random_edits(5, seed)
    batch = Batch(Model(parts, tokenizer), edits, CONTEXTS)
    before = find_targets(batch, Z_LAYER, TargetConfig(steps=1), in_flight=3)
    after = find_targets(batch, Z_LAYER, TargetConfig(), in_flight=3)
    assert after.z.dtype == after.loss.dtype == torch.float32
    assert (after.loss < before.loss).all()


def test_the_model_stays_as_it_is(tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2").train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]

    def attributes() -> list[Any]:
        return [
            (m.training, m.__dict__.get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        ]

    expected = attributes()
    edits = random_edits(3, seed)
    for config in CONFIGS.values():
        with torch.no_grad():
            sought = replace(config, stop_loss=0.0)
            targets = find_targets(Batch(Model.of(model, tokenizer), edits, CONTEXTS), Z_LAYER, sought)
        assert targets.steps.all()
        assert attributes() == expected

    def fail(*_: Any, **__: Any) -> None:
        assert not any(p.requires_grad for p in model.parameters())  # autograd would keep what their gradients need
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target_loop.ops, "target_cross_entropy", fail)
        with pytest.raises(KeyboardInterrupt):
            find_targets(Batch(Model.of(model, tokenizer), edits), Z_LAYER, CONFIGS["mlp"])
    assert attributes() == expected
    assert [p.requires_grad for p in model.parameters()] == flags
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_wrong_input_is_named(tokenizer: Any) -> None:
    parts = topology(tiny_model("llama"))
    good = EditRequest("w10 w11 is", "w12", "w11")

    def run(edit: EditRequest, z_layer: int = Z_LAYER, contexts: Sequence[str] = ()) -> None:
        find_targets(Batch(Model(parts, tokenizer), [good, edit], contexts), z_layer, CONFIG)

    with pytest.raises(RequestError, match="edit x: the subject 'w13' is not in the prompt 'w10 w11'"):
        run(EditRequest("w10 w11", "w12", "w13", id="x"))
    with pytest.raises(RequestError, match="edit 1: it has no subject"):
        run(EditRequest("w10 w11", "w12"))
    with pytest.raises(RequestError, match=r"^edit x: prompt and target take 70 tokens"):
        run(EditRequest("w10 " * 70, "w12", "w10", id="x"))
    with pytest.raises(RequestError, match=r"^edit x, after the context 'w13 .* {}': prompt and target take 66 tokens"):
        run(EditRequest("w10 " * 60, "w12", "w10", id="x"), contexts=["w13 {}", "w13 w13 w13 w13 w13 w13 {}"])
    with pytest.raises(ConfigError, match=r"the context 'w13 \{\} \{\}' needs exactly one"):
        run(good, contexts=["w13 {} {}"])
    with pytest.raises(ConfigError, match=r"z_layer 3 is the last block.*choose one of 0 to 2"):
        run(good, z_layer=3)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"clamp": -1.0}, {"kl_factor": -1.0}),
        *({"stop_loss": -0.1}, {"weight_decay": float("inf")}, {"site": "attn"}),
    ],
)
def test_wrong_configuration_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} is "):
        TargetConfig(**wrong)


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
