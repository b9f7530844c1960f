"""Models over several devices: accelerate moves what passes between them.

The second device is PyTorch's lazy one, which computes on the CPU and takes no tensor of another device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moments, ragged_samples, tiny_model

from fastedit import Editor, EditRequest, ModelError
from fastedit.models import PrefixCache, pack
from fastedit.models.self_check import _place
from fastedit.statistics.collect import collect

lazy = pytest.importorskip("torch._lazy.ts_backend", reason="this build of torch has no lazy device")
hooks = pytest.importorskip(
    "accelerate.hooks", reason="accelerate is not installed: pip install 'fastedit-llm[offload]'"
)
Edits = Callable[..., list[EditRequest]]
PUBLISHED = {"published": True, "layer": 2, "lr": 1e-2, "epochs": 2}
SUBJECTS = {"tokens": "subject", "preserve": "null-space", "layer": (1, 2), "lr": 1e-2, "epochs": 4, "name_weight": 0.0}
MEMIT = {"method": "memit", "layers": (1, 2), "steps": 3, "n_contexts": 0}


@pytest.fixture(scope="module", autouse=True)
def lazy_device() -> None:
    lazy.init()


def spread(model: Any, elsewhere: tuple[str, ...] = ("embed_tokens", "layers.0"), hooked: bool = True) -> Any:
    """A copy of a Llama with some modules on the lazy device, as accelerate dispatches a model."""
    model = copy.deepcopy(model)
    names = ["embed_tokens", "rotary_emb", *(f"layers.{i}" for i in range(4)), "norm"]
    places = {f"model.{name}": "lazy:0" if name in elsewhere else "cpu" for name in names}
    places["lm_head"] = "lazy:0" if "lm_head" in elsewhere else "cpu"
    for path, device in places.items():
        model.get_submodule(path).to(device)
    if hooked:
        hooks.attach_align_device_hook_on_blocks(model, execution_device=places, offload=dict.fromkeys(places, False))
    return model


@pytest.mark.parametrize("options", [PUBLISHED, SUBJECTS, MEMIT], ids=["published", "subjects", "memit"])
def test_an_edit_above_the_other_device(
    options: dict[str, Any], make_edits: Edits, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    """Updates and report agree with those of one device, and the weights come back."""
    model, edits = tiny_model("llama"), [with_subject(edit) for edit in make_edits(4)]
    moments(model, tmp_path, seed)
    whole, parts = (Editor(m, tokenizer, statistics=tmp_path, **options) for m in (model, spread(model)))
    (one, of_one), (two, of_two) = ((e.edit(edits), e.evaluate(edits).metrics) for e in (whole, parts))
    assert one.delta.updates.keys() == two.delta.updates.keys()
    for path, update in two.delta.updates.items():
        wanted = one.delta.updates[path].to("cpu")
        # Adam divides small gradients by their size, and their rounding with them
        assert (dense(update) - dense(wanted)).norm() <= 1e-3 * dense(wanted).norm(), path
    for name in ("reliability", "locality"):
        assert of_two[name] == pytest.approx(of_one[name]), name
    two.delta.revert()
    assert torch.equal(
        parts.model.model.layers[2].mlp.down_proj.weight, tiny_model("llama").model.layers[2].mlp.down_proj.weight
    )


def with_subject(edit: EditRequest) -> EditRequest:
    return EditRequest(edit.prompt, edit.target, subject=edit.prompt.split()[0], neighbours=edit.neighbours)


def dense(update: Any) -> torch.Tensor:
    return update.dense() if hasattr(update, "dense") else update


def test_passes_begin_where_the_last_block_is(tokenizer: Any) -> None:
    """The cached states, and the block on which the parts are checked at load."""
    parts = Editor(spread(tiny_model("llama"), ("embed_tokens", "layers.0", "layers.1")), tokenizer).parts.topology
    with PrefixCache(parts, ragged_samples([5, 9, 3]), 2) as cache:
        rows = pack(cache.samples, [0]).to(parts.device)
        assert cache.hidden(rows).device == parts.device == torch.device("cpu")
    assert _place(parts)[0] == 2


def test_statistics_of_blocks_on_both_devices(tokenizer: Any) -> None:
    model = tiny_model("llama")
    text = [f"w{9 + i} w{10 + i} w{12 + i}" for i in range(20)]
    one, two = (collect(Editor(m, tokenizer).parts, text, [0, 2]) for m in (model, spread(model)))
    for layer in (0, 2):
        torch.testing.assert_close(two[layer].finalize(), one[layer].finalize(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("elsewhere", "hooked", "options", "says"),
    [
        (
            ("layers.0", "layers.1"),
            True,
            PUBLISHED | {"layer": 1},
            r"1 blocks from the edited block 1 .*: 1\. Edit a block above 1",
        ),
        (("layers.0", "layers.1"), True, MEMIT, r"1 blocks from the edited block 1 on are not on cpu"),
        (("layers.0", "lm_head"), True, PUBLISHED, r"lm_head\.weight is on lazy:0, but the last block on cpu"),
        (("layers.0",), False, PUBLISHED, r"layers\.0\..*weight is on lazy:0, but the last block on cpu; load"),
    ],
    ids=["locft-bf", "memit", "head", "without accelerate"],
)
def test_refused_before_the_edit(
    elsewhere: tuple[str, ...],
    hooked: bool,
    options: dict[str, Any],
    says: str,
    make_edits: Edits,
    tokenizer: Any,
    tmp_path: Path,
    seed: int,
) -> None:
    model = tiny_model("llama")
    moments(model, tmp_path, seed)
    edits = [with_subject(edit) for edit in make_edits(2)]
    with pytest.raises(ModelError, match=says):
        Editor(spread(model, elsewhere, hooked), tokenizer, statistics=tmp_path, **options).edit(edits)
