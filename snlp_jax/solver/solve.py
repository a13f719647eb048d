"""The one loop: guess the trace, then evaluate all nodes at once and correct.

:func:`step` is one turn of it. :func:`solve` makes a fixed number of them, ``solve_until`` (``adaptive.py``) as many as
each sequence needs.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain, MethodData
from snlp_jax.solver.corrections import Correction, Iteration
from snlp_jax.solver.init import NO_DATA, Guess, Init
from snlp_jax.solver.linear import Corrected, shift

PyTree = Any
Kept = Literal["last", "refreshed"]
"""Of which evaluation ``Solution.aux`` is: the last one (free), or one more at the corrected trace, as far as aux needs
it."""


class Result(IntEnum):
    """How a solution ended."""

    CONVERGED = 0
    """The residual fell below the tolerance, or as many iterations as nodes were made: the solution is exact."""
    MAX_ITERS = 1
    """All iterations were made; the residual was not asked for, or is not below the tolerance."""
    NONFINITE = 2
    """The solution holds a NaN or an infinity."""


class Solution(NamedTuple):
    """What a pass over the nodes of a chain gives."""

    value: PyTree
    """Output of the last node."""
    trace: PyTree
    """Outputs of all nodes, leaves [N, ...]; None where it was not asked for."""
    aux: PyTree
    """What each node left behind: leaves [N, ...], of a list of nodes a list of N trees; None where it was not asked
    for. See ``Kept``."""
    stats: dict[str, jax.Array]
    """On request ``residual_norm`` [num_iters, N]: mean over tokens of ||f_l(h_{l-1}) - h_l|| / ||h_l||, before each
    correction. With a tolerance also ``num_iters``, the iterations made (those not made are NaN in residual_norm), and
    ``sequence_iters`` [B], after how many of them each sequence stopped."""
    tapped: tuple[PyTree, ...] = ()
    """Outputs of the nodes that were asked for."""
    result: jax.Array | None = None
    """int32, a :class:`Result` for each sequence [B], or one where the state's leaves share no batch axis; None of a
    sequential pass."""


class Wanted(NamedTuple):
    """What of a solution is wanted besides its value and trace."""

    taps: tuple[int, ...] = ()
    """Nodes whose outputs come back in ``Solution.tapped`` (on every device, where the nodes are spread)."""
    stats: bool = False
    """The residual norms in ``Solution.stats``."""
    aux: Kept = "last"
    """Which evaluation's aux."""


VALUE = Wanted()


class Step(NamedTuple):
    """One evaluation of all nodes and what the correction made of it."""

    corrected: Corrected
    iteration: Iteration

    @property
    def guess(self) -> Guess:
        """The new trace, to go on from."""
        return Guess(self.corrected.h_L, self.corrected.entering)


def step(
    chain: Chain,
    correction: Correction,
    guess: Guess,
    state: PyTree,
    index: jax.Array | int,
    *,
    taps: tuple[int, ...] = (),
    pack: Callable[[Iteration], PyTree] = lambda iteration: (),
) -> Step:
    """Evaluate all nodes at once at the guess, then correct: one iteration.

    Args:
        guess: trace [N, ...] and the state that enters the first node.
        state: what ``correction.start(chain, x_L, data)`` gave.
        index: of the iteration, from 0.
        taps: nodes of the whole chain whose new outputs are wanted in ``corrected.tapped``.
        pack: what of the evaluation all devices want to know; it comes back as ``corrected.packed`` [devices, ...].
    """
    x_L = shift(guess.h_L, guess.entering)
    y_L, aux_L = chain.sweep(x_L)
    iteration = Iteration(index, x_L, y_L, aux_L, guess.h_L, guess.entering)
    return Step(correction(chain, iteration, state, taps=taps, packed=pack(iteration)), iteration)


