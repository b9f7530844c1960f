"""The processes of torchrun; only the first one prints and writes files."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import wraps
from typing import Any

from fastedit.errors import ConfigError, FastEditError

_COMMANDS = ("edit", "evaluate", "covariance")


def several() -> bool:
    """Whether torchrun has started more than this process."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def speaks() -> bool:
    """Whether this is the process that prints and writes files."""
    return not several() or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes of torchrun, each with its own GPU if there are any; all but the first are silent.

    After an error, they end only when the first has printed it, because torchrun would end that one, too.
    """
    if not several():
        yield
        return
    import torch
    from torch import distributed

    from fastedit import parallel

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    with ExitStack() as stack:
        if not speaks():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        distributed.init_process_group(backend)
        try:
            yield
        except Exception as error:
            if type(error).__module__.split(".")[0] in ("typer", "click"):  # an exit after the message
                raise
            traceback.print_exc()
            sys.exit(1)
        finally:
            with suppress(FastEditError):
                parallel.gathered(None)
            distributed.destroy_process_group()


def in_all(name: str, command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that a failure in one process is a failure in all."""

    @wraps(command)
    def run(**parameters: Any) -> Any:
        if not several():
            return command(**parameters)
        if name not in _COMMANDS:
            raise ConfigError(
                f"{name} runs in one process, without torchrun; commands that share their work: {', '.join(_COMMANDS)}"
            )
        from fastedit import parallel

        with parallel.together():
            return command(**parameters)

    return run
