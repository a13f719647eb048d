"""Files that are plain, gzip or zstd, as the ends of their names say, and what their first bytes say they are."""

import contextlib
import gzip
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import zstandard

from snlp_jax.errors import InputError

PACKINGS = {".gz": "gzip", ".zst": "zstd"}
"""End of a file's name, and by what the file is packed."""
FAULTS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What a file that cannot be read, is cut off or damaged raises while it is read."""

_STARTS = {
    b"\x1f\x8b": ("packed by gzip", "rename it to end in .gz"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "rename it to end in .zst"),
    b"PAR1": ("a parquet file", "rename it to end in .parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"BZh": ("packed by bzip2", "unpack it"),
    b"\xfd7zXZ\0": ("packed by xz", "unpack it"),
}
"""First bytes of files that are no text: what they are, and what to do."""
_MAGIC = {"gzip": re.compile(rb"\x1f\x8b"), "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")}
_RECORD = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')
"""The beginning of a JSON object, or of an array of them."""
_HEAD_BYTES = 4096
_INPUT_BYTES = 4096
"""Of a zstd file that are unpacked at once: they may become 32768 times as many."""


def open_packed(path: str, packing: str) -> BinaryIO:
    """The unpacked bytes of a file, a few at a time; several members or frames are read one after another."""
    if packing == "gzip":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return io.BufferedReader(_ZstdFile(path), 1 << 16) if packing == "zstd" else open(path, "rb")


@contextlib.contextmanager
def plain_copy(path: str, packing: str) -> Iterator[str]:
    """The path of a file, or of an unpacked copy for as long as it is needed."""
    if not packing:
        yield path
        return
    with tempfile.NamedTemporaryFile() as copy:
        with open_packed(path, packing) as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        yield copy.name


def check_start(path: str, packing: str, *, is_lines: bool, may_be_records: bool) -> None:
    """Refuse a file whose first bytes tell that it is not what its name says.

    Args:
        is_lines: it should hold text, plain or as JSON.
        may_be_records: JSON objects are what it should hold, or are meant to be read as text.

    Raises:
        InputError: names what it is, and the remedy.
        OSError, EOFError: it cannot be read, or is cut off; see ``FAULTS``.
    """
    with open(path, "rb") as file:
        start = file.read(_HEAD_BYTES)
    if packing:
        if not _MAGIC[packing].match(start):
            raise InputError(f"file {path!r} is not packed by {packing}, as its name says; mend or rename it.")
        with open_packed(path, packing) as file:
            start = file.read(_HEAD_BYTES)
    for magic, (what, remedy) in _STARTS.items():
        if is_lines and start.startswith(magic):
            raise InputError(f"file {path!r} is {what}, which its name does not say; {remedy}, or leave it out.")
    if not may_be_records and _RECORD.match(start):
        raise InputError(
            f"file {path!r} begins with a JSON object; rename it to end in .jsonl or .json to read the texts in its "
            "records, or in .txt to take it as it stands."
        )


class _ZstdFile(io.RawIOBase):
    """Frames of zstd, unpacked. Raises EOFError where the last one is cut off, which the library passes over."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed by close
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("its last frame is cut off")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(self._output), len(buffer))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
