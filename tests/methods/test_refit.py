"""The least update that does the same at the edits, in place of the trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import last_of_subject, moments, random_edits, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import ConfigError, EditError, Editor, EditRequest, StreamingCovariance
from fastedit.errors import TensorError
from fastedit.methods.contexts import context_templates
from fastedit.methods.locft_bf import refit
from fastedit.methods.locft_bf.null_space import threshold
from fastedit.models import Model, topology
from fastedit.statistics.store import statistics_path

SETTINGS: dict[str, Any] = {"layer": (1, 2), "module": "down_proj", "tokens": "subject", "preserve": "null-space"}
SETTINGS |= {"lr": 3e-3, "batch_size": 4, "epochs": 4, "focus": 0.0}


def metric_of(C: Tensor) -> Tensor:
    """C + τ, at which 0.8 of the directions count as those of other text."""
    tau = threshold(torch.linalg.eigvalsh(C).clamp(min=0), 0.8)
    return C + tau * torch.eye(len(C), dtype=C.dtype)


def direct(D: Tensor, K: Tensor, C: Tensor) -> Tensor:
    """The definition, with keys K [n, d], through the inverse of the whole metric."""
    inverse = torch.linalg.inv(metric_of(C))
    system = K @ inverse @ K.T
    system += 0.03 * system.diagonal().mean() * torch.eye(len(K), dtype=K.dtype)
    return D @ K.T @ torch.linalg.solve(system, K @ inverse)


@pytest.mark.parametrize("n", [5, 40])
def test_it_does_the_same_at_the_keys_and_least_elsewhere(n: int, rng: torch.Generator) -> None:
    d, h = 24, 10
    rows, K = (torch.randn(size, d, dtype=torch.float64, generator=rng) for size in (200, n))
    C = rows.T @ rows / 200 * torch.linspace(0.1, 3, d, dtype=torch.float64)
    C = (C + C.T) / 2 + torch.eye(d, dtype=torch.float64)
    D = torch.randn(h, d, dtype=torch.float64, generator=rng)
    found = refit.least_update(D, K, *torch.linalg.eigh(C))
    torch.testing.assert_close(found, direct(D, K, C), rtol=1e-8, atol=1e-8)
    assert (K @ (found - D).T).norm() <= 0.1 * (K @ D.T).norm()

    def elsewhere(update: Tensor) -> float:
        return float((update @ metric_of(C) * update).sum())

    assert elsewhere(found) <= (0.7 if n < d else 1.0) * elsewhere(D)


def test_second_moments_of_few_tokens_do(rng: torch.Generator) -> None:
    rows, K = (torch.randn(size, 24, dtype=torch.float64, generator=rng) for size in (6, 5))
    D = torch.randn(10, 24, generator=rng)
    found = refit.least_update(D, K.float(), *torch.linalg.eigh(rows.T @ rows / 6))
    assert found.dtype == torch.float32
    assert (K @ (found - D).double().T).norm() <= 0.1 * (K @ D.double().T).norm()


def keys_of(model: nn.Module, tokenizer: Any, edits: list[EditRequest], layer: int, contexts: list[str]) -> Tensor:
    """Inputs of down_proj at each subject: in the bare prompt, then half of that and half of the mean in contexts."""
    _, module = topology(model).resolve(layer, "down_proj")
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    bare, within = [], []
    with torch.no_grad():
        for edit in edits:
            found = []
            for template in ("{}", *contexts):
                text = template.replace("{}", edit.prompt)
                model(input_ids=torch.tensor([tokenizer(text).input_ids]))
                before = len(tokenizer(template.partition("{}")[0]).input_ids) if template != "{}" else 0
                found.append(seen[-1][before + last_of_subject(tokenizer, edit)])
            bare.append(found[0])
            within.append(found[0] / 2 + torch.stack(found[1:]).mean(0) / 2)
    handle.remove()
    return torch.stack([*bare, *within])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_edit_is_refitted_layer_by_layer(family: str, tokenizer: Any, tmp_path: Path, seed: int) -> None:
    model, edits = tiny_model(family, seed=seed), random_edits(4, seed)
    moments(model, tmp_path, seed)
    parts = topology(model)
    contexts = context_templates(Model.of(model, tokenizer), 4, seed=0)
    editor = Editor(model, tokenizer, statistics=str(tmp_path), **SETTINGS)
    refitted = editor.edit(edits)
    found = dict(refitted.delta.updates)
    refitted.revert()
    trained = Editor(model, tokenizer, statistics=str(tmp_path), refit=False, **SETTINGS).edit(edits)
    for layer in (1, 2):
        path, module = parts.resolve(layer, "down_proj")
        D, weight = trained.delta.updates[f"{path}.weight"], module.get_parameter("weight")
        assert isinstance(D, Tensor)
        C = StreamingCovariance.load(statistics_path(parts, tmp_path, layer)).finalize()
        K = keys_of(model, tokenizer, edits, layer, contexts).double()
        turned = D.T if isinstance(module, Conv1D) else D
        wanted = direct(turned.double(), K, C).float()
        wanted = wanted.T if isinstance(module, Conv1D) else wanted
        update = found[f"{path}.weight"]
        assert isinstance(update, Tensor)
        assert (update - wanted).norm() <= 1e-3 * wanted.norm()
        assert (D - wanted).norm() > 0.1 * wanted.norm()  # or there is nothing to see
        with torch.no_grad():
            weight += wanted - D  # the next layer reads what this one writes
    with torch.no_grad():
        loss = [-float(p.log()) for p in refitted.probability]
    for edit, wanted_loss in zip(edits, loss, strict=True):
        prompt = tokenizer(edit.prompt).input_ids
        target = [*tokenizer(edit.target).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            said = model(input_ids=torch.tensor([[*prompt, *target][:-1]])).logits[0, len(prompt) - 1 :]
        nll = torch.nn.functional.cross_entropy(said, torch.tensor(target))
        assert float(nll) == pytest.approx(wanted_loss, rel=1e-2)  # what is reported is of the refitted weights


@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError, TensorError, EditError], ids=lambda error: str(error.__name__)
)
def test_a_failure_keeps_what_was_trained(
    error: type[Exception], tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edits = tiny_model("llama", seed=seed), random_edits(4, seed)
    moments(model, tmp_path, seed)
    trained = Editor(model, tokenizer, statistics=str(tmp_path), refit=False, **SETTINGS).edit(edits)
    trained.revert()
    least, calls = refit.least_update, []

    def fails(*args: Tensor) -> Tensor:
        calls.append(args)
        if len(calls) == 2:  # after the first layer is written
            raise error("not positive definite")
        return least(*args)

    monkeypatch.setattr(refit, "least_update", fails)
    result = Editor(model, tokenizer, statistics=str(tmp_path), **SETTINGS).edit(edits)
    assert [note for note in result.notes if "was not refitted: not positive definite" in note]
    for path, update in trained.delta.updates.items():
        assert torch.equal(result.delta.updates[path], update)
    result.revert()
    trained.delta.apply(model)
    now = {name: value.clone() for name, value in model.state_dict().items()}
    trained.revert()
    result.delta.apply(model)
    assert all(torch.equal(value, now[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"published": True}, {"tokens": "all"}, {"preserve": "none"}, {"preserve": "anchors"}]
)
def test_it_needs_subjects_and_the_null_space(options: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="refit needs tokens subject and preserve null-space"):
        Editor(tiny_model("llama"), tokenizer, refit=True, **options)


def test_edits_without_a_subject_are_named_if_it_was_asked_for(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    model, edits = tiny_model("llama", seed=seed), random_edits(4, seed)
    edits[2] = EditRequest(edits[2].prompt, edits[2].target, id="bare")
    moments(model, tmp_path, seed)
    options = SETTINGS | {"statistics": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"refit is about the edits' subjects.* bare"):
        Editor(model, tokenizer, refit=True, **options).plan(edits)
    assert Editor(model, tokenizer, **options).plan(edits).made.config.refit is False
