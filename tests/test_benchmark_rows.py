"""The state of the GPU in the rows of the benchmarks; with a pretended nvidia-smi."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import rows


@pytest.mark.parametrize(("answer", "state"), [("1980, 511.62, 61", "1980 MHz, 512 W, 61 °C"), ("[N/A], 5, 6", "")])
def test_the_state_of_a_gpu(answer: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\n[ "$1" = --id=GPU-12-34 ] && echo "{answer}"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert rows.gpu_state(torch.device("cuda")) == state
    monkeypatch.setenv("PATH", "")
    assert rows.gpu_state(torch.device("cuda")) == ""
