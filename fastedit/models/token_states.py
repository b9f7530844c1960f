"""Hidden states of all tokens of all samples in a flat buffer; by its size on the GPU, in host memory or in a file."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

from fastedit.models.rows_file import RowsFile
from fastedit.models.tokens import Rows

_GROUPS = Path("/sys/fs/cgroup")
# for each version of cgroups: folder, limit, usage, and the part of the usage that is file cache
_CONTROL_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Tally:
    """Counter of the bytes that cached states take.

    Attributes:
        most: tier -> peak bytes.
    """

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self._now: Counter[str] = Counter()

    def count(self, states: TokenStates) -> TokenStates:
        """Count some states until they are freed."""
        self.add(states, states.tier, states.nbytes)
        return states

    def add(self, owner: object, tier: str, taken: int) -> None:
        """Count bytes until their owner is freed."""
        self._now[tier] += taken
        self.most[tier] = max(self.most.get(tier, 0), self._now[tier])
        finalize(owner, self._now.subtract, {tier: taken})


@dataclass(frozen=True)
class Budget:
    """Bytes that cached states may take on the GPU and in host memory; None is half of what is free when they are made.

    States that fit neither go to a file in ``directory`` (None: the system's temporary one).
    For a model on the CPU only ``host_bytes`` counts. ``tally`` counts what is taken.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    directory: Path | None = None
    tally: Tally = field(default_factory=Tally, compare=False, repr=False)

    def allows(self, device: torch.device) -> int:
        """How many bytes may be taken in the memory of ``device``."""
        given = self.device_bytes if device.type == "cuda" else self.host_bytes
        return free_bytes(device) // 2 if given is None else given


class TokenStates:
    """States [T, width] of T tokens, zeros before they are written.

    Their ``tier`` is ``"device"`` (GPU memory), ``"pinned"`` (host memory, sent to the GPU through pinned staging),
    ``"host"`` (host memory, for a model on the CPU) or ``"file"`` (deleted with the states).
    """

    def __init__(self, tier: str, buffer: Tensor | RowsFile, device: torch.device) -> None:
        self.tier, self._buffer, self._device = tier, buffer, device

    @classmethod
    def allocate(
        cls, size: tuple[int, int], dtype: torch.dtype, device: torch.device, budget: Budget, *, near: bool = False
    ) -> TokenStates | None:
        """Allocate states in the first tier that the budget allows, for a model on ``device``.

        Args:
            near: return None instead of using a tier outside the memory of ``device``.

        Raises:
            ModelError: the file does not fit on its disk.
        """
        needed, gpu = size[0] * size[1] * dtype.itemsize, device.type == "cuda"
        if gpu:
            if needed <= budget.allows(device):
                return budget.tally.count(cls("device", torch.zeros(size, dtype=dtype, device=device), device))
            if near:
                return None
        if needed <= budget.allows(torch.device("cpu")):
            return budget.tally.count(cls("pinned" if gpu else "host", torch.zeros(size, dtype=dtype), device))
        if near:
            return None
        file = RowsFile(size, dtype, budget.directory or Path(tempfile.gettempdir()))
        return budget.tally.count(cls("file", file, device))

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def left(self, budget: Budget) -> Budget:
        """The budget that remains after these states."""
        device, host = budget.device_bytes, budget.host_bytes
        if self.tier == "device":
            return replace(budget, device_bytes=device and max(0, device - self.nbytes))
        taken = 0 if self.tier == "file" else self.nbytes
        return replace(budget, host_bytes=host and max(0, host - taken))

    def read(self, rows: Rows) -> Tensor:
        """The states of the rows' tokens [B, R, width] on the model's device; pads get some token's state."""
        state, device = self._buffer, self._device
        if isinstance(state, RowsFile):
            places, index = rows.host_index.view(-1).unique(return_inverse=True)
            held = state.read(places, pinned=device.type == "cuda").to(device, non_blocking=True)
            flat = held.index_select(0, index.to(device, non_blocking=True))
        elif self.tier == "device":
            flat = state.index_select(0, rows.index.to(device, non_blocking=True).view(-1))
        elif device.type == "cuda":
            index = rows.host_index.view(-1)
            # the caching allocator of pinned memory keeps the staging block until the copy is done
            staging = torch.empty((len(index), state.shape[1]), dtype=state.dtype, pin_memory=True)
            flat = torch.index_select(state, 0, index, out=staging).to(device, non_blocking=True)
        else:
            flat = state.index_select(0, rows.host_index.view(-1)).to(device)
        return flat.view(*rows.index.shape, -1)

    def ahead(self, begin: Tensor, end: Tensor) -> None:
        """Ask the system to prefetch the states of the tokens from ``begin`` [N] to ``end`` [N], if in a file."""
        if isinstance(self._buffer, RowsFile):
            self._buffer.ahead(begin, end)

    def write(self, rows: Rows, states: Tensor) -> None:
        """Keep the states [..., width] of the rows' tokens; ``states`` has B·R of them."""
        flat = states.reshape(-1, states.shape[-1])
        tokens = rows.host_index.view(-1)[rows.token_rows]
        if isinstance(self._buffer, RowsFile):
            tokens, order = tokens.sort()
            self._buffer.write(tokens, flat.index_select(0, rows.token_rows[order].to(flat.device)).cpu())
            return
        taken = flat.index_select(0, rows.token_rows.to(flat.device, non_blocking=True))
        self._buffer.index_copy_(0, tokens.to(self._buffer.device, non_blocking=True), taken.to(self._buffer.device))


def free_bytes(device: torch.device) -> int:
    """Free memory of ``device``, in bytes."""
    return _free_device_bytes(device) if device.type == "cuda" else _free_host_bytes()


def _free_device_bytes(device: torch.device) -> int:
    free: int = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_host_bytes() -> int:
    """Available memory of the machine, or what the control group still allows if that is less."""
    free = []
    with suppress(OSError, StopIteration):
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
        free.append(int(line.split()[1]) * 1024)
    for folder, *names, given_up in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # without a limit, memory.max reads "max"
            limit, used = (int((_GROUPS / folder / name).read_text()) for name in names)
            counts = dict(line.split() for line in (_GROUPS / folder / "memory.stat").read_text().splitlines())
            free.append(max(limit - used + int(counts[given_up]), 0))  # file cache is given up on demand
    if not free:
        with suppress(OSError, ValueError, AttributeError):
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(free, default=0)
