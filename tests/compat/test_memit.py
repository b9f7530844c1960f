"""The calls of rome, memit, EMMET and AlphaEdit against an Editor with the same settings: arguments in, values out."""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CONTEXTS, in_fp64, moments, random_edits, same, tiny_model, values
from torch import nn

from fastedit import ConfigError, Editor, EditRequest, FileError, ModelError, RequestError
from fastedit.compat import known, memit
from fastedit.compat.requests import upstream_edits
from fastedit.methods.locate_then_edit import method as method_module
from fastedit.models import joined, topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path

FIELDS: dict[str, Any] = {
    "layers": [0, 2],
    "fact_token": "subject_last",
    "layer_selection": "all",
    "v_num_grad_steps": 4,
    "v_lr": 0.3,
    "v_loss_layer": 3,
    "v_weight_decay": 0.1,
    "clamp_norm_factor": 2,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 7.0,
    "context_template_length_params": [[5, 2], [10, 1]],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
    "update_norm_lambda": 0,
    "emmet_lambda": 0.2,
    "L2": 3.0,
    "nullspace_threshold": 0.07,
}
TARGET = {"steps": 4, "lr": 0.3, "weight_decay": 0.1, "clamp": 2.0}
OURS: dict[str, dict[str, Any]] = {  # the same for an Editor
    "rome": TARGET | {"layers": (1,)},
    "memit": TARGET | {"layers": (0, 2), "cov_weight": 7.0},
    "emmet": TARGET | {"layers": (1,), "cov_weight": 7.0, "alpha": 0.2, "site": "block"},
    "alphaedit": TARGET | {"layers": (0, 2), "l2": 3.0, "null_threshold": 0.07},
}
CALLS: dict[str, Callable[..., Any]] = {
    "rome": memit.apply_rome_to_model,
    "memit": memit.apply_memit_to_model,
    "emmet": memit.apply_emmet_to_model,
    "alphaedit": memit.apply_AlphaEdit_to_model,
}


def hparams(method: str = "memit", **given: Any) -> SimpleNamespace:
    return SimpleNamespace(**FIELDS | {"layers": list(OURS[method]["layers"])} | given)


def requests_of(edits: Sequence[EditRequest]) -> list[dict[str, Any]]:
    """Each a template, with the subject's last occurrence taken out."""
    found = []
    for i, edit in enumerate(edits):
        before, _, after = edit.prompt.rpartition(str(edit.subject))
        prompt = f"{before}{{}}{after}"
        found.append({"case_id": i, "prompt": prompt, "subject": edit.subject, "target_new": {"str": edit.target}})
    return found


class Case:
    """A tiny model called "org/tiny" whose second moments are in COV_CACHE, and those of an Editor in a folder."""

    def __init__(self, tokenizer: Any, folder: Path, seed: int, family: str = "llama") -> None:
        self.model, self.tokenizer, self.folder, self.family = tiny_model(family), tokenizer, folder, family
        self.model.config._name_or_path = "org/tiny"
        self.before = values(self.model)
        moments(self.model, folder, seed)
        self.edits = random_edits(3, seed)
        self.requests = requests_of(self.edits)
        self.C = {}
        for layer in range(4):
            found = StreamingCovariance.load(statistics_path(topology(self.model), folder, layer))
            self.C["org_tiny", f"model.layers.{layer}.mlp.down_proj"] = found.finalize()

    def editor(self, method: str, model: Any = None, **config: Any) -> Editor:
        own = {"statistics": self.folder, "contexts": CONTEXTS} | OURS[method] | config
        return Editor(model or tiny_model(self.family), self.tokenizer, method, **own)

    def wanted(self, method: str, edits: Sequence[EditRequest] | None = None, **config: Any) -> dict[str, torch.Tensor]:
        editor = self.editor(method, **config)
        editor.edit(edits or self.edits)
        return values(editor.model)

    def call(self, method: str, requests: Any = None, given: Any = None, **options: Any) -> Any:
        requests = self.requests if requests is None else requests
        return CALLS[method](self.model, self.tokenizer, requests, given or hparams(method), **options)


