"""`fastedit env`."""

from __future__ import annotations

import os
import platform

from fastedit.cli.output import show
from fastedit.version import version_of


def env() -> None:
    """Show versions, processors, and which backend each operation takes here.

    Example: fastedit env
    """
    import torch
    from rich.table import Table

    from fastedit.ops import registry

    table = Table(show_header=False, box=None)
    table.add_row("python", platform.python_version())
    for name in ("fastedit", "torch", "triton", "transformers"):
        table.add_row(
            name, torch.__version__ if name == "torch" else version_of(name, "not installed")
        )  # torch's own has the build, such as +cpu
    table.add_row("CPU", f"{torch.get_num_threads()} threads on {os.cpu_count()} cores")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        table.add_row(f"GPU {i}", f"{gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}")
    if not torch.cuda.is_available():
        table.add_row("GPU", "none")
    for op, taken, why in registry.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        table.add_row(f"ops.{op}", f"{taken} ({why})" if why else taken)
    show(table)
