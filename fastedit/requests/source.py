"""A file of requests of any size as a stream of decompressed bytes or text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
from collections.abc import Callable
from importlib import import_module
from typing import Any, BinaryIO, TextIO, cast

from fastedit.errors import InputFileError

AnyPath = str | os.PathLike[str]


class _Frames:
    """A reader of consecutive zstd frames. The package's own reader does not notice a truncated frame."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._begin = file, import_module("zstandard").ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = self._found = b""

    def read(self, size: int) -> bytes:
        while not self._found and (packed := self._packed or self._file.read(1 << 16)):
            self._frame = self._frame or self._begin()
            self._found, self._packed = self._frame.decompress(packed), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        if not self._found and self._frame is not None:
            raise EOFError("it ends inside a frame")
        data, self._found = self._found[:size], self._found[size:]
        return data

    def close(self) -> None:
        self._frame = None


# The first bytes of a compressed file, how it is compressed, and what unpacks it.
_COMPRESSED: tuple[tuple[bytes, str, Callable[[BinaryIO], Any]], ...] = (
    (b"\x1f\x8b", "gzip", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", "bzip2", bz2.BZ2File),
    (b"\xfd7zXZ", "xz", lzma.LZMAFile),
    (b"\x28\xb5\x2f\xfd", "zstd", _Frames),
)


class Source:
    """A file that can be read from its beginning more than once; anything else, such as a pipe, is kept in memory.

    Attributes:
        plain: whether it is an ordinary file that is not compressed.

    Raises:
        InputFileError: it cannot be read, is a zip file, or needs a package that is not installed; while it is read,
            also that it is damaged.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self._content: bytes | None = None
        try:
            with open(path, "rb") as file:
                ordinary = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
                head = file.read(8 if ordinary else -1)
        except OSError as error:
            raise InputFileError(path, f"cannot be read: {error.strerror}") from error
        if not ordinary:
            self._content = head
        if head.startswith(b"PK\x03\x04"):
            raise InputFileError(
                path, "{path} is compressed (zip), and may hold several files; unpack it first, with unzip"
            )
        self._kind: str | None = None
        self._unpack: Callable[[BinaryIO], Any] | None = None
        for start, kind, unpack in _COMPRESSED:
            if head.startswith(start):
                self._kind, self._unpack = kind, unpack
        self.plain = ordinary and self._kind is None

    def bytes(self) -> BinaryIO:
        """The decompressed content from its beginning."""
        try:
            packed = open(self.path, "rb") if self._content is None else io.BytesIO(self._content)  # noqa: SIM115
            inner = packed if self._unpack is None else self._unpack(packed)
        except ModuleNotFoundError as error:
            text = f"{{path}} is compressed ({self._kind}): pip install {error.name}, or unpack it first"
            raise InputFileError(self.path, text) from None
        except OSError as error:
            raise InputFileError(self.path, f"cannot be read: {error.strerror}") from error
        return cast(BinaryIO, io.BufferedReader(_Told(inner, packed, self._fault), 1 << 16))

    def text(self, newline: str = "\n") -> TextIO:
        """The content as text; callers turn a UnicodeDecodeError of reading it into `not_utf8`."""
        return io.TextIOWrapper(self.bytes(), encoding="utf-8-sig", newline=newline)

    def not_utf8(self) -> InputFileError:
        """The error that names the first byte that is not UTF-8."""
        with self.bytes() as file:
            content = file.read()
        try:
            content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line, offset = error.object.count(b"\n", 0, error.start) + 1, error.start
            return InputFileError(self.path, f"{{path}}, line {line}: byte {offset} is not UTF-8; save as UTF-8")
        return InputFileError(self.path, "{path} changed while it was read; try again")

    def _fault(self, error: Exception) -> InputFileError:
        if self._kind is None:
            return InputFileError(self.path, f"cannot be read: {error}")
        return InputFileError(self.path, f"the {self._kind} file is damaged or truncated: {error}")


class _Told(io.RawIOBase):
    """A stream that raises InputFileErrors; each package that decompresses raises its own types."""

    def __init__(self, inner: Any, packed: BinaryIO, fault: Callable[[Exception], InputFileError]) -> None:
        self._inner, self._packed, self._fault = inner, packed, fault

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except Exception as error:
            raise self._fault(error) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._inner.close()
        self._packed.close()
        super().close()
