"""Kernels of eight bits for evaluation, one scale an output channel: ``W ~ q s``.

    s_O = c_O max_i |W_iO| / m,   q = round(W / s) clipped to [-m, m]          m = 127 (int8), 448 (float8_e4m3fn)
    y = (x q) s                                                               q cast to the compute dtype

Only the weights are quantised: bfloat16 holds every ``q``, so the product is that of the kernel ``q s``, whose scale is
applied to the result. The kernels of attention, MLPs, linear maps and an untied head take half the bytes of bfloat16;
embeddings, norms, scales, gates, maps between streams and heads that look further ahead stay as they are.

With c = 1 nothing is clipped and ``|W - q s| <= s / 2`` (int8). Calibrated, every channel takes the c of
:data:`CLIP_RATIOS` that adds the least error to its output on a text, of whose inputs the diagonal of the second moment
is known:

    E |x (W - q s)|^2_O ~ sum_i E[x_i^2] (W - q s)_iO^2

c = 1 is among them, so that this error never exceeds that of plain scales.

Compiled for GPUs and TPUs the conversion of ``q`` is part of the product, and nothing the size of a weight is written
(``tests/test_aot.py``). A CPU converts before each product and mostly loses time (docs/log.md).
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import WeightPrecision, check_weights
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import Context, Shared
from snlp_jax.model.projections import PARTS
from snlp_jax.solver import Schedule
from snlp_jax.types import Array, Params, PyTree

CLIP_RATIOS = tuple(1.0 - 0.02 * i for i in range(20))
"""The first of equally good ones is taken: 1, which clips nothing."""
_FORMATS: dict[str, tuple[Any, float]] = {"int8": (jnp.int8, 127.0), "float8": (jnp.float8_e4m3fn, 448.0)}


def quantize(params: Params, precision: WeightPrecision, squares: PyTree = None) -> Params:
    """Parameters with ``q`` in place of every kernel and ``s`` beside it, as ``NAME_scale``; everything that evaluates
    takes them as it takes others. Training does not: no gradient passes through a rounding.

    Args:
        params: as trained, in float32.
        squares: of :func:`input_squares`, for calibrated clipping; without them nothing is clipped.

    Raises:
        InputError: a precision that there is none of.
    """
    check_weights(precision, 0)
    if precision == "compute":
        return params
    ratios = (1.0,) if squares is None else CLIP_RATIOS

    def of_tree(tree: PyTree, squares: PyTree, num_axes: int) -> PyTree:
        made = dict(tree)
        for name in [name for name, leaf in tree.items() if leaf.ndim == num_axes]:
            square = jnp.ones(tree[name].shape[:-1]) if squares is None else squares[name]
            made[name], made[f"{name}_scale"] = _quantize_stack(tree[name], square, precision, ratios)
        return made

    blocks, head = dict(params["blocks"]), dict(params["head"])
    for part in filter(blocks.__contains__, PARTS):
        blocks[part] = of_tree(blocks[part], squares and squares[part], 3)
    if "kernel" in head:
        head_square = squares and {"kernel": squares["head"][None]}
        quantised = of_tree({"kernel": head["kernel"][None]}, head_square, 3)
        head |= {name: leaf[0] for name, leaf in quantised.items()}
    return params | {"blocks": blocks, "head": head}


@functools.partial(jax.jit, static_argnames=("precision", "ratios"))
def _quantize_stack(
    kernel_LIO: Array, square_LI: Array, precision: str, ratios: Sequence[float]
) -> tuple[Array, Array]:
    """``(q, s)``, layer after layer."""
    dtype, limit = _FORMATS[precision]

    def one(row: tuple[Array, Array]) -> tuple[Array, Array]:
        kernel_IO, square_I = row
        top_O = jnp.abs(kernel_IO).max(0)

        def at(ratio: Array) -> tuple[Array, Array]:
            scale_O = jnp.where(top_O > 0, ratio * top_O / limit, 1.0)
            scaled_IO = jnp.clip(kernel_IO / scale_O[None], -limit, limit)
            return (jnp.round(scaled_IO) if precision == "int8" else scaled_IO).astype(dtype), scale_O

        def error_O(ratio: Array) -> Array:
            q_IO, scale_O = at(ratio)
            return (square_I[:, None] * jnp.square(kernel_IO - q_IO.astype(jnp.float32) * scale_O[None])).sum(0)

        ratio_C = jnp.asarray(ratios)
        return at(ratio_C[jax.lax.map(error_O, ratio_C).argmin(0)])

    return jax.lax.map(one, (kernel_LIO.astype(jnp.float32), square_LI))


def input_squares(model: LanguageModel, params: Params, batches: Iterable[Mapping[str, np.ndarray]]) -> PyTree:
    """E[x_i^2] of what every kernel multiplies in the sequential pass: ``{part: {name: [n, I]}, "head": [D]}``.

    Layer after layer, each kind compiled once; memory is that of one layer's activations and does not grow with text.

    Args:
        batches: of equal shape, ``tokens`` [B, T + 1] and, where documents are masked, ``document`` [B, T + 1].
    """
    # What a traced layer hands on cannot leave a checkpoint.
    model = LanguageModel(dataclasses.replace(model.config, remat=False), model.machine, backend=model.backend)
    config = model.config
    weights = prepare(model, params, Schedule.of(config.num_layers), layout="list")
    layers = [layer for part in weights.parts for layer in part.blocks]
    mean_square = lambda x: jnp.square(x.astype(jnp.float32)).mean((0, 1))  # noqa: E731

    @jax.jit
    def step(layer: PyTree, h: Array, ctx: Context, shared: Shared) -> tuple[Array, dict[str, dict[str, Array]]]:
        found: dict[str, dict[str, Array]] = {}
        note = lambda part, name, x: found.setdefault(part, {}).update({name: mean_square(x)})  # noqa: E731
        h, _ = model.adapted(on_input=note).block_fn()(layer, h, ctx, shared)
        return h, found

    total, count = None, 0
    for batch in batches:
        ends, tokens_BT = weights.embed_head, jnp.asarray(batch["tokens"][:, :-1])
        document_BT = jnp.asarray(batch["document"][:, :-1]) if "document" in batch else None
        x0_BTD = model.embed(ends, tokens_BT, None, document_BT)
        shared, h, by_layer = model.shared(x0_BTD, None, document_BT), model.expand(x0_BTD), []
        h_mid = h
        for index, layer in enumerate(layers):
            ctx = model.context(ends, [layer], tokens_BT, index, index + 1)
            h, found = step(layer, h, jax.tree.map(lambda leaf: leaf[0], ctx), shared)
            by_layer.append(found)
            h_mid = h if index == config.mid_layer else h_mid
        made = (by_layer, mean_square(model.head_input(ends, model.readout(ends, h, h_mid))))
        total = made if total is None else jax.tree.map(jnp.add, total, made)
        count += 1
    assert total is not None, "there is no text to calibrate on"
    by_layer, head_D = jax.tree.map(lambda leaf: leaf / count, total)
    of_parts = {part: [found[part] for found in by_layer if part in found] for part in PARTS}
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    return {"head": head_D} | {part: stack(trees) for part, trees in of_parts.items() if trees}
