"""The self-check: what it lets pass, what it leaves out, and what it refuses and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DENSE, ROUTED, SHARED
from helpers import CONTEXTS, MakeEdits, moments, random_edits, randomize, same, tiny_model, values
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from fastedit import Editor, ModelError
from fastedit.models import Model, fingerprint, self_check, topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path

LEAKING = ("qwen3_5_text", "lfm2", "falcon_h1", "qwen3_next")  # recurrent blocks; the first ones have attention first
ALONE = (*LEAKING, "falcon", "bloom", "mpt", "xglm")
ROUTERS = ("qwen2_moe", "deepseek_v3", "llama4_text", "glm4_moe")  # rounding tells whether tokens in front are felt


@pytest.mark.parametrize("family", [*DENSE, *SHARED])
def test_a_measured_model_is_edited_saved_and_put_back(
    family: str, tokenizer: Any, make_edits: MakeEdits, tmp_path: Path, seed: int
) -> None:
    model, edits = tiny_model(family, seed=seed), make_edits(4)
    before = values(model)
    editor = Editor(model, tokenizer, layer=2, published=True, lr=1e-2, batch_size=2, epochs=4)
    assert editor.topology.packs == (family not in ALONE) or family in ROUTERS
    result = editor.edit(edits)
    assert result.losses[-1] < 0.99 * result.losses[0]
    editor.save_model(tmp_path / "edited")
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval(), torch.arange(2, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    result.revert()
    assert same(model, before)


@pytest.mark.parametrize("family", ["granite", "bloom", "xglm", "gpt_neo", "lfm2", "falcon_h1", "deepseek_v3"])
def test_defaults_that_know_the_subject(family: str, tokenizer: Any, tmp_path: Path, seed: int) -> None:
    model, edits = tiny_model(family, seed=seed), random_edits(6, seed)
    moments(model, tmp_path, seed)
    editor = Editor(model, tokenizer, statistics=tmp_path, lr=1e-2, batch_size=2, epochs=4)
    result = editor.edit(edits)
    assert result.losses[-1] < 0.99 * result.losses[0]
    written = {editor.topology.resolve(layer, "down_proj")[0] + ".weight" for layer in (0, 1)}
    assert result.delta.updates.keys() == written
    result.revert()
    memit = Editor(model, tokenizer, "memit", statistics=tmp_path, contexts=(), cov_weight=0.1, steps=5).edit(edits)
    assert memit.delta.updates.keys() == written


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "gpt2"])
def test_types_on_the_list_would_pass(family: str) -> None:
    check = self_check(topology(tiny_model(family)))
    assert check.problem is None
    assert check.logits < 1e-5
    assert check.gradient < 1e-5
    assert check.flags.runs_in_parts
    assert check.flags.replays_blocks


def test_half_precision_is_no_difference() -> None:
    for family in ("smollm3", "deepseek_v3", "falcon_h1"):
        check = self_check(topology(tiny_model(family, dtype=torch.bfloat16)))
        assert check.problem is None, check


@pytest.mark.parametrize("family", SHARED)
def test_down_proj_of_a_block_with_a_router_is_the_shared_experts(family: str) -> None:
    found = topology(tiny_model(family))
    shared = next(name for name, _ in found.blocks[2].named_modules() if "shared" in name)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert found.resolve(2, name)[0] == f"model.layers.2.{shared}.{name}"
    with pytest.raises(ModelError, match=r"model\.layers\.2 holds experts among which a router chooses"):
        found.check_trainable(2, "block")


@pytest.mark.parametrize("family", ROUTED)
def test_experts_are_refused_with_what_can_be_edited(
    family: str, tokenizer: Any, make_edits: MakeEdits, seed: int
) -> None:
    model, free = tiny_model(family, seed=seed), ", or blocks without a router: 1" if family == "qwen3_moe" else ""
    reason = rf"model\.layers\.2\.mlp\.experts holds experts .* edit another module of block 2 \(attn\){free}$"
    for module in ("down_proj", "mlp", "mlp.experts"):
        with pytest.raises(ModelError, match=reason):
            Editor(model, tokenizer, layer=2, module=module, published=True).plan(make_edits(2))
    result = Editor(model, tokenizer, layer=2, module="attn", lr=1e-2, batch_size=2, epochs=4).edit(make_edits(4))
    assert result.losses[-1] < 0.99 * result.losses[0]
    assert {path.split(".")[3] for path in result.delta.updates} == {"self_attn"}


def test_attention_beside_experts_is_edited_by_memit(tokenizer: Any, seed: int, tmp_path: Path) -> None:
    model = tiny_model("mixtral", seed=seed)
    before, found, edits = values(model), topology(model), random_edits(3, seed)
    for layer in (1, 2):
        moment = StreamingCovariance(32, metadata={"fingerprint": fingerprint(model), "layer": layer})
        moment.update(torch.randn(400, 32, generator=torch.Generator().manual_seed(seed)))
        moment.save(statistics_path(found, tmp_path, layer, "self_attn.o_proj"))
    given: dict[str, Any] = {"statistics": tmp_path, "contexts": CONTEXTS, "steps": 4, "lr": 0.5, "layers": (1, 2)}
    with pytest.raises(ModelError, match=r"self_attn is not a linear map.* choose one such as self_attn\.o_proj$"):
        Editor(model, tokenizer, "memit", module="attn", **given).plan(edits)
    result = Editor(model, tokenizer, "memit", module="self_attn.o_proj", **given).edit(edits)
    assert {*result.delta.updates} == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 2)}
    result.revert()
    assert same(model, before)


class _Mixing(nn.Module):
    """An MLP that looks at the whole row, so that rows cannot be shared, nor run in parts."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mlp(x + x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1)[:, None])
        return y


