"""The hparams of rome, memit, EMMET and AlphaEdit: how they are read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_edits, same, tiny_model, values
from memit_calls import Case, close, hparams, requests_of

from fastedit import ConfigError
from fastedit.compat import memit
from fastedit.models import topology
from fastedit.statistics import names
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path


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


@pytest.mark.parametrize("method", ["rome", "memit", "emmet"])
def test_names_do_not_count_as_in_that_code(method: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our default counts them, where a tokenizer knows some."""
    monkeypatch.setattr(names, "common_names", lambda: ("w30", "w31 w32"))
    model, *_ = case.call(method, given=hparams(method))
    assert same(model, case.wanted(method, name_weight=0.0))


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
