"""What setup.py decides before a compiler runs."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

setuptools = pytest.importorskip("setuptools")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, which sets nothing up."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(Path(__file__).parents[1])
    return runpy.run_path("setup.py")


def test_pybind11_headers_come_with_torch_where_it_is_not_installed(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers: Callable[[], str] = script["pybind11_headers"]
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert Path(headers(), "pybind11", "pybind11.h").is_file()
    monkeypatch.setitem(headers.__globals__, "find_spec", lambda _: None)
    with pytest.raises(setuptools.errors.CompileError, match="pybind11 is not installed"):
        headers()


def test_architectures_are_those_asked_for_or_that_nvcc_knows(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc, wanted = tmp_path / "nvcc", script["wanted_architectures"]
    nvcc.write_text("#!/bin/sh\necho sm_75\necho sm_80\necho sm_90\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("FASTEDIT_CUDA_ARCHS", raising=False)
    assert wanted(str(nvcc)) == ["80", "90a"]
    monkeypatch.setenv("FASTEDIT_CUDA_ARCHS", "86,90a+PTX")
    assert wanted(str(nvcc)) == ["86", "90a+PTX"]
    monkeypatch.setenv("FASTEDIT_CUDA_ARCHS", "")
    assert wanted(str(nvcc)) == []


def test_a_change_of_any_source_builds_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    root, given = Path(__file__).parents[1], {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(root)
    runpy.run_path("setup.py")
    (extension,) = given["ext_modules"]
    files = {str(path.relative_to(root)) for path in (root / "csrc").iterdir()} - {"csrc/README.md"}
    assert {*extension.sources, *extension.depends} == files
