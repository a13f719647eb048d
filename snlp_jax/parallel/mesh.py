"""The device mesh: axes ``('data', 'layer', 'tensor')``, those of size 1 kept so that specs never change."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from snlp_jax.config import MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.parallel.sharding import constrain
from snlp_jax.types import PyTree

AXES = ("data", "layer", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config over the first of ``devices`` (all there are, by default).

    Processes own neighbouring devices, and ``tensor`` runs fastest: what is exchanged most often stays in one host.

    Raises:
        InputError: there are fewer devices, or ``data=0`` cannot use all of them; or some process would own none.
    """
    have = jax.devices() if devices is None else list(devices)
    others = config.layer * config.tensor
    shape = (config.data or max(len(have) // others, 1), config.layer, config.tensor)
    needed, size = math.prod(shape), " x ".join(map(str, shape))
    if needed > len(have):
        raise InputError(f"a mesh of {size} needs {needed} devices, but there are {len(have)}.")
    if needed < len(have) and config.data == 0:
        raise InputError(f"{len(have)} devices do not divide by mesh.layer x mesh.tensor = {others}; change one.")
    used = have[:needed]
    if {device.process_index for device in used} != {device.process_index for device in have}:
        raise InputError(f"a mesh of {size} leaves some of the {jax.process_count()} processes without a device.")
    if devices is not None:
        return Mesh(np.asarray(used).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)
    # Auto, not Explicit: with a sharded layer axis Explicit rejects scan and associative_scan.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=used)


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """``(index, count)``: of the ``count`` equal parts of a batch that processes feed, this one feeds part ``index``.

    Processes that hold the same rows feed the same part.
    """
    process = jax.process_index()
    rows = sorted({place[0] for place, device in np.ndenumerate(mesh.devices) if device.process_index == process})
    count = mesh.shape["data"] // len(rows)
    if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise InputError("the data axis of the mesh is not divided evenly among the processes; change mesh.data.")
    return rows[0] // len(rows), count


def put_batch(mesh: Mesh | None, rows: PyTree, *, is_whole: bool = False) -> PyTree:
    """Rows of host memory, arrays [B, ...], each as one array whose first axis is spread over ``data``.

    Args:
        rows: this process's part of the batch (:func:`data_shard`), or with ``is_whole`` the whole of it.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, rows)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    index, count = (0, 1) if is_whole else data_shard(mesh)

    def put(part: np.ndarray) -> jax.Array:
        first, shape = index * part.shape[0], (count * part.shape[0], *part.shape[1:])

        def piece(place: Any) -> np.ndarray:
            start, stop, _ = place[0].indices(shape[0])
            return part[start - first : stop - first]

        return jax.make_array_from_callback(shape, sharding, piece)

    return jax.tree.map(put, rows)


def over_data(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """``x`` [B, ...] under jit, held to be spread over ``data`` by its batch and whole otherwise. Inside of
    ``shard_map`` over ``data`` it is so already."""
    if mesh is None or "data" in jax.sharding.get_abstract_mesh().manual_axes:
        return x
    return constrain(x, mesh, PartitionSpec("data"))


def kernels_on(mesh: Mesh | None, *, is_spread: bool) -> tuple[Literal["cudnn", "splash", "triton", "mosaic"], ...]:
    """Hand-written attention kernels that run over a mesh: where no axis of several devices is left to the compiler,
    that is, where layers are spread and ``tensor`` is 1; cuDNN's also where only the batch is spread."""
    if mesh is None or mesh.size == 1 or (is_spread and mesh.shape["tensor"] == 1):
        return ("cudnn", "splash", "triton", "mosaic")
    return ("cudnn",) if mesh.shape["data"] == mesh.size else ()
