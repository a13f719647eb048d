"""Initial traces: a guess of every layer's output before the first iteration."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.corrections import Jacobi
from snlp_jax.solver.problem import LayerProblem

PyTree = Any


class Guess(NamedTuple):
    """A trace of the (local) layers and the state that enters the first of them."""

    h_L: PyTree
    entering: PyTree


@dataclass(frozen=True)
class PrefixState:
    """``h0``: every layer's output is guessed to be the region's input. Free."""

    num_evals: int = 0

    def __call__(self, problem: LayerProblem) -> Guess:
        repeat = lambda leaf: jnp.broadcast_to(leaf, (problem.num_layers, *leaf.shape))  # noqa: E731
        return Guess(jax.tree.map(repeat, problem.h_in), problem.h_in)


@dataclass(frozen=True)
class BatchForward:
    """Every layer evaluated at the region's input: ``h_l = f_l(h_S)``. One evaluation; equals one Jacobi step."""

    num_evals: int = 1

    def __call__(self, problem: LayerProblem) -> Guess:
        h_L, entering = PrefixState()(problem)
        y_L, _ = problem.sweep(h_L)
        corrected = Jacobi()(problem, y_L, h_L, entering)
        return Guess(corrected.h_L, corrected.entering)


Init = PrefixState | BatchForward
