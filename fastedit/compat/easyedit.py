"""EasyEdit's editor with our methods: `install()`, and its `edit`, `batch_edit` and `sequential_edit` run them.

    from fastedit.compat import easyedit
    easyedit.install()  # before an editor is made, because that is when it looks up its method

Ours are ROME, MEMIT, EMMET, AlphaEdit and FT, and the new LocFT-BF. All others, such as R-ROME, stay EasyEdit's own;
so does FT with objective_optimization prompt_last, for targets of more than one token. Two things differ from
EasyEdit: AlphaEdit preserves only edits that the model still holds, and EMMET returns the old weights, so that its
edits are reverted when they are not sequential.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.compat import memit
from fastedit.compat.calls import EditCall, Request, fine_tune, locate_then_edit
from fastedit.errors import ConfigError, FileError
from fastedit.files import stamp
from fastedit.models import plain_state

Apply = Callable[..., tuple[Any, Any]]
_REGISTRY, _DICT = "easyeditor.util.alg_dict", "ALG_DICT"
_BATCHES = "easyeditor.editors.batch_editor"  # says which methods may take several edits at once
_NEW = "LocFT-BF"
_log = logging.getLogger(__name__)


def _memit(model: Any, tok: Any, requests: Sequence[Request], hparams: Any, **options: Any) -> tuple[Any, Any]:
    return memit.apply_memit_to_model(model, tok, requests, hparams, **_taken(options, "cache_template"))


def _rome(model: Any, tok: Any, requests: Sequence[Request], hparams: Any, **options: Any) -> tuple[Any, Any]:
    return memit.apply_rome_to_model(model, tok, requests, hparams, **_taken(options))


@plain_state
def _emmet(model: Any, tok: Any, requests: Sequence[Request], hparams: Any, **options: Any) -> tuple[Any, Any]:
    call = EditCall("EMMET", model, tok, requests, hparams)
    taken = _taken(options, "cache_template")
    wanted = taken.pop("return_orig_weights")
    edited = locate_then_edit(call, memit.variables(), **taken)
    return edited.model, edited.weights_copy(wanted)


@plain_state
def _alphaedit(model: Any, tok: Any, requests: Sequence[Request], hparams: Any, **options: Any) -> tuple[Any, Any]:
    call = EditCall("AlphaEdit", model, tok, requests, hparams)
    if options.get("reset_cache"):
        call.known.written.clear()
    file = Path(str(call.hparams.get("P_loc", "")))
    load = partial(_projections, file)
    P = call.known.memo.get("P_loc", (file, stamp(file)), load) if file.is_file() else None
    previous = call.known.standing(call.parts.network)
    taken = _taken(options, "cache_template")
    wanted = taken.pop("return_orig_weights")
    edited = locate_then_edit(call, memit.variables(), projections=P, previous=previous, **taken)
    keys = {
        path: torch.cat([previous[path], new]) if path in previous else new for path, new in edited.result.keys.items()
    }
    edited.known.note(edited.parts.network, keys)
    return edited.model, edited.weights_copy(wanted)


def _projections(path: Path) -> Tensor:
    """Load P [L, d, d] from a file."""
    try:
        projections = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything may be in the file
        raise FileError(path, f"P_loc is not a tensor that torch.load reads: {error}") from error
    if not isinstance(projections, Tensor):
        raise FileError(path, f"P_loc holds a {type(projections).__name__}, expected a tensor")
    return projections


def _ft(model: Any, tok: Any, requests: Sequence[Request], hparams: Any, **options: Any) -> tuple[Any, Any]:
    if EditCall("FT", model, tok, requests, hparams).longer_targets():
        _log.warning("FT runs as EasyEdit's own: objective_optimization is prompt_last, ours trains target_new")
        result: tuple[Any, Any] = _theirs["FT"](model, tok, requests, hparams, **options)
        return result
    return memit.apply_ft_to_model(model, tok, requests, hparams, **_taken(options))


@plain_state
def _locft_bf(model: Any, tok: Any, requests: Sequence[Request], hparams: Any, **options: Any) -> tuple[Any, Any]:
    call = EditCall(_NEW, model, tok, requests, hparams)
    fields = call.hparams.get("config", {})
    if not isinstance(fields, Mapping):
        raise ConfigError(f"config of {_NEW}'s hparams is {fields!r}, expected fields of LocFTBFConfig by name")
    edited = fine_tune(call, "locft-bf", fields, copy=options["copy"])
    return edited.model, edited.weights_copy(options["return_orig_weights"])


def _taken(options: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The options that our methods have; EasyEdit's own also ignore the rest."""
    return {name: options[name] for name in ("copy", "return_orig_weights", *more) if name in options}


