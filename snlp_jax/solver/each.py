"""Solving where every evaluation reads a context of its own: the cache rule ``per_iteration``."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain, MethodData
from snlp_jax.solver.corrections import Correction
from snlp_jax.solver.init import NO_DATA, Init
from snlp_jax.solver.solve import VALUE, Solution, Wanted, finish, measure, start, step

PyTree = Any


def solve_each(
    chains: Sequence[Chain],
    correction: Correction,
    init: Init,
    data: MethodData = NO_DATA,
    *,
    want: Wanted = VALUE,
) -> Solution:
    """:func:`snlp_jax.solver.solve` with one iteration for each of ``chains`` that the initial trace does not take.

    ``chains`` differ in ``ctx`` and ``shared`` alone: the first ``init.num_evals`` of them are read by the initial
    trace. ``Solution.aux`` is a tuple of what each evaluation left behind, that of the initial trace included.
    """
    guess, aux_of_guess, state = start(chains[0], correction, init, data)
    kept, stats = [] if aux_of_guess is None else [aux_of_guess], []
    iterations = chains[init.num_evals :]
    for index, chain in enumerate(iterations):
        last = step(chain, correction, guess, state, index, taps=want.taps if chain is iterations[-1] else ())
        guess = last.guess
        kept.append(last.iteration.aux_L)
        stats.append(measure(last.iteration, want))
    all_stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
    return finish(chains[-1], last, len(iterations), tuple(kept), all_stats)
