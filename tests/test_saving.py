"""Saved models are read again: every kind of model that must save well does, and what would not is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, randomize, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from fastedit import Editor, EditRequest, FileError
from fastedit.errors import ModelError
from fastedit.models import Model
from fastedit.saving import check_saves, save_model

DOWN = "model.layers.1.mlp.down_proj.weight"
Make = Callable[[], Any]


def of(change: Callable[[Any], Any], family: str = "llama", **how: Any) -> Make:
    """Makes a tiny model and changes it."""

    def make() -> Any:
        model = tiny_model(family, **how)
        changed = change(model)
        return model if changed is None else changed

    return make


def tied(model: Any) -> None:
    model.config.tie_word_embeddings = True
    model.tie_weights()


def tied_by_hand(model: Any) -> None:
    """The config does not say so: transformers leaves one out of the file, and a reader draws it at random."""
    model.lm_head.weight = model.model.embed_tokens.weight


def shared_by_hand(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def views_of_one(model: Any) -> None:
    both = torch.randn(2, 32, 56)
    for block, weight in zip(model.model.layers, both, strict=False):
        block.mlp.down_proj.weight = nn.Parameter(weight)


def transposed(model: Any) -> None:
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().T.contiguous().T)


def special_values(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])


def unsaved_buffer(model: Any) -> None:
    model.register_buffer("scratch", torch.ones(3), persistent=False)


def with_images() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=tiny_model("gemma3").config.to_dict(),
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    return randomize(Gemma3ForConditionalGeneration(config)).eval()


GOOD: dict[str, Make] = {
    **{family: of(lambda m: None, family) for family in FAMILIES},
    "bf16": of(lambda m: None, dtype=torch.bfloat16),
    "fp16": of(lambda m: None, dtype=torch.float16),
    "fp64": of(lambda m: None, dtype=torch.float64),
    "tied": of(tied),
    "tied by hand": of(tied_by_hand),
    "shared by hand": of(shared_by_hand),
    "views of one storage": of(views_of_one),
    "transposed": of(transposed),
    "special values": of(special_values),
    "unsaved buffer": of(unsaved_buffer),
    "compiled": of(torch.compile),
    "wrapped": of(nn.Sequential),
    "with images": with_images,
}


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_read_is_what_was_saved(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    editor = Editor(GOOD[kind](), tokenizer)
    check_saves(editor.parts, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    state = torch.get_rng_state()
    editor.save_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    network: Any = editor.parts.network
    read, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=network.dtype, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    found = read.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(found[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name


def test_settings_that_are_no_objects_go_along(tokenizer: Any, tmp_path: Path) -> None:
    """Into another folder those that tell how images are read; into the model's own all that stood there."""
    Editor(tiny_model("llama"), tokenizer).save_model(tmp_path / "one")
    beside = {
        "preprocessor_config.json": "{}",
        "README.md": "mine",
        "templates/rag.jinja": "x",
        ".git/HEAD": "y",
        "original/a.pth": "z",
    }
    for name, text in (beside | {"pytorch_model.bin": "old"}).items():
        (tmp_path / "one" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "one" / name).write_text(text)
    editor = Editor.from_pretrained(tmp_path / "one", device="cpu")
    editor.save_model(tmp_path / "two")
    assert [name for name in beside if (tmp_path / "two" / name).exists()] == ["preprocessor_config.json"]
    editor.tokenizer.chat_template = "new"
    editor.save_model(tmp_path / "one")
    assert {name: (tmp_path / "one" / name).read_text() for name in beside} == beside
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "new"
    assert not (tmp_path / "one" / "pytorch_model.bin").exists()


def test_a_delta_beside_the_weights_is_not_taken_for_weights(tokenizer: Any, tmp_path: Path) -> None:
    """Servers read all safetensors files of a folder, or those that its index names if it has one (vLLM, SGLang)."""
    save_model(Model.of(tiny_model("llama"), tokenizer), tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())


def test_shards_are_saved_and_read_again(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plain = type(model).save_pretrained
    monkeypatch.setattr(
        type(model), "save_pretrained", lambda self, *args, **kw: plain(self, *args, max_shard_size="20KB", **kw)
    )
    Editor(model, tokenizer).save_model(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)


def compiled_part(model: Any) -> None:
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp)


