"""Where a Hugging Face causal language model keeps its parts, found from its structure and its config.

Modules are found by what they do: the list of equal blocks beside the token embedding, the child of a block that
takes an attention mask, the projection back to the model's width. ``self_check`` then checks that passes through these
parts compute the same as the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastedit.errors import ModelError, listed
from fastedit.models.adapters import check_no_adapter
from fastedit.models.block_parts import (
    BlockParts,
    UnknownPartsError,
    find_parts,
    holds_experts,
    is_projection,
    maps_alone,
    projections,
    widths,
)
from fastedit.models.hooks import Stopped, eval_mode, hooked

_SHORT_NAMES = ("down_proj", "up_proj", "gate_proj", "mlp", "attn", "block")
_CONTEXTS = ("max_position_embeddings", "seq_length", "max_seq_len", "n_positions")  # the first in a config counts
_FIRST_CONTEXT = "original_max_position_embeddings"
_CONTEXT = 2048  # tokens, for a model without a limit on positions


@dataclass(frozen=True, eq=False)
class Topology:
    """The parts of a causal language model.

    ``backbone`` is the module that owns the token embedding and the ``blocks``; called with ``input_ids`` it
    returns the hidden states after the final norm. ``blocks_path`` is the path of ``blocks`` in ``model``.
    ``head`` projects them to the vocabulary, times ``logit_scale``; ``logit_softcap`` bounds the logits (None: no
    bound). ``context_length`` is in tokens.

    Three flags say what a pass may do with the model; ``self_check`` turns off what changes its numbers.
    ``shares_rows``: samples may share a row, if positions restart (``packs``). ``runs_in_parts``: a block may run at
    some of its rows, or with cached outputs of its frozen parts. ``replays_blocks``: blocks may be called without the
    backbone, and with keys and values of earlier tokens.
    """

    model: nn.Module
    config: Any
    backbone: nn.Module
    blocks: nn.ModuleList
    blocks_path: str
    head: nn.Module
    logit_scale: float
    logit_softcap: float | None
    hidden_size: int
    context_length: int
    shares_rows: bool = True
    runs_in_parts: bool = True
    replays_blocks: bool = True

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the backbone ends, as a rule with its final norm, and where edits run; "meta" if all is offloaded."""
        devices = [p.device for p in self.backbone.parameters() if not p.is_meta]
        return devices[-1] if devices else torch.device("meta")

    def block(self, layer: int) -> nn.Module:
        """Block ``layer``.

        Raises:
            ModelError: the model has no such block; negative layers do not count from the end.
        """
        if not 0 <= layer < self.n_blocks:
            raise ModelError(
                f"layer {layer} does not exist: {self.name} has blocks 0 to {self.n_blocks - 1} "
                f"({self.blocks_path}); choose one of them"
            )
        return self.blocks[layer]

    def attn(self, layer: int) -> nn.Module:
        """The attention module of a block: its child that takes an attention mask."""
        return self._part(layer, "attn")

    def mlp(self, layer: int) -> nn.Module:
        """The MLP module of a block. Raises ModelError if the block has no such module (OPT)."""
        return self._part(layer, "mlp")

    def resolve(self, layer: int, module: str) -> tuple[str, nn.Module]:
        """The full dotted path in ``model``, and the module, for a name ``module`` in block ``layer``.

        Args:
            layer: 0 … n_blocks - 1.
            module: ``down_proj``, ``up_proj``, ``gate_proj``, ``mlp``, ``attn``, ``block``, or a module path
                relative to the block or to the model.

        Raises:
            ModelError: no such block in the model or no such module in the block; the message lists what there is.
        """
        block = self.block(layer)
        prefix = f"{self.blocks_path}.{layer}"
        names = {child: name for name, child in block.named_modules()}
        inside = module.removeprefix(f"{prefix}.")
        if module in _SHORT_NAMES:
            found: nn.Module | None = self._part(layer, module)
        else:
            found = next((child for name, child in block.named_modules() if name and name == inside), None)
        if found is not None:
            return ".".join(filter(None, (prefix, names[found]))), found
        paths = ", ".join(filter(None, names.values()))
        raise ModelError(
            f"module {module!r} does not exist in block {layer} of {self.name} ({prefix}); choose one of "
            f"{', '.join(self._short_names(layer))}, or a path among {paths}"
        )

    def is_down_proj(self, layer: int, module: nn.Module) -> bool:
        """Whether a module is the ``down_proj`` of a block; a block whose MLP is experts has none."""
        return self._parts(layer).named.get("down_proj") is module

    def input_width(self, layer: int, module: str) -> int:
        """Input width d of a projection of a block, which is the width of its keys.

        Raises:
            ModelError: no such block or module, or one that is not a projection.
        """
        path, submodule = self.resolve(layer, module)
        if not is_projection(submodule):
            names = {child: name for name, child in self.block(layer).named_modules()}
            others = ["down_proj" if self.is_down_proj(layer, m) else names[m] for m in self.writers(layer)]
            raise ModelError(f"{path} is not a linear map, so it has no keys; choose one such as {[*others, '…'][0]}")
        return widths(submodule)[0]

    def for_head(self, states: Tensor) -> Tensor:
        """The head's input [..., h] for hidden states [..., h] after the final norm: scaled by ``logit_scale``."""
        return states if self.logit_scale == 1 else states * self.logit_scale

    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Logits [M, V] for the head's input [M, h] (``for_head``): the model's head or another, then the soft-cap."""
        logits: Tensor = (head or self.head)(hidden)
        cap = self.logit_softcap
        return logits if cap is None else (logits / cap).tanh() * cap

    def rowwise(self, layer: int) -> tuple[nn.Module, ...]:
        """Sub-modules of a block that treat each row of their input [..., in] independently.

        They are the MLP (its projections if the block has no MLP module, or one that takes more than its input),
        the attention's output projection, and its query projection if that is a separate module. A caller that
        reads only some rows of the block's output may run them at those rows alone. Empty if blocks do not run in
        parts, or if the block was rebuilt so that they are not recognized.
        """
        parts = self._found(layer) if self.runs_in_parts else None
        if parts is None:
            return ()
        mlp = parts.named.get("mlp")
        rowwise = [mlp] if mlp is not None and maps_alone(mlp) else [*parts.mlp_maps]
        attention = {name.rpartition(".")[2]: m for name, m in projections(parts.named["attn"])}
        outputs = self._attention_outputs(parts)
        if len(outputs) == 1:
            rowwise += outputs
        if {"q_proj", "k_proj", "v_proj"} <= attention.keys():
            rowwise.append(attention["q_proj"])
        return tuple(rowwise)

    def writers(self, layer: int) -> tuple[nn.Module, ...]:
        """The projections of a block that write to the residual stream: the MLP's last one, and the attention's."""
        parts = self._parts(layer)
        down = parts.named.get("down_proj")
        return (*([] if down is None else [down]), *self._attention_outputs(parts))

    def _attention_outputs(self, parts: BlockParts) -> list[nn.Module]:
        return [
            module
            for name, module in projections(parts.named["attn"])
            if name.rpartition(".")[2] not in ("q_proj", "k_proj", "v_proj") and widths(module)[1] == self.hidden_size
        ]

    def attended(self, layer: int) -> tuple[nn.Module, ...]:
        """The projections of a block's attention that make its keys and values, fused ones included.

        Empty if the block was rebuilt so that they are not recognized.
        """
        rowwise = self.rowwise(layer)
        if not rowwise:
            return ()
        of_attention = projections(self.attn(layer))
        maps = {name.rpartition(".")[2]: m for name, m in of_attention if m not in rowwise}
        return tuple(maps.values()) if len(maps) == 1 or maps.keys() == {"k_proj", "v_proj"} else ()

    @property
    def packs(self) -> bool:
        """Whether samples may share a row (``tokens.pack``).

        They may if a position that restarts begins a new sequence. Some families ignore that (OPT, and
        GPT-J in transformers 4), so it is measured once: a token must not see the sequence before it.
        """
        return self.shares_rows and self._probe[0]

    @property
    def blocks_return_tuples(self) -> bool:
        """Whether a block returns (hidden, …), as in transformers 4, or the hidden states alone."""
        return self._probe[1]

    @cached_property
    def _probe(self) -> tuple[bool, bool]:
        n = self.config.vocab_size
        outputs = [self.first_block([first, n // 3]) for first in (n // 4, n // 2)]
        if not isinstance(outputs[0], (Tensor, tuple)):
            kind = type(outputs[0]).__name__
            raise ModelError(f"block 0 of {self.name} returns a {kind}; hidden states or a tuple were expected")
        tuples = isinstance(outputs[0], tuple)
        one, other = (output[0] if tuples else output for output in outputs)
        # no tolerance: equal shapes run the same kernels, and a masked token has weight exactly 0
        return torch.equal(one[0, 1], other[0, 1]), tuples

    @torch.no_grad()
    def first_block(self, tokens: list[int]) -> Any:
        """The output of block 0 for a row of tokens, each of which is its own sequence."""

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise Stopped(output)

        input_ids = torch.tensor([tokens], device=self.device)
        try:
            with hooked([self.blocks[0].register_forward_hook(stop)]), eval_mode(self.backbone):
                self.backbone(input_ids=input_ids, position_ids=torch.zeros_like(input_ids), use_cache=False)
        except Stopped as stopped:
            return stopped.seen

    @property
    def name(self) -> str:
        """The model's class and type, for messages."""
        return f"{type(self.model).__name__} ({self.config.model_type})"

    def _short_names(self, layer: int) -> Iterator[str]:
        parts = self._parts(layer).named
        return (name for name in _SHORT_NAMES if name in parts and not holds_experts(parts[name]))

    def _part(self, layer: int, name: str) -> nn.Module:
        parts = self._parts(layer)
        if name in parts.named:
            return parts.named[name]
        if parts.experts is not None:
            raise ModelError(self._why_no_experts(layer, f"{self.blocks_path}.{layer}.{parts.experts}"))
        raise ModelError(f"block {layer} of {self.name} has no {name}; it has {', '.join(self._short_names(layer))}")

    def check_trainable(self, layer: int, module: str) -> None:
        """Check that the module that ``module`` names in block ``layer`` can be trained.

        Raises:
            ModelError: no such block or module; a module without weights, or one that holds experts among which a
                router chooses. The message says what can be trained instead.
        """
        path, submodule = self.resolve(layer, module)
        if holds_experts(submodule):
            raise ModelError(self._why_no_experts(layer, path))
        if not list(submodule.parameters()):
            raise ModelError(f"module {module!r} of block {layer} has no weights to train; choose another")

    def _why_no_experts(self, layer: int, path: str) -> str:
        """Why experts cannot be edited, and what can."""
        free = [i for i in range(self.n_blocks) if not holds_experts(self.blocks[i])]
        others = f", or blocks without a router: {', '.join(map(str, free))}" if free else ""
        names = ", ".join(self._short_names(layer))
        other = f"another module of block {layer} ({names})" if names else "another model: this block has nothing else"
        return (
            f"{path} holds experts among which a router chooses, so that a change reaches only the tokens that are "
            f"sent there; edit {other}{others}"
        )

    def _parts(self, layer: int) -> BlockParts:
        """The modules of a block by their short names; looked for once, and again when a module was replaced."""
        block = self.block(layer)
        modules = [(name, module, type(module)) for name, module in block.named_modules()]
        known, parts = self._seen.get(layer, (None, None))
        if parts is None or known != modules:
            try:
                parts = find_parts(block, self.hidden_size)
            except UnknownPartsError as error:
                raise ModelError(f"block {layer} of {self.name} {error}") from None
            self._seen[layer] = modules, parts
        return parts

    @cached_property
    def _seen(self) -> dict[int, tuple[list[tuple[str, nn.Module, type]], BlockParts]]:
        """The parts of a block, and the modules that it had when they were found."""
        return {}

    def _found(self, layer: int) -> BlockParts | None:
        try:
            return self._parts(layer)
        except ModelError:
            return None


