"""The command line: `fastedit edit | evaluate | demo | locate | …`, also `python -m fastedit`.

Exit codes: 0 for success; 2 for a failure before the work began, such as bad usage or bad input; 1 for a failure after
that, or Ctrl-C. A failure is one line on stderr. torch, transformers and matplotlib are imported only inside commands,
so that `--help` is quick.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from fastedit.cli import phase, processes
from fastedit.cli.apply import apply
from fastedit.cli.arguments import Command, check_backend
from fastedit.cli.check import check
from fastedit.cli.check_model import check_model
from fastedit.cli.covariance import covariance
from fastedit.cli.demo import demo
from fastedit.cli.diff import diff
from fastedit.cli.edit import edit
from fastedit.cli.env import env
from fastedit.cli.evaluate import evaluate
from fastedit.cli.export import export
from fastedit.cli.flags import configured
from fastedit.cli.ledger import LEDGER
from fastedit.cli.locate import OWN as LOCATE_OWN
from fastedit.cli.locate import locate
from fastedit.cli.resume import ResumableCommand
from fastedit.cli.revert import revert
from fastedit.cli.tune import OWN as TUNE_OWN
from fastedit.cli.tune import tune
from fastedit.cli.watch import watch
from fastedit.errors import SHOWN, FastEditError, RequestError

_log = logging.getLogger(__name__)


class _Group(TyperGroup):
    """The group of commands; turns their errors into one line and an exit code."""

    def get_help_option(self, ctx: Any) -> Any:
        """`--help` with a default of False: for None, typer would import pydantic."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        arguments = [*args]  # parsing empties the list
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if not arguments or not hasattr(error, "format_message"):  # without arguments the error is the help
                raise
            _leave(f"{error.format_message()} (--help lists the commands)", 2)

    def invoke(self, ctx: Any) -> Any:
        phase.reset()
        with processes.joined():
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            message, code = phase.interrupted(), 1
        except FastEditError as error:
            message, code = phase.written(str(error)) + _unquoted(error), phase.exit_code()
        except Exception as error:
            if not hasattr(error, "format_message"):  # an error of click, which typer contains since 0.2x
                raise
            message, code = f"{error.format_message()} (--help shows an example)", 2
        _leave(message, code)


def _unquoted(error: FastEditError) -> str:
    """Log the problems that the error does not quote; without a log, say how to see them."""
    sentences = error.sentences if isinstance(error, RequestError) else ()
    if len(sentences) <= SHOWN:
        return ""
    if not _log.isEnabledFor(logging.INFO):
        return " (--verbose lists them all)"
    for sentence in sentences:
        _log.info("%s", sentence)
    return ""


def _leave(message: str, code: int) -> NoReturn:
    typer.echo("fastedit: " + " ".join(message.split("\n")), err=True)
    raise typer.Exit(code)


def _checked(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that it checks FASTEDIT_BACKEND first."""

    @wraps(command)
    def run(**parameters: Any) -> Any:
        check_backend()
        return command(**parameters)

    return run


def _flowing(command: Callable[..., Any]) -> str:
    """The docstring of a command with each paragraph as one line, which the terminal breaks where it ends."""
    paragraphs = inspect.getdoc(command).split("\n\n")  # type: ignore[union-attr]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def make_app() -> typer.Typer:
    """Make the application, with a flag for each field of the methods' configurations."""
    app = typer.Typer(
        cls=_Group,
        help="Fast knowledge editing of large language models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    commands: dict[str, Callable[..., None]] = {
        "edit": configured(edit),
        "watch": watch,
        "evaluate": evaluate,
        "check": check,
        "demo": demo,
        "locate": configured(locate, LOCATE_OWN, ("locft-bf",)),
        "tune": configured(tune, TUNE_OWN),
        "covariance": covariance,
        "export": export,
        "apply": apply,
        "revert": revert,
        "diff": diff,
        "check-model": check_model,
        "env": env,
    }
    for name, command in commands.items():
        kind = ResumableCommand if command is commands["edit"] else Command
        app.command(name, cls=kind, help=_flowing(command))(_checked(processes.in_all(name, command)))
    ledger = typer.Typer(cls=_Group, help="Keep the facts of a model, and change any of them.")
    for name, command in LEDGER.items():
        ledger.command(name, cls=Command, help=_flowing(command))(_checked(processes.in_all(f"ledger {name}", command)))
    app.add_typer(ledger, name="ledger")
    return app


app = make_app()


def main() -> None:
    """Run the console script."""
    app(prog_name="fastedit")
