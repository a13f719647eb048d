"""What stands in a GGUF file before its tensors' bytes: fields by name, and where each tensor lies.

The format is version 2 or 3, little endian: counts, then name, type and value of every field, then name, shape, type
and offset of every tensor. The package ``gguf`` has a reader too; it takes half a minute and 0.7 GB for the quarter of
a million entries of Gemma's vocabulary, and trusts lengths that the file gives. Here no length is believed that the
file does not hold.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from snlp_jax.errors import InputError
from snlp_jax.io.optional import optional

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Codes of the types of fields that are one number -> theirs in ``struct``."""
STRING, ARRAY = 8, 9
MAX_DIMS = 4


class GgufTensor(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]
    """As in torch: rows first. The file gives it the other way round."""
    kind: Any
    """``gguf.GGMLQuantizationType``."""
    offset: int
    """Of the first byte in the file."""
    row_shape: tuple[int, ...]
    """Of the tensor's bytes: ``shape`` with the bytes of a row in place of the last number."""


class GgufHeader(NamedTuple):
    """Fields and tensors of a file."""

    fields: dict[str, Any]
    """Numbers, texts, and lists of them."""
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read all but the tensors.

    Raises:
        InputError: the package ``gguf`` is missing, or the file is no GGUF file, cut off, or damaged.
    """
    gguf = optional("gguf", f"the GGUF file {str(path)!r}", "snlp-jax[gguf]")
    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != b"GGUF":
            raise InputError(f"{str(path)!r} is no GGUF file; download it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(_Cursor(data, 4), gguf)
            except (ValueError, KeyError, IndexError) as error:
                reason = ascii(str(error))[1:-1][:160]  # names in a damaged file may hold anything
                raise InputError(f"{str(path)!r} is cut off or damaged ({reason}); download it again.") from error


def _read(cursor: "_Cursor", gguf: Any) -> GgufHeader:
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"format version {version}, little-endian 2 and 3 can be read")
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(cursor.count(num_fields, 12)):
        name = cursor.string()
        fields[name] = cursor.value(cursor.number("I"))
    found = [cursor.tensor() for _ in range(cursor.count(num_tensors, 24))]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, code, offset in found:
        kind = gguf.GGMLQuantizationType(code)
        row_shape = gguf.quant_shape_to_byte_shape(shape, kind)
        if start + offset + math.prod(row_shape) > len(cursor.data):
            raise ValueError(f"the tensor {name!r} ends behind the file")
        if name in tensors:
            raise ValueError(f"two tensors are named {name!r}")
        tensors[name] = GgufTensor(shape, kind, start + offset, tuple(row_shape))
    return GgufHeader(fields, tensors)


class _Cursor:
    """Reads on from ``offset``. Raises ValueError where the file ends before."""

    def __init__(self, data: mmap.mmap, offset: int):
        self.data, self.offset = data, offset

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.offset:
            raise ValueError("the file ends within its header")
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def count(self, number: int, least_bytes: int) -> int:
        """``number``, of things of at least so many bytes each, which have room."""
        if number * least_bytes > len(self.data) - self.offset:
            raise ValueError(f"the file is too short for {number} entries")
        return number

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        # A token may be a part of a character in a damaged vocabulary; it is then refused with the vocabulary.
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            code = NUMBERS[kind]
            form = f"<{self.count(length, struct.calcsize('<' + code))}{code}"
            return list(struct.unpack(form, self.take(struct.calcsize(form))))
        if kind != STRING:
            raise ValueError("an array of arrays")
        return [self.string() for _ in range(self.count(length, 8))]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, code of the type, and offset among the tensors' bytes."""
        name, num_dims = self.string(), self.number("I")
        if num_dims > MAX_DIMS:
            raise ValueError(f"the tensor {name!r} has {num_dims} axes")
        shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
        return name, shape, self.number("I"), self.number("Q")
