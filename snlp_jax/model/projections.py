"""The matrices of a layer as its maths reads them: as they are trained, or as evaluation prefers them.

    y = (x W) s + b,    s_O the scales of a kernel of eight bits, 1 of others

Those that read one input may be joined into one kernel, ``W = [W_q | W_k | W_v]`` or ``[W_up | W_gate]``, with their
biases and scales: every output is then the same sum, and one product is issued in place of two or three. The names of a
layer's leaves say which form it has: ``query``, ``key``, ``value`` or ``qkv``; ``NAME_scale`` beside a kernel of eight
bits (``snlp_jax/quantize.py``).
"""

from collections.abc import Sequence
from itertools import accumulate

import jax.numpy as jnp

from snlp_jax.config import ModelConfig
from snlp_jax.types import PyTree

PARTS = ("attn", "mlp", "linear_attn", "linear_mlp")
"""Sub-trees of a layer that hold kernels."""
JOINED: dict[str, tuple[str, tuple[str, ...]]] = {
    "attn": ("qkv", ("query", "key", "value")),
    "mlp": ("up_gate", ("up", "gate")),
}
"""By part: the name of the joined kernel, and those that it is made of."""


def head_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Columns of queries, keys and values in their joined kernel."""
    kv_width = config.num_kv_heads * config.head_dim
    return config.num_heads * config.head_dim, kv_width, kv_width


def join_projections(blocks: PyTree) -> PyTree:
    """Kernels [.., D, X] that read one input as one [.., D, sum X]; copies them once, and nothing if that is done."""
    made = dict(blocks)
    for part, (joined, names) in JOINED.items():
        if not set(names) <= made.get(part, {}).keys():
            continue
        tree = dict(made[part])
        for what in ("", "_bias", "_scale"):
            if names[0] + what in tree:
                tree[joined + what] = jnp.concatenate([tree.pop(name + what) for name in names], axis=-1)
        made[part] = tree
    return made


def separate_projections(layer: PyTree, part: str, widths: Sequence[int]) -> PyTree:
    """One part of :func:`join_projections` undone, under jit: a program that uses some of the kernels reads those alone
    (compiled for a GPU it copies none of them; all three would be read for keys and values otherwise)."""
    joined, names = JOINED[part]
    if joined not in layer.get(part, {}):
        return layer
    tree = dict(layer[part])
    for what in ("", "_bias", "_scale"):
        if joined + what in tree:
            slices = jnp.split(tree.pop(joined + what), list(accumulate(widths))[:-1], axis=-1)
            tree |= {name + what: leaf for name, leaf in zip(names, slices, strict=True)}
    return layer | {part: tree}
