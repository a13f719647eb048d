"""Tables that pair tensor names with leaves of ``params``, and their use: leaf by leaf from files, and back to files.

torch keeps a Linear weight as [out, in] and the layers apart; here a kernel is [in, out] and the layers are stacked.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.memory import check_room
from snlp_jax.model.convert.tensor_files import Index, Tensor, TensorFiles, write_files
from snlp_jax.model.lm import LanguageModel
from snlp_jax.types import Params, PyTree, flatten, unflatten

Layout = Literal["same", "transposed", "unit"]
"""Of a tensor beside its leaf; ``unit``: the tensor has an extra leading axis of length 1."""
Table = Mapping[Layout, Mapping[str, str]]
"""A format: of every layout the leaves and their tensors' names, with ``{}`` for the layer (or head) in a stack."""


@dataclass(frozen=True)
class Row:
    """One leaf of ``params`` and the tensors it is made of: one, or one a layer (a head) where the leaf is a stack."""

    path: str
    shape: tuple[int, ...]
    """Of the leaf."""
    names: Sequence[str]
    """Of the tensors."""
    layout: Layout
    is_stacked: bool

    @property
    def shape_in_torch(self) -> tuple[int, ...]:
        """Of a tensor."""
        shape = self.shape[self.is_stacked :]
        return {"same": shape, "transposed": shape[::-1], "unit": (1, *shape)}[self.layout]

    def to_torch(self, tensor: np.ndarray) -> np.ndarray:
        """A view."""
        return {"same": tensor, "transposed": tensor.T, "unit": tensor[None]}[self.layout]

    def index_in_torch(self, index: Index) -> Index:
        return {"same": index, "transposed": index[::-1], "unit": (slice(None), *index)}[self.layout]


def rows_of(config: ModelConfig, table: Table) -> list[Row]:
    """Where every tensor of a model goes.

    Raises:
        InputError: names a part of the model that the format has no tensor for.
    """
    if config.replaced_layers:
        raise InputError(
            f"layers {config.replaced_layers} have linear or dropped branches, which this format has no tensors for; "
            "give the run that they were replaced in."
        )
    found = {path: (layout, name) for layout, names in table.items() for path, name in names.items()}
    rows: list[Row] = []
    for path, leaf in flatten(LanguageModel(config).abstract_params()).items():
        if path not in found:
            raise InputError(f"this format has no tensor for {path!r}, which the model has.")
        layout, name = found[path]
        layers = config.value_embed_layers if path.startswith("embed/") else range(leaf.shape[0] if leaf.shape else 0)
        names = [name.format(layer) for layer in layers] if "{}" in name else [name]
        rows.append(Row(path, leaf.shape, names, layout, "{}" in name))
    return rows


def read_params(files: TensorFiles, rows: Sequence[Row], unused: str = "", shardings: PyTree = None) -> Params:
    """Float32 parameters, one leaf after the other, each straight onto its sharding.

    Beside the parameters the host holds one leaf (on a mesh, one device's part of it) and a block of a file.

    Args:
        unused: pattern of names that may be there and are not read.
        shardings: a tree like the parameters; the first device where there is none.

    Raises:
        InputError: names a tensor that is missing, has the wrong shape or type, or has no place in the model; or a
            file that is broken; or they take more memory than is free.
    """
    known = {name: row.shape_in_torch for row in rows for name in row.names}
    for name, shape in known.items():  # before anything is read
        files.check(name, shape)
    for name in files:
        if name not in known and not re.fullmatch(unused, name):
            raise InputError(f"{files} holds the tensor {name!r}, which the model has no place for.")
    if shardings is None:
        needed = sum(4 * math.prod(row.shape) for row in rows)
        check_room(f"the parameters of {files}", needed, "end other programs, or spread them over devices with --mesh")
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding_of = flatten(shardings)
    return unflatten({row.path: _read_leaf(files, row, sharding_of.get(row.path, first)) for row in rows})


def _read_leaf(files: TensorFiles, row: Row, sharding: jax.sharding.Sharding) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        bounds = [where.indices(size)[:2] for where, size in zip(index, row.shape, strict=True)]
        leaf = np.empty([stop - start for start, stop in bounds], np.float32)
        inner = row.index_in_torch(index[row.is_stacked :])
        names, parts = (row.names[slice(*bounds[0])], leaf) if row.is_stacked else (row.names, leaf[None])
        for place, name in enumerate(names):
            files.read_into(name, inner, row.to_torch(parts[place, ...]))  # a view, of a single number too
        return leaf

    # Waited for: the next one may then take the room of its copy.
    return jax.block_until_ready(jax.make_array_from_callback(row.shape, sharding, part))


def tensors_of(params: Params, rows: Sequence[Row]) -> Iterator[Tensor]:
    """Tensors by name, made one by one; their dtypes are kept."""
    leaves = flatten(params)
    for row in rows:
        for place, name in enumerate(row.names):
            index = place if row.is_stacked else ...
            make = lambda row=row, index=index: row.to_torch(np.asarray(leaves[row.path][index]))  # noqa: E731
            yield Tensor(name, row.shape_in_torch, make)


def write_params(params: Params, rows: Sequence[Row], folder: Path, dtype: str, max_shard_bytes: int) -> list[Path]:
    """Inverse of :func:`read_params`: tensors in .safetensors files of at most ``max_shard_bytes`` (or one tensor)."""
    return write_files(folder, list(tensors_of(params, rows)), dtype, max_shard_bytes)
