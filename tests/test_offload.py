"""Offloaded models: blocks stay in the checkpoint's files and are read when they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from helpers import VOCAB, moments, tiny_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastedit import ConfigError, Editor, EditRequest, ModelError
from fastedit.models import PrefixCache

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'fastedit-llm[offload]'")
LOCFT_BF = {"published": True, "layer": 2, "lr": 1e-2, "epochs": 2}
MEMIT = {"method": "memit", "layers": (1, 2), "steps": 2, "lr": 0.5, "n_contexts": 0}
Edits = Callable[..., list[EditRequest]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight was read from the files."""
    from accelerate.utils import OffloadedWeightsLoader

    counted, read = Counter[str](), OffloadedWeightsLoader.__getitem__

    def count(loader: Any, name: str) -> Any:
        counted[name] += 1
        return read(loader, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", count)
    return counted


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Any) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        tiny_model(family).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


def in_memory(editor: Editor) -> list[int]:
    """The blocks with all their weights in memory."""
    blocks = enumerate(editor.topology.blocks)
    return [i for i, block in blocks if not any(p.is_meta for p in block.parameters())]


@pytest.mark.parametrize("method", ["locft-bf", "memit"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "granite", "falcon", "qwen2_moe", "lfm2"])
def test_an_edit_has_the_same_bits(
    family: str, method: str, checkpoint: Any, make_edits: Edits, tmp_path: Path, seed: int
) -> None:
    """The edit, its report, the fingerprint, and the saved files; also of types that are measured.

    The products of experts depend in the last bits on the rows beside them, which differ from those without offloading.
    """
    rounding = 1e-5 if family == "qwen2_moe" else 0.0
    config: dict[str, Any] = dict(LOCFT_BF if method == "locft-bf" else MEMIT)
    folder, found = checkpoint(family), []
    edits = [replace(edit, subject=edit.prompt) for edit in make_edits(5)]
    for offload in (None, "prefix"):
        if method == "memit":
            config["statistics"] = str(tmp_path / "statistics")
        editor = Editor.from_pretrained(folder, device="cpu", offload=offload, **config)
        if method == "memit":
            moments(editor.model, tmp_path / "statistics", seed, layers=(1, 2))
        result = editor.edit(edits)
        editor.save_model(tmp_path / f"{offload}")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"{offload}").state_dict()
        found.append((result.delta.metadata["fingerprint"], editor.evaluate(edits).metrics, saved))
    assert not any("forward" in vars(module) for block in editor.topology.blocks[2:] for module in block.modules())
    assert in_memory(editor) == ([2, 3] if method == "locft-bf" else [1, 2, 3])
    (made_for, report, saved), (made_for_, report_, saved_) = found
    assert made_for_ == made_for
    assert report_.pop("kl") == pytest.approx(report.pop("kl"), abs=rounding)
    assert report_ == report
    assert saved.keys() == saved_.keys()
    for name in saved:
        torch.testing.assert_close(saved_[name], saved[name], rtol=0.0, atol=rounding)
    changed = [name for name, weight in tiny_model(family).state_dict().items() if not torch.equal(weight, saved[name])]
    assert changed


def test_the_frozen_blocks_are_read_once(checkpoint: Any, reads: Counter[str]) -> None:
    """However many passes the edits take; each pass of the whole model would read every block again."""
    editor = Editor.from_pretrained(checkpoint("llama"), device="cpu", offload="prefix", **LOCFT_BF)
    with PrefixCache(editor.topology, editor.parts.tokenize([("w9 w10", "w11")] * 400, append_eos=True), 0) as cache:
        reads.clear()
        cache.advance(3)
    assert {name.split(".")[2] for name in reads} == {"0", "1", "2"}
    assert {*reads.values()} == {1}