@pytest.fixture
def case(
    tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Case:
    found = Case(tokenizer, tmp_path / "statistics", seed, getattr(request, "param", "llama"))
    monkeypatch.setattr(memit, "COV_CACHE", found.C)
    monkeypatch.setattr(memit, "CONTEXT_TEMPLATES_CACHE", [["{}"], CONTEXTS])
    monkeypatch.setattr(memit, "STATS_DIR", str(tmp_path / "none"))
    return found


def close(
    model: nn.Module, wanted: dict[str, torch.Tensor], before: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> bool:
    """Relative to the change."""
    return all(
        float((p.detach() - wanted[name]).norm()) <= tolerance * float((wanted[name] - before[name]).norm())
        for name, p in model.named_parameters()
    )


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


def test_a_matrix_that_is_no_projection_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match=r"P\[1\], of layer 2, is not a projection: P P is not P"):
        case.call("alphaedit", P=torch.stack([torch.eye(56), 2 * torch.eye(56)]))
    case.call("alphaedit", P=torch.eye(56).half().repeat(2, 1, 1))
    assert not same(case.model, case.before)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (torch.Tensor.tolist, "is a list, expected (56, 56)"),
        (lambda C: C[:3], "has shape (3, 56), expected (56, 56)"),
        (torch.Tensor.long, "is torch.int64"),
    ],
)
def test_what_is_no_second_moment_is_refused_by_its_key(spoil: Callable[..., Any], said: str, case: Case) -> None:
    key = "org_tiny", "model.layers.2.mlp.down_proj"
    case.C[key] = spoil(case.C[key])
    with pytest.raises(ConfigError, match=re.escape(f"COV_CACHE[{key}] {said}")):
        case.call("memit")
    assert same(case.model, case.before)


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