def topology(model: nn.Module) -> Topology:
    """Find the parts of a causal language model, as it is or inside wrappers that keep it as a sub-module.

    Raises:
        ModelError: not a causal language model, or several, or one without the expected parts, or with an adapter.
    """
    # torch.compile's wrapper has the attributes of what it wraps
    held = dict(_outermost(model, "")) if isinstance(model, nn.Module) else {}
    inner: Any = next(iter(held), None)
    if len(held) > 1:
        raise ModelError(f"{type(model).__name__} holds {len(held)} models ({listed(list(held.values()))}); give one")
    if inner is None:
        given = repr(model) if isinstance(model, str | os.PathLike) else type(model).__name__
        raise ModelError(
            f"{given} is not a Hugging Face causal language model; load one with AutoModelForCausalLM.from_pretrained, "
            "or model and tokenizer by their folder or hub name with Editor.from_pretrained"
        )
    check_no_adapter(model, inner)
    config = inner.config.get_text_config()
    name = f"{type(inner).__name__} ({config.model_type})"
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    if head is None:
        raise ModelError(f"{name} has no head to the vocabulary; load it with AutoModelForCausalLM")
    candidates = [
        (backbone, path, blocks)
        for path, blocks, backbone in _block_lists(inner)
        if any(child is embedding for child in backbone.children())
        and len(blocks) == config.num_hidden_layers
        and len({type(block) for block in blocks}) == 1
    ]
    if len(candidates) != 1:
        raise ModelError(
            f"{name}: looked for one list of {config.num_hidden_layers} equal blocks beside the token "
            f"embedding and found {len(candidates)}"
        )
    backbone, path, blocks = candidates[0]
    if shared := [i for i, block in enumerate(blocks) if block in list(blocks)[:i]]:
        raise ModelError(
            f"{len(shared)} blocks of {name} are modules that stand lower down already: "
            f"{listed([str(i) for i in shared])}; give each block a module of its own"
        )
    return Topology(
        model=inner,
        config=config,
        backbone=backbone,
        blocks=blocks,
        blocks_path=path,
        head=head,
        logit_scale=_logit_scale(config),
        # a composite model (text and images) ignores the soft-cap in its text config
        logit_softcap=getattr(config, "final_logit_softcapping", None) if config is inner.config else None,
        hidden_size=config.hidden_size,
        context_length=_context_length(config),
    )


def _context_length(config: Any) -> int:
    """The most tokens of a sample. LongRoPE rotates otherwise in rows longer than its first context: less than that."""
    longest = next((n for name in _CONTEXTS if (n := getattr(config, name, None))), _CONTEXT)
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (r for r in (ropes, *ropes.values()) if isinstance(r, dict) and "longrope" in r.values()):
        longest = min(longest, getattr(config, _FIRST_CONTEXT, None) or rope.get(_FIRST_CONTEXT, longest))
    return longest


def _logit_scale(config: Any) -> float:
    """The factor of the logits, which each family names in its own way; 1 without one."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return float(factor) / float(getattr(config, "logits_scaling", None) or 1.0)


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList, nn.Module]]:
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList):
                yield ".".join(filter(None, (path, name))), child, parent


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """The Hugging Face models that are in no other one, each with its path."""
    if isinstance(module, PreTrainedModel):
        yield module, path
        return
    for name, child in module.named_children():
        yield from _outermost(child, f"{path}.{name}".lstrip("."))
