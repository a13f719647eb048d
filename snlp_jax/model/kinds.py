"""Layers of several kinds: who owns a parameter, and how layers of one kind are cut from ragged stacks.

Each branch of a layer is whole, linear or dropped (``ModelConfig.kinds``). Every sub-tree of ``params['blocks']`` is a
stack of the layers that have it, in order of depth: leaves of ``attn`` are [L - n, ...] where n layers have none.
Nothing is padded, and a model of whole layers has the stacks [L, ...] that it always had.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import Branch, Kind, ModelConfig
from snlp_jax.types import Array, Groups, PyTree

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


def kind_of(block: PyTree) -> Kind:
    """The kind of a layer, or of a stack of layers of one kind, from the tree of its parameters."""

    def find(name: str) -> Branch:
        return "full" if name in block else "linear" if f"linear_{name}" in block else "none"

    return Kind(find("attn"), find("mlp"))


def kinds_in(config: ModelConfig, start: int, stop: int) -> dict[Kind, tuple[int, ...]]:
    """Layers ``start`` to ``stop - 1`` by their kinds, which stand in the order of their first layers."""
    layers: dict[Kind, tuple[int, ...]] = {}
    for layer, kind in enumerate(config.kinds[start:stop], start):
        layers[kind] = (*layers.get(kind, ()), layer)
    return layers


def take(config: ModelConfig, blocks: PyTree, layers: Sequence[int]) -> PyTree:
    """The stack [n, ...] of layers of one kind, cut from ragged stacks: a slice where they stand next to each other in
    theirs, else a copy."""

    def cut(path: str, leaf: Array) -> Array | None:
        place = {layer: row for row, layer in enumerate(owners(config, path))}
        if layers[0] not in place:
            return None
        rows = [place[layer] for layer in layers]
        is_slice = rows == list(range(rows[0], rows[0] + len(rows)))
        return leaf[rows[0] : rows[0] + len(rows)] if is_slice else leaf[np.asarray(rows)]

    return _map_present(cut, blocks)


def cut(config: ModelConfig, blocks: PyTree, start: int, stop: int) -> PyTree:
    """Layers ``start`` to ``stop - 1`` of ragged stacks: a stack, or where they differ the stacks of their kinds, those
    without a full branch one each: the solver reads them one by one."""
    kinds = kinds_in(config, start, stop)
    if len(kinds) == 1:
        return take(config, blocks, tuple(range(start, stop)))
    parts: list[tuple[int, ...]] = []
    for kind, layers in kinds.items():
        parts += [layers] if "full" in kind else [(layer,) for layer in layers]
    members = tuple(tuple(layer - start for layer in layers) for layers in parts)
    return Groups(tuple(take(config, blocks, layers) for layers in parts), members)


def in_a_row(config: ModelConfig, blocks: PyTree, start: int, stop: int) -> PyTree:
    """As :func:`cut`, to be run in order under jit: layers that differ are a list, none of them copied twice."""
    if len(kinds_in(config, start, stop)) == 1:
        return cut(config, blocks, start, stop)
    return [jax.tree.map(lambda leaf: leaf[0], take(config, blocks, (layer,))) for layer in range(start, stop)]


def each_stack(fn: Callable[[PyTree], PyTree], blocks: PyTree) -> PyTree:
    """``fn`` of a stack, or of the stack of every kind."""
    if isinstance(blocks, Groups):
        return Groups(tuple(map(fn, blocks.groups)), blocks.members)
    return fn(blocks)


def of_all(blocks: PyTree, name: str) -> PyTree:
    """The stack of a sub-tree that all layers have, in order of depth; copied where they are of several kinds."""
    if not isinstance(blocks, Groups):
        return blocks[name]
    return join([{name: group[name]} for group in blocks.groups], blocks.members)[name]


def join(groups: Sequence[PyTree], members: Sequence[Sequence[int]]) -> PyTree:
    """Ragged stacks of all layers from the stacks of their kinds: the inverse of :func:`cut`."""
    if len(groups) == 1:
        return groups[0]
    parts: dict[tuple[str, ...], list[tuple[Sequence[int], Array]]] = {}
    for group, layers in zip(groups, members, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(group):
            parts.setdefault(tuple(key.key for key in path), []).append((layers, leaf))
    joined: dict[str, Any] = {}
    for keys, held in parts.items():
        node = joined
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        order = np.argsort(np.concatenate([np.asarray(layers) for layers, _ in held]))
        leaf = held[0][1] if len(held) == 1 else jnp.concatenate([leaf for _, leaf in held])[order]
        node[keys[-1]] = leaf
    return joined


def _map_present(fn: Callable[[str, Array], Array | None], tree: PyTree, prefix: str = "") -> PyTree:
    """``fn(path, leaf)`` of a nested dict, without what it gives None for."""
    made: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        new = (_map_present(fn, node, path + "/") or None) if isinstance(node, dict) else fn(path, node)
        if new is not None:
            made[name] = new
    return made
