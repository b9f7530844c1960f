"""Several processes that make one edit together, as torchrun starts them: the default group of torch.distributed.

All of them run the same program and exchange values in the same order. With every value goes a word on errors, so that
a process that fails stops all others, and none waits for it. In a single process nothing of this has an effect.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from fastedit.errors import EditError, reason

_Value = TypeVar("_Value")
_PATIENCE = timedelta(minutes=60)  # as long as the first process may take to write a large checkpoint


class _Ours:
    inside = False
    of: Any = None  # the default group when `group` was made
    group: Any = None  # for Python objects: on the CPU, whatever device the default group uses


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def share(n: int) -> range:
    """This process's share of `n` items, consecutive ones; sizes of shares differ by one at most."""
    return range(n * rank() // world(), n * (rank() + 1) // world())


@contextmanager
def together() -> Iterator[None]:
    """Make the block succeed in all processes or in none: an error in one of them is raised in all.

    Inside another `together` it has no effect. It is a decorator, too.

    Raises:
        EditError: another process ended, or did not answer for an hour.
    """
    if world() == 1 or _Ours.inside:
        yield
        return
    _Ours.inside = True
    try:
        yield
        _exchange(None)
    except BaseException as error:
        if not _known(error):
            _exchange(None, error)
        raise
    finally:
        _Ours.inside = False


def gathered(value: _Value) -> list[_Value]:
    """The values that all processes give, in order of rank; tensors in them have to be on the CPU.

    Raises:
        Exception: whatever another process raised in the same `together`.
    """
    return [value] if world() == 1 else _exchange(value)


def of_first(make: Callable[[], _Value]) -> _Value:
    """Call `make` in the first process only, and return its value in all; its error is raised in all."""
    if world() == 1:
        return make()
    with together():
        return gathered(make() if first() else None)[0]  # type: ignore[return-value]


def summed(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world() > 1:
        gathered(None)
        with _answered():
            distributed.all_reduce(x)
    return x


def joined_rows(x: Tensor) -> Tensor:
    """The rows [n, d] of all processes, in order of rank; n may differ between them."""
    if world() == 1:
        return x
    sizes = gathered(len(x))
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    with _answered():  # as bytes: gloo does not know every dtype
        distributed.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8))
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def _exchange(value: Any, error: BaseException | None = None) -> list[Any]:
    if _Ours.of is not distributed.group.WORLD:
        _Ours.of, _Ours.group = distributed.group.WORLD, distributed.new_group(backend="gloo", timeout=_PATIENCE)
    messages: list[Any] = [None] * world()
    with _answered():
        distributed.all_gather_object(messages, (_sendable(error), value), group=_Ours.group)
    for number, (failure, _) in enumerate(messages):
        if failure is not None:
            raised: Any = error if number == rank() and error is not None else failure
            raised._fastedit_known = True
            raise raised
    return [each for _, each in messages]


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        minutes = int(_PATIENCE.total_seconds()) // 60
        lost: Any = EditError(
            f"process {rank()} of {world()} lost the others: one of them ended, or was silent for {minutes} minutes "
            f"({reason(error)[:200]}); what the first one wrote so far stays. Look at what the others have printed"
        )
        lost._fastedit_known = True
        raise lost from error


def _sendable(error: BaseException | None) -> BaseException | None:
    try:
        sendable: BaseException | None = pickle.loads(pickle.dumps(error))
    except Exception:  # an error that cannot be pickled may raise anything here
        sendable = EditError(f"process {rank()}: {reason(error)}" if error is not None else "")
    return sendable


def _known(error: BaseException | None) -> bool:
    """Whether all processes know of an error: it, or its cause, came from an exchange."""
    while error is not None:
        if getattr(error, "_fastedit_known", False):
            return True
        error = error.__cause__ or error.__context__
    return False
