"""The one loop: guess the trace, then evaluate all layers at once and correct, ``num_iters`` times."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.corrections import Correction
from snlp_jax.solver.init import Guess, Init
from snlp_jax.solver.linear import shift
from snlp_jax.solver.problem import LayerProblem

PyTree = Any


class Solution(NamedTuple):
    """What a pass over the layers of a problem gives."""

    value: PyTree
    """Output of the last layer."""
    trace: PyTree
    """Outputs of all layers, leaves [N, ...]; None where it was not asked for."""
    aux: PyTree
    """What each layer left behind in the last evaluation, leaves [N, ...]; None where it was not asked for."""
    stats: dict[str, jax.Array]
    """On request ``residual_norm`` [num_iters, N]: mean over tokens of ||f_l(h_{l-1}) - h_l|| / ||h_l||, before each
    correction."""


def solve(
    problem: LayerProblem,
    correction: Correction,
    *,
    num_iters: int,
    init: Init,
    with_stats: bool = False,
) -> Solution:
    """Solve ``h_l = f_l(h_{l-1})`` for all layers with ``num_iters`` parallel iterations.

    Exactness: after k iterations the first k layers are exact for any correction; ``num_iters = N`` reproduces
    :func:`sequential`. A small residual does not bound the error (it grows with the product of the Jacobians).

    Raises:
        ValueError: ``num_iters`` < 1.
    """
    if num_iters < 1:
        raise ValueError(f"num_iters is {num_iters}; a parallel region needs at least one iteration.")

    def iterate(guess: Guess) -> tuple[Any, PyTree, dict[str, jax.Array]]:
        y_L, aux = problem.sweep(shift(guess.h_L, guess.entering))
        stats = {"residual_norm": relative_norm(y_L, guess.h_L)} if with_stats else {}
        return correction(problem, y_L, guess.h_L, guess.entering), aux, stats

    def body(guess: Guess, _: None) -> tuple[Guess, dict[str, jax.Array]]:
        corrected, _, stats = iterate(guess)
        return Guess(corrected.h_L, corrected.entering), stats

    # All iterations but the last share one compiled body; only the last one's aux and value are wanted.
    guess, early_stats = jax.lax.scan(body, init(problem), None, length=num_iters - 1, unroll=num_iters <= 4)
    corrected, aux, last_stats = iterate(guess)
    stats = {name: jnp.concatenate([early_stats[name], last[None]]) for name, last in last_stats.items()}
    return Solution(corrected.leaving, corrected.h_L, aux, stats)


def sequential(problem: LayerProblem, *, with_trace: bool = False, with_aux: bool = False) -> Solution:
    """The oracle: one layer after another (``lax.scan`` over stacked params, unrolled over a list)."""
    if problem.axis_name is not None:
        raise ValueError("the sequential pass over layers that are sharded over a mesh axis is not available.")

    def body(h: PyTree, row: tuple[PyTree, PyTree]) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        h, aux = problem.block_fn(row[0], h, row[1], problem.shared)
        return h, (h if with_trace else None, aux if with_aux else None)

    if not problem.is_unrolled:
        value, (trace, aux) = jax.lax.scan(body, problem.h_in, (problem.params, problem.ctx))
        return Solution(value, trace, aux, {})
    h, rows = problem.h_in, []
    for index in range(problem.num_layers):
        h, row = body(h, problem.layer(index))
        rows.append(row)
    trace, aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return Solution(h, trace, aux, {})


def relative_norm(a_L: PyTree, b_L: PyTree) -> jax.Array:
    """[N]: mean over tokens of ||a - b|| / max(||b||, 1e-6), norms over the last axis, averaged over leaves."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (x.reshape(x.shape[0], -1, x.shape[-1]) if x.ndim > 1 else x[:, None, None] for x in (a, b))
        return (safe_norm(a - b) / jnp.maximum(safe_norm(b), 1e-6)).mean(-1)

    ratios = jax.tree.leaves(jax.tree.map(one, a_L, b_L))
    return jnp.stack(ratios).mean(0)


def safe_norm(x: jax.Array) -> jax.Array:
    """2-norm over the last axis in float32, with subgradient 0 at 0.

    At a fresh initialisation the solver's trace equals the sequential one exactly, where the derivative of a plain
    norm is 0/0: every gradient would be NaN from step 0.
    """
    squared = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
    is_zero = squared == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))
