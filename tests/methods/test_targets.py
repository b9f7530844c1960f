"""Targets z against a loop that takes one edit at a time, one row after the other, through the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import last_of_subject, random_edits, tiny_model
from seeking import CONFIG, CONFIGS, CONTEXTS, Z_LAYER, assert_same, found
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from fastedit import ConfigError, EditRequest, RequestError
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit import target_loop
from fastedit.methods.locate_then_edit.config import TargetConfig
from fastedit.methods.locate_then_edit.target_loop import RELATIVE_LR
from fastedit.methods.locate_then_edit.targets import Targets, find_targets
from fastedit.models import Model, topology


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


def test_who_shares_the_batch_changes_no_edit(tokenizer: Any, seed: int) -> None:
    edits = random_edits(9, seed)
    together = found("llama", tokenizer, edits, CONFIG)
    for in_flight in (1, 4):
        assert_same(found("llama", tokenizer, edits, CONFIG, in_flight=in_flight), together)
    backwards = found("llama", tokenizer, edits[::-1], CONFIG, in_flight=2)
    flipped = (getattr(backwards, name).flip(0) for name in ("z", "h0", "loss", "probability", "steps"))
    assert_same(Targets(*flipped, (), 0.0, ()), together)


def test_the_same_run_gives_the_same_bits(tokenizer: Any, seed: int) -> None:
    one, other = (found("llama", tokenizer, random_edits(5, seed), CONFIG, in_flight=2) for _ in range(2))
    assert torch.equal(one.z, other.z)


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


def test_states_near_zero_are_no_reason_to_drop_an_edit(tokenizer: Any, seed: int) -> None:
    """The decay's factor is 1 / |h0|², and its gradient at δ = 0 is 0 however large that is."""
    model, edit = tiny_model("llama").requires_grad_(False), random_edits(1, seed)[0]
    mlp = topology(model).mlp(Z_LAYER)
    mlp.down_proj.weight.mul_(1e-6)
    config = replace(CONFIG, site="mlp", weight_decay=0.5, lr=1e-6)
    targets = find_targets(Batch(Model.of(model, tokenizer), [edit], CONTEXTS), Z_LAYER, config)
    wanted = one_at_a_time(model, mlp, tokenizer, edit, config)
    assert targets.dropped == ()
    torch.testing.assert_close(targets.z[0], wanted.z, rtol=1e-3, atol=1e-8)


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
