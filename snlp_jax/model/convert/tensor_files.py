"""Tensors in .safetensors files, by the library of that name: read in blocks of rows, written a file at a time.

A folder holds one file, or several and an index that says which tensor is in which. A file is opened anew for every
tensor that is read: the library maps it, and what was read would stay in memory as long as it is open.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from snlp_jax.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
READABLE: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types of tensors that are numbers of a model, as their headers name them."""
BLOCK_BYTES = 2**25
"""Of a tensor that are read at once."""

Index = tuple[slice, ...]
"""Part of a tensor: a slice of each axis, without steps."""


class Tensor(NamedTuple):
    """A tensor to be written, made when its file is."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


class _Entry(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a folder, or of one file; nothing but headers is read before they are asked for.

    Raises:
        InputError: there is no file, an index names one that is missing, or one is broken or cut off.
    """

    def __init__(self, source: Path):
        self._source = source
        self._tensors: dict[str, _Entry] = {}
        for path in _paths(source):
            try:
                with safe_open(path, framework="numpy") as file:
                    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            except SafetensorError as error:
                raise InputError(f"{str(path)!r} is cut off or broken ({error}); download it again.") from error
            for name, each in slices.items():
                self._tensors[name] = _Entry(path, str(each.get_dtype()), tuple(each.get_shape()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

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
        with safe_open(tensor.path, framework="numpy") as file:
            if not tensor.shape:
                target[...] = file.get_tensor(name)
                return
            first, last, _ = index[0].indices(tensor.shape[0])
            row_bytes = math.prod(tensor.shape[1:]) * np.dtype(READABLE[tensor.dtype]).itemsize
            step = max(1, BLOCK_BYTES // max(1, row_bytes))
            rows = file.get_slice(name)
            for row in range(first, last, step):
                stop = min(row + step, last)
                target[row - first : stop - first] = rows[(slice(row, stop), *index[1:])]


class StateDict(TensorFiles):
    """Arrays in memory, read as files are."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self._tensors = {name: _Entry(Path(), "F32", np.shape(array)) for name, array in arrays.items()}

    def __str__(self) -> str:
        return "the state dict"

    def read_into(self, name: str, index: Index, target: np.ndarray) -> None:
        target[...] = self._arrays[name][index]


def write_files(folder: Path, tensors: Sequence[Tensor], dtype: str, max_shard_bytes: int) -> list[Path]:
    """Write tensors into as few files as ``max_shard_bytes`` allows; memory holds one file's."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    shards: list[list[Tensor]] = [[]]
    size = total = 0
    for tensor in tensors:
        num_bytes = kind.itemsize * math.prod(tensor.shape)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + num_bytes, total + num_bytes
    paths: list[Path] = []
    where: dict[str, str] = {}
    for number, shard in enumerate(shards):
        several = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        path = folder / (several if len(shards) > 1 else SINGLE_NAME)
        arrays = {tensor.name: np.ascontiguousarray(tensor.make().astype(kind)) for tensor in shard}
        save_file(arrays, path, metadata={"format": "pt"})
        where |= dict.fromkeys(arrays, path.name)
        paths.append(path)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _paths(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if (index := source / INDEX_NAME).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{str(index)!r} is not an index of tensors; download it again.") from error
        for name in names:
            if "/" in name or "\\" in name or not (source / name).is_file():
                raise InputError(f"{str(source)!r} lacks the file {name!r}, which its index names; download it again.")
        return [source / name for name in names]
    if (source / SINGLE_NAME).is_file():
        return [source / SINGLE_NAME]
    raise InputError(
        f"{str(source)!r} holds neither {SINGLE_NAME} nor {INDEX_NAME}; convert its weights to them first."
    )
