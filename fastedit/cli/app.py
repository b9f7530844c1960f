"""The command line: `fastedit edit | evaluate | demo | locate | …`, also `python -m fastedit`.

Exit codes: 0 it worked; 2 what failed before the work began, as bad usage and bad input do; 1 what failed after that,
or Ctrl-C. A failure is one line on stderr. torch, transformers and matplotlib are imported inside commands only, so
that `--help` is quick.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from fastedit.cli import phase, processes
from fastedit.cli.apply import apply
from fastedit.cli.arguments import BareEvaluate, check_backend
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
from fastedit.cli.locate import OWN as LOCATE_OWN
from fastedit.cli.locate import locate
from fastedit.cli.resume import ResumableCommand
from fastedit.cli.revert import revert
from fastedit.cli.tune import OWN as TUNE_OWN
from fastedit.cli.tune import tune
from fastedit.errors import SHOWN, FastEditError, RequestError

_log = logging.getLogger(__name__)


class _Group(TyperGroup):
    """The commands, whose errors become one line and an exit code."""

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, off if it is not given: for a value of None typer would import pydantic to read it."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = [*args]  # reading them takes them away
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if not given or not hasattr(error, "format_message"):  # without arguments it is the help
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
            message, code = phase.written(str(error)) + _rest(error), phase.exit_code()
        except Exception as error:
            if not hasattr(error, "format_message"):  # click's, which typer brings along since 0.2x
                raise
            message, code = f"{error.format_message()} (--help shows an example)", 2
        _leave(message, code)


def _rest(error: FastEditError) -> str:
    """Where those problems stand that the error does not quote: in the log, if it is on."""
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
    """The command, which looks at the environment before anything else."""

    @wraps(command)
    def run(**given: Any) -> Any:
        check_backend()
        return command(**given)

    return run


def make_app() -> typer.Typer:
    """The application, with a flag for each field of the methods' configurations."""
    app = typer.Typer(
        cls=_Group,
        help="Fast knowledge editing of large language models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    commands: dict[str, Callable[..., None]] = {
        "edit": configured(edit),
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
        kind = ResumableCommand if command is commands["edit"] else BareEvaluate
        app.command(name, cls=kind)(_checked(processes.in_all(name, command)))
    return app


app = make_app()


def main() -> None:
    """Run the console script."""
    app(prog_name="fastedit")
