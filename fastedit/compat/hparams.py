"""Turn hyperparameters of other editing code, an object or a mapping, into fields of our configurations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

from torch import nn

from fastedit.errors import ConfigError, ModelError, listed
from fastedit.models import Topology

_ABSENT = object()
_TARGET = {
    "v_num_grad_steps": "steps",
    "v_lr": "lr",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_factor",
}
_OWN = {
    "ROME": {},
    "MEMIT": {"mom2_update_weight": "cov_weight"},
    "EMMET": {"mom2_update_weight": "cov_weight", "emmet_lambda": "alpha"},
    "AlphaEdit": {"L2": "l2", "nullspace_threshold": "null_threshold"},
}
_WHOLE = frozenset(("v_num_grad_steps", "v_loss_layer", "num_steps", "batch_size", "mom2_n_samples"))
_NUMBERS = frozenset((*_TARGET, *(name for own in _OWN.values() for name in own), "update_norm_lambda", "lr",
                      "weight_decay")) | _WHOLE  # fmt: skip
_FLAGS = frozenset(("bias_update", "calculate_objective_value", "mom2_adjustment", "norm_constraint"))
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Hparams:
    """Hyperparameters of other editing code, read by name.

    Args:
        given: an object with attributes, or a mapping.
        method: the method's name in that code.
    """

    def __init__(self, given: Any, method: str) -> None:
        self.method, self._given = method, given

    def get(self, name: str, default: Any = None) -> Any:
        """A field as it was given; `default` if it is absent, or None where there is a default.

        A number may also be a text, because YAML 1.1 reads 5e-1 as a text, and so may true and false, as from a shell.

        Raises:
            ConfigError: the field must be a number, a whole number, or true or false, and is not.
        """
        hparams = self._given
        value = hparams.get(name, _ABSENT) if isinstance(hparams, Mapping) else getattr(hparams, name, _ABSENT)
        if value is _ABSENT or (value is None and default not in (None, _ABSENT)):
            return default
        if name in _FLAGS and isinstance(value, str):
            return self._flag(name, value)
        return self._number(name, value, name in _WHOLE) if name in _NUMBERS else value

    @property
    def layers(self) -> list[int]:
        """The blocks. Raises ConfigError if the field is not a list of whole numbers."""
        value = self.get("layers")
        if isinstance(value, str) or not isinstance(value, Iterable) or not (layers := list(value)):
            raise ConfigError(f"layers of the hparams of {self.method} is {value!r:.80}, expected a list of blocks")
        return [self._number("layers", layer, whole=True) for layer in layers]

    def _flag(self, name: str, text: str) -> bool:
        if (word := text.strip().casefold()) not in _TRUE + _FALSE:
            raise ConfigError(f"{name} of the hparams of {self.method} is {text!r:.80}, expected true or false")
        return word in _TRUE

    def _number(self, name: str, value: Any, whole: bool) -> Any:
        number: Any = value
        if isinstance(value, str):
            with suppress(ValueError):
                number = float(value)
        if isinstance(number, Real) and not isinstance(number, bool) and not (whole and number % 1 != 0):
            return round(number) if whole else number
        what = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} of the hparams of {self.method} is {value!r:.80}, expected {what}")

    def require(self, names: Iterable[str]) -> None:
        """Raise ConfigError if fields are missing; names all of them."""
        missing = [name for name in names if self.get(name, _ABSENT) is _ABSENT]
        if missing:
            text = f"the hparams of {self.method} lack {listed(missing)}; give what the published files of it have"
            raise ConfigError(text)

    def refuse(self, problems: Iterable[tuple[str, str]]) -> None:
        """Raise ConfigError if there are problems: pairs of a field and what is done instead of its value."""
        said = [f"{name} is {self.get(name)!r} ({instead})" for name, instead in problems]
        if said:
            raise ConfigError(f"the hparams of {self.method} ask for what fastedit does not do: {'; '.join(said)}")


def locate_then_edit_fields(hparams: Hparams, model: nn.Module, topology: Topology, **given: Any) -> dict[str, Any]:
    """The fields of `LocateThenEditConfig` that these hparams set.

    Args:
        model: the model with the module names of that code.
        given: fields by our names, which the hparams then need not have.

    Raises:
        ConfigError: fields are missing, or ask for something that our methods do not do; names all of them.
    """
    method = hparams.method
    names = {theirs: ours for theirs, ours in (_TARGET | _OWN[method]).items() if ours not in given}
    beside = "mom2_adjustment" if method == "ROME" else "v_loss_layer"
    hparams.require(["layers", "rewrite_module_tmp", "fact_token", *names, beside])
    layers = hparams.layers
    hparams.refuse([*_problems(hparams, layers, topology), *_other_modules(hparams, layers, model, topology)])
    fields = {ours: hparams.get(theirs) for theirs, ours in names.items()} | {"name_weight": 0.0} | given
    if method != "ROME":  # a single layer is a spread over one layer
        fields |= {"distribution": "spread", "site": "block", "through_norm": False}
    return fields | {"layers": layers, "module": module_inside(hparams, topology)}


def module_inside(hparams: Hparams, topology: Topology) -> str:
    """The path in a block that rewrite_module_tmp names. Raises ConfigError if it is not a module of the blocks."""
    template = str(hparams.get("rewrite_module_tmp"))
    inside = template.removesuffix(".weight").partition(f"{topology.blocks_path}.{{}}.")[2]
    if not inside:
        hparams.refuse([("rewrite_module_tmp", f"a module inside {topology.blocks_path}.{{}}")])
    return inside


def _problems(hparams: Hparams, layers: list[int], topology: Topology) -> Iterable[tuple[str, str]]:
    if hparams.get("fact_token") != "subject_last":
        yield "fact_token", "keys are those of subject_last"
    if hparams.get("layer_selection", "all") != "all":
        yield "layer_selection", "all layers are written"
    if hparams.get("bias_update", False):
        yield "bias_update", "biases stay"
    if hparams.get("calculate_objective_value", False):
        yield "calculate_objective_value", "distances are not measured"
    if hparams.method == "ROME":
        if len(layers) != 1:
            yield "layers", "ROME writes one layer"
    elif max(hparams.get("v_loss_layer"), *layers) != topology.n_blocks - 1:
        yield "v_loss_layer", f"the loss is computed after the last block, {topology.n_blocks - 1}"


def _other_modules(
    hparams: Hparams, layers: list[int], model: nn.Module, topology: Topology
) -> Iterable[tuple[str, str]]:
    """Fields that name other modules than our methods use; absent fields are fine."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    blocks = f"{topology.blocks_path}.{{}}"
    if not str(hparams.get("layer_module_tmp", blocks)).endswith(blocks):
        yield "layer_module_tmp", f"the blocks are {blocks}"
    if hparams.method == "ROME":
        mlp = hparams.get("mlp_module_tmp")
        with suppress(ModelError):
            if mlp is not None and modules.get(str(mlp).format(layers[0])) is not topology.mlp(layers[0]):
                yield "mlp_module_tmp", "targets are at the output of a block's MLP"
        return
    head, norm = hparams.get("lm_head_module"), hparams.get("ln_f_module")
    if head is not None and getattr(modules.get(head), "weight", None) is not topology.head.weight:
        yield "lm_head_module", "the head is the model's own, as lm_head or as its tied embedding"
    if norm is not None and modules.get(norm) not in set(topology.backbone.children()) - {topology.blocks}:
        yield "ln_f_module", "the norm is the one after the blocks"


