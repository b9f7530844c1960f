"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastedit.errors import ModelError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # what the umask allows; safetensors would keep its file private
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """The same for a folder; only an empty folder or a checkpoint is replaced, with all that it holds.

    Raises:
        ModelError: `path` is something else: no folder, or one without config.json and safetensors files.
    """
    path = path.resolve()  # "." has no siblings by that name, and a link is not what should be replaced
    if path.exists() and not (path.is_dir() and (_is_checkpoint(path) or not any(path.iterdir()))):
        raise ModelError(f"{path} exists and is no checkpoint; give a new folder, nothing was overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    new.mkdir()
    try:
        yield new
        blank = temporary / "blank"
        blank.touch()
        for file in filter(Path.is_file, new.rglob("*")):  # safetensors keeps its files private, whatever the umask
            file.chmod(blank.stat().st_mode)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_checkpoint(path: Path) -> bool:
    return (path / "config.json").exists() and any(path.glob("*.safetensors"))
