"""The status of a running edit, for `fastedit watch`: one small file beside its state."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from fastedit.files import replacing

STATUS = "status.json"
_OFTEN, _SELDOM = 1.0, 5.0  # seconds between two writes, with and without news


class Status:
    """The status of an edit, kept in a folder while the block runs; a separate thread writes it, at most once a second.

    Errors of writing are ignored, so that no edit fails because of its status.

    Args:
        about: fields that are known from the start, serializable to JSON.
    """

    def __init__(self, folder: Path, **about: Any) -> None:
        self._folder, now = folder, time.time()
        process = f"{os.getpid()} on {platform.node()}"
        self._content = {"state": "running", **about, "process": process, "began": now, "moved": now}
        self._news, self._over = False, Event()
        self._thread = Thread(target=self._keep_writing, daemon=True)

    def __enter__(self) -> Status:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is not None:
            self._content |= {"error": "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)}
        self._content["state"] = "ended" if error is None else "failed"
        self._write()

    def update(self, **figures: Any) -> None:
        """Set fields of the status; takes a microsecond."""
        self._content = {**self._content, **figures, "moved": time.time()}  # anew: the thread may read the old
        self._news = True

    def _keep_writing(self) -> None:
        written = time.monotonic()
        while not self._over.wait(_OFTEN):
            if self._news or time.monotonic() - written >= _SELDOM:
                self._news, written = False, time.monotonic()
                self._write()

    def _write(self) -> None:
        with suppress(OSError):
            states = [file.stat().st_mtime for file in self._folder.glob("*.safetensors")]
            more = {"updated": time.time(), "saved": max(states, default=None), "memory": memory()}
            with replacing(self._folder / STATUS) as temporary:
                temporary.write_text(json.dumps(self._content | more, indent=1) + "\n", encoding="utf-8")


def memory() -> dict[str, int | None]:
    """Peak bytes so far of this process on the "host" and on its "device"; None if not known."""
    host = device = None
    with suppress(ImportError):
        import resource

        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        device = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return {"host": host, "device": device}


def clock(seconds: float) -> str:
    """A duration as hours, minutes and seconds."""
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes}:{remainder:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{remainder:02}"
