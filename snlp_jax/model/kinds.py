"""Layers of several kinds: who owns a parameter, and how layers of one kind are cut from ragged stacks.

Each branch of a layer is whole, linear or dropped (``ModelConfig.kinds``). Every sub-tree of ``params['blocks']`` is a
stack of the layers that have it, in order of depth: leaves of ``attn`` are [L - n, ...] where n layers have none.
Nothing is padded, and a model of whole layers has the stacks [L, ...] that it always had.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import Kind, ModelConfig
from snlp_jax.types import Array, PyTree, flatten, unflatten

_SUBTREES = {
    "attn": ("attn", "full"),
    "linear_attn": ("attn", "linear"),
    "mlp": ("mlp", "full"),
    "linear_mlp": ("mlp", "linear"),
}


def owners(config: ModelConfig, path: str) -> tuple[int, ...]:
    """Layers that have the leaf ``path`` of the blocks, such as ``attn/query``, in order of depth."""
    first, *rest = path.split("/")
    first = rest[0].removesuffix("_post") if first == "norms" else first
    if first not in _SUBTREES:
        return tuple(range(config.num_layers))
    branch, what = _SUBTREES[first]
    return tuple(layer for layer, kind in enumerate(config.kinds) if getattr(kind, branch) == what)


def kinds_in(config: ModelConfig, start: int, stop: int) -> dict[Kind, tuple[int, ...]]:
    """Layers ``start`` to ``stop - 1`` by their kinds, which stand in the order of their first layers."""
    layers: dict[Kind, tuple[int, ...]] = {}
    for layer, kind in enumerate(config.kinds[start:stop], start):
        layers[kind] = (*layers.get(kind, ()), layer)
    return layers


def is_affine(config: ModelConfig, layer: int) -> bool:
    """Whether the layer is affine in its state: both its branches are linear or dropped, and no map between streams
    depends on the token."""
    is_steady = not config.num_streams or config.hyper_maps == "static"
    return is_steady and "full" not in config.kinds[layer]


def must_unroll(config: ModelConfig, start: int, stop: int) -> bool:
    """Whether layers ``start`` to ``stop - 1`` have to be read one by one: they differ, or some are affine."""
    return len(set(config.kinds[start:stop])) > 1 or any(is_affine(config, layer) for layer in range(start, stop))


def cut(config: ModelConfig, blocks: PyTree, start: int, stop: int) -> PyTree:
    """Layers ``start`` to ``stop - 1`` of ragged stacks: a stack, or where :func:`must_unroll` a list of trees.

    Outside jit on a CPU nothing is copied, see :func:`rows_of`. Under jit a layer of a list is read where it lies.
    """
    if must_unroll(config, start, stop):
        return [layer_of(take(config, blocks, layer, layer + 1), 0) for layer in range(start, stop)]
    return take(config, blocks, start, stop)


def take(config: ModelConfig, blocks: PyTree, start: int, stop: int) -> PyTree:
    """The stack [n, ...] of layers of one kind, cut from ragged stacks."""

    def one(path: str, leaf: Array) -> Array | None:
        place = {layer: row for row, layer in enumerate(owners(config, path))}
        return rows_of(leaf, place[start], place[start] + stop - start) if start in place else None

    return map_present(one, blocks)


def rows_of(leaf: Array, start: int, stop: int) -> Array:
    """``leaf[start:stop]``. Of an array in a CPU's memory a view, where its rows are aligned to 64 bytes."""
    return leaf if (start, stop) == (0, leaf.shape[0]) else _at(leaf, slice(start, stop))


def layer_of(tree: PyTree, row: int) -> PyTree:
    """One row of every leaf, as :func:`rows_of` cuts it."""
    return jax.tree.map(lambda leaf: _at(leaf, row), tree)


def _at(leaf: Array, index: int | slice) -> Array:
    """``leaf[index]``, of which numpy makes a view where it can look into the array without a copy."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable:
        default = jax.devices()[0]
        if default.platform == "cpu" and leaf.devices() == {default}:
            return jax.device_put(np.asarray(leaf)[index], may_alias=True)
    return leaf[index]


def join(groups: Sequence[PyTree], members: Sequence[Sequence[int]]) -> PyTree:
    """Ragged stacks of all layers from the stacks of their kinds: the inverse of :func:`take`."""
    leaves_of = [flatten(group) for group in groups]

    def one(path: str) -> Array:
        held = [(leaves[path], layers) for leaves, layers in zip(leaves_of, members, strict=True) if path in leaves]
        order = np.argsort(np.concatenate([layers for _, layers in held]))
        return held[0][0] if len(held) == 1 else jnp.concatenate([leaf for leaf, _ in held])[order]

    return unflatten({path: one(path) for path in sorted(set().union(*leaves_of))})


def map_present(fn: Callable[[str, Array], Array | None], tree: PyTree) -> PyTree:
    """``fn(path, leaf)`` of a nested dict, without what it gives None for."""
    made = {path: fn(path, leaf) for path, leaf in flatten(tree).items()}
    return unflatten({path: leaf for path, leaf in made.items() if leaf is not None})