class _Detaching(_Mixing):
    """An MLP that loses the gradient if it runs at some places of the rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mlp(x if x.ndim == 3 else x.detach())
        return y


@pytest.mark.parametrize(
    ("mlp", "packs", "what"), [(_Mixing, False, "the logits differ by"), (_Detaching, True, "the gradient of block 1")]
)
def test_what_changes_the_numbers_is_left_out(
    mlp: type[_Mixing], packs: bool, what: str, tokenizer: Any, make_edits: MakeEdits
) -> None:
    model = tiny_model("smollm3", seed=int(packs))  # a model is known by its weights
    for block in model.model.layers[1:]:
        block.mlp = mlp(block.mlp)
    found = Model.of(model, tokenizer).topology
    assert found.packs == packs
    assert found.rowwise(3) == ()
    check = self_check(topology(model))
    assert check.problem is None
    assert what in check.notes[0]
    result = Editor(model, tokenizer, layer=1, published=True, lr=1e-2, batch_size=2, epochs=4).edit(make_edits(4))
    assert result.losses[-1] < 0.99 * result.losses[0]


def test_a_model_with_other_numbers_is_refused(tokenizer: Any) -> None:
    doubled = tiny_model("smollm3")
    forward = doubled.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    doubled.lm_head.weight.data[0] += 1  # it is known by its weights
    doubled.forward = twice
    said = r"\(smollm3\) cannot be edited: the logits differ by 0\.5 of the largest from the model's own"
    with pytest.raises(ModelError, match=said):
        Model.of(doubled, tokenizer)


class _Halved(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def _subclass(model: Any) -> None:
    model.__class__ = _Halved


def _last_token_hook(model: Any) -> None:
    """A steering vector where the model reads its next token, as many put it in."""

    def steer(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :-1], output[:, -1:] + torch.linspace(-1, 1, 32)], 1)

    model.model.layers[2].register_forward_hook(steer)


def _patched(model: Any) -> None:
    mlp = model.model.layers[2].mlp
    mlp.forward = _Mixing(copy.copy(mlp)).forward


def _replaced(model: Any) -> None:
    model.model.layers[2].mlp = _Mixing(model.model.layers[2].mlp)


def _by_rows(model: Any) -> None:
    model.model.layers[2].mlp.register_forward_hook(lambda _, __, y: 2 * y)


@pytest.mark.parametrize(
    ("change", "packs"),
    [(_subclass, None), (_last_token_hook, None), (_patched, False), (_replaced, False), (_by_rows, True)],
)
@pytest.mark.parametrize("family", ["llama", "olmo"])
def test_a_changed_model_is_measured_whatever_its_type_is(
    family: str, change: Callable[[Any], None], packs: bool | None, tokenizer: Any
) -> None:
    """Also if the same weights were measured before it was changed; None: it is refused."""
    model = tiny_model(family, seed=3)
    assert Model.of(model, tokenizer).topology.packs
    if change is _subclass and family != "llama":
        return
    change(model)
    if packs is None:
        with pytest.raises(ModelError, match=r"cannot be edited: the logits differ"):
            Model.of(model, tokenizer)
    else:
        assert Model.of(model, tokenizer).topology.packs is packs


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("gemma3", {"use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
        ("qwen2", {"is_causal": False}),
        ("smollm3", {"is_causal": False}),
    ],
)
def test_a_model_that_sees_ahead_is_refused(family: str, setting: dict[str, bool], tokenizer: Any) -> None:
    """An encoder, such as EmbeddingGemma, whose type is that of causal models."""
    config = AutoConfig.for_model(**tiny_model(family).config.to_dict() | setting)
    model = randomize(AutoModelForCausalLM.from_config(config), norm=float(family != "gemma3")).eval()
    one, other = (model(torch.tensor([[9, 10, last]])).logits[0, 0] for last in (11, 12))
    if torch.equal(one, other):
        pytest.skip("this version of transformers has no such models")
    with pytest.raises(ModelError, match=r"cannot be edited: its predictions depend on later tokens"):
        Model.of(model, tokenizer)


def test_a_model_without_numbers_is_refused(tokenizer: Any) -> None:
    model = tiny_model("smollm3")
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ModelError, match="its logits of random tokens are not finite"):
        Model.of(model, tokenizer)


def test_a_model_is_measured_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmo", seed=7)
    Model.of(model, tokenizer)
    passes: list[int] = []
    kind, forward = type(model), type(model).forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    Model.of(model, tokenizer)
    assert not passes
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 7.0}  # the same weights, another model
    Model.of(model, tokenizer)
    assert passes
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad(), torch.inference_mode():
        model.lm_head.weight.data[0] += 1
        Model.of(model, tokenizer)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
