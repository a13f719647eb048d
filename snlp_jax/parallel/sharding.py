"""One shelf: which axes of the mesh every array is split over.

``TABLE`` names, for each parameter, what its dimensions count; a :class:`Layout` says which mesh axes take what is
counted. Three layouts read the one table:

    TRAINING    layers over ``layer``, heads and features over ``tensor``, what is left over ``data`` (FSDP)
    BY_LAYER    evaluation of a region, or of the sequential pass as a ring: layers over ``layer``
    BY_FEATURE  evaluation of layers in order: every layer over ``layer`` and ``tensor`` at once, by heads and features

Optimizer state lies as its parameters do. A mesh axis goes to the first dimension that it divides; one that divides
none leaves the array whole along it (heads that the devices do not divide, say), which costs memory and nothing else.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.config import ModelConfig
from snlp_jax.types import PyTree, map_named

Layout = Mapping[str, tuple[str, ...]]
"""What a dimension counts -> the mesh axes that take it."""

_WITHIN: Layout = {"heads": ("tensor",), "features": ("tensor",), "vocabulary": ("layer", "tensor")}
TRAINING: Layout = {
    "layers": ("layer",),
    **_WITHIN,
    "channels": ("data",),
    "entries": ("layer",),
    "stacked": ("layer", "data"),
}
BY_LAYER: Layout = {"layers": ("layer",), **_WITHIN, "rows": ("data",)}
BY_FEATURE: Layout = {**dict.fromkeys(_WITHIN, ("layer", "tensor")), "rows": ("data",)}

TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"blocks/attn/(query|key|value)", ("layers", "channels", "heads")),
    (r"blocks/attn/out", ("layers", "heads", "channels")),
    (r"blocks/attn/(query|key|value)_(bias|scale)", ("layers", "heads")),
    (r"blocks/mlp/(up|gate)", ("layers", "channels", "features")),
    (r"blocks/mlp/(up|gate)_(bias|scale)", ("layers", "features")),
    (r"blocks/mlp/down", ("layers", "features", "channels")),
    (r"blocks/linear_(attn|mlp)/(kernel|down)", ("layers", "channels", "features")),
    (r"blocks/linear_(attn|mlp)/(kernel|down)_scale", ("layers", "features")),
    (r"blocks/linear_(attn|mlp)/up", ("layers", "features", "channels")),
    (r"blocks/hyper/(attn|mlp)/phi", ("layers", "channels")),
    (r"blocks/.*", ("layers",)),
    (r"embed/token", ("vocabulary", "channels")),
    (r"embed/value", ("layers", "entries", "heads channels")),
    (r"embed/value_gate", ("layers", "", "heads")),
    (r"head/kernel", ("channels", "vocabulary")),
    (r"head/kernel_scale", ("vocabulary",)),
    (r"head/mtp", ("", "channels")),  # and not by outputs: docs/log.md
    (r"(embed|head)/.*", ()),
    (r"cache", ("layers", "rows", "heads")),
    (r"muon", ("stacked",)),
)
"""Pattern of an array's name (a parameter's path; "cache", keys and values of earlier tokens; "muon", matrices while
they are orthogonalised), and what its dimensions count; the first match wins."""


def spec_of(
    name: str, shape: Sequence[int], config: ModelConfig, mesh: Mesh, layout: Layout, *, is_one_layer: bool = False
) -> PartitionSpec:
    """How one array lies. ``name`` is a parameter's path, or ends with one (optimizer state); a name that the table
    does not know, such as a counter's, is on every device. A leaf of ``blocks`` that ``is_one_layer`` comes without its
    layer axis and lies as a stack of one would."""
    if is_one_layer:
        return PartitionSpec(*spec_of(name, (1, *shape), config, mesh, layout)[1:])
    counts = next((row for pattern, row in TABLE if re.search(f"(^|/){pattern}$", name)), ())
    if len(shape) < len(counts):  # a masked leaf of an optimizer, or a scalar that stands for one
        counts = ()
    used: set[str] = set()
    spec: list[tuple[str, ...] | str | None] = []
    for size, counted in zip(shape, counts, strict=False):
        axes: tuple[str, ...] = ()
        for what in counted.split():
            # Heads move as a whole: a kv head with the query heads that read it.
            units = config.num_kv_heads if what == "heads" else size
            for axis in layout.get(what, ()):
                parts = math.prod(mesh.shape[taken] for taken in (*axes, axis))
                if axis not in used and mesh.shape[axis] > 1 and units % parts == 0:
                    axes += (axis,)
                    used.add(axis)
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def shardings_of(
    tree: PyTree, config: ModelConfig, mesh: Mesh, layout: Layout, prefix: str = "", *, is_one_layer: bool = False
) -> PyTree:
    """A tree like ``tree`` (arrays or their shapes) of shardings; ``prefix`` comes before the paths of its leaves."""

    def place(name: str, leaf: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, spec_of(prefix + name, leaf.shape, config, mesh, layout, is_one_layer=is_one_layer))

    return map_named(place, tree)


def gather_channels(
    tree: PyTree, config: ModelConfig, mesh: Mesh, *, dtype: Any = None, prefix: str = "", is_one_layer: bool = False
) -> PyTree:
    """Parameters in the training layout, whole along ``channels`` from here on: what FSDP does before a weight is used.

    Under jit. Without it the compiler would rather split the activations the way the weights lie. Gradients go back
    split, by a reduce-scatter and not an all-reduce, and in float32.

    Args:
        dtype: of the matrices, cast before they travel; None leaves them as they are. Tables that are looked up and
            maps of the residual path travel in float32: gradients of a table's rows are sums over tokens, which stop
            growing in bfloat16.
        is_one_layer: the leaves of ``blocks`` come without their layer axis.
    """
    whole = {what: axes for what, axes in TRAINING.items() if what != "channels"}

    def one(name: str, leaf: jax.Array) -> jax.Array:
        name, lies = prefix + name, functools.partial(spec_of, config=config, mesh=mesh, is_one_layer=is_one_layer)
        split, gathered = lies(name, leaf.shape, layout=TRAINING), lies(name, leaf.shape, layout=whole)
        if split == gathered:
            return leaf
        is_cast = dtype is not None and "hyper" not in name and not name.startswith("embed/")
        return _gather(leaf, mesh, split, gathered, dtype if is_cast else leaf.dtype)

    return map_named(one, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(leaf: jax.Array, mesh: Mesh, split: PartitionSpec, gathered: PartitionSpec, dtype: Any) -> jax.Array:
    return constrain(leaf.astype(dtype), mesh, gathered)


def _gather_bwd(
    mesh: Mesh, split: PartitionSpec, gathered: PartitionSpec, dtype: Any, _: None, grad: jax.Array
) -> tuple[jax.Array]:
    return (constrain(grad.astype(jax.numpy.float32), mesh, split),)


_gather.defvjp(lambda *args: (_gather(*args), None), _gather_bwd)


def constrain(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """``x`` under jit, held to lie so; inside ``shard_map`` ``spec`` may name the axes that it leaves automatic."""
    current = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh if current.empty else current, spec))


def spread_matrices(tree: PyTree, config: ModelConfig, mesh: Mesh | None) -> PyTree:
    """Stacked matrices [L, m, n] under jit, each whole along ``data``: with as many layers as places every product of
    a Newton-Schulz iteration is then local (but along ``tensor``, which the compiler may keep as it finds it)."""
    if mesh is None or mesh.size == 1:
        return tree
    rest = PartitionSpec.UNCONSTRAINED if mesh.shape["tensor"] > 1 else None

    def one(x: jax.Array) -> jax.Array:
        spec = spec_of("muon", x.shape, config, mesh, TRAINING) or PartitionSpec(None)
        return constrain(x, mesh, PartitionSpec(*spec, rest, rest))

    return jax.tree.map(one, tree)


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes of a tree, each with its sharding: what ahead-of-time compilation and restoring read."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, tree, shardings)


def bytes_per_device(tree: PyTree) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes, with shardings."""

    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
