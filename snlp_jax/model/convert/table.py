"""Tables that pair tensor names with leaves of ``params``, and their use: leaf by leaf from files, and back to files.

torch keeps a Linear weight as [out, in] and the layers apart; here a kernel is [in, out] and the layers are stacked.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.model.convert.tensor_files import Index, Tensor, TensorFiles, write_files
from snlp_jax.model.lm import LanguageModel
from snlp_jax.types import Params, PyTree


@dataclass(frozen=True)
class Row:
    """One leaf of ``params`` and the tensors it is made of: one, or one a layer (a head) where the leaf is a stack."""

    path: str
    template: str
    layout: Literal["same", "transposed", "unit"]
    """Of a tensor beside its leaf; ``unit``: the tensor has an extra leading axis of length 1."""
    layers: tuple[int, ...] = ()
    """Layers (or heads) of the stack; empty where the leaf is not one."""

    @property
    def is_stacked(self) -> bool:
        return bool(self.layers)

    @property
    def names(self) -> list[str]:
        return [self.template.format(layer) for layer in self.layers] or [self.template]

    def shape_in_torch(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return {"same": shape, "transposed": shape[::-1], "unit": (1, *shape)}[self.layout]

    def to_torch(self, tensor: np.ndarray) -> np.ndarray:
        """A view."""
        return {"same": tensor, "transposed": tensor.T, "unit": tensor[None]}[self.layout]

    def index_in_torch(self, index: Index) -> Index:
        return {"same": index, "transposed": index[::-1], "unit": (slice(None), *index)}[self.layout]


def read_params(
    files: TensorFiles, config: ModelConfig, rows: Sequence[Row], unused: str = "", shardings: PyTree = None
) -> Params:
    """Float32 parameters, one leaf after the other, each straight onto its sharding.

    Beside the parameters the host holds one leaf (on a mesh, one device's part of it) and a block of a file.

    Args:
        unused: pattern of names that may be there and are not read.
        shardings: a tree like the parameters; the first device where there is none.

    Raises:
        InputError: names a tensor that is missing, has the wrong shape or type, or has no place in the model; or a
            file that is broken.
    """
    shapes = LanguageModel(config).abstract_params()
    check_rows(rows, shapes)
    for row in rows:  # before anything is read
        leaf_shape = get_leaf(shapes, row.path).shape[row.is_stacked :]
        for name in row.names:
            files.check(name, row.shape_in_torch(leaf_shape))
    known = {name for row in rows for name in row.names}
    for name in files:
        if name not in known and not re.fullmatch(unused, name):
            raise InputError(f"{files} holds the tensor {name!r}, which the model has no place for.")
    params: Params = {}
    for row in rows:
        shape = get_leaf(shapes, row.path).shape
        sharding = get_leaf(shardings, row.path) if shardings is not None else None
        set_leaf(params, row.path, _read_leaf(files, row, shape, sharding))
    return params


def _read_leaf(files: TensorFiles, row: Row, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        bounds = [where.indices(size)[:2] for where, size in zip(index, shape, strict=True)]
        leaf = np.empty([stop - start for start, stop in bounds], np.float32)
        inner = row.index_in_torch(index[row.is_stacked :])
        names, parts = (row.names[slice(*bounds[0])], leaf) if row.is_stacked else (row.names, leaf[None])
        for place, name in enumerate(names):
            files.read_into(name, inner, row.to_torch(parts[place, ...]))  # a view, of a single number too
        return leaf

    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.block_until_ready(
        jax.make_array_from_callback(shape, sharding, part)
    )  # the next one may then take the room of its copy


def write_params(
    params: Params, config: ModelConfig, rows: Sequence[Row], folder: Path, dtype: str, max_shard_bytes: int
) -> list[Path]:
    """Inverse of :func:`read_params`: tensors in .safetensors files of at most ``max_shard_bytes`` (or one tensor)."""
    check_rows(rows, LanguageModel(config).abstract_params())

    def of_row(row: Row) -> Iterator[Tensor]:
        leaf = get_leaf(params, row.path)
        shape = row.shape_in_torch(leaf.shape[row.is_stacked :])
        tensor = lambda index: lambda: row.to_torch(np.asarray(leaf[index]))  # noqa: E731
        for place, name in enumerate(row.names):
            yield Tensor(name, shape, tensor(place if row.is_stacked else ...))

    return write_files(folder, [tensor for row in rows for tensor in of_row(row)], dtype, max_shard_bytes)


def check_rows(rows: Sequence[Row], shapes: Params) -> None:
    """Refuse a table that leaves out a part of the model.

    Raises:
        InputError: names the first leaf that no row makes.
    """
    made = {row.path for row in rows}
    for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in made:
            raise InputError(f"this format has no tensor for {name!r}, which the model has.")


def check_whole(config: ModelConfig) -> None:
    """Refuse a model that no other format knows.

    Raises:
        InputError: names its layers that are not as trained.
    """
    if config.replaced_layers:
        raise InputError(
            f"layers {config.replaced_layers} have linear or dropped branches, which this format has no tensors for; "
            "give the run that they were replaced in."
        )


def get_leaf(params: Params, path: str) -> Any:
    for key in path.split("/"):
        params = params[key]
    return params


def set_leaf(params: Params, path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        params = params.setdefault(key, {})
    params[last] = leaf
