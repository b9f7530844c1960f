"""Several processes that make one edit together, as torchrun starts them: the default group of torch.distributed.

All of them run the same program. They exchange in the same order, and whatever they exchange goes with word of how the
others fare, so that a process that fails stops all of them: nobody waits for it. In one process all of this is nothing.
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
    group: Any = None  # for words between processes: on the CPU, whatever the default group computes on


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


def share(n: int) -> range:
    """The consecutive ones of `n` things that are this process's; shares differ in size by one at most."""
    return range(n * rank() // world(), n * (rank() + 1) // world())


@contextmanager
def together() -> Iterator[None]:
    """Do the work of the block in all processes, or in none: an error in one of them is raised in all.

    Inside another one it is nothing. It decorates functions, too.

    Raises:
        EditError: another process ended, or was silent for an hour.
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
    """The value that each process gives, in their order; tensors in it have to be on the CPU.

    Raises:
        Exception: whatever another process has raised in the same `together`.
    """
    return [value] if world() == 1 else _exchange(value)


def of_first(make: Callable[[], _Value]) -> _Value:
    """What `make` gives in the first process, which alone calls it; an error of it is raised in all."""
    if world() == 1:
        return make()
    with together():
        return gathered(make() if first() else None)[0]  # type: ignore[return-value]


def summed(x: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place."""
    if world() > 1:
        gathered(None)
        with _answered():
            distributed.all_reduce(x)
    return x


def joined_rows(x: Tensor) -> Tensor:
    """The rows [n, d] of all processes, in their order; each may have another n."""
    if world() == 1:
        return x
    sizes = gathered(len(x))
    mine = x.new_zeros(max(sizes), *x.shape[1:])
    mine[: len(x)] = x
    parts = [torch.empty_like(mine) for _ in sizes]
    with _answered():  # as bytes: gloo does not know every dtype
        distributed.all_gather([part.view(torch.uint8) for part in parts], mine.view(torch.uint8))
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def _exchange(value: Any, error: BaseException | None = None) -> list[Any]:
    if _Ours.of is not distributed.group.WORLD:
        _Ours.of, _Ours.group = distributed.group.WORLD, distributed.new_group(backend="gloo", timeout=_PATIENCE)
    found: list[Any] = [None] * world()
    with _answered():
        distributed.all_gather_object(found, (_sendable(error), value), group=_Ours.group)
    for number, (failed, _) in enumerate(found):
        if failed is not None:
            raised: Any = error if number == rank() and error is not None else failed
            raised._fastedit_known = True
            raise raised
    return [each for _, each in found]


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
        found: BaseException | None = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class says that cannot be pickled
        found = EditError(f"process {rank()}: {reason(error)}" if error is not None else "")
    return found


def _known(error: BaseException | None) -> bool:
    """Whether all processes know of it: it, or what it was raised for, came from an exchange."""
    while error is not None:
        if getattr(error, "_fastedit_known", False):
            return True
        error = error.__cause__ or error.__context__
    return False
