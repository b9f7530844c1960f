"""Fixtures that several test files share: the seed of a run, a tokenizer without a download, random edits."""

from __future__ import annotations

import gc
import os
import random
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a thread that spins takes another worker's time

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
from helpers import SPECIAL, WORDS
from interpreted import remember_builtins
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fastedit import EditRequest

if os.environ.get("TRITON_INTERPRET") == "1":
    remember_builtins()
torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start

if not os.environ.get("FASTEDIT_TEST_SEED"):
    os.environ["FASTEDIT_TEST_SEED"] = str(secrets.randbelow(2**31))  # where the workers of this run find it
if "XDG_CACHE_HOME" not in os.environ:  # statistics that edits make are gone with the run
    _CACHE = tempfile.TemporaryDirectory(prefix="fastedit-tests-")
    os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))  # to list fonts takes seconds
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
_SEED = int(os.environ["FASTEDIT_TEST_SEED"])


def pytest_collection_finish() -> None:
    """Leave what imports have made out of garbage collections, which would look through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed() -> int:
    """FASTEDIT_TEST_SEED, or drawn anew by every run; shown when a test fails."""
    print(f"FASTEDIT_TEST_SEED={_SEED}")
    return _SEED


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word ("w9" … "w96" are 9 … 96), and punctuation by itself."""
    words = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def make_edits(seed: int) -> Callable[..., list[EditRequest]]:
    """Makes n random edits with different prompts of 1 to 9 words, targets of 1 to 3, two neighbours each."""

    def make(n: int, salt: int = 0) -> list[EditRequest]:
        rng = random.Random(seed * 1000 + salt)

        def text(low: int, high: int) -> str:
            return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

        prompts: dict[str, None] = {}
        while len(prompts) < n:
            prompts[text(1, 9)] = None
        return [
            EditRequest(
                prompt,
                text(1, 3),
                id=f"edit-{salt}-{i}",
                paraphrases=(text(2, 9),),
                neighbours=((text(2, 9), text(1, 2)), (text(2, 9), text(1, 2))),
            )
            for i, prompt in enumerate(prompts)
        ]

    return make
