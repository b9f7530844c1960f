"""`auto` takes the CUDA kernels of syrk_ where their tests have passed, and nowhere else; on a pretended GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastedit.errors import ConfigError
from fastedit.ops import syrk, trust
from fastedit.ops.registry import choose

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Name and binary of the pretended GPU and extension; the table is in tmp_path."""
    fake = SimpleNamespace(name="NVIDIA H200", __file__=str(tmp_path / "_C.so"), syrk_cuda=None)
    Path(fake.__file__).write_bytes(b"compiled")
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    monkeypatch.setenv(trust.VARIABLE, str(tmp_path / "cache" / "trust.json"))
    monkeypatch.setattr(syrk, "_extension", lambda: fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: fake.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    trust.trusted.cache_clear()
    yield fake
    trust.trusted.cache_clear()


def taken() -> str:
    """The backend of a new process."""
    trust.trusted.cache_clear()
    return choose("syrk_", device=GPU, dtype=torch.bfloat16)


def test_only_what_was_tested_is_trusted(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken() == "torch"
    syrk.trust_cuda()
    syrk.trust_cuda()  # once is enough
    assert trust.path().read_text().count('"op"') == 1
    assert choose("syrk_", device=GPU, dtype=torch.bfloat16) == "cuda"  # at once, and
    assert taken() == "cuda"
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "9.9")
        assert taken() == "torch"
    gpu.name = "NVIDIA A100"
    assert taken() == "torch"
    syrk.trust_cuda()  # beside the first
    gpu.name = "NVIDIA H200"
    assert taken() == "cuda"
    Path(gpu.__file__).write_bytes(b"compiled anew")
    assert taken() == "torch"


def test_without_kernels_nothing_is_trusted(gpu: SimpleNamespace) -> None:
    del gpu.syrk_cuda
    with pytest.raises(ConfigError, match=r"cannot be trusted: fastedit\._C was built without nvcc"):
        syrk.trust_cuda()
    assert not trust.path().exists()


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_broken_table_is_named(text: str) -> None:
    trust.path().parent.mkdir()
    trust.path().write_text(text)
    with pytest.raises(ConfigError, match=r"trust\.json .*delete it"):
        taken()
