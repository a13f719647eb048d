"""The one loop: guess the trace, then evaluate all layers at once and correct, until the iterations are used up or,
where a tolerance is given, until every sequence's residual is small."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.corrections import Correction
from snlp_jax.solver.init import Guess, Init
from snlp_jax.solver.linear import Corrected, layer, pass_round, shift, stack_rows, tell_owned
from snlp_jax.solver.problem import BatchAxes, Iteration, LayerProblem

PyTree = Any
Kept = Literal["last", "refreshed", "every"]
"""Of which evaluation ``Solution.aux`` is: the last one (free); one more at the corrected trace, as far as aux needs
it; or every one, the initial trace's included, in a tuple."""


class Solution(NamedTuple):
    """What a pass over the layers of a problem gives."""

    value: PyTree
    """Output of the last layer."""
    trace: PyTree
    """Outputs of all layers, leaves [N, ...]; None where it was not asked for."""
    aux: PyTree
    """What each layer left behind, leaves [N, ...]; None where it was not asked for. See ``Kept``."""
    stats: dict[str, jax.Array]
    """On request ``residual_norm`` [num_iters, N]: mean over tokens of ||f_l(h_{l-1}) - h_l|| / ||h_l||, before each
    correction. With a tolerance also ``num_iters``, the iterations made (those not made are NaN in residual_norm), and
    ``sequence_iters`` [B], after how many of them each sequence stopped."""
    tapped: tuple[PyTree, ...] = ()
    """Outputs of the layers that were asked for."""


def solve(
    problem: LayerProblem,
    correction: Correction,
    *,
    num_iters: int,
    init: Init,
    tolerance: float = 0.0,
    taps: tuple[int, ...] = (),
    with_stats: bool = False,
    kept: Kept = "last",
) -> Solution:
    """Solve ``h_l = f_l(h_{l-1})`` for all layers with ``num_iters`` parallel iterations.

    Exactness: after k iterations the first k layers are exact for any correction; ``num_iters = N`` reproduces
    :func:`sequential`. A small residual does not bound the error (it grows with the product of the Jacobians).

    Args:
        tolerance: above 0 a sequence (index of the state's first axis) stops after the first iteration that finds
            ``max over its layers and tokens of ||f_l(h_{l-1}) - h_l|| / ||h_l||`` below it, and keeps its trace, so
            its result does not depend on the others of the batch, nor, where ``problem.batch_axes`` says how it lies,
            what it leaves behind; ``num_iters`` is the most that is made. For inference only: a ``lax.while_loop`` has
            no reverse mode. Sharded, the residual travels with the totals.
        taps: layers whose outputs are wanted in ``Solution.tapped`` (on every device, where the layers are sharded).
        kept: which evaluation's aux is wanted.

    Raises:
        ValueError: ``num_iters`` < 1, a tolerance for a state whose leaves share no batch axis, or a tolerance where
            every evaluation reads its own context.
    """
    if num_iters < 1:
        raise ValueError(f"num_iters is {num_iters}; a parallel region needs at least one iteration.")
    if tolerance > 0 and (kept == "every" or problem.evaluations):
        raise ValueError("with a tolerance the number of evaluations is not known, so none can have its own context.")
    guess, aux_of_guess = init.with_aux(problem.at(0))
    state = correction.start(problem.at(0), shift(guess.h_L, guess.entering))

    def evaluate(index: jax.Array | int, guess: Guess, problem: LayerProblem = problem) -> Iteration:
        x_L = shift(guess.h_L, guess.entering)
        return Iteration(index, x_L, *problem.sweep(x_L), guess.h_L, guess.entering)

    def refreshed(h_L: PyTree, entering: PyTree, aux_L: PyTree) -> PyTree:
        return problem.refresh(shift(h_L, entering)) if kept == "refreshed" else aux_L

    def measure(it: Iteration) -> dict[str, jax.Array]:
        return {"residual_norm": relative_norm(it.y_L, it.h_L)} if with_stats else {}

    if tolerance > 0:
        solution, entering = _solve_adaptively(
            problem, correction, state, guess, evaluate, measure, num_iters, tolerance, taps
        )
        return solution._replace(aux=refreshed(solution.trace, entering, solution.aux))

    def body(guess: Guess, index: jax.Array) -> tuple[Guess, dict[str, jax.Array]]:
        it = evaluate(index, guess)
        corrected = correction(problem, it, state)
        return Guess(corrected.h_L, corrected.entering), measure(it)

    if kept == "every" or problem.evaluations:
        aux_of_all, early = [] if aux_of_guess is None else [aux_of_guess], []
        for index in range(num_iters):
            here = problem.at(init.num_evals + index)
            last = evaluate(index, guess, here)
            corrected = correction(here, last, state, taps=taps if index == num_iters - 1 else ())
            guess = Guess(corrected.h_L, corrected.entering)
            aux_of_all.append(last.aux_L)
            early.append(measure(last))
        stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *early)
        aux = tuple(aux_of_all) if kept == "every" else refreshed(*guess[:2], last.aux_L)
        return Solution(corrected.leaving, corrected.h_L, aux, stats, corrected.tapped)

    # All iterations but the last share one compiled body; only the last one's aux and value are wanted.
    guess, early_stats = jax.lax.scan(body, guess, jnp.arange(num_iters - 1), unroll=num_iters <= 4)
    last = evaluate(num_iters - 1, guess)
    corrected = correction(problem, last, state, taps=taps)
    stats = {name: jnp.concatenate([early_stats[name], value[None]]) for name, value in measure(last).items()}
    aux_L = refreshed(corrected.h_L, corrected.entering, last.aux_L)
    return Solution(corrected.leaving, corrected.h_L, aux_L, stats, corrected.tapped)


