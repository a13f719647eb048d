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

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import WeightPrecision, check_weights
from snlp_jax.model import LanguageModel
from snlp_jax.model.projections import PARTS
from snlp_jax.types import Array, Params, PyTree, unflatten

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

    def of_part(part: str, tree: PyTree) -> PyTree:
        made = dict(tree)
        for name in [name for name, leaf in tree.items() if leaf.ndim == 3]:
            square = jnp.ones(tree[name].shape[:-1]) if squares is None else squares[part][name]
            made[name], made[f"{name}_scale"] = _quantize_stack(tree[name], square, precision, ratios)
        return made

    blocks, head = params["blocks"], params["head"]
    blocks = {part: of_part(part, tree) if part in PARTS else tree for part, tree in blocks.items()}
    if "kernel" in head:
        quantised = of_part("head", {"kernel": head["kernel"][None]})
        head = head | {name: leaf[0] for name, leaf in quantised.items()}
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
    """E[x_i^2] of what every kernel multiplies in the sequential pass: ``{part: {name: [n, I]}}``, the head a part of
    one layer. One program of all layers, so that compilation grows with depth; memory does not grow with text.

    Args:
        batches: of equal shape, ``tokens`` [B, T + 1] and, where documents are masked, ``document`` [B, T + 1].
    """

    @jax.jit
    def squares_of(params: Params, inputs: Mapping[str, Array]) -> PyTree:
        found: dict[str, list[Array]] = {}

        def note(part: str, name: str, x: Array) -> None:
            found.setdefault(f"{part}/{name}", []).append(jnp.square(x.astype(jnp.float32)).mean((0, 1)))

        model.adapted(on_input=note)(params, inputs["tokens"], inputs.get("document"))
        return unflatten({path: jnp.stack(of_layers) for path, of_layers in found.items()})

    params, total, count = model.cast(params), None, 0
    for batch in batches:
        made = squares_of(
            params, {name: leaf[:, :-1] for name, leaf in batch.items() if name in ("tokens", "document")}
        )
        total = made if total is None else jax.tree.map(jnp.add, total, made)
        count += 1
    assert total is not None, "there is no text to calibrate on"
    return jax.tree.map(lambda leaf: leaf / count, total)