def _as_theirs(apply: Apply) -> Apply:
    def with_their_signature(
        model: Any,
        tok: Any,
        requests: Sequence[Request],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        kwargs |= {"copy": copy, "return_orig_weights": return_orig_weights}
        return apply(model, tok, requests, hparams, keep_original_weight=keep_original_weight, **kwargs)

    return with_their_signature


OURS: dict[str, Apply] = {
    name: _as_theirs(apply)
    for name, apply in {
        "ROME": _rome,
        "MEMIT": _memit,
        "EMMET": _emmet,
        "AlphaEdit": _alphaedit,
        "FT": _ft,
        _NEW: _locft_bf,
    }.items()
}
"""The methods by EasyEdit's names, with its signature: `fn(model, tok, requests, hparams, copy, return_orig_weights,
keep_original_weight, **kwargs)` returns the model and the changed weights as they were before."""
_theirs: dict[str, Any] = {}
_undo: list[Callable[[], None]] = []


@dataclass
class LocFTBFHyperParams:
    """Hyperparameters of LocFT-BF for EasyEdit's editor.

    Attributes:
        model_name: a folder or a name, or (model, tokenizer), as `BaseEditor` takes it.
        batch_size: edits that `batch_edit` trains together; `edit` needs 1. The mini-batch of training is
            `batch_size` in `config`.
        config: fields of `fastedit.methods.LocFTBFConfig`; the others are chosen for the model.
    """

    model_name: Any
    device: Any = 0
    batch_size: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    alg_name: str = _NEW
    model_parallel: bool = False
    fp16: bool = False
    max_length: int = 40

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> LocFTBFHyperParams:
        """Read a YAML file, as EasyEdit's classes do.

        Raises:
            FileError: the file cannot be read, is of another method, or has other fields.
        """
        import yaml  # type: ignore[import-untyped]  # EasyEdit has it

        path = Path(hparams_name_or_path)
        path = path if path.suffix in (".yaml", ".yml") else Path(f"{path}.yaml")
        try:
            hparams = cls(**yaml.safe_load(path.read_text("utf-8")))
            hparams.config = {name: _number(value) for name, value in hparams.config.items()}
        except (OSError, TypeError, AttributeError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise FileError(path, f"no hyperparameters of {_NEW} can be read: {error}") from error
        if hparams.alg_name != _NEW:
            raise FileError(path, f"{{path}} is of {hparams.alg_name}, expected alg_name {_NEW}")
        return hparams


def _number(value: Any) -> Any:
    """A number such as 5e-4, which YAML 1.1 reads as a text; other values as they are."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else value


def _registry() -> MutableMapping[str, Any]:
    try:
        registry = getattr(import_module(_REGISTRY), _DICT)
    except (ImportError, AttributeError) as error:
        text = f"looked for EasyEdit's registry of methods, {_DICT} in {_REGISTRY}, and did not find it: {error}"
        raise ConfigError(
            f"{text}. Is EasyEdit on the path, with all it needs, in a version that has it there?"
        ) from error
    if not isinstance(registry, dict) or not registry.keys() & OURS.keys():
        text = f"{_REGISTRY}.{_DICT} is a {type(registry).__name__} without any of {', '.join(OURS)}"
        raise ConfigError(f"{text}: expected EasyEdit's registry, name of a method -> function")
    return registry


def _batches() -> Any:
    """EasyEdit's class that says which methods take several edits at once; None if there is none."""
    try:
        return import_module(_BATCHES).BatchEditor
    except (ImportError, AttributeError):
        return None


def install() -> None:
    """Put our methods into EasyEdit's registry, in place; a second call does nothing.

    Raises:
        ConfigError: EasyEdit's registry was not found.
    """
    registry = _registry()
    if _theirs:
        return
    _theirs.update({name: registry.get(name) for name in OURS})
    registry.update(OURS)
    others = sorted(registry.keys() - OURS.keys())
    _log.info("EasyEdit runs ours for %s; its own for %s", ", ".join(OURS), ", ".join(others) or "no other")
    if (batches := _batches()) is not None:
        own = batches.is_batchable_method
        batches.is_batchable_method = staticmethod(lambda name: name == _NEW or own(name))
        _undo.append(lambda: setattr(batches, "is_batchable_method", staticmethod(own)))


def uninstall() -> None:
    """Restore EasyEdit's own methods; does nothing without `install`."""
    if not _theirs:
        return
    registry = _registry()
    for name, theirs in _theirs.items():
        if theirs is None:
            registry.pop(name, None)
        else:
            registry[name] = theirs
    _theirs.clear()
    while _undo:
        _undo.pop()()


@contextmanager
def installed() -> Iterator[None]:
    """Install our methods inside the block; afterwards restore what was there before.

    Raises:
        ConfigError: as for `install`.
    """
    before = bool(_theirs)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()
