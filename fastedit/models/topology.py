"""Where a Hugging Face causal language model keeps its parts, found from its structure and its config.

The model's type decides only whether this package has verified it; modules are found by what they are: the
list of equal blocks beside the token embedding, the child of a block that takes an attention mask, the
projection back to the model's width.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastedit.errors import ModelError
from fastedit.models.adapters import check_no_adapter
from fastedit.models.hooks import Stopped, eval_mode, hooked

_VERIFIED = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
)
_EDITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WHOLE = "load the whole model on one device, without device_map"
_SHORT_NAMES = ("down_proj", "up_proj", "gate_proj", "mlp", "attn", "block")


@dataclass(frozen=True, eq=False)
class Topology:
    """The parts of a causal language model.

    ``backbone`` is the module that owns the token embedding and the ``blocks``; called with ``input_ids`` it
    returns the hidden states after the final norm. ``blocks_path`` is the path of ``blocks`` in ``model``.
    ``head`` projects them to the vocabulary; ``logit_softcap`` bounds the logits (None: no bound).
    ``context_length`` is in tokens.
    """

    model: nn.Module
    config: Any
    backbone: nn.Module
    blocks: nn.ModuleList
    blocks_path: str
    head: nn.Module
    logit_softcap: float | None
    hidden_size: int
    context_length: int

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the backbone expects its input."""
        return next(self.backbone.parameters()).device

    def block(self, layer: int) -> nn.Module:
        """Block ``layer``.

        Raises:
            ModelError: the model has no such block; negative layers do not count from the end.
        """
        if not 0 <= layer < self.n_blocks:
            raise ModelError(
                f"layer {layer} does not exist: {self._name} has blocks 0 to {self.n_blocks - 1} "
                f"({self.blocks_path}); choose one of them"
            )
        return self.blocks[layer]

    def attn(self, layer: int) -> nn.Module:
        """The attention module of a block: its child that takes an attention mask."""
        return self._part(layer, "attn")

    def mlp(self, layer: int) -> nn.Module:
        """The MLP module of a block. Raises ModelError if the block has none of its own (OPT)."""
        return self._part(layer, "mlp")

    def resolve(self, layer: int, module: str) -> tuple[str, nn.Module]:
        """Full dotted path in ``model`` and the module that ``module`` names in block ``layer``.

        Args:
            layer: 0 … n_blocks - 1.
            module: ``down_proj``, ``up_proj``, ``gate_proj``, ``mlp``, ``attn``, ``block``, or a module path
                relative to the block or to the model.

        Raises:
            ModelError: no such block in the model or no such module in the block; the message lists what is.
        """
        block = self.block(layer)
        prefix = f"{self.blocks_path}.{layer}"
        names = {child: name for name, child in block.named_modules()}
        if module in _SHORT_NAMES:
            found = self._part(layer, module)
            return ".".join(filter(None, (prefix, names[found]))), found
        inside = module.removeprefix(f"{prefix}.")
        for name, child in block.named_modules():
            if name and name == inside:
                return f"{prefix}.{name}", child
        paths = ", ".join(filter(None, names.values()))
        raise ModelError(
            f"module {module!r} does not exist in block {layer} of {self._name} ({prefix}); choose one of "
            f"{', '.join(self._short_names(layer))}, or a path among {paths}"
        )

    def input_width(self, layer: int, module: str) -> int:
        """Width of the rows that a projection of a block reads: d, if those rows are the keys.

        Raises:
            ModelError: no such block or module, or one that is not a projection.
        """
        path, found = self.resolve(layer, module)
        if not _is_projection(found):
            raise ModelError(f"{path} is no linear map, so it has no keys; choose one such as down_proj")
        return _widths(found)[0]

    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Logits [M, V] of hidden states [M, h] after the final norm: head, then soft-cap if there is one.

        Another ``head`` may stand in for the model's own.
        """
        logits: Tensor = (head or self.head)(hidden)
        cap = self.logit_softcap
        return logits if cap is None else (logits / cap).tanh() * cap

    def rowwise(self, layer: int) -> tuple[nn.Module, ...]:
        """Sub-modules of a block that treat each row of their input [..., in] by itself.

        They are the MLP (its projections where the block has no MLP module), the attention's output
        projection, and its query projection if that is a module of its own. A caller that reads only some
        rows of the block's output may run them at those rows alone. Empty where the parts of the block are
        not recognized, because somebody has rebuilt it.
        """
        try:
            parts = self._parts(layer)
        except ModelError:
            return ()
        rowwise = [parts[name] for name in (["mlp"] if "mlp" in parts else ["up_proj", "down_proj"])]
        projections = dict(_projections(parts["attn"]))
        queries = projections.get("q_proj")
        _, *outputs = self.writers(layer)
        if len(outputs) == 1:
            rowwise += outputs
        if queries is not None and {"k_proj", "v_proj"} <= projections.keys():
            rowwise.append(queries)
        return tuple(rowwise)

    def writers(self, layer: int) -> tuple[nn.Module, ...]:
        """The projections of a block that write to the residual stream: the MLP's last one, and the attention's."""
        parts = self._parts(layer)
        outputs = (
            module
            for name, module in _projections(parts["attn"])
            if name not in ("q_proj", "k_proj", "v_proj") and _widths(module)[1] == self.hidden_size
        )
        return (parts["down_proj"], *outputs)

    def attended(self, layer: int) -> tuple[nn.Module, ...]:
        """The projections of a block's attention that make its keys and values, fused ones included.

        Empty if they are not recognized, because somebody has rebuilt the block.
        """
        rowwise = self.rowwise(layer)
        if not rowwise:
            return ()
        rest = {name: m for name, m in _projections(self._parts(layer)["attn"]) if m not in rowwise}
        return tuple(rest.values()) if len(rest) == 1 or rest.keys() == {"k_proj", "v_proj"} else ()

    @property
    def packs(self) -> bool:
        """Whether samples may share a row (``tokens.pack``).

        They may if a position that restarts begins a new sequence. Some families ignore that (OPT, and
        GPT-J in transformers 4), so it is measured once: a token must not see the sequence in front of it.
        """
        return self._probe[0]

    @property
    def blocks_return_tuples(self) -> bool:
        """Whether a block returns (hidden, …), as in transformers 4, or the hidden states alone."""
        return self._probe[1]

    @cached_property
    def _probe(self) -> tuple[bool, bool]:
        n = self.config.vocab_size
        outputs = [self._first_block([first, n // 3]) for first in (n // 4, n // 2)]
        tuples = isinstance(outputs[0], tuple)
        one, other = (output[0] if tuples else output for output in outputs)
        # equal shapes run equal kernels and a masked token weighs exactly 0: no tolerance is needed
        return torch.equal(one[0, 1], other[0, 1]), tuples

    @cached_property
    def mlp_adds(self) -> bool:
        """Whether the residual stream behind a block moves as the output of its ``down_proj`` does.

        It does not if a norm stands between (Gemma 2 and 3, OLMo 2) or after the sum (some OPT). Measured once, in
        block 0.
        """
        tokens = [self.config.vocab_size // 4]
        before = self._hidden(self._first_block(tokens))
        shift = before.new_ones(self.hidden_size) * before.square().mean().sqrt()
        shift[::2] *= -1
        down = self.resolve(0, "down_proj")[1]
        with hooked([down.register_forward_hook(lambda _, __, y: y + shift.to(y.dtype))]):
            moved = self._hidden(self._first_block(tokens)) - before
        return bool((moved - shift).norm() < 0.1 * (moved + shift).norm())

    def _hidden(self, output: Any) -> Tensor:
        """The hidden states in fp32 among what a block returns."""
        hidden: Tensor = output[0] if self.blocks_return_tuples else output
        return hidden.float()

    @torch.no_grad()
    def _first_block(self, tokens: list[int]) -> Any:
        """The output of block 0 for a row of tokens that are a sequence each."""

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise Stopped(output)

        input_ids = torch.tensor([tokens], device=self.device)
        try:
            with hooked([self.blocks[0].register_forward_hook(stop)]), eval_mode(self.backbone):
                self.backbone(input_ids=input_ids, position_ids=torch.zeros_like(input_ids), use_cache=False)
        except Stopped as stopped:
            return stopped.seen

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} ({self.config.model_type})"

    def _short_names(self, layer: int) -> Iterator[str]:
        parts = self._parts(layer)
        return (name for name in _SHORT_NAMES if name in parts)

    def _part(self, layer: int, name: str) -> nn.Module:
        parts = self._parts(layer)
        if name not in parts:
            raise ModelError(
                f"block {layer} of {self._name} has no {name}; it has {', '.join(self._short_names(layer))}"
            )
        return parts[name]

    def _parts(self, layer: int) -> dict[str, nn.Module]:
        """The modules of a block by their short names."""
        block = self.block(layer)
        parts: dict[str, nn.Module] = {"block": block}
        others: list[nn.Module] = []
        for child in block.children():
            child_type: Any = type(child)
            if _takes_mask(child_type):
                parts["attn"] = child
            elif any(True for _ in _projections(child)):
                others.append(child)
        if len(others) == 1 and not _is_projection(others[0]):
            parts["mlp"] = others[0]
        projections = dict(_projections(parts.get("mlp", block), skip=parts.get("attn")))
        if "attn" not in parts or not projections:
            raise ModelError(f"block {layer} of {self._name} has no attention and MLP that can be told apart")
        down_name, down = list(projections.items())[-1]
        inner, width = _widths(down)
        ups = {name: module for name, module in projections.items() if name != down_name}
        if width != self.hidden_size or any(_widths(up)[0] != width for up in ups.values()):
            raise ModelError(
                f"the MLP of block {layer} of {self._name} does not end in a projection to {self.hidden_size}"
            )
        parts["down_proj"] = down
        if len(ups) == 1:
            (up,) = ups.values()
            parts["up_proj"] = up
            if _widths(up)[1] == 2 * inner:  # one matrix holds both
                parts["gate_proj"] = up
        else:  # equal shapes: only the exact names tell the gate from the other
            parts |= {name: ups[name] for name in ("gate_proj", "up_proj") if name in ups}
        return parts


def topology(model: nn.Module) -> Topology:
    """Find the parts of a causal language model, as it is or inside wrappers that keep it as a sub-module.

    Raises:
        ModelError: not a supported architecture; a model without the expected parts, or with an adapter.
    """
    # torch.compile's wrapper has the attributes of what it wraps
    modules = model.modules() if isinstance(model, nn.Module) else iter(())
    inner: Any = next((m for m in modules if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        given = repr(model) if isinstance(model, str | os.PathLike) else type(model).__name__
        raise ModelError(
            f"{given} is no Hugging Face causal language model; load one with AutoModelForCausalLM.from_pretrained, "
            "or model and tokenizer by their folder or hub name with Editor.from_pretrained"
        )
    check_no_adapter(model, inner)
    config = inner.config.get_text_config()
    name = f"{type(inner).__name__} ({config.model_type})"
    if config.model_type not in _VERIFIED:
        raise ModelError(f"{name} is not supported; supported model types: {', '.join(_VERIFIED)}")
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    if head is None:
        raise ModelError(f"{name} has no head to the vocabulary; load it with AutoModelForCausalLM")
    found = [
        (backbone, path, blocks)
        for path, blocks, backbone in _block_lists(inner)
        if any(child is embedding for child in backbone.children())
        and len(blocks) == config.num_hidden_layers
        and len({type(block) for block in blocks}) == 1
    ]
    if len(found) != 1:
        raise ModelError(
            f"{name}: looked for one list of {config.num_hidden_layers} equal blocks beside the token "
            f"embedding and found {len(found)}"
        )
    backbone, path, blocks = found[0]
    return Topology(
        model=inner,
        config=config,
        backbone=backbone,
        blocks=blocks,
        blocks_path=path,
        head=head,
        # a composite model (text and images) does not cap its logits, whatever its text config says
        logit_softcap=getattr(config, "final_logit_softcapping", None) if config is inner.config else None,
        hidden_size=config.hidden_size,
        context_length=config.max_position_embeddings,
    )


def check_editable(found: Topology) -> None:
    """See that the weights are such as this package can edit: of floating point, whole, and on one device.

    Raises:
        ModelError: quantized, sharded or offloaded weights, or weights on several devices; names the parameter.
    """
    parameters = dict(found.model.named_parameters())
    first, device = next((path, parameter.device) for path, parameter in parameters.items())
    for path, parameter in parameters.items():
        if parameter.dtype not in _EDITABLE:
            raise ModelError(f"{path} holds {parameter.dtype}: it is quantized; load the model in fp32, bf16 or fp16")
        if parameter.is_meta:
            raise ModelError(f"{path} is on the meta device: it is offloaded, or was never loaded; {_WHOLE}")
        if parameter.device != device:
            raise ModelError(f"{path} is on {parameter.device}, but {first} on {device}; {_WHOLE}")
    for path, module in found.blocks.named_modules():
        if isinstance(module, nn.Linear) and module.weight.shape != (module.out_features, module.in_features):
            expected = (module.out_features, module.in_features)
            raise ModelError(
                f"{found.blocks_path}.{path}.weight has shape {tuple(module.weight.shape)}, expected {expected}: it is "
                "quantized or sharded; load the model in fp32, bf16 or fp16, on one device"
            )


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList, nn.Module]]:
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList):
                yield ".".join(filter(None, (path, name))), child, parent


@cache
def _takes_mask(module_type: Any) -> bool:
    return "attention_mask" in inspect.signature(module_type.forward).parameters


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _projections(module: nn.Module, skip: nn.Module | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps under a module (itself included), in the order in which it registers them."""
    if _is_projection(module):
        yield "", module
    for name, child in module.named_children():
        if child is skip:
            continue
        if _is_projection(child):
            yield name, child
        else:
            for below, projection in _projections(child):
                yield f"{name}.{below}", projection


def _widths(projection: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear map; Conv1D stores its weight transposed."""
    rows, columns = projection.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(projection, Conv1D) else (columns, rows)
