"""The calls of rome, memit, EMMET and AlphaEdit against an Editor with the same settings: arguments in, values out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, same, tiny_model, values
from memit_calls import Case, close, hparams

from fastedit import ConfigError
from fastedit.compat import known, memit


@pytest.mark.parametrize("method", ["rome", "memit", "emmet"])
def test_a_call_makes_the_edit_of_an_editor_and_returns_what_theirs_does(method: str, case: Case) -> None:
    wanted = case.wanted(method)
    changed = {name for name, value in wanted.items() if not torch.equal(value, case.before[name])}
    copy, weights, *rest = case.call(method, copy=True, return_orig_weights=True)
    assert copy is not case.model
    assert same(case.model, case.before)
    assert same(copy, wanted)
    assert {*weights} == changed
    assert all(torch.equal(weights[name], case.before[name]) for name in changed)
    model, weights, *_ = case.call(method)
    assert model is case.model
    assert weights == {}
    assert same(model, wanted)
    if method == "emmet":
        (distances,) = rest
        name = "model.layers.1.mlp.down_proj.weight"
        assert distances["1"]["new_weights_norm"] == pytest.approx(float(wanted[name].norm()))
        assert distances["1"]["delta_norm"] == pytest.approx(float((wanted[name] - case.before[name]).norm()), rel=1e-3)
        assert distances["1"]["preservation_distance"] is None
    else:
        assert rest == []


def test_a_single_edit_of_emmet_is_an_exact_equality(case: Case) -> None:
    model, *_ = case.call("emmet", case.requests[:1])
    assert same(model, case.wanted("emmet", case.edits[:1], alpha=0.0))


@contextmanager
def _bf16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "state", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), _bf16_by_default],
    ids=["inference_mode", "no_grad", "default device", "default dtype"],
)  # fmt: skip
@pytest.mark.parametrize("statistics", ["C", "P", "none"])
def test_the_state_of_the_caller_does_not_matter(statistics: str, state: Callable[[], Any], case: Case) -> None:
    given = {"P": torch.diag_embed((torch.arange(56) % 2).float()).repeat(2, 1, 1)} if statistics == "P" else {}

    def two_calls() -> Any:
        if statistics == "none":
            return case.call("rome", given=hparams("rome", mom2_adjustment=False))[1].get("none")
        _, cache_c = case.call("alphaedit", case.requests[:1], **given)
        return case.call("alphaedit", case.requests[1:], cache_c=cache_c, **given)[1]

    cache_c, wanted = two_calls(), values(case.model)
    case.model.load_state_dict(case.before)
    with state():
        again = two_calls()
    assert same(case.model, wanted)
    if cache_c is not None:
        assert (again.dtype, again.device, again.is_inference()) == (torch.float32, cache_c.device, False)
        assert torch.equal(again, cache_c)


def test_what_a_call_was_given_lives_no_longer_than_its_model(case: Case) -> None:
    """Of each place only what was made last is kept, without the caller's tensor; the model is not."""
    model = tiny_model("llama")
    seen = []
    for _ in range(3):
        P = torch.eye(56).repeat(2, 1, 1)
        memit.apply_AlphaEdit_to_model(model, case.tokenizer, case.requests, hparams("alphaedit"), P=P)
        seen.append((len(known._KNOWN[model].memo._held), weakref.ref(P)))
        del P
    gc.collect()
    assert {n for n, _ in seen} == {4}  # of two layers I − P, and the basis of its null space
    assert [P() for _, P in seen] == [None] * 3
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_rome_without_second_moment_writes_along_the_key(case: Case) -> None:
    memit.COV_CACHE.clear()
    model, _ = case.call("rome", case.requests[:1], hparams("rome", mom2_adjustment=False))
    editor = case.editor("rome")
    memit.COV_CACHE["org_tiny", "model.layers.1.mlp.down_proj"] = torch.eye(56)
    case.model = editor.model
    case.model.config._name_or_path = "org/tiny"
    assert same(case.call("rome", case.requests[:1])[0], values(model))


def test_a_model_writes_its_own_contexts_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memit, "CONTEXT_TEMPLATES_CACHE", None)
    case.call("memit", copy=True)
    monkeypatch.setattr("fastedit.compat.known.context_templates", None)
    case.call("memit")
    assert memit.CONTEXT_TEMPLATES_CACHE is None
    monkeypatch.setattr(memit, "CONTEXT_TEMPLATES_CACHE", CONTEXTS)
    with pytest.raises(ConfigError, match=r'"\{\}" among them once'):
        case.call("memit")


@pytest.mark.parametrize("case", ["gemma2"], indirect=True)
def test_a_norm_after_the_mlp_is_not_counted_as_in_the_published_code(case: Case) -> None:
    ours, published = case.wanted("memit"), case.wanted("memit", through_norm=False)
    model, _ = case.call("memit")
    assert close(model, published, case.before)
    assert not close(model, ours, case.before, 0.1)
