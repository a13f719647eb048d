"""Initial traces: a guess of every layer's output before the first iteration."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.linear import ZeroMap, correct
from snlp_jax.solver.problem import LayerProblem

PyTree = Any


class Guess(NamedTuple):
    """A trace of the (local) layers and the state that enters the first of them."""

    h_L: PyTree
    entering: PyTree


@dataclass(frozen=True)
class Init:
    """Base of all initial traces."""

    @property
    def num_evals(self) -> int:
        """Evaluations of all layers that it costs, on the critical path."""
        return 0

    @property
    def is_oracle(self) -> bool:
        """Whether it needs what only a sequential pass over the same input can know."""
        return False

    def __call__(self, problem: LayerProblem) -> Guess:
        raise NotImplementedError

    def with_aux(self, problem: LayerProblem) -> tuple[Guess, PyTree]:
        """The guess, and what the layers left behind where it took an evaluation, else None."""
        return self(problem), None


@dataclass(frozen=True)
class PrefixState(Init):
    """``h0``: every layer's output is guessed to be the region's input. Free."""

    def __call__(self, problem: LayerProblem) -> Guess:
        repeat = lambda leaf: jnp.broadcast_to(leaf, (problem.num_layers, *leaf.shape))  # noqa: E731
        return Guess(jax.tree.map(repeat, problem.h_in), problem.h_in)


@dataclass(frozen=True)
class BatchForward(Init):
    """Every layer evaluated at the region's input: ``h_l = f_l(h_S)``. One evaluation; equals one Jacobi step."""

    @property
    def num_evals(self) -> int:
        return 1

    def __call__(self, problem: LayerProblem) -> Guess:
        return self.with_aux(problem)[0]

    def with_aux(self, problem: LayerProblem) -> tuple[Guess, PyTree]:
        y_L, aux_L = problem.sweep(PrefixState()(problem).h_L)
        return _guess(problem, y_L), aux_L


@dataclass(frozen=True)
class Warm(Init):
    """A trace that is at hand, ``problem.warm_L``: in decoding that of the previous token, which is free.

    In the evaluation of a whole sequence it is an oracle: the previous token's exact states are known only from a
    sequential pass over the same sequence.
    """

    @property
    def is_oracle(self) -> bool:
        return True

    def __call__(self, problem: LayerProblem) -> Guess:
        if problem.warm_L is None:
            raise ValueError("the Warm initial trace needs problem.warm_L, a trace from elsewhere.")
        return _guess(problem, problem.warm_L)


def _guess(problem: LayerProblem, h_L: PyTree) -> Guess:
    """Any trace as a guess; sharded, one exchange tells each device its neighbour's last state.

    Layers that do not count hold the region's input, which those before the region pass on.
    """
    h_L = problem.pass_on(PrefixState()(problem).h_L, h_L)
    corrected = correct(ZeroMap(), h_L, h_L, problem.h_in, problem.axis)
    return Guess(corrected.h_L, corrected.entering)
