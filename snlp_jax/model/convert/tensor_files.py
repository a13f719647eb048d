"""Tensors in .safetensors files, read in blocks and written one by one.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, first and last byte
of the data) and the data. A folder holds one file, or several and an index that says which tensor is in which. Files
are read and not mapped, so that what was read does not stay in memory.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from snlp_jax.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
READABLE: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types of tensors that are numbers of a model, as their headers name them."""
WRITABLE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BLOCK_BYTES = 2**25
"""Of a file that are read at once."""
MAX_HEADER_BYTES = 10**8

Index = tuple[slice, ...]
"""Part of a tensor: a slice of each axis, without steps."""


@dataclass(frozen=True)
class _Tensor:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


class TensorFiles:
    """The tensors of a folder, or of one file; nothing but headers is read before they are asked for.

    Raises:
        InputError: there is no file, an index names one that is missing, or one is broken or shorter than it says.
    """

    def __init__(self, source: Path):
        self._source = source
        self._tensors: dict[str, _Tensor] = {}
        for path in _paths(source):
            self._tensors |= _read_header(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __str__(self) -> str:
        return repr(str(self._source))

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse to go on without a tensor.

        Raises:
            InputError: it is missing, or has another shape, or a type that cannot be read.
        """
        if name not in self._tensors:
            raise InputError(f"{self} lacks the tensor {name!r}.")
        tensor = self._tensors[name]
        if tensor.dtype not in READABLE:
            raise InputError(
                f"the tensor {name!r} in {str(tensor.path)!r} is of type {tensor.dtype}; "
                f"only {', '.join(READABLE)} can be read, so convert it first."
            )
        if tensor.shape != shape:
            raise InputError(f"the tensor {name!r} has the shape {tensor.shape}; the model needs {shape}.")

    def read_into(self, name: str, index: Index, target: np.ndarray) -> None:
        """Copy a part of a tensor into ``target``, an array or a view of its shape, converted to its type."""
        tensor = self._tensors[name]
        dtype = np.dtype(READABLE[tensor.dtype])
        if not tensor.shape:
            target[...] = np.fromfile(tensor.path, dtype, 1, offset=tensor.start)[0]
            return
        width = math.prod(tensor.shape[1:])
        first, last, _ = index[0].indices(tensor.shape[0])
        step = max(1, BLOCK_BYTES // max(1, width * dtype.itemsize))
        with open(tensor.path, "rb") as file:
            file.seek(tensor.start + first * width * dtype.itemsize)
            for row in range(first, last, step):
                count = min(step, last - row)
                block = np.fromfile(file, dtype, count * width).reshape(count, *tensor.shape[1:])
                target[row - first : row - first + count] = block[:, *index[1:]]


def write_files(
    folder: Path, tensors: Sequence[tuple[str, tuple[int, ...], Callable[[], Any]]], dtype: str, max_shard_bytes: int
) -> list[Path]:
    """Write tensors, given as names, shapes and what makes each, into as few files as ``max_shard_bytes`` allows."""
    target = np.dtype(READABLE[WRITABLE[dtype]])
    shards: list[list[Any]] = [[]]
    size = 0
    for tensor in tensors:
        its_size = target.itemsize * math.prod(tensor[1])
        if shards[-1] and size + its_size > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += its_size
    paths, where, total = [], {}, 0
    for number, shard in enumerate(shards):
        several = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        path = folder / (several if len(shards) > 1 else SINGLE_NAME)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape, _ in shard:
            start, end = end, end + target.itemsize * math.prod(shape)
            header[name] = {"dtype": WRITABLE[dtype], "shape": list(shape), "data_offsets": [start, end]}
            where[name] = path.name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, _, make in shard:
                np.ascontiguousarray(make().astype(target)).tofile(file)
        paths.append(path)
        total += end
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _paths(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if (source / INDEX_NAME).is_file():
        try:
            names = sorted(set(json.loads((source / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{str(source / INDEX_NAME)!r} is not an index of tensors; download it again.") from error
        for name in names:
            if "/" in name or "\\" in name or not (source / name).is_file():
                raise InputError(f"{str(source)!r} lacks the file {name!r}, which its index names; download it again.")
        return [source / name for name in names]
    if (source / SINGLE_NAME).is_file():
        return [source / SINGLE_NAME]
    raise InputError(
        f"{str(source)!r} holds neither {SINGLE_NAME} nor {INDEX_NAME}; convert its weights to them first."
    )


def _read_header(path: Path) -> dict[str, _Tensor]:
    broken = InputError(f"{str(path)!r} is not a .safetensors file, or its header is broken; download it again.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise broken
        text = file.read(length)
    tensors, needed = {}, 8 + length
    if len(text) == length:
        try:
            for name, entry in json.loads(text).items():
                if name == "__metadata__":
                    continue
                start, end = map(int, entry["data_offsets"])
                dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
                if not 0 <= start <= end or min(shape, default=0) < 0:
                    raise broken
                if dtype in READABLE and end - start != np.dtype(READABLE[dtype]).itemsize * math.prod(shape):
                    raise broken
                tensors[name] = _Tensor(path, dtype, shape, 8 + length + start)
                needed = max(needed, 8 + length + end)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise broken from error
    if size < needed:
        raise InputError(f"{str(path)!r} is cut off: it has {size} of {needed} bytes; download it again.")
    return tensors