FORMS: dict[str, Callable[[EditRequest, str], dict[str, Any]]] = {
    "template, mapping": lambda e, t: {"prompt": t, "subject": e.subject, "target_new": {"str": f" {e.target}"}},
    "template, text": lambda e, t: {"prompt": t, "subject": e.subject, "target_new": e.target},
    "subject inside": lambda e, _: {"prompt": e.prompt, "subject": e.subject, "target_new": e.target},
    "EasyEdit's": lambda e, _: {
        "prompt": e.prompt, "subject": e.subject, "target_new": e.target, "ground_truth": "w9", "portability": {},
        "locality": {},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_requests_of_all_forms_are_the_same_edits(form: str, case: Case) -> None:
    requests = [FORMS[form](e, r["prompt"]) for e, r in zip(case.edits, case.requests, strict=True)]
    model, _ = case.call("memit", requests)
    assert same(model, case.wanted("memit"))


def test_a_template_says_where_the_subject_is(case: Case) -> None:
    request = {"prompt": "w30 {} w31 w40", "subject": "w40", "target_new": "w50"}
    model, _ = case.call("memit", [request])
    elsewhere = case.wanted("memit", [EditRequest("w30 w40 w31 w40", "w50", "w40")])
    assert not same(model, elsewhere)  # as found by the last occurrence
    assert upstream_edits([request])[0].subject_end == len("w30 w40")


def test_texts_are_those_that_are_tokenized_there() -> None:
    for prompt, target, text in [
        ("{} is", "Paris", "X is Paris"),
        ("{} is", " Paris", "X is Paris"),
        ("{} is ", "Paris ", "X is  Paris "),
        ("{}的首都是", "东京", "X的首都是 东京"),
    ]:
        (edit,) = upstream_edits([{"prompt": prompt, "subject": "X", "target_new": target}])
        assert joined(edit.prompt, edit.target) == text


def test_requests_that_cannot_be_used_are_all_named(case: Case) -> None:
    good = {"prompt": "{} w9", "subject": "w10", "target_new": "w11"}
    bad = [good | {"target_new": {"text": "w11"}}, good | {"prompt": "{} and {}"}, good | {"subject": ""}, "w9"]
    with pytest.raises(RequestError) as raised:
        case.call("memit", [good, *bad])
    assert [*raised.value.sentences] == [
        "requests[1]: target_new is None, expected a text",
        "requests[2]: the prompt '{} and {}' is a template and there is 2 places for it, expected one",
        "requests[3]: the prompt '{} w9' is a template and there is no subject to put there",
        "requests[4]: it is a str, expected a mapping with prompt and target_new",
    ]
    with pytest.raises(RequestError, match="is not in the prompt"):
        case.call("memit", [good | {"prompt": "w9 w9"}])
    for requests, kind in ((good, "dict"), ("facts.json", "str"), (hparams(), "SimpleNamespace")):
        with pytest.raises(RequestError, match=f"requests is a {kind}, expected a list of mappings"):
            case.call("memit", requests)
    assert same(case.model, case.before)


@pytest.mark.parametrize(
    ("method", "given", "as_given"),
    [
        ("rome", {"mom2_adjustment": "False"}, {"mom2_adjustment": False}),
        ("rome", {"mom2_adjustment": " yes"}, {}),
        ("memit", {"bias_update": "no", "calculate_objective_value": "false"}, {}),
        ("memit", {"layer_selection": None, "layer_module_tmp": None, "stats_dir": None, "bias_update": None}, {}),
        ("emmet", {"update_norm_lambda": None}, {}),
    ],
    ids=str,
)
def test_texts_of_truth_values_and_fields_without_a_value(
    method: str, given: dict[str, Any], as_given: dict[str, Any], case: Case
) -> None:
    case.call(method, given=hparams(method, **as_given))
    wanted = values(case.model)
    case.model.load_state_dict(case.before)
    case.call(method, given=hparams(method, **given))
    assert same(case.model, wanted)


def test_no_value_of_stats_dir_is_the_default_folder(case: Case) -> None:
    case.C.clear()
    memit.STATS_DIR = str(case.folder)
    case.call("memit", given=hparams("memit", stats_dir=None))
    assert same(case.model, case.wanted("memit"))


def test_hparams_are_read_from_mappings_too_and_from_texts_of_numbers(case: Case) -> None:
    given = vars(hparams("memit", v_lr="3e-1", v_weight_decay="1e-1"))  # as YAML 1.1 reads them
    model, _ = case.call("memit", given=given)
    assert same(model, case.wanted("memit"))


def test_texts_stay_texts_that_read_as_numbers(case: Case, tmp_path: Path) -> None:
    """A folder of statistics called 2024, a data set called 1e3."""
    for layer, path in ((0, "model.layers.0.mlp.down_proj"), (2, "model.layers.2.mlp.down_proj")):
        file = tmp_path / "2024" / "7" / "1e3_stats" / f"{path}_16_mom2_100000.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        moment = StreamingCovariance.load(statistics_path(topology(case.model), case.folder, layer))
        moment.save_npz(file, sample_size=100000)
    case.C.clear()
    case.model.config._name_or_path = "7"
    names = {"mom2_dataset": "1e3", "mom2_dtype": "16", "mom2_n_samples": "1e5", "layers": ["0", 2.0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        model, _ = case.call("memit", given=hparams("memit", stats_dir="2024", **names))
    assert close(model, case.wanted("memit"), case.before)


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("rome", {"mom2_adjustment": "maybe"}, "mom2_adjustment .* is 'maybe', expected true or false"),
        ("memit", {"v_lr": "fast"}, "v_lr of the hparams of MEMIT is 'fast', expected a number"),
        ("memit", {"kl_factor": None}, "kl_factor of the hparams of MEMIT is None, expected a number"),
        ("memit", {"v_num_grad_steps": 2.5}, "v_num_grad_steps .* is 2.5, expected a whole number"),
        ("memit", {"v_loss_layer": "inf"}, "v_loss_layer .* is 'inf', expected a whole number"),
        ("rome", {"mom2_n_samples": True}, "mom2_n_samples of the hparams of ROME is True, expected a whole number"),
        ("emmet", {"update_norm_lambda": []}, r"update_norm_lambda .* is \[\], expected a number"),
        ("alphaedit", {"layers": 3}, "layers of the hparams of AlphaEdit is 3, expected a list of blocks"),
        ("memit", {"layers": []}, r"layers .* is \[\], expected a list of blocks"),
        ("memit", {"layers": [0, "x"]}, "layers .* is 'x', expected a whole number"),
        ("rome", {"context_template_length_params": [5]}, r"context_template_length_params is \[5\], expected pairs"),
    ],
)
def test_what_is_no_number_is_refused_where_one_is_expected(
    method: str, given: dict[str, Any], said: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.C.clear()
    monkeypatch.setattr(memit, "CONTEXT_TEMPLATES_CACHE", None)
    with pytest.raises(ConfigError, match=said):
        case.call(method, given=hparams(method, **given))
    assert same(case.model, case.before)


@pytest.mark.parametrize(
    ("method", "missing"),
    [
        ("rome", ["v_lr", "rewrite_module_tmp", "mom2_adjustment"]),
        ("memit", ["v_loss_layer", "mom2_update_weight"]),
        ("emmet", ["emmet_lambda", "clamp_norm_factor"]),
        ("alphaedit", ["L2", "nullspace_threshold"]),
    ],
)
def test_missing_fields_are_named_with_their_method(method: str, missing: list[str], case: Case) -> None:
    given = vars(hparams(method))
    for name in missing:
        del given[name]
    theirs = "AlphaEdit" if method == "alphaedit" else method.upper()
    with pytest.raises(ConfigError, match=f"the hparams of {theirs} lack ") as raised:
        case.call(method, given=given)
    found = str(raised.value)
    assert all(name in found for name in missing)
    assert same(case.model, case.before)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("memit", {"fact_token": "last"}),
    ("memit", {"layer_selection": "random"}),
    ("memit", {"v_loss_layer": 2}),
    ("memit", {"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"}),
    ("memit", {"layer_module_tmp": "model.layers.{}.mlp"}),
    ("memit", {"lm_head_module": "model.embed_tokens"}),  # not tied here
    ("memit", {"ln_f_module": "model.layers"}),
    ("rome", {"mlp_module_tmp": "model.layers.{}.self_attn"}),
    ("rome", {"layers": [1, 2]}),
    ("emmet", {"calculate_objective_value": True}),
]


@pytest.mark.parametrize(("method", "given"), REFUSED, ids=str)
def test_what_cannot_be_honoured_is_refused_by_name(method: str, given: dict[str, Any], case: Case) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=f"ask for what fastedit does not do: {name} is "):
        case.call(method, given=hparams(method, **given))
    assert same(case.model, case.before)


def test_all_refusals_come_at_once(case: Case) -> None:
    with pytest.raises(ConfigError, match=r"fact_token is 'last' .*; v_loss_layer is 1 .*the last block, 3"):
        case.call("memit", given=hparams("memit", fact_token="last", v_loss_layer=1))


@pytest.mark.parametrize("head", ["lm_head", "transformer.wte"])
def test_a_tied_head_is_found_by_either_name(head: str, tokenizer: Any, seed: int) -> None:
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    path = "transformer.h.1.mlp.c_proj"
    memit.COV_CACHE["", path] = torch.eye(128)
    given = hparams(
        "emmet", rewrite_module_tmp="transformer.h.{}.mlp.c_proj", layer_module_tmp="transformer.h.{}",
        mlp_module_tmp="transformer.h.{}.mlp", ln_f_module="transformer.ln_f", lm_head_module=head,
    )  # fmt: skip
    before = values(model)
    _, weights, _ = memit.apply_emmet_to_model(
        model, tokenizer, requests_of(random_edits(2, seed)), given, return_orig_weights=True
    )
    assert {*weights} == {f"{path}.weight"}
    assert not same(model, before)


def test_published_statistics_are_read_and_kept(case: Case, tmp_path: Path) -> None:
    memit.COV_CACHE.clear()
    folder = tmp_path / "stats" / "tiny" / "wikipedia_stats"  # EasyEdit's name of a model
    for layer in (0, 2):
        found = StreamingCovariance.load(statistics_path(topology(case.model), case.folder, layer))
        folder.mkdir(parents=True, exist_ok=True)
        found.save_npz(folder / f"model.layers.{layer}.mlp.down_proj_float32_mom2_100000.npz", sample_size=100000)
    given = hparams("memit", stats_dir=str(tmp_path / "stats"))
    model, _ = case.call("memit", given=given)
    assert close(model, case.wanted("memit"), case.before)
    assert {*memit.COV_CACHE} == {("org_tiny", f"model.layers.{layer}.mlp.down_proj") for layer in (0, 2)}
    memit.COV_CACHE.clear()
    given.mom2_n_samples = 1000
    with pytest.raises(ModelError, match=r"there is no file .*0\.mlp\.down_proj_float32_mom2_1000\.npz, .*layers 0,2"):
        case.call("memit", given=given)
    given.stats_dir = str(case.folder)  # statistics of `fastedit covariance`
    case.model = tiny_model("llama")
    model, _ = case.call("memit", given=given)
    assert same(model, case.wanted("memit"))


def test_statistics_are_read_again_where_their_file_is_another(case: Case, tmp_path: Path) -> None:
    key, moved = ("org_tiny", "model.layers.2.mlp.down_proj"), case.C["org_tiny", "model.layers.3.mlp.down_proj"]
    given = hparams("memit", layers=[2], stats_dir=str(tmp_path))

    def write(dataset: str, layer: int) -> Path:
        file = tmp_path / "tiny" / f"{dataset}_stats" / "model.layers.2.mlp.down_proj_float32_mom2_100000.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        found = StreamingCovariance.load(statistics_path(topology(case.model), case.folder, layer))
        found.save_npz(file, sample_size=100000)
        return file

    def read() -> torch.Tensor:
        case.call("memit", given=given)
        return memit.COV_CACHE[key]

    own = case.C[key]
    file = write("wikipedia", 3)
    assert read() is own  # the caller's
    case.C.clear()
    first = read()
    torch.testing.assert_close(first, moved.float())
    assert read() is first
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    other = write("wikipedia", 2).rename(tmp_path / "other")
    write("wikipedia", 3)  # so that the inode is another
    os.replace(other, file)
    os.utime(file, ns=times)
    torch.testing.assert_close(read(), own.float())
    write("wikitext", 3)
    given.mom2_dataset = "wikitext"
    torch.testing.assert_close(read(), moved.float())


def test_own_statistics_serve_later_calls_on_the_edited_model(case: Case, seed: int) -> None:
    memit.COV_CACHE.clear()
    given = hparams("memit", stats_dir=str(case.folder))
    case.call("memit", given=given)
    case.call("memit", requests_of(random_edits(2, seed + 1)), given=given)


def test_own_statistics_that_changed_are_read_again(case: Case, seed: int) -> None:
    memit.COV_CACHE.clear()
    given = hparams("memit", stats_dir=str(case.folder))
    case.call("memit", given=given)
    case.model.load_state_dict(case.before)
    first = case.wanted("memit")
    moments(case.model, case.folder, seed + 1)
    model, _ = case.call("memit", given=given)
    assert same(model, case.wanted("memit"))
    assert not same(model, first)


def test_targets_are_kept_in_files_and_read_again(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "kv" / "layer_{}_clamp_{}_case_{}.npz"
    case.call("memit", case.requests[:2], cache_template=str(template))
    names = {f"layer_2_clamp_2_case_{i}.npz" for i in (0, 1)}  # the clamp as the hparams have it
    assert {path.name for path in template.parent.iterdir()} == names
    wanted, sought = np.full(32, 3.0, np.float32), []
    np.savez(template.parent / "layer_2_clamp_2_case_0.npz", v_star=wanted)
    find = method_module.find_targets

    def counted(batch: Any, *rest: Any) -> Any:
        sought.extend(edit.id for edit in batch.edits)
        return find(batch, *rest)

    def noted(batch: Any, z: torch.Tensor, *rest: Any) -> Any:
        written.append(z)
        return walk(batch, z, *rest)

    written: list[torch.Tensor] = []
    walk = method_module._walk_layers
    monkeypatch.setattr(method_module, "find_targets", counted)
    monkeypatch.setattr(method_module, "_walk_layers", noted)
    case.model = tiny_model("llama")
    case.model.config._name_or_path = "org/tiny"
    case.call("memit", cache_template=template)
    assert sought == ["2"]
    assert torch.equal(written[0][0], torch.from_numpy(wanted))
    (template.parent / "layer_2_clamp_2_case_1.npz").write_bytes(b"PK")
    before = values(case.model)
    with pytest.raises(FileError, match=r"case_1\.npz holds no target v_star"):
        case.call("memit", cache_template=template)
    assert same(case.model, before)
    with pytest.raises(RequestError, match="edit 0: it has no case_id"):
        case.call("memit", [{**case.requests[0], "case_id": None}], cache_template=template)
    with pytest.raises(ConfigError, match="cache_template of ROME"):
        case.call("rome", cache_template=template)


@pytest.mark.parametrize("template", ["{}_{}_{}_{}.npz", "{layer}_{}_{}.npz", "{}_{}_{}_}.npz", "{0.z}.npz"])
def test_a_template_that_cannot_be_filled_is_refused(template: str, case: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache_template is .*, which cannot be filled \(.*give three \{\}"):
        case.call("memit", cache_template=tmp_path / template)
    assert same(case.model, case.before)


@pytest.mark.parametrize(
    ("template", "ids"), [("z.npz", (0, 1, 2)), ("{}_{}.npz", (0, 1, 2)), ("{}_{}_{}.npz", (7, 7, 7))]
)
def test_edits_that_would_share_a_file_of_targets_are_refused(
    template: str, ids: tuple[int, ...], case: Case, tmp_path: Path
) -> None:
    """The next call would read the target of the last one for all."""
    requests = [request | {"case_id": id_} for request, id_ in zip(case.requests, ids, strict=True)]
    with pytest.raises(RequestError) as raised:
        case.call("memit", requests, cache_template=tmp_path / "kv" / template)
    assert len(raised.value.sentences) == 2
    assert all(
        re.search(r"^edit .*: requests\[[12]\] has the file of requests\[0\] by", text)
        for text in raised.value.sentences
    )
    assert not (tmp_path / "kv").exists()
    case.call("memit", [requests[0], requests[0]], cache_template=tmp_path / "kv" / template)  # one edit, given twice


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


def fine_tuned(model: Any, tokenizer: Any, edits: Sequence[EditRequest], given: dict[str, Any]) -> None:
    """FT's loop as published, one sample at a time."""
    weights = [model.model.layers[layer].mlp.down_proj.weight for layer in given["layers"]]
    optimizer = torch.optim.Adam(weights, lr=given["lr"], weight_decay=given["weight_decay"])
    for _ in range(given["num_steps"]):
        losses = []
        for first in range(0, len(edits), given["batch_size"]):
            batch = edits[first : first + given["batch_size"]]
            each = []
            for edit in batch:
                n = len(tokenizer(edit.prompt).input_ids)
                ids = torch.tensor([tokenizer(f"{edit.prompt} {edit.target}").input_ids])
                logits = model(input_ids=ids).logits[0, n - 1 : -1]
                each.append(torch.nn.functional.cross_entropy(logits, ids[0, n:]))
            optimizer.zero_grad()
            loss = torch.stack(each).mean()
            losses += [float(loss.detach())] * len(batch)
            if loss >= 1e-2:
                loss.backward()
                optimizer.step()
        if sum(losses) / len(losses) < 1e-2:
            break


FT = {"num_steps": 6, "lr": 1e-2, "weight_decay": 0.01, "batch_size": 2, "norm_constraint": False, "layers": [1, 2]}
FT |= {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight", "objective_optimization": "target_new"}


@pytest.mark.parametrize("case", ["gemma2"], indirect=True)
def test_a_norm_after_the_mlp_is_not_counted_as_in_the_published_code(case: Case) -> None:
    ours, published = case.wanted("memit"), case.wanted("memit", through_norm=False)
    model, _ = case.call("memit")
    assert close(model, published, case.before)
    assert not close(model, ours, case.before, 0.1)


def test_ft_is_the_published_loop(tokenizer: Any, seed: int) -> None:
    """In fp64: Adam's first steps are ±lr, whatever the slope, and rounding alone decides where that is 0."""
    with in_fp64():
        reference, own, edits = tiny_model("llama"), tiny_model("llama"), random_edits(3, seed)
        before = values(reference)
        fine_tuned(reference, tokenizer, edits, FT)
        model, weights = memit.apply_ft_to_model(own, tokenizer, requests_of(edits), FT, return_orig_weights=True)
    assert close(model, values(reference), before, 1e-9)
    assert {*weights} == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"norm_constraint": 5e-4}, "norm_constraint is 0.0005"),
        ({"objective_optimization": "other"}, "objective_optimization is 'other'"),
        ({"lr": None, "drop": "lr"}, "the hparams of FT lack lr"),
    ],
)
def test_ft_refuses_what_it_cannot_honour(given: dict[str, Any], match: str, case: Case) -> None:
    fields = FT | given
    fields.pop(fields.pop("drop", ""), None)
    with pytest.raises(ConfigError, match=match):
        memit.apply_ft_to_model(case.model, case.tokenizer, case.requests, fields)


def test_ft_at_the_prompt_s_last_token_takes_targets_of_one_token_alone(case: Case) -> None:
    fields = {name: value for name, value in FT.items() if name != "objective_optimization"}
    one = [{"prompt": "w9 w10", "target_new": {"str": "w11"}}]
    memit.apply_ft_to_model(case.model, case.tokenizer, one, fields)
    longer = [*one, {"prompt": "w9 w12", "target_new": "w11 w13"}]
    with pytest.raises(RequestError, match=r"targets of several tokens: edit 1; give target_new"):
        memit.apply_ft_to_model(case.model, case.tokenizer, longer, fields)


@pytest.fixture(autouse=True)
def _cache() -> Iterator[None]:
    yield
    memit.COV_CACHE.clear()