def _solve_adaptively(
    problem: LayerProblem,
    correction: Correction,
    state: PyTree,
    guess: Guess,
    evaluate: Any,
    measure: Any,
    num_iters: int,
    tolerance: float,
    taps: tuple[int, ...],
) -> tuple[Solution, PyTree]:
    """The loop of :func:`solve` with a tolerance, and the state that enters the first (local) layer."""
    batch_sizes = {leaf.shape[0] if leaf.ndim > 1 else 1 for leaf in jax.tree.leaves(problem.h_in)}
    if len(batch_sizes) != 1:
        raise ValueError(f"a tolerance needs a state whose leaves share a batch axis; these lead with {batch_sizes}.")
    batch_size = batch_sizes.pop()

    def step(index: jax.Array, guess: Guess) -> tuple[Corrected, PyTree, dict[str, jax.Array], jax.Array]:
        it = evaluate(index, guess)
        ratio_LB = _worst_ratio(it.y_L, it.h_L, batch_size)
        is_padding_L = problem.is_padding()
        if is_padding_L is not None:
            ratio_LB = jnp.where(is_padding_L[:, None], 0.0, ratio_LB)
        corrected = correction(problem, it, state, taps=taps, packed=ratio_LB.max(0))
        return corrected, it.aux_L, measure(it), corrected.packed.max(0)

    def on_any_device(is_active: jax.Array) -> jax.Array:
        """Devices with other rows of the batch go on together."""
        if problem.axis is None or problem.axis.rows_name is None:
            return is_active
        return jax.lax.pmax(is_active.astype(jnp.int32), problem.axis.rows_name) > 0

    def advance(carry: tuple) -> tuple:
        index, guess, kept, old_aux_L, stats, iters_B, active_B, _ = carry
        corrected, aux_L, measured, ratio_B = step(index, guess)
        freeze = lambda new, old, axis: jax.tree.map(  # noqa: E731
            lambda n, o: jnp.where(_along_batch(active_B, n, axis), n, o), new, old
        )
        guess = Guess(freeze(corrected.h_L, guess.h_L, 1), freeze(corrected.entering, guess.entering, 0))
        kept = freeze((corrected.leaving, corrected.tapped), kept, 0)
        if problem.batch_axes is not None:
            aux_L = freeze(aux_L, old_aux_L, 1 + problem.batch_axes.aux)
        stats = {name: stats[name].at[index].set(value) for name, value in measured.items()}
        still_B = active_B & ~(ratio_B < tolerance)
        return index + 1, guess, kept, aux_L, stats, iters_B + active_B, still_B, on_any_device(still_B.any())

    first = jnp.zeros((), jnp.int32)
    corrected, aux_L, measured, _ = jax.eval_shape(step, first, guess)
    empty = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)  # noqa: E731
    carry = (
        first,
        guess,
        empty((corrected.leaving, corrected.tapped)),
        empty(aux_L),
        {name: jnp.full((num_iters, *value.shape), jnp.nan) for name, value in measured.items()},
        jnp.zeros((batch_size,), jnp.int32),
        jnp.ones((batch_size,), bool),
        jnp.ones((), bool),
    )
    made, guess, (leaving, tapped), aux_L, stats, iters_B, *_ = jax.lax.while_loop(
        lambda carry: (carry[0] < num_iters) & carry[-1], advance, carry
    )
    stats |= {"num_iters": made, "sequence_iters": iters_B}
    return Solution(leaving, guess.h_L, aux_L, stats, tapped), guess.entering


