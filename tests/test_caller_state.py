"""The caller's global state: an edit does not depend on it, and leaves it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, moments, random_edits, same, tiny_model, values
from torch import Tensor

from fastedit import Editor, ModelError, WeightDelta
from fastedit.loading import load_model
from fastedit.models import Model
from fastedit.statistics.own_text import write_text
from fastedit.weights import LowRank

FAMILY = "gpt2"  # it has dropout
_LOCATE: dict[str, Any] = {"contexts": CONTEXTS, "steps": 3, "lr": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "locft-bf": {"epochs": 2, "batch_size": 2},
    "locft-bf, published": {"published": True, "epochs": 2, "batch_size": 2, "lr": 1e-3},
    "rome": _LOCATE | {"layers": (1,), "batch_size": 1},
    "memit": _LOCATE | {"layers": (1, 2)},
    "emmet": _LOCATE | {"layers": (1,)},
    "alphaedit": _LOCATE | {"layers": (1, 2)},
}


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """The setting inside; fails if it is another one at the end."""
    before = get()
    put(value)
    try:
        yield
        assert get() == value
    finally:
        put(before)


@contextmanager
def inside(context: AbstractContextManager[Any]) -> Iterator[None]:
    """The context, whose modes are the same at the end."""
    with context:
        before = modes()
        yield
        assert modes() == before


def modes() -> list[Any]:
    flags = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()]
    return [*flags, torch.is_autocast_enabled("cpu"), torch.get_default_device()]


@contextmanager
def of_tokenizer(tokenizer: Any) -> Iterator[None]:
    core = tokenizer.backend_tokenizer
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    core.enable_truncation(2)
    core.enable_padding(length=40)
    wanted = core.truncation, core.padding
    try:
        yield
        assert (core.truncation, core.padding) == wanted
        assert tokenizer.padding_side == tokenizer.truncation_side == "left"
    finally:
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        core.no_truncation()
        core.no_padding()


@contextmanager
def of_weights(model: Any, flag: bool) -> Iterator[None]:
    """Gradients asked for at some weights, and gradients there already."""
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(flag and i % 2 == 0)
        p.grad = torch.ones_like(p)
    yield
    for i, p in enumerate(model.parameters()):
        assert p.requires_grad is (flag and i % 2 == 0)
        assert torch.equal(p.grad, torch.ones_like(p))


@contextmanager
def training(model: Any) -> Iterator[None]:
    model.train()
    model.lm_head.eval()
    flags, before = [m.training for m in model.modules()], torch.get_rng_state()
    yield
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), before)  # no dropout
    model.eval()


State = Callable[[Any, Any], AbstractContextManager[None]]
STATES: dict[str, State] = {
    "default dtype bf16": lambda *_: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default dtype fp64": lambda *_: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda *_: setting(torch.get_default_device, torch.set_default_device, torch.device("meta")),
    "device context": lambda *_: inside(torch.device("meta")),
    "no_grad": lambda *_: inside(torch.no_grad()),
    "inference_mode": lambda *_: inside(torch.inference_mode()),
    "autocast": lambda *_: inside(torch.autocast("cpu", torch.bfloat16)),
    "anomaly mode": lambda *_: inside(torch.autograd.set_detect_anomaly(True)),
    "deterministic": lambda *_: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matmul precision": lambda *_: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"
    ),
    "threads": lambda *_: setting(torch.get_num_threads, torch.set_num_threads, 2),
    "tokenizer": lambda _, tokenizer: of_tokenizer(tokenizer),
    "model.train()": lambda model, _: training(model),
    "some weights frozen": lambda model, _: of_weights(model, True),
    "all weights frozen": lambda model, _: of_weights(model, False),
}
INEXACT = ("threads", "matmul precision")  # they may choose another order of sums


def editor(model: Any, tokenizer: Any, name: str, folder: Path) -> Editor:
    method = name.split(", ")[0]
    config = METHODS[name] if method == "locft-bf" else METHODS[name] | {"statistics": folder}
    return Editor(model, tokenizer, method, **config)


def dense(delta: WeightDelta) -> dict[str, Tensor]:
    return {path: u.dense() if isinstance(u, LowRank) else u for path, u in delta.updates.items()}


@pytest.fixture(scope="module")
def plain(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """Gives the folder of statistics and the updates of a method in the plain state, made once."""
    folder = tmp_path_factory.mktemp("statistics")
    moments(tiny_model(FAMILY), folder, 0)

    @cache
    def made(name: str) -> tuple[Path, dict[str, Tensor]]:
        return folder, dense(editor(tiny_model(FAMILY), tokenizer, name, folder).edit(random_edits(3, 0)).delta)

    return made


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("state", STATES)
def test_the_state_of_the_caller_does_not_matter(
    name: str, state: str, tokenizer: Any, plain: Any, tmp_path: Path
) -> None:
    folder, wanted = plain(name)
    model, edits = tiny_model(FAMILY), random_edits(3, 0)
    before, file = values(model), tmp_path / "delta.safetensors"
    with STATES[state](model, tokenizer):
        result = editor(model, tokenizer, name, folder).edit(edits)
        result.delta.save(file)
        result.revert()
        loaded = WeightDelta.load(file)
        loaded.apply(model)
        loaded.revert()
    assert same(model, before)
    found, again = dense(result.delta), dense(loaded)
    assert found.keys() == again.keys() == wanted.keys()
    for path, update in found.items():
        assert (update.dtype, update.device.type, update.is_inference()) == (torch.float32, "cpu", False)
        assert torch.equal(again[path], update)
        if state in INEXACT:
            assert (update - wanted[path]).norm() < 1e-3 * wanted[path].norm()
        else:
            assert torch.equal(update, wanted[path])


def measures(model: Any, tokenizer: Any) -> dict[str, Any]:
    return Editor(model, tokenizer).evaluate(random_edits(3, 0), text=["w20 w21 w22 w23"]).to_dict()


@pytest.fixture(scope="module")
def plain_measures(tokenizer: Any) -> dict[str, Any]:
    return measures(tiny_model(FAMILY), tokenizer)


@pytest.mark.parametrize("state", STATES)
def test_nor_for_measuring(state: str, tokenizer: Any, plain_measures: dict[str, Any]) -> None:
    model = tiny_model(FAMILY)
    with STATES[state](model, tokenizer):
        found = measures(model, tokenizer)
    assert found == plain_measures if state not in INEXACT else found.keys() == plain_measures.keys()


@pytest.mark.parametrize("state", ["default dtype fp64", "device context", "inference_mode", "model.train()"])
def test_nor_for_what_a_model_writes(state: str, tokenizer: Any) -> None:
    model = tiny_model(FAMILY)
    wanted = write_text(Model.of(model, tokenizer), 100)
    with STATES[state](model, tokenizer):
        assert write_text(Model.of(model, tokenizer), 100) == wanted


@pytest.mark.parametrize("state", ["default dtype bf16", "default device", "device context", "inference_mode"])
def test_nor_for_loading(state: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(FAMILY)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with STATES[state](model, tokenizer):
        loaded, own = load_model(tmp_path, device="cpu")
        Editor(loaded, own, "locft-bf", layer=1, lr=1e-3, epochs=1).edit(random_edits(2, 0)).revert()
    assert same(loaded, values(model))
    assert not any(p.is_inference() for p in loaded.parameters())


def test_weights_made_in_inference_mode_are_refused(tokenizer: Any) -> None:
    model = tiny_model(FAMILY)
    with torch.inference_mode():
        model.transformer.h[1].mlp.c_proj.weight = torch.nn.Parameter(torch.zeros(128, 32), requires_grad=False)
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_proj\.weight was made in torch.inference_mode.*load the model"):
        Editor(model, tokenizer)
