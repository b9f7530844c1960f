"""Deltas put onto checkpoints and taken out again without loading the model: the same bits as in the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastedit import FileError, ModelError, WeightDelta
from fastedit.checkpoints import Checkpoint, Reverted, Stack, differences, rank_of
from fastedit.compose import stacked
from fastedit.models import fingerprint
from fastedit.undo import Undo
from fastedit.weights import LowRank

BF16 = torch.bfloat16


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(dict(change(load_file(file))), file, {"format": "pt"})


def without_prefix(folder: Path) -> None:
    """As GPT-2's files on the hub are."""
    rewritten(folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})


def head_twice(folder: Path) -> None:
    """As files of old programs are: a tied head that is stored once more."""
    rewritten(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})


# family, dtype, size of shards, what is done to the files
STORED: dict[str, tuple[str, torch.dtype, str, Callable[[Path], object]]] = {
    "llama": ("llama", torch.float32, "1GB", str),
    "llama in bf16 and shards": ("llama", BF16, "20KB", str),
    "fp16": ("qwen3", torch.float16, "1GB", str),
    "gpt2, Conv1D, bf16": ("gpt2", BF16, "1GB", str),
    "gpt2 as on the hub": ("gpt2", torch.float32, "1GB", without_prefix),
    "gpt_neox, fused qkv": ("gpt_neox", torch.float32, "20KB", str),
    "phi3, fused": ("phi3", BF16, "20KB", str),
    "gemma2, tied": ("gemma2", BF16, "1GB", str),
    "gemma2, tied, stored twice": ("gemma2", BF16, "1GB", head_twice),
}


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, shards: str = "1GB", seed: int = 0) -> Path:
    tiny_model(family, dtype=dtype, seed=seed).save_pretrained(folder, max_shard_size=shards)
    return folder


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)


def an_edit(model: Any, rng: torch.Generator, among: str = "") -> WeightDelta:
    """Of one parameter in five, the embedding too; every second matrix in factors."""
    updates: dict[str, Any] = {}
    for i, (path, p) in enumerate(model.named_parameters()):
        if (i % 5 == 0 or i == 0) and among in path:
            if p.ndim == 2 and i % 2:
                a, b = torch.randn(p.shape[0], 3, generator=rng), torch.randn(3, p.shape[1], generator=rng)
                updates[path] = LowRank(a / 9, b / 9)
            else:
                updates[path] = torch.randn(p.shape, generator=rng) / 30
    return WeightDelta(updates, {"fingerprint": fingerprint(model)})


def put(checkpoint: Checkpoint, folder: Path, *deltas: WeightDelta) -> tuple[Path, Undo]:
    stack, undo = Stack(checkpoint), Undo()
    stacked(deltas, checkpoint.fingerprint(), stack.put)
    changes = {}
    for path in {path for delta in stack.sums for path in delta.updates}:
        total = deltas[0].updates[path]
        undo.keep(path, checkpoint.read(path), stack.edited(path, checkpoint.read(path)), total)
        changes[path] = lambda weight, path=path: stack.edited(path, weight)
    checkpoint.write(folder, changes)
    return folder, undo


def bits(folder: Path) -> dict[str, bytes]:
    return {
        f"{path.name} {name}": t.contiguous().view(torch.uint8).numpy().tobytes()
        for path in folder.glob("*.safetensors")
        for name, t in load_file(path).items()
    }


