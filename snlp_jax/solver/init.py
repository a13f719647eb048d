"""Initial traces: a guess of every node's output before the first iteration."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain, MethodData
from snlp_jax.solver.linear import correct
from snlp_jax.solver.maps import ZeroMap

PyTree = Any
NO_DATA = MethodData()


class Guess(NamedTuple):
    """A trace of the (local) nodes and the state that enters the first of them."""

    h_L: PyTree
    entering: PyTree


@dataclass(frozen=True)
class Init:
    """Base of all initial traces."""

    @property
    def num_evals(self) -> int:
        """Evaluations of all nodes that it costs, on the critical path."""
        return 0

    @property
    def is_oracle(self) -> bool:
        """Whether it needs what only a sequential pass over the same input can know."""
        return False

    def __call__(self, chain: Chain, data: MethodData = NO_DATA) -> Guess:
        raise NotImplementedError

    def with_aux(self, chain: Chain, data: MethodData = NO_DATA) -> tuple[Guess, PyTree]:
        """The guess, and what the nodes left behind where it took an evaluation, else None."""
        return self(chain, data), None


@dataclass(frozen=True)
class PrefixState(Init):
    """``h0``: every node's output is guessed to be the region's input. Free."""

    def __call__(self, chain: Chain, data: MethodData = NO_DATA) -> Guess:
        return Guess(_repeated(chain), chain.h_in)


@dataclass(frozen=True)
class BatchForward(Init):
    """Every node evaluated at the region's input: ``h_l = f_l(h_S)``. One evaluation; equals one Jacobi step."""

    @property
    def num_evals(self) -> int:
        return 1

    def __call__(self, chain: Chain, data: MethodData = NO_DATA) -> Guess:
        return self.with_aux(chain, data)[0]

    def with_aux(self, chain: Chain, data: MethodData = NO_DATA) -> tuple[Guess, PyTree]:
        y_L, aux_L = chain.sweep(_repeated(chain))
        return guess_of(chain, y_L), aux_L


@dataclass(frozen=True)
class Warm(Init):
    """A trace that is at hand, ``data.warm_L``: in decoding that of the previous token, which is free.

    In the evaluation of a whole sequence it is an oracle: the previous token's exact states are known only from a
    sequential pass over the same sequence.
    """

    @property
    def is_oracle(self) -> bool:
        return True

    def __call__(self, chain: Chain, data: MethodData = NO_DATA) -> Guess:
        if data.warm_L is None:
            raise ValueError("the Warm initial trace needs data.warm_L, a trace from elsewhere.")
        return guess_of(chain, data.warm_L)


def guess_of(chain: Chain, h_L: PyTree) -> Guess:
    """Any trace as a guess; over devices, one exchange tells each its neighbour's last state.

    Rows that do not count hold the region's input, which those before the region pass on.
    """
    h_L = chain.pass_on(_repeated(chain), h_L)
    corrected = correct(ZeroMap(), h_L, h_L, chain.h_in, chain.place.axis)
    return Guess(corrected.h_L, corrected.entering)


def _repeated(chain: Chain) -> PyTree:
    """The state that enters the chain, once for every node."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (chain.num_nodes, *leaf.shape)), chain.h_in)