def sequential(
    problem: LayerProblem,
    *,
    with_trace: bool = False,
    with_aux: bool = False,
    taps: tuple[int, ...] = (),
    num_microbatches: int = 1,
) -> Solution:
    """The oracle: one layer after another (``lax.scan`` over stacked params, unrolled over a list).

    Sharded over n devices, weights stay where they are and the state goes round: n - 1 moves, and one all_reduce that
    tells all devices the value and the taps. With M microbatches (rows j, j + M, ... of the batch are the j-th, which
    keeps a batch that is sharded itself in its place) device i is at work on one while its neighbours are at others:
    M + n - 2 moves of a state 1/M the size, and the work of (M + n - 1) / M passes in place of that of n.

    Args:
        taps: layers whose outputs are wanted in ``Solution.tapped``.
        num_microbatches: M, of a sharded pass; divides the batch; needs ``problem.batch_axes``.

    Raises:
        ValueError: microbatches of a pass that is not sharded, or that do not divide the batch.
    """
    if problem.axis is not None:
        return _ring(problem, with_trace, with_aux, taps, num_microbatches)
    if num_microbatches > 1:
        raise ValueError("microbatches are for a sequential pass over sharded layers.")
    value, trace, aux = _one_by_one(problem, with_trace or bool(taps), with_aux)
    return Solution(value, trace, aux, {}, tuple(layer(trace, tap) for tap in taps))


def _one_by_one(problem: LayerProblem, with_trace: bool, with_aux: bool) -> tuple[PyTree, PyTree, PyTree]:
    """Value, trace and aux of the (local) layers; None for what is not wanted."""
    is_padding_L = problem.is_padding()
    block_fn = problem.block_fn if problem.is_stack else problem.traced_once

    def body(h: PyTree, row: tuple[PyTree, PyTree, jax.Array | None]) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        params, ctx, is_padding = row
        new, aux = block_fn(params, h, ctx, problem.shared)
        if is_padding is not None:
            new = jax.tree.map(lambda old, new: jnp.where(is_padding, old, new), h, new)
        return new, (new if with_trace else None, aux if with_aux else None)

    if problem.is_stack:
        value, (trace, aux) = jax.lax.scan(body, problem.h_in, (problem.params, problem.ctx, is_padding_L))
        return value, trace, aux
    h, rows = problem.h_in, []
    for index in range(problem.num_layers):
        h, row = body(h, (*problem.layer(index), None))
        rows.append(row)
    trace, aux = stack_rows(rows)
    return h, trace, aux