@pytest.mark.parametrize("kind", STORED)
def test_a_checkpoint_is_edited_as_the_model_is_and_put_back(kind: str, rng: torch.Generator, tmp_path: Path) -> None:
    family, dtype, shards, change = STORED[kind]
    source = saved(tmp_path / "model", family, dtype, shards)
    change(source)
    for kept in ("notes.txt", "additional_chat_templates/tools.jinja"):
        (source / kept).parent.mkdir(exist_ok=True)
        (source / kept).write_text("kept")
    for left in ("checkpoint-5/model.safetensors", "onnx/model.onnx", ".cache/metadata", "old.bin"):
        (source / left).parent.mkdir(exist_ok=True)
        (source / left).touch()
    model, before = loaded(source), Checkpoint(source)
    assert before.fingerprint() == fingerprint(model)
    delta = an_edit(model, rng)
    edited, undo = put(before, tmp_path / "edited", delta)
    assert (edited / "notes.txt").read_text() == "kept"
    assert {path.name for path in edited.rglob("*") if path.is_dir()} == {"additional_chat_templates"}
    assert (edited / "additional_chat_templates" / "tools.jinja").read_text() == "kept"
    assert not (edited / "old.bin").exists()
    assert bits(edited).keys() == bits(source).keys()
    delta.apply(model)
    for name, tensor in loaded(edited).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name

    undo.save(tmp_path / "undo")
    after = Checkpoint(edited)
    found = Reverted(after, [delta], [Undo.load(tmp_path / "undo")])
    assert found.problem() is None
    after.write(tmp_path / "back", found.changes())
    assert bits(tmp_path / "back") == bits(source)


def test_what_is_not_known_to_be_exact_is_told(rng: torch.Generator, tmp_path: Path) -> None:
    """And subtracting is near all the same."""
    source = saved(tmp_path / "model", "llama", BF16)
    checkpoint, model = Checkpoint(source), loaded(source)
    one, other = an_edit(model, rng), an_edit(model, rng)
    edited, undo = put(checkpoint, tmp_path / "edited", one)
    after = Checkpoint(edited)
    assert "there is no delta.undo" in str(Reverted(after, [one], []).problem())
    for deltas in ([other], [one, other]):
        assert "of other edits, or of fewer or more" in str(Reverted(after, deltas, [undo]).problem())
    later = loaded(edited)
    later.model.layers[1].mlp.gate_proj.weight.data += 1
    later.save_pretrained(tmp_path / "later")
    assert "holds other edits too" in str(Reverted(Checkpoint(tmp_path / "later"), [one], [undo]).problem())
    later.get_parameter("model.embed_tokens.weight").data += 1
    later.save_pretrained(tmp_path / "later")
    problem = str(Reverted(Checkpoint(tmp_path / "later"), [one], [undo]).problem())
    assert f"1 of {len(one.updates)} matrices are not what they were: model.embed_tokens.weight" in problem
    after.write(tmp_path / "near", Reverted(after, [one], []).changes())
    for name, tensor in loaded(tmp_path / "near").state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("size", [1e-3, 1e3], ids=["kept in places", "kept whole"])
def test_an_undo_restores_no_weights_that_were_changed_later(size: float, rng: torch.Generator) -> None:
    weight = torch.randn(256, 128, generator=rng)
    update = size * torch.randn(256, 128, generator=rng)
    undo = Undo()
    undo.keep("w", weight, weight + update, update)
    assert torch.equal(undo.restored("w", weight + update, update), weight)
    assert undo.restored("w", weight + update + 1, update) is None
    if size < 1:
        undo._tensors["w..at"][-1] += weight.numel()  # of a file that is damaged
        assert undo.restored("w", weight + update, update) is None


def test_differences_are_named_and_measured(rng: torch.Generator, tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "llama")
    model = loaded(source)
    path = "model.layers.1.mlp.down_proj.weight"
    update = LowRank(torch.randn(32, 3, generator=rng), torch.randn(3, 56, generator=rng))
    before = model.get_parameter(path).detach().clone()
    WeightDelta({path: update}, {"fingerprint": fingerprint(model)}).apply(model)
    model.save_pretrained(tmp_path / "edited")
    ((found, dense),) = differences(Checkpoint(source), Checkpoint(tmp_path / "edited"))
    assert (found.path, found.changed, rank_of(dense)) == (path, 1.0, 3)
    assert found.relative == pytest.approx(float(update.dense().norm() / before.norm()), rel=1e-5)
    torch.testing.assert_close(dense, update.dense(), atol=1e-5, rtol=1e-5)
    saved(tmp_path / "other", "qwen3")
    with pytest.raises(ModelError, match=r"8 parameters .*model.layers.0.self_attn.q_norm.weight"):
        differences(Checkpoint(source), Checkpoint(tmp_path / "other"))


