"""The statistics that ship with the fact world, and the command that made them."""

from __future__ import annotations

import itertools
import runpy
import warnings
from pathlib import Path

import pytest
import torch

from fastedit import StreamingCovariance
from fastedit.demo import World, checkpoint_path
from fastedit.demo.statistics import documents
from fastedit.models import Topology, fingerprint
from fastedit.statistics.store import StatisticsStore

pytestmark = pytest.mark.usefixtures("cache")


def test_the_fact_world_ships_with_its_own(world: Topology) -> None:
    mark = fingerprint(world.model)
    shipped = sorted(path for path in (checkpoint_path() / "statistics").glob("*_proj.safetensors"))
    assert shipped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in shipped:
            layer = int(path.name.partition(".")[0])
            found = StreamingCovariance.load(path)
            assert (found.metadata["fingerprint"], found.dim) == (mark, world.input_width(layer, "down_proj"))
            assert found.count >= 10 * found.dim
            StatisticsStore(world, mark).covariance(layer)
            before = sorted(checkpoint_path().rglob("*"))
            StatisticsStore(world, mark).cholesky(layer)
            assert sorted(checkpoint_path().rglob("*")) == before


def test_the_fact_world_s_text_is_tokenized_as_in_training() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    both = zip(World().documents(3, curriculum=False), documents(3), strict=True)
    for spans, text in itertools.islice(both, 200):
        pieces = [tokenizer.encode(span.text, add_special_tokens=False) for span in spans]
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *(t for piece in pieces for t in piece)]


def test_the_fact_world_s_statistics_are_made_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--tokens", "800", "--layers", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["fastedit.demo.statistics", *arguments])
    runpy.run_module("fastedit.demo.statistics", run_name="__main__")
    found = StreamingCovariance.load(tmp_path / "1.down_proj.safetensors")
    assert found.count >= 800
    assert found.stored == torch.float32
