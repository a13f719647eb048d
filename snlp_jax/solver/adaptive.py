"""Solving until every sequence's residual is small, by as many turns of :func:`snlp_jax.solver.step` as it takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain, MethodData
from snlp_jax.solver.corrections import Correction, Iteration
from snlp_jax.solver.init import NO_DATA, Guess, Init
from snlp_jax.solver.linear import shift
from snlp_jax.solver.solve import (
    VALUE,
    Solution,
    Wanted,
    batch_size_of,
    check_num_iters,
    measure,
    result_of,
    safe_norm,
    start,
    step,
)

PyTree = Any


class _Progress(NamedTuple):
    """What the loop carries."""

    index: jax.Array  # type: ignore[assignment]  # not tuple.index
    guess: Guess
    outputs: PyTree
    """``(leaving, tapped)`` of each sequence's last iteration."""
    aux_L: PyTree
    stats: dict[str, jax.Array]
    iters_B: jax.Array
    is_active_B: jax.Array
    is_any_active: jax.Array
    """On any device."""


def solve_until(
    chain: Chain,
    correction: Correction,
    init: Init,
    data: MethodData = NO_DATA,
    *,
    tolerance: float,
    max_iters: int,
    want: Wanted = VALUE,
) -> Solution:
    """:func:`snlp_jax.solver.solve` with as many iterations as each sequence needs, ``max_iters`` at most.

    A sequence (index of the state's first axis) stops after the first iteration that finds the largest
    ``||f_l(h_{l-1}) - h_l|| / ||h_l||`` of its nodes and tokens below ``tolerance``, and keeps its trace. So its result
    does not depend on the others of the batch, nor, where ``fns.batch_axes`` says how the batch lies, what it leaves
    behind. Over devices the residual travels with the totals. For inference only: a while loop has no reverse mode.

    Raises:
        ValueError: ``max_iters`` < 1, or a state whose leaves share no batch axis.
    """
    check_num_iters(max_iters)
    batch_size = batch_size_of(chain.h_in)
    if batch_size is None:
        raise ValueError("a tolerance needs a state whose leaves share a batch axis.")
    guess, _, state = start(chain, correction, init, data)

    def turn(index: jax.Array, guess: Guess) -> tuple:
        pack = lambda it: _ratios(chain, it, batch_size)  # noqa: E731
        corrected, it = made = step(chain, correction, guess, state, index, taps=want.taps, pack=pack)
        outputs = (corrected.leaving, corrected.tapped)
        return made.guess, outputs, it.aux_L, measure(it, want), corrected.packed.max(0)

    def advance(carry: _Progress) -> _Progress:
        guess, outputs, aux_L, measured, ratio_B = turn(carry.index, carry.guess)

        def freeze(new: PyTree, old: PyTree, axis: int) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(_along(carry.is_active_B, n, axis), n, o), new, old)

        if chain.fns.batch_axes is not None:
            aux_L = freeze(aux_L, carry.aux_L, chain.fns.batch_axes.aux + (not chain.is_list))
        is_active_B = carry.is_active_B & ~(ratio_B < tolerance)
        return _Progress(
            carry.index + 1,
            Guess(freeze(guess.h_L, carry.guess.h_L, 1), freeze(guess.entering, carry.guess.entering, 0)),
            freeze(outputs, carry.outputs, 0),
            aux_L,
            {name: carry.stats[name].at[carry.index].set(value) for name, value in measured.items()},
            carry.iters_B + carry.is_active_B,
            is_active_B,
            _on_any_device(chain, is_active_B.any()),
        )

    first = _before_first(turn, guess, max_iters, batch_size)
    end = jax.lax.while_loop(lambda carry: (carry.index < max_iters) & carry.is_any_active, advance, first)
    leaving, tapped = end.outputs
    aux_L = chain.left_behind(shift(*end.guess)) if want.aux == "refreshed" else end.aux_L
    stats = end.stats | {"num_iters": end.index, "sequence_iters": end.iters_B}
    is_converged_B = ~end.is_active_B | (end.iters_B >= chain.place.size)
    result_B = result_of(leaving, is_converged_B, batch_size)
    return Solution(leaving, end.guess.h_L, aux_L, stats, tapped, result_B)


def _before_first(turn: Any, guess: Guess, max_iters: int, batch_size: int) -> _Progress:
    """The carry before the first iteration, of the shapes that ``turn`` gives."""
    index = jnp.zeros((), jnp.int32)
    _, outputs, aux_L, measured, _ = jax.eval_shape(turn, index, guess)
    outputs, aux_L = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (outputs, aux_L))
    stats = {name: jnp.full((max_iters, *value.shape), jnp.nan) for name, value in measured.items()}
    iters_B, is_active_B = jnp.zeros((batch_size,), jnp.int32), jnp.ones((batch_size,), bool)
    return _Progress(index, guess, outputs, aux_L, stats, iters_B, is_active_B, jnp.ones((), bool))


def _ratios(chain: Chain, it: Iteration, batch_size: int) -> jax.Array:
    """[B]: the largest ||y - h|| / max(||h||, 1e-6) of a sequence's (local) nodes, tokens and leaves."""

    def one(y: jax.Array, h: jax.Array) -> jax.Array:
        y, h = (x.reshape(x.shape[0], batch_size, -1, x.shape[-1] if x.ndim > 1 else 1) for x in (y, h))
        return (safe_norm(y - h) / jnp.maximum(safe_norm(h), 1e-6)).max(-1)

    ratio_LB = jnp.stack(jax.tree.leaves(jax.tree.map(one, it.y_L, it.h_L))).max(0)
    is_padding_L = chain.place.is_padding()
    if is_padding_L is not None:
        ratio_LB = jnp.where(is_padding_L[:, None], 0.0, ratio_LB)
    return ratio_LB.max(0)


def _on_any_device(chain: Chain, is_active: jax.Array) -> jax.Array:
    """Devices with other rows of the batch go on together."""
    axis = chain.place.axis
    if axis is None or axis.rows_name is None:
        return is_active
    return jax.lax.pmax(is_active.astype(jnp.int32), axis.rows_name) > 0


def _along(mask_B: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """The mask shaped to select along ``axis`` of ``like``; states without a batch axis are one sequence."""
    if like.ndim <= axis + 1:
        return mask_B.reshape((1,) * like.ndim)
    return mask_B.reshape((1,) * axis + (-1,) + (1,) * (like.ndim - axis - 1))
