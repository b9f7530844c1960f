"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastedit.errors import FileError, listed

_LOCK = "lock"
CHECKPOINT, DELTA, ADAPTER = "a checkpoint", "a delta with its report", "an adapter"
"""Kinds of folders that may be replaced."""
_NAMES = {
    DELTA: (["delta.safetensors", "report.json"], ["delta.safetensors", "report.html", "report.json"]),
    ADAPTER: (["adapter_config.json", "adapter_model.safetensors"],),
}
BY_CHECKPOINT, BY_DELTA, BY_ADAPTER = (CHECKPOINT, DELTA), (DELTA,), (ADAPTER,)
"""The kinds that each kind may replace: only a checkpoint replaces a checkpoint."""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises FileError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FileError(path, f"byte {error.start} is not UTF-8; save as UTF-8") from None


def read_json(path: Path, example: str) -> Any:
    """The content of a JSON file that a person wrote.

    Raises:
        FileError: the file cannot be read or is not JSON (shows the example); an object of it has a key twice, of which
            json would keep the last.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
            raise FileError(path, f"{listed(twice)} given more than once in an object; keep one")
        return dict(pairs)

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"is not JSON: {error}; expected such as {example}") from None


def stamp(path: Path) -> tuple[int, ...]:
    """A value that changes when a file is written again or replaced by another one. Raises OSError."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`. It replaces `path` if the block succeeds, and is deleted otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # what the umask allows; safetensors would keep its file private
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the new name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path, over: Sequence[str] = BY_CHECKPOINT) -> Iterator[Path]:
    """Do the same for a folder, which may replace an empty folder or one of the kinds in `over`, but no other.

    The content of the old folder is deleted. If it may hold inputs, call `check_directory` first.

    Args:
        over: the kinds that may be replaced; by default those that a checkpoint may replace.

    Raises:
        FileError: `path` is not a folder, or a folder of another kind.
    """
    path = path.resolve()  # "." has no siblings by that name, and of a link the target is to be replaced
    if path.exists() and not (path.is_dir() and not any(path.iterdir())) and (kind := _kind(path)) not in over:
        what = (
            f"is {kind}, which is not replaced by this" if kind else "exists and is not a checkpoint, delta or adapter"
        )
        raise FileError(path, f"{{path}} {what}; give a new folder, nothing was overwritten")
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


def check_file(path: Path, inputs: Mapping[str, Path] | None = None) -> None:
    """Check now that `replacing` can write a file at the end, and that it would not overwrite an input.

    Args:
        inputs: name for messages ("the model") -> file or folder that is read.

    Raises:
        FileError: `path` is one of the inputs or in a folder of them, is not an ordinary file, or cannot be written.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # as root, replacing /dev/null would work
        raise FileError(
            path, f"{{path}} is {'a folder' if path.is_dir() else 'no ordinary file'}; give the name of a file"
        )
    _refuse_inputs(path, inputs or {})
    with _trial(path, replacing, path):
        pass


def check_directory(path: Path, inputs: Mapping[str, Path] | None = None, over: Sequence[str] = BY_CHECKPOINT) -> None:
    """Check now that `replacing_directory` can write a folder at the end, and that it would not delete an input.

    Args:
        inputs: as for `check_file`.
        over: as for `replacing_directory`.

    Raises:
        FileError: as for `replacing_directory`; `path` is one of the inputs or holds one; it cannot be written.
    """
    _refuse_inputs(path, inputs or {})
    with trying_directory(path, over):
        pass


@contextmanager
def trying_directory(path: Path, over: Sequence[str] = BY_CHECKPOINT) -> Iterator[Path]:
    """Yield a folder as `replacing_directory` does, but delete it at the end and leave `path` as it is.

    Raises:
        FileError: as for `replacing_directory`; it cannot be written.
    """
    with _trial(path, partial(replacing_directory, over=over), path) as temporary:
        yield temporary


def check_writable(folder: Path) -> None:
    """Check now that files can be written to a folder, by writing one and removing it.

    Raises:
        FileError: the folder cannot be made, or not be written to.
    """
    with _trial(folder / "trial", replacing, folder):
        pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes until the block or this process ends; this process may lock it again.

    The folder is made if needed, and removed afterwards if it is empty. On a system without locks this does nothing.

    Raises:
        FileError: another process is using the folder; names it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    mine = f"{os.getpid()} on {platform.node()}"
    path = folder / _LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read()
            file.close()
            if holder != mine:
                why = f"is in use by process {holder}" if holder else "is in use by another process"
                raise FileError(folder, f"{{path}} {why}; wait for its end, or give another folder") from None
            yield
            return
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the one who had it took the file away between our two calls
    try:
        file.truncate(0)
        file.write(mine)
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with suppress(OSError):
            folder.rmdir()


def _refuse_inputs(path: Path, inputs: Mapping[str, Path]) -> None:
    for name, source in inputs.items():
        if path.resolve() == source.resolve():
            raise FileError(path, f"{{path}} is {name}; give another place to write to")
        entries = source.iterdir() if os.path.isdir(source) and os.access(source, os.R_OK) else ()
        if os.path.isfile(path) and _lies_in(path, source):
            raise FileError(path, f"{{path}} is a part of {name} {source}; give another file")
        if any(_lies_in(each, path) for each in (source, *entries)):  # an entry may be a link
            raise FileError(
                path, f"{{path}} would be replaced, and {name} {source} is inside it; write to another place"
            )


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path, or the target of a link, is the folder or inside it."""
    places = path.resolve(), path.parent.resolve() / path.name
    return any(folder.resolve() in (place, *place.parents) for place in places)


class _Possible(Exception):  # noqa: N818  # not an error: ends a trial before it takes effect
    pass


@contextmanager
def _trial(path: Path, way: Callable[[Path], AbstractContextManager[Path]], shown: Path) -> Iterator[Path]:
    created = [parent for parent in path.parents if not os.path.exists(parent)]
    try:
        with way(path) as temporary:
            yield temporary
            raise _Possible
    except _Possible:
        pass
    except OSError as error:
        file = next((parent for parent in path.parents if os.path.isfile(parent)), None)
        reason = f"{'it' if file == shown else file} is a file" if file else error.strerror
        raise FileError(shown, f"{{path}} cannot be written: {reason}; give another place") from error
    finally:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()


def _kind(path: Path) -> str | None:
    """Which of the kinds above a folder is, or None."""
    if not path.is_dir():
        return None
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return CHECKPOINT
    names = sorted(entry.name for entry in path.iterdir())
    return next((kind for kind, layouts in _NAMES.items() if names in layouts), None)
