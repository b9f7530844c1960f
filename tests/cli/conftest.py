"""Fixtures of the command line: a model, requests, and a copy of the model to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from capitals import RECORDS, save, write
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 3 blocks and a byte-level BPE, as a checkpoint."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [r["prompt"] for r in RECORDS],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
    )
    return save(config, tokenizer, tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write(tmp_path / "facts.json", RECORDS)


@pytest.fixture
def spoiled(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "spoiled"))