def untied_by_hand(model: Any) -> None:
    model.config.tie_word_embeddings = True


def one_more(model: Any) -> None:
    model.register_buffer("scratch", torch.ones(3))


def config_changed(model: Any) -> None:
    model.config.intermediate_size = 40


def settings_of_generation(model: Any) -> None:
    model.generation_config.temperature = 0.9


BAD: dict[str, tuple[Callable[[Any], None], str]] = {
    "parametrized": (
        parametrized,
        rf"the model lacks 1 weights of its architecture: {DOWN}, and has 2 that are not .*original0, .*original1",
    ),
    "compiled part": (compiled_part, r"lacks 3 weights .*layers\.1\.mlp\.down_proj\.weight.* has 3 .*_orig_mod"),
    "untied by hand": (untied_by_hand, r"ties .* their values differ; set tie_word_embeddings to False"),
    "one more": (one_more, "has 1 that are not of its architecture: scratch"),
    "config changed": (
        config_changed,
        r"12 weights are not .*down_proj\.weight of shape \[32, 56\] instead of \[32, 40\]",
    ),
    "settings of generation": (settings_of_generation, "GenerationConfig is invalid.*temperature"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_reader_would_not_read_is_refused(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """By every road, before the work too; what stood there stays."""
    spoil, message = BAD[kind]
    Editor(tiny_model("llama", seed=1), tokenizer).save_model(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    model = tiny_model("llama")
    editor = Editor(model, tokenizer, layer=0, epochs=1, batch_size=1, lr=1e-3)
    result = editor.edit([EditRequest("w10 w11", "w12")])
    spoil(model)
    with pytest.raises(ModelError, match=message):
        check_saves(editor.parts, tmp_path / "new")
    for save in (editor.save_model, result.save_model):
        for place in ("old", "new"):
            with pytest.raises(
                FileError, match=rf"{place}: the model could not be saved: .*{message}.*nothing was written"
            ):
                save(tmp_path / place)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


WRITTEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "the edit is missing": (lambda t: t[DOWN].sub_(1e-3), rf"1 weights in the files are not the model's: {DOWN}"),
    "a bit": (lambda t: t[DOWN].view(torch.int32)[3, 5].bitwise_xor_(1), "1 weights in the files are not the model's"),
    "a dtype": (lambda t: t.update({DOWN: t[DOWN].double()}), "1 weights in the files are not the model's"),
    "one too few": (lambda t: t.pop(DOWN), rf"what was written lacks 1 weights of its architecture: {DOWN}"),
    "another name": (
        lambda t: t.update({DOWN.replace("weight", "base_layer.weight"): t.pop(DOWN)}),
        rf"lacks 1 weights .*: {DOWN}, and has 1 that are not of its architecture: .*base_layer",
    ),
    "nothing": (dict.clear, "lacks 39 weights of its architecture"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_was_written_is_trusted_only_after_it_was_read(
    kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever made transformers write something else than the model."""
    change, message = WRITTEN[kind]
    model = tiny_model("llama")
    editor, plain = Editor(model, tokenizer), type(model).save_pretrained
    editor.save_model(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def save(self: Any, folder: Any, **how: Any) -> None:
        plain(self, folder, **how)
        if Path(folder).name == "new":  # the trial goes elsewhere
            rewrite(Path(folder), change)

    monkeypatch.setattr(type(model), "save_pretrained", save)
    with pytest.raises(FileError, match=message):
        editor.save_model(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_what_transformers_raises_is_no_traceback(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("Object of type dtype is not JSON serializable")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", broken)
    with pytest.raises(FileError, match="could not be saved: Object of type dtype is not JSON"):
        Editor(tiny_model("llama"), tokenizer).save_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_told_before_the_work(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = Editor(tiny_model("llama"), tokenizer)
    for total, free, told in ((10**12, 1000, True), (10**12, 10**9, False), (0, 0, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, t=total, f=free: type("Usage", (), {"total": t, "free": f}))
        if told:
            with pytest.raises(FileError, match=r"out needs 0\.0 GB for the model, and 0\.0 GB are free"):
                check_saves(editor.parts, tmp_path / "out")
        else:
            check_saves(editor.parts, tmp_path / "out")