NAN, INF = float("nan"), float("inf")
# weights of two checkpoints -> share that differs, largest finite difference, how many are not finite; None if equal
VALUES: dict[str, tuple[list[float], list[float], tuple[float, float, int] | None]] = {
    "a NaN that is new": ([1, 2, 3, 4], [1, NAN, 3, 6], (0.5, 2.0, 1)),
    "an infinity that is new": ([1, 2, 3, 4], [1, -INF, 3, 4], (0.25, 0.0, 1)),
    "the same NaN and infinity": ([NAN, INF, 3, 4], [NAN, INF, 3, 4], None),
    "and a weight beside them": ([NAN, INF, 3, 4], [NAN, INF, 5, 4], (0.25, 2.0, 0)),
}


@pytest.mark.parametrize("other_dtype", [False, True], ids=["one dtype", "two dtypes"])
@pytest.mark.parametrize("case", VALUES)
def test_differences_of_weights_that_are_not_finite(case: str, other_dtype: bool, tmp_path: Path) -> None:
    *values, wanted = VALUES[case]
    folders = [saved(tmp_path / name, "llama", BF16 if name == "a" and other_dtype else torch.float32) for name in "ab"]
    tensors = load_file(folders[0] / "model.safetensors")  # the values of bf16, in fp32 too
    for folder, row in zip(folders, values, strict=True):
        dtype = load_file(folder / "model.safetensors")["model.norm.weight"].dtype
        new = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        new["model.norm.weight"][:4] = torch.tensor(row)
        new["model.norm.weight"] = new["model.norm.weight"][[0, 1, 2, 3] * 8]
        save_file(new, folder / "model.safetensors", {"format": "pt"})
    found = list(differences(*map(Checkpoint, folders)))
    if wanted is None:
        assert not found
    else:
        ((difference, _),) = found
        assert (difference.changed, difference.largest, difference.broken // 8) == wanted


def index_of_lost_file(folder: Path) -> None:
    content = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "lost.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter of MODEL"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "holds no weights"),
    "a lost shard": (index_of_lost_file, "lacks 1 of its files: lost.safetensors"),
    "quantized": (quantized, "is quantized"),
    "names of its own": (
        lambda folder: rewritten(folder, lambda t: {name.replace("mlp", "ffn"): x for name, x in t.items()}),
        "name no tensor for 12 parameters of the model: model.layers.0.mlp",
    ),
    "other shapes": (
        lambda folder: rewritten(folder, lambda t: t | {"model.norm.weight": torch.ones(7)}),
        r"1 tensors are not as config.json says: model.norm.weight \[7\] instead of \[32\]",
    ),
    "other dtypes": (
        lambda folder: rewritten(folder, lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "model.norm.weight in I8",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_checkpoint_to_edit_is_refused(kind: str, tmp_path: Path) -> None:
    spoil, message = BAD[kind]
    spoil(saved(tmp_path / "model", "llama"))
    with pytest.raises((FileError, ModelError), match=message):
        Checkpoint(tmp_path / "model")


def test_a_delta_of_another_model_is_refused(rng: torch.Generator, tmp_path: Path) -> None:
    """Before anything is written."""
    checkpoint = Checkpoint(saved(tmp_path / "model", "llama"))
    delta = an_edit(tiny_model("llama", seed=1), rng)
    made_for = delta.metadata["fingerprint"]
    with pytest.raises(ModelError, match=f"fingerprint is {checkpoint.fingerprint()}: delta 1 was made for {made_for}"):
        put(checkpoint, tmp_path / "edited", delta)
    assert not (tmp_path / "edited").exists()
