"""One process at a time in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from fastedit.errors import FileError


def locked(folder: Path) -> IO[str]:
    """The lock of a folder, held until it is closed or the process ends, however it ends.

    Raises:
        FileError: another process, which is named, or this one holds it; the folder cannot be written.
    """
    import fcntl  # what Windows lacks

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise FileError(folder, f"{{path}} cannot be written: {error.strerror}; give another place") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        text = f"{{path}} is in use by process {holder}; wait until it is done, or end it"
        if holder == str(os.getpid()):
            text = f"{{path}} is open in this process ({holder}) already; use that one, or close it first"
        raise FileError(folder, text) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
