"""The device mesh: axes ``('data', 'layer', 'tensor')``, those of size 1 kept so that specs never change."""

import math

import jax
from jax.sharding import AxisType, Mesh

from snlp_jax.errors import InputError

AXES = ("data", "layer", "tensor")


def make_mesh(*, data: int = 1, layer: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first ``data * layer * tensor`` devices.

    Raises:
        InputError: there are fewer devices.
    """
    shape = (data, layer, tensor)
    needed, have = math.prod(shape), jax.device_count()
    if needed > have:
        raise InputError(f"a mesh of {data} x {layer} x {tensor} needs {needed} devices, but there are {have}.")
    # Auto, not Explicit: with a sharded layer axis Explicit rejects scan and associative_scan.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:needed])