def start(chain: Chain, correction: Correction, init: Init, data: MethodData) -> tuple[Guess, PyTree, PyTree]:
    """``(guess, aux of the guess or None, the correction's state)`` before the first iteration."""
    guess, aux_L = init.with_aux(chain, data)
    return guess, aux_L, correction.start(chain, shift(guess.h_L, guess.entering), data)


def solve(
    chain: Chain,
    correction: Correction,
    init: Init,
    data: MethodData = NO_DATA,
    *,
    num_iters: int,
    want: Wanted = VALUE,
) -> Solution:
    """Solve ``h_l = f_l(h_{l-1})`` for all nodes with ``num_iters`` parallel iterations.

    Exactness: after k iterations the first k nodes are exact for any correction; ``num_iters = N`` reproduces
    :func:`snlp_jax.solver.sequential`. A small residual does not bound the error, which grows with the product of the
    Jacobians.

    Args:
        data: what the correction and the initial trace ask for.
        want: what besides the value and the trace.

    Raises:
        ValueError: ``num_iters`` < 1.
    """
    check_num_iters(num_iters)
    guess, _, state = start(chain, correction, init, data)

    def body(guess: Guess, index: jax.Array) -> tuple[Guess, dict[str, jax.Array]]:
        made = step(chain, correction, guess, state, index)
        return made.guess, measure(made.iteration, want)

    # All iterations but the last share one compiled body; only the last one's aux, value and taps are wanted.
    early: dict[str, jax.Array] | None = None
    if num_iters > 1:
        guess, early = jax.lax.scan(body, guess, jnp.arange(num_iters - 1), unroll=num_iters <= 4)
    last = step(chain, correction, guess, state, num_iters - 1, taps=want.taps)
    stats = jax.tree.map(lambda value: value[None], measure(last.iteration, want))
    if early is not None:
        stats = jax.tree.map(lambda before, value: jnp.concatenate([before, value]), early, stats)
    aux_L = chain.left_behind(shift(*last.guess)) if want.aux == "refreshed" else last.iteration.aux_L
    return finish(chain, last, num_iters, aux_L, stats)


def finish(chain: Chain, last: Step, num_iters: int, aux: PyTree, stats: dict[str, jax.Array]) -> Solution:
    """The solution after the last of a fixed number of iterations."""
    batch_size = batch_size_of(chain.h_in)
    is_exact_B = jnp.full((batch_size or 1,), num_iters >= chain.place.size)
    result = result_of(last.corrected.leaving, is_exact_B, batch_size)
    return Solution(last.corrected.leaving, last.corrected.h_L, aux, stats, last.corrected.tapped, result)


def measure(it: Iteration, want: Wanted) -> dict[str, jax.Array]:
    """What ``Solution.stats`` says of one iteration."""
    return {"residual_norm": relative_norm(it.y_L, it.h_L)} if want.stats else {}


def check_num_iters(num_iters: int) -> None:
    """Raises ValueError where ``num_iters`` < 1."""
    if num_iters < 1:
        raise ValueError(f"num_iters is {num_iters}; a parallel region needs at least one iteration.")


def batch_size_of(h_in: PyTree) -> int | None:
    """Sequences in a state: the first axis of all its leaves (a leaf of one axis is one sequence); None where they
    differ."""
    sizes = {leaf.shape[0] if leaf.ndim > 1 else 1 for leaf in jax.tree.leaves(h_in)}
    return sizes.pop() if len(sizes) == 1 else None


def result_of(value: PyTree, is_converged_B: jax.Array, batch_size: int | None) -> jax.Array:
    """int32 [B], or a scalar without a batch: a :class:`Result` for each sequence."""
    finite = [jnp.isfinite(leaf).reshape(batch_size or 1, -1).all(-1) for leaf in jax.tree.leaves(value)]
    is_finite_B = jnp.stack(finite).all(0)
    result_B = jnp.where(is_converged_B, Result.CONVERGED.value, Result.MAX_ITERS.value)
    result_B = jnp.where(is_finite_B, result_B, Result.NONFINITE.value).astype(jnp.int32)
    return result_B if batch_size else result_B[0]


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
