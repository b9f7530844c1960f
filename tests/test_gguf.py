"""GGUF files: read, edited, saved as ordinary checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit import Editor, EditRequest, ModelError

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ.,?"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rotary dimensions in the order of GGUF files: pairs beside one another."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write(model: Any, path: Path) -> None:
    """A llama as a GGUF file, its last projections in 8 bits, with a tokenizer of letters."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'fastedit-llm[gguf]'")
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'fastedit-llm[gguf]'")
    config, file = model.config, gguf.GGUFWriter(path, "llama")
    file.add_name("tiny")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    file.add_vocab_size(config.vocab_size)
    tokens = ["<s>", "</s>", "<unk>", *LETTERS]
    tokens += ["an", *(f"<{i}>" for i in range(config.vocab_size - len(tokens) - 1))]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    file.add_token_merges(["a n"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    for name, weight in model.state_dict().items():
        new = name.replace("model.layers.", "blk.")
        for old, short in NAMES.items():
            new = new.replace(old, short)
        if "attn_q." in new or "attn_k." in new:
            heads = config.num_attention_heads if "attn_q." in new else config.num_key_value_heads
            weight = interleaved(weight, heads)
        if "attn_output" in new:
            packed = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            file.add_tensor(new, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            file.add_tensor(new, weight.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


EDIT = EditRequest("The capital of France is", "Lyon", "France")
CONFIG: dict[str, Any] = {"published": True, "layer": 2, "epochs": 30, "lr": 0.02}


def test_a_file_is_edited_and_saved_as_an_ordinary_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted, file = tiny_model("llama"), tmp_path / "tiny.Q8_0.gguf"
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    write(wanted, blobs / "0a1b2c")
    file.symlink_to(blobs / "0a1b2c")  # as it stands in the hub's cache
    with caplog.at_level(logging.WARNING, "fastedit"):
        editor = Editor.from_pretrained(file, device="cpu", **CONFIG)
    assert f"{file} was dequantized to float32" in caplog.text
    ids = torch.tensor([[0, 5, 9, 23, 40]])
    assert torch.allclose(editor.model(ids).logits, wanted(ids).logits, atol=0.1)
    for name, weight in editor.model.state_dict().items():
        apart = (weight - wanted.state_dict()[name]).abs().max()
        assert 0 < apart < 0.01 if "o_proj" in name else apart == 0, name
    editor.edit([EDIT])
    editor.save_model(tmp_path / "edited")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert all(torch.equal(p, editor.model.state_dict()[name]) for name, p in saved.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    assert tokenizer(EDIT.prompt).input_ids == editor.tokenizer(EDIT.prompt).input_ids
    again = Editor(saved, tokenizer).evaluate([EDIT])
    assert again.metrics["reliability"]["generated"] == 1.0


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ([], "there is no file .*none.gguf; give the path"),
        (["gguf"], r"to read it gguf must be installed: pip install 'fastedit-llm\[gguf\]'"),
        (["gguf", "accelerate"], "to read it gguf and accelerate must be installed"),
    ],
)
def test_what_is_missing_is_named(
    missing: Sequence[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "none.gguf"
    if missing:
        file.write_bytes(b"GGUF")
    monkeypatch.setattr("fastedit.loading.find_spec", lambda name: None if name in missing else find_spec(name))
    with pytest.raises(ModelError, match=said):
        Editor.from_pretrained(file)