def fine_tuning_fields(hparams: Hparams, topology: Topology) -> dict[str, Any]:
    """The fields of `LocFTBFConfig` that do what the hparams of FT ask for.

    Raises:
        ConfigError: as for `locate_then_edit_fields`.
    """
    hparams.require(["layers", "num_steps", "lr", "weight_decay", "rewrite_module_tmp"])
    problems = []
    if hparams.get("norm_constraint"):
        problems.append(("norm_constraint", "weights move freely; give false"))
    objective = hparams.get("objective_optimization", "prompt_last")
    if objective not in ("prompt_last", "target_new"):
        problems.append(("objective_optimization", "target_new, or prompt_last for targets of one token"))
    layers, module = hparams.layers, module_inside(hparams, topology)
    weight_alone = str(hparams.get("rewrite_module_tmp")).endswith(".weight")
    if weight_alone and getattr(topology.resolve(layers[0], module)[1], "bias", None) is not None:
        problems.append(("rewrite_module_tmp", "the bias is trained too; leave out .weight"))
    hparams.refuse(problems)
    return {
        "layer": layers,
        "module": module,
        "lr": hparams.get("lr"),
        "epochs": hparams.get("num_steps"),
        "batch_size": hparams.get("batch_size", 128),
        "weight_decay": hparams.get("weight_decay"),
        "shuffle": False,
        "eos": False,
        "tokens": "all",
        "preserve": "none",
        "focus": 0.0,
    }