def _ring(
    problem: LayerProblem, with_trace: bool, with_aux: bool, taps: tuple[int, ...], num_microbatches: int
) -> Solution:
    """:func:`sequential` over sharded layers."""
    axis, num_layers = problem.axis, problem.num_layers
    assert axis is not None
    ctx_axes, shared_axes, aux_axis = problem.batch_axes or BatchAxes(None, None, 0)
    M = num_microbatches

    def parts(leaf: jax.Array, axis: int) -> jax.Array:
        """[.., B, ..] -> [M, .., B / M, ..]; microbatch j holds rows j, j + M, ..."""
        if M == 1:
            return leaf[None]
        if leaf.shape[axis] % M:
            raise ValueError(f"a batch of {leaf.shape[axis]} does not divide into {M} microbatches.")
        shape = (*leaf.shape[:axis], leaf.shape[axis] // M, M, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)

    def join(leaf_M: jax.Array, axis: int) -> jax.Array:
        if M == 1:
            return leaf_M[0]
        leaf = jnp.moveaxis(leaf_M, 0, axis + 1)
        return leaf.reshape(*leaf.shape[:axis], leaf.shape[axis] * M, *leaf.shape[axis + 2 :])

    def pick(tree: PyTree, axes: PyTree, index: jax.Array, offset: int) -> PyTree:
        """One microbatch of the leaves that have a batch axis (``offset`` counts a layer axis before it)."""
        one = lambda axis, leaf: leaf if axis is None else parts(leaf, axis + offset)[index]  # noqa: E731
        return jax.tree.map(
            lambda axis, sub: jax.tree.map(lambda leaf: one(axis, leaf), sub), axes, tree, is_leaf=lambda x: x is None
        )

    def evaluate(h: PyTree, index: jax.Array) -> tuple[PyTree, PyTree]:
        here = dataclasses.replace(problem, h_in=h)
        if M > 1:
            here = dataclasses.replace(
                here, ctx=pick(problem.ctx, ctx_axes, index, 1), shared=pick(problem.shared, shared_axes, index, 0)
            )
        value, trace, aux = _one_by_one(here, with_trace or bool(taps), with_aux)
        return value, (trace, aux)

    states_M = jax.tree.map(lambda leaf: parts(leaf, 0), problem.h_in)
    _, left_M, (trace_M, aux_M) = pass_round(evaluate, states_M, axis)
    value = jax.tree.map(lambda leaf: join(leaf, 0), left_M)
    trace = jax.tree.map(lambda leaf: join(leaf, 1), trace_M)
    aux = jax.tree.map(lambda leaf: join(leaf, 1 + aux_axis), aux_M)
    owned = [(axis.size - 1, value)]
    owned += [(tap // num_layers, layer(trace, tap % num_layers)) for tap in taps]
    value, *tapped = tell_owned(owned, axis)
    return Solution(value, trace if with_trace else None, aux, {}, tuple(tapped))


def relative_norm(a_L: PyTree, b_L: PyTree) -> jax.Array:
    """[N]: mean over tokens of ||a - b|| / max(||b||, 1e-6), norms over the last axis, averaged over leaves."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (x.reshape(x.shape[0], -1, x.shape[-1]) if x.ndim > 1 else x[:, None, None] for x in (a, b))
        return (safe_norm(a - b) / jnp.maximum(safe_norm(b), 1e-6)).mean(-1)

    ratios = jax.tree.leaves(jax.tree.map(one, a_L, b_L))
    return jnp.stack(ratios).mean(0)


def _worst_ratio(a_L: PyTree, b_L: PyTree, batch_size: int) -> jax.Array:
    """[N, B]: the largest ||a - b|| / max(||b||, 1e-6) of a sequence's tokens and leaves."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (x.reshape(x.shape[0], batch_size, -1, x.shape[-1] if x.ndim > 1 else 1) for x in (a, b))
        return (safe_norm(a - b) / jnp.maximum(safe_norm(b), 1e-6)).max(-1)

    return jnp.stack(jax.tree.leaves(jax.tree.map(one, a_L, b_L))).max(0)


def _along_batch(mask_B: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    """The mask shaped to select along ``axis`` of ``like``; states without a batch axis are one sequence."""
    if like.ndim <= axis + 1:
        return mask_B.reshape((1,) * like.ndim)
    return mask_B.reshape((1,) * axis + (-1,) + (1,) * (like.ndim - axis - 1))


def safe_norm(x: jax.Array) -> jax.Array:
    """2-norm over the last axis in float32, with subgradient 0 at 0.

    At a fresh initialisation the solver's trace equals the sequential one exactly, where the derivative of a plain
    norm is 0/0: every gradient would be NaN from step 0.
    """
    squared = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
    is_zero = squared == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))
