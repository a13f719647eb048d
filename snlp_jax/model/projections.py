"""The matrices of a layer as its maths reads them: as they are trained, or as evaluation prefers them.

    y = (x W) s + b,    s_O the scales of a kernel of eight bits, 1 of others

Those that read one input may be joined into one kernel, ``W = [W_q | W_k | W_v]`` or ``[W_up | W_gate]``, with their
biases and scales: every output is then the same sum, and one product is issued in place of two or three. The names of a
layer's leaves say which form it has: ``query``, ``key``, ``value`` or ``qkv``; ``NAME_scale`` beside a kernel of eight
bits (``snlp_jax/quantize.py``); ``NAME_t``, [O, I], for a kernel that is kept transposed.
"""

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp

from snlp_jax.config import ModelConfig
from snlp_jax.types import Array, Params, PyTree

PARTS = ("attn", "mlp", "linear_attn", "linear_mlp")
"""Sub-trees of a layer that hold kernels."""
JOINED: dict[str, tuple[str, tuple[str, ...]]] = {
    "attn": ("qkv", ("query", "key", "value")),
    "mlp": ("up_gate", ("up", "gate")),
}
"""By part: the name of the joined kernel, and those that it is made of."""
TRANSPOSED_FROM = 512
"""Width from which a CPU that evaluates few tokens at once keeps kernels transposed: those of narrower layers stay in
its cache, where both forms are as fast. ``python -m snlp_jax.infer RUN --tune`` measures it (docs/log.md)."""
FEW_TOKENS = 64
"""Up to how many tokens (batch x length) of a pass a CPU is faster with transposed kernels."""


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


def transpose_kernels(params: Params) -> Params:
    """Every kernel [.., I, O] of the layers and of an untied head as ``NAME_t`` [.., O, I]; copies those that are not
    so yet."""

    def of_part(tree: PyTree) -> PyTree:
        names = [name for name, leaf in tree.items() if leaf.ndim == 3 and not name.endswith("_t")]
        return {name: leaf for name, leaf in tree.items() if name not in names} | {
            f"{name}_t": _swapped(tree[name]) for name in names
        }

    blocks, head = params["blocks"], params["head"]
    blocks = {name: of_part(tree) if name in PARTS else tree for name, tree in blocks.items()}
    if "kernel" in head:
        head = {name: leaf for name, leaf in head.items() if name != "kernel"} | {"kernel_t": _swapped(head["kernel"])}
    return params | {"blocks": blocks, "head": head}


_swapped = jax.jit(lambda kernel: jnp.swapaxes(kernel, -1, -2))


def head_kernel(params: Params, *, is_tied: bool, is_few: bool) -> tuple[Array, bool]:
    """The head's kernel, and whether it is [V, D]: the table of a tied head is a transposed kernel, which a CPU
    multiplies few rows by as it lies (``is_few``)."""
    if is_tied:
        table_VD = params["embed"]["token"]
        return (table_VD, True) if is_few else (table_VD.T, False)
    head = params["head"]
    return (head["kernel_t"], True) if "kernel_t" in head else (head["kernel"], False)


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
