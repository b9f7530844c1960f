"""The package's file format for tensors: safetensors with a tag, metadata and a checksum of every tensor.

The tag says what the file holds and in which version of its layout, such as "fastedit-delta-2".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastedit.errors import FileError
from fastedit.files import replacing

_CHUNK = 2**20  # bytes that are summed at once


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], tag: str, metadata: Mapping[str, Any], what: str
) -> None:
    """Write tensors and metadata; the file appears whole or not at all.

    Args:
        tag: of the layout.
        metadata: serializable to JSON.
        what: name of the content in messages, such as "the delta".

    Raises:
        FileError: the file cannot be written (a full disk, say).
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    header = {"format": tag, "fastedit": json.dumps(metadata), "checksums": json.dumps(checksums(tensors))}
    with writing(path, f"{what} could not be saved") as temporary:
        save_file(tensors, temporary, header)


def load_tensors(path: str | Path, tags: Sequence[str], what: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors (on the CPU), metadata and tag of a file that `save_tensors` wrote.

    Files of version 0.1 may lack checksums; they are read as they are.

    Raises:
        FileError: the file is missing or truncated, has another tag, or was changed since it was written.
    """
    with _opened(path) as file:
        header = _header(file, path, tags, what)
        # copies: a memory-mapped tensor changes with the file, and reading it crashes if the file gets shorter
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # not a mapping
        metadata = _parsed(header, "fastedit", path, what)
        if "checksums" in header and _parsed(header, "checksums", path, what) != checksums(tensors):
            raise FileError(path, f"{what} is damaged (it was changed since it was written); make it again")
        return tensors, metadata, header["format"]


def load_metadata(path: str | Path, tags: Sequence[str], what: str) -> dict[str, Any]:
    """Metadata of a file that `save_tensors` wrote; its tensors are not read. Raises FileError like `load_tensors`."""
    with _opened(path) as file:
        return _parsed(_header(file, path, tags, what), "fastedit", path, what)


@contextmanager
def writing(path: str | os.PathLike[str], failure: str) -> Iterator[Path]:
    """Do as `files.replacing`, but fail with a FileError that begins with `failure`."""
    try:
        with replacing(Path(path)) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        text = f"{failure}: {error}; nothing was changed. Make room, or give another folder or another path"
        raise FileError(Path(path), text) from error


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    if Path(path).is_dir():
        raise FileError(path, f"{{path}} is a folder; give its file, such as {Path(path) / 'delta.safetensors'}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise FileError(path, f"not a readable safetensors file: {error}") from error


def _header(file: Any, path: str | Path, tags: Sequence[str], what: str) -> dict[str, str]:
    header: dict[str, str] = file.metadata() or {}
    if header.get("format") not in tags:
        raise FileError(path, f"{{path}} is not {what} (its header lacks format {' or '.join(tags)})")
    return header


def _parsed(header: Mapping[str, str], name: str, path: str | Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(header[name])
        if not isinstance(value, dict):
            raise ValueError(f"{name} is not an object")
        return value
    except (KeyError, ValueError) as error:
        raise FileError(path, f"{what} is damaged ({error!r}); make it again") from error


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of each tensor -> a text that identifies its bits, dtype and shape."""
    return {name: f"{t.dtype} {list(t.shape)} {checksum(t)}" for name, t in tensors.items()}


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum that depends on every bit of a tensor and its position, and on nothing else.

    Words of 32 bits are summed with random odd weights, modulo 2⁶⁴. Unlike a sum that rounds, this does not depend on
    the order or on the device. Chunks of one MiB are summed at once, so that temporaries stay small; the sums of
    the chunks are summed in the same way.
    """
    rng = torch.Generator().manual_seed(0)

    def weights(n: int) -> Tensor:
        return (torch.randint(-(2**63), 2**63 - 1, (n,), generator=rng) | 1).to(tensor.device)

    flat = tensor.detach().reshape(-1)
    word = torch.int8 if flat.nbytes % 4 else torch.int32
    word_weights = weights(min(_CHUNK, flat.nbytes) // word.itemsize)
    chunks = (chunk.clone().view(word) for chunk in flat.split(_CHUNK // flat.itemsize))  # copies are aligned
    # one thread is enough for a MiB: several would wait for one another where other processes run
    dot = torch.dot if flat.device.type == "cpu" else lambda a, b: (a * b).sum()
    sums = torch.stack([dot(chunk.long(), word_weights[: len(chunk)]) for chunk in chunks])
    return int((sums * weights(len(sums))).sum())
