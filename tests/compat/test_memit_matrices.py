"""P and cache_c of AlphaEdit: what they do to an edit, and matrices that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_edits, same, values
from memit_calls import FIELDS, Case, close, hparams, requests_of

from fastedit import ConfigError
from fastedit.compat import memit


def test_alphaedit_preserves_the_edits_of_cache_c(case: Case, seed: int) -> None:
    more = random_edits(2, seed + 1)
    editor = case.editor("alphaedit")
    editor.edit(case.edits)
    first = values(editor.model)
    editor.edit(more)
    model, cache_c = case.call("alphaedit")
    assert model is case.model
    assert same(model, first)
    assert tuple(cache_c.shape) == (2, 56, 56)
    again = cache_c.clone()  # which does not know the keys that it is the sum of
    copy = case.model.__class__(case.model.config)
    copy.load_state_dict(case.model.state_dict())
    copy.eval()
    _, returned = case.call("alphaedit", requests_of(more), cache_c=cache_c)
    assert returned is cache_c
    assert close(case.model, values(editor.model), first)
    case.model = copy
    case.call("alphaedit", requests_of(more), cache_c=again)
    assert close(copy, values(editor.model), first)
    torch.testing.assert_close(again, cache_c)


def test_alphaedit_writes_where_p_projects(case: Case) -> None:
    P = []
    for layer in (0, 2):
        values_, vectors = torch.linalg.eigh(case.C["org_tiny", f"model.layers.{layer}.mlp.down_proj"])
        U = vectors[:, values_ < FIELDS["nullspace_threshold"]]
        P.append(U @ U.T)
    given = hparams("alphaedit")
    del given.nullspace_threshold
    memit.COV_CACHE.clear()
    model, _ = case.call("alphaedit", given=given, P=torch.stack(P), cache_c=torch.zeros(2, 56, 56))
    assert close(model, case.wanted("alphaedit"), case.before)
    with pytest.raises(ConfigError, match=r"P has shape \(1, 56, 56\), expected \(2, 56, 56\)"):
        case.call("alphaedit", P=torch.stack(P)[:1])


def _in_inference_mode(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.clone()


BAD_STACKS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "list": (torch.Tensor.tolist, "is a list, expected (2, 56, 56): a matrix for each layer"),
    "numpy": (torch.Tensor.numpy, "is a ndarray, expected (2, 56, 56)"),
    "one layer": (lambda t: t[:1], "has shape (1, 56, 56), expected (2, 56, 56)"),
    "whole numbers": (torch.Tensor.long, "is torch.int64, torch.strided, on cpu, expected"),
    "complex": (lambda t: t.to(torch.complex64), "is torch.complex64"),
    "sparse": (torch.Tensor.to_sparse, "is torch.float32, torch.sparse_coo"),
    "no data": (lambda t: t.to("meta"), "on meta, expected"),
    "gradient": (lambda t: t.clone().requires_grad_(), "requires a gradient; give {name}.detach()"),
    "nan": (lambda t: t * torch.tensor([1, torch.nan])[:, None, None], "[1], of layer 2, holds NaN or infinity"),
    "inference": (lambda t: _in_inference_mode(t), "was made in torch.inference_mode(); give {name}.clone()"),
    "not symmetric": (lambda t: t + torch.ones(56, 56).triu(1), "[0], of layer 0, is not symmetric"),
}


@pytest.mark.parametrize("name", ["P", "cache_c"])
@pytest.mark.parametrize("kind", BAD_STACKS)
def test_matrices_that_cannot_be_used_are_refused_before_the_work(kind: str, name: str, case: Case) -> None:
    spoil, said = BAD_STACKS[kind]
    with pytest.raises(ConfigError, match=re.escape(name) + ".*" + re.escape(said.replace("{name}", name))):
        case.call("alphaedit", **{name: spoil(torch.eye(56).repeat(2, 1, 1))})
    assert same(case.model, case.before)


def test_a_cache_c_that_cannot_be_updated_is_refused_before_the_work(case: Case) -> None:
    with pytest.raises(ConfigError, match=r"cache_c is updated in place, and several of its elements are one"):
        case.call("alphaedit", cache_c=torch.zeros(1).expand(2, 56, 56))
    assert same(case.model, case.before)


@pytest.mark.parametrize("way", [lambda t: t.data.zero_(), lambda t: t.numpy().fill(0)], ids=["data", "numpy"])
def test_a_cache_c_that_was_emptied_holds_no_keys(way: Callable[[torch.Tensor], object], case: Case) -> None:
    _, cache_c = case.call("alphaedit", case.requests[:1])
    case.model.load_state_dict(case.before)
    way(cache_c)
    case.call("alphaedit", case.requests[1:], cache_c=cache_c)
    assert same(case.model, case.wanted("alphaedit", case.edits[1:]))


def test_a_cache_c_that_is_no_sum_of_keys_is_refused(case: Case) -> None:
    signs = torch.ones(2, 56)
    signs[1, 3] = -1
    with pytest.raises(ConfigError, match=r"cache_c\[1\], of layer 2, is not a sum of k kᵀ: an eigenvalue of it is -1"):
        case.call("alphaedit", cache_c=signs.diag_embed())
    assert same(case.model, case.before)


def test_a_matrix_that_is_no_projection_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match=r"P\[1\], of layer 2, is not a projection: P P is not P"):
        case.call("alphaedit", P=torch.stack([torch.eye(56), 2 * torch.eye(56)]))
    case.call("alphaedit", P=torch.eye(56).half().repeat(2, 1, 1))
    assert not same(case.model, case.before)
