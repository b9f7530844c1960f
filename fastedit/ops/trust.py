"""The GPU kernels that have passed their tests on a machine: what lets `auto` take one that no release has measured.

`make gpu-test` runs the tests of the CUDA kernels, and if they pass notes the device, the versions and the extension in
a file (`syrk.trust_cuda`). Another device, another torch or an extension built from other source is not in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import torch

from fastedit.errors import ConfigError
from fastedit.files import replacing
from fastedit.version import version_of

VARIABLE = "FASTEDIT_TRUST"
"""Environment variable with the path of the file; by default it is in the user's cache."""


def path() -> Path:
    """The file, a JSON list of `subject`s."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(VARIABLE) or cache_folder / "fastedit" / "trust.json")


def subject(op: str, device: torch.device, binary: str | os.PathLike[str]) -> dict[str, str]:
    """Describe what was tested: an op on a kind of device, by these versions and this file of compiled kernels."""
    return {
        "op": op,
        "device": torch.cuda.get_device_name(device),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "fastedit": version_of("fastedit"),
        "binary": hashlib.sha256(Path(binary).read_bytes()).hexdigest(),
    }


def trust(op: str, device: torch.device, binary: str | os.PathLike[str]) -> Path:
    """Note that the op passed its tests; returns the file."""
    file, entry = path(), subject(op, device, binary)
    known = _read(file)
    if entry not in known:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            new.write_text(json.dumps([*known, entry], indent=1) + "\n", encoding="utf-8")
    trusted.cache_clear()
    return file


@cache
def trusted(op: str, device: torch.device, binary: str | os.PathLike[str]) -> bool:
    """Whether the op passed its tests here. The file is read once per process."""
    known = _read(path())
    return bool(known) and subject(op, device, binary) in known


def _read(file: Path) -> list[dict[str, str]]:
    """Read the file. Raises ConfigError if it is not such a file."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); delete it, and run make gpu-test") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{file} holds no list; delete it, and run make gpu-test")
    return entries
