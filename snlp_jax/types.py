"""Type aliases and the legend of axis letters used in names, einsum strings and sharding specs.

B batch, T query time, S key time, D embed, F mlp, N query heads, K kv heads, G = N/K, H head dim, V vocab,
L layers (of the model, or of the parallel region at hand), C chunks, M layers per chunk, R residual streams.
A name such as ``h_LBTD`` wears its shape. Iterations are always ``num_iters``, never K.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Array = jax.Array
PyTree = Any
Params = dict[str, Any]
"""Nested dict of arrays. Everything under ``params['blocks']`` leads with the layer axis: that of the layers which have
it, see ``snlp_jax/model/kinds.py``."""


class Batch(NamedTuple):
    """What a training step reads: numpy arrays from the data, jax arrays in the step."""

    tokens: Any
    """int32 [B, T + 1]; the first T are inputs, the last T targets."""
    weight: Any = None
    """float32 [B, T]: how much each target counts; None where all count alike."""
    document: Any = None
    """int32 [B, T + 1]: number of the document, in its row, that each token belongs to, where tokens attend to their
    own document alone; None where they attend to whatever stands before them."""


def is_list(weights: PyTree) -> bool:
    """Whether the weights of several nodes are a list with one tree a node, and not a stack, leaves [n, ...]: the two
    forms that there are. The same holds for contexts and for what nodes leave behind."""
    return isinstance(weights, list)


def map_named(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """``function(name, leaf)`` of every leaf, whose name is its path, such as ``blocks/attn/query``."""
    named = lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)  # noqa: E731
    return jax.tree_util.tree_map_with_path(named, tree)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves of a nested dict by their names, which are their paths, such as ``blocks/attn/query``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> PyTree:
    """The nested dict of leaves by their names: the inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