def test_a_failure_leaves_no_block_in_memory(
    checkpoint: Any, make_edits: Edits, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastedit.models import prefix_cache

    passed, run = [], prefix_cache.run_blocks

    def fails(*args: Any, **kwargs: Any) -> Any:
        passed.append(kwargs["stop"])
        if kwargs["stop"] == 2:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(prefix_cache, "run_blocks", fails)
    editor = Editor.from_pretrained(checkpoint("llama"), device="cpu", offload="prefix", **LOCFT_BF | {"layer": 3})
    with pytest.raises(KeyboardInterrupt):
        editor.edit(make_edits(3))
    assert passed == [1, 2]
    assert in_memory(editor) == [3]
    monkeypatch.undo()
    assert editor.edit(make_edits(3)).losses  # the hooks still read what passes need


def test_a_delta_loads_what_it_changes(checkpoint: Any, make_edits: Edits) -> None:
    folder, ids = checkpoint("llama"), torch.arange(9)[None]
    delta = Editor.from_pretrained(folder, device="cpu", **LOCFT_BF).edit(make_edits(3)).delta
    delta.revert()
    editor = Editor.from_pretrained(folder, device="cpu", offload="prefix")
    before = editor.model(ids).logits
    delta.apply(editor.model)
    assert not torch.equal(editor.model(ids).logits, before)
    delta.revert()
    assert torch.equal(editor.model(ids).logits, before)


@pytest.mark.parametrize("on_disk", [("model.layers",), ("model.embed_tokens", "model.layers.1")])
def test_models_that_accelerate_offloads(
    on_disk: tuple[str, ...], checkpoint: Any, make_edits: Edits, tokenizer: Any, tmp_path: Path
) -> None:
    """A model that the caller has loaded with a device_map of their own."""
    folder, edits = checkpoint("llama"), make_edits(4)
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
    places |= dict.fromkeys([f"model.layers.{i}" for i in range(4)], "cpu")
    places |= {name: "disk" for name in places if name.startswith(on_disk)}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    offloaded = Editor(model, tokenizer, **LOCFT_BF)
    whole = Editor.from_pretrained(folder, device="cpu", **LOCFT_BF)
    (update,), (wanted,) = (editor.edit(edits).delta.updates.values() for editor in (offloaded, whole))
    assert torch.equal(update, wanted)
    assert offloaded.evaluate(edits).metrics == whole.evaluate(edits).metrics


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("llama", {"offload": "suffix"}, ConfigError, "offload is 'suffix'; give prefix"),
        ("missing", {"offload": "prefix"}, ModelError, "no folder .*missing"),
        ("model.gguf", {"offload": "prefix"}, ModelError, "dequantized once"),
    ],
)
def test_what_cannot_be_offloaded(
    name: str, options: dict[str, Any], error: type[Exception], says: str, checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint("llama")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(error, match=says):
        Editor.from_pretrained(tmp_path / name, device="cpu", **options)


def test_without_accelerate(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastedit import loading

    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install 'fastedit-llm\\[offload\\]'"):
        Editor.from_pretrained(checkpoint("llama"), device="cpu", offload="prefix")


_MEMORY = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed counts no more
_LIMITED = """
    import re, resource, sys
    from fastedit import Editor
    import accelerate, fastedit.methods.locft_bf, torch, transformers
    torch.set_num_threads(1)
    with open("/proc/self/status", encoding="ascii") as status:
        used = int(re.search(r"VmData:\\s+(\\d+)", status.read())[1]) * 1024
    folder, offload, output, mapped = sys.argv[1], sys.argv[2] or None, sys.argv[3], int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_DATA, (used + mapped + 700_000_000,) * 2)
    editor = Editor.from_pretrained(folder, device="cpu", dtype="float32", offload=offload, layer=22, epochs=1)
    edits = [{"prompt": f"w{9 + i} w{10 + i}", "target": f"w{20 + i}"} for i in range(4)]
    editor.edit(edits)
    editor.evaluate(edits, generate=False)  # each generated token would read the model again
    editor.save_model(output)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc and limits")
def test_a_model_larger_than_the_memory(tokenizer: Any, tmp_path: Path) -> None:
    """A model of 1.5 GB in fp32 is edited, measured and saved with 700 MB; without offload that is not enough.

    Files that are mapped count towards the limit, although they take memory only while there is some to spare.
    """
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=8, eos_token_id=1, bos_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}
    assert 4 * sum(shape.numel() for shape in shapes.values()) > 1.5e9
    folder, rng = tmp_path / "model", torch.Generator().manual_seed(0)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    values = {shape: torch.randn(shape, generator=rng).mul_(0.02).bfloat16() for shape in {*shapes.values()}}
    places: dict[str, str] = {}
    for block in range(24):
        own = {name: values[shape].clone() for name, shape in shapes.items() if f".layers.{block}." in name}
        if not block:
            own |= {name: values[shape].clone() for name, shape in shapes.items() if ".layers." not in name}
        places |= dict.fromkeys(own, f"model-{block + 1:05}-of-00024.safetensors")
        save_file(own, folder / places[next(iter(own))], {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    output, mapped = tmp_path / "edited", sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for offload in ("prefix", ""):
        command = [sys.executable, "-c", dedent(_LIMITED), str(folder), offload, str(output), str(mapped)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_MEMORY)
        if offload:
            assert done.returncode == 0, done.stderr
            assert (output / "config.json").exists()
        else:
            assert done.returncode != 0
            assert "memory" in done.stderr
