"""Resume an edit after a crash: its command is kept with its state, beside its output."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastedit.cli.arguments import Command
from fastedit.cli.processes import speaks
from fastedit.errors import ConfigError, EditError, FastEditError, FileError
from fastedit.files import locked, replacing

_COMMAND = "command.json"


class _Given:
    arguments: tuple[str, ...] = ()


class ResumableCommand(Command):
    """A command that, with `--resume OUTPUT`, runs again with the arguments of the command that wrote there."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(word.partition("=")[0] == "--resume" for word in args):
            args = _remembered([word.removeprefix("--resume=") for word in args if word != "--resume"])
        _Given.arguments = tuple(args)
        return super().parse_args(ctx, args)


def run_folder(output: Path) -> Path:
    """The folder for the state of an edit that is written to `output`."""
    output = output.resolve()
    return output.with_name(f"{output.name}.run")


def check_apart(state: Path, output: Path) -> None:
    """Raise FileError if one of the folders contains the other; the output is replaced as a whole."""
    state, output = state.resolve(), output.resolve()
    if state == output or state in output.parents or output in state.parents:
        raise FileError(state, f"--state {{path}} and --output {output}: one contains the other; give two folders")


def place_of(folder: Path, name: str) -> Path:
    """A file of the state of an edit; `folder` is the edit's output or its state."""
    places = [run_folder(folder) / name, folder / name]
    return next(filter(Path.exists, places), places[0])


@contextmanager
def resumable(output: Path, folder: Path) -> Iterator[None]:
    """Keep the command in a folder while the block runs, once for all processes; after a failure it stays there.

    Raises:
        EditError: Ctrl-C; says how to continue. FileError: another process is using the folder.
    """
    if not speaks():
        yield
        return
    with locked(run_folder(output)), locked(folder):  # both: two edits may have one output and two states
        with _remembering(output, folder):
            yield
        _forget(folder)


@contextmanager
def _remembering(output: Path, folder: Path) -> Iterator[None]:
    with suppress(OSError):  # then the same command can continue, but not --resume
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _COMMAND) as temporary:
            command = {"arguments": _Given.arguments, "folder": os.getcwd(), "state": str(folder.resolve())}
            temporary.write_text(json.dumps(command), encoding="utf-8")
    try:
        yield
    except BaseException as error:
        if not any(folder.glob("*.safetensors")):
            _forget(folder)
            raise
        how = f"to continue: fastedit edit --resume {output if folder == run_folder(output) else folder}"
        if isinstance(error, KeyboardInterrupt):
            raise EditError(f"interrupted; {how}") from None
        if isinstance(error, FastEditError):
            error.add(how)
        raise


def _forget(folder: Path) -> None:
    from fastedit.methods.saved_run import remove_state  # imports torch

    remove_state(folder)


def _remembered(given: list[str]) -> list[str]:
    """The arguments of the command that `--resume` names; changes to the folder where it ran."""
    if len(given) != 1:
        raise ConfigError(
            "--resume takes the folder of --output or of --state and no other flag, got "
            f"{' '.join(given) or 'nothing'}; all flags are those that the edit began with"
        )
    path = place_of(Path(given[0]), _COMMAND)
    try:
        command = json.loads(path.read_text(encoding="utf-8"))
        arguments, state = (
            [str(word) for word in command["arguments"]],
            Path(command.get("state", path.parent.resolve())),
        )
        if state != path.parent.resolve():
            raise FileError(
                path,
                f"--resume {given[0]}: {path.parent} was moved or copied from {state}, where its edit would start "
                f"again; move it back, or run the whole command again with --state {path.parent}, which continues it",
            )
        os.chdir(command["folder"])
    except FileNotFoundError as error:
        if error.filename == str(path):
            why = f"there is no {path}; the edit is done, or it never began"
        else:
            why = f"the folder {error.filename} where it began is gone; run the whole command again, which continues it"
        raise FileError(path, f"--resume {given[0]}: {why}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            path, f"{{path}} cannot be used ({error}); run the whole command again, which continues it"
        ) from error
    return arguments
