"""What the solver's own numbers do not say: the error of every layer, the sizes of the Jacobians and of what a
correction leaves of them. These cost a sequential pass and more, so :func:`snlp_jax.solver.solve` never calls them.

A small residual does not bound the error: ``h_l - h*_l`` is the sum over i <= l of the residual r_i times the product
of the Jacobians from i to l, so layers of norm above 1 amplify it with depth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain, MethodData
from snlp_jax.solver.corrections import Correction, Iteration
from snlp_jax.solver.init import NO_DATA, Guess, Init
from snlp_jax.solver.linear import shift, subtract
from snlp_jax.solver.sequential import sequential
from snlp_jax.solver.solve import check_num_iters, relative_norm, start, step

PyTree = Any

NUM_STEPS = 20
"""Of the power iteration: where sigma_2 = 0.95 sigma_1, 0.95^(4 x 19) = 2 % of the second direction's energy is left,
and the estimate is 0.2 % too low."""


class TraceErrors(NamedTuple):
    """Row k is the trace after k iterations, row 0 the initial trace; both are means over tokens."""

    error: jax.Array
    """[num_iters + 1, N]: ||h_l - h*_l|| / ||h*_l|| against the exact trace h*."""
    residual: jax.Array
    """[num_iters + 1, N]: ||f_l(h_{l-1}) - h_l|| / ||h_l||, all that a solver can see without h*."""

    @property
    def ratio(self) -> jax.Array:
        """[num_iters, N] error after each iteration / error before it: the observed contraction; 0 where nothing was
        left to remove. Of errors at the level of rounding it says nothing."""
        before, after = self.error[:-1], self.error[1:]
        return jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 0.0)


def trace_errors(
    chain: Chain, correction: Correction, init: Init, data: MethodData = NO_DATA, *, num_iters: int
) -> TraceErrors:
    """``||h^k_l - h*_l|| / ||h*_l||`` of every node l after every iteration k = 0 .. num_iters.

    Cost: a sequential pass and ``num_iters + 1`` iterations in one scan, whose body is compiled once; two traces are
    held. The first k nodes of row k are exact for any correction, to the rounding in which a batched evaluation
    differs from a single one. Call it under ``jax.jit``. The chain of its ``block`` is the truth: of fused chunks, the
    fused model.

    Raises:
        ValueError: ``num_iters`` < 1.
    """
    check_num_iters(num_iters)
    exact_L = sequential(chain, with_trace=True).trace
    guess, _, state = start(chain, correction, init, data)

    def body(guess: Guess, index: jax.Array) -> tuple[Guess, tuple[jax.Array, jax.Array]]:
        made = step(chain, correction, guess, state, index)
        it = made.iteration
        return made.guess, (relative_norm(it.h_L, exact_L), relative_norm(it.y_L, it.h_L))

    return TraceErrors(*jax.lax.scan(body, guess, jnp.arange(num_iters + 1))[1])


def spectral_norms(chain: Chain, trace: PyTree, num_steps: int = NUM_STEPS, key: jax.Array | None = None) -> jax.Array:
    """[N]: ``||J_l||_2`` of the nodes at the inputs that ``trace`` gives them, by power iteration on ``J^T J``.

    J_l maps the whole state that enters layer l, all tokens and all sequences, to the whole state that leaves it; a
    norm above 1 means that some perturbation grows. The estimate is from below: ``||J v||`` of the best v found.

    Cost: one linearisation of all layers, then a JVP and a VJP of all layers a step; it holds what a backward pass of
    one sweep holds. Needs layers with a forward-mode derivative.
    """
    return _largest_singular_values(*_linearized(chain, trace)[:2], num_steps, key)


def contraction(
    chain: Chain,
    correction: Correction,
    trace: PyTree,
    data: MethodData = NO_DATA,
    num_steps: int = NUM_STEPS,
    key: jax.Array | None = None,
    *,
    index: int = 0,
) -> jax.Array:
    """[N]: ``||J_l - A_l||_2`` at the exact trace, by the power iteration of :func:`spectral_norms`.

    To first order the errors e of one iteration's trace give those of the next by

        e'_l = (J_l - A_l) e_{l-1} + A_l e'_{l-1},

    so this is the error that a layer makes anew for each unit of error at its input, before A carries it on. It is 0
    on the chains that the correction solves in one step, ||J_l|| for Jacobi and ||J_l - I|| for Identity, whose errors
    shrink where it is small against 1. The loop ends in N iterations whatever it is. Cost as ``spectral_norms``.

    Args:
        trace: the exact trace; A_l is made at it.
        index: the iteration, counted from 0, whose A_l is meant where a correction has one for each.
    """
    jvp, x_L, y_L, aux_L = _linearized(chain, trace)
    it = Iteration(index, x_L, y_L, aux_L, trace, chain.h_in)
    state = correction.start(chain, x_L, data)

    def remainder(v_L: PyTree) -> PyTree:
        jv_L = jvp(v_L)
        return subtract(jv_L, correction.apply(chain, it, state, v_L, jv_L))

    return _largest_singular_values(remainder, x_L, num_steps, key)


def _linearized(chain: Chain, trace: PyTree) -> tuple[Callable[[PyTree], PyTree], PyTree, PyTree, PyTree]:
    """``v_L -> J_l v_l`` for all layers at once, their inputs, outputs and what they leave behind."""
    if chain.place.axis is not None:
        raise ValueError("diagnostics of layers that are sharded over a mesh axis are not available.")
    x_L = shift(trace, chain.h_in)
    y_L, jvp, aux_L = jax.linearize(chain.sweep, x_L, has_aux=True)
    return jvp, x_L, y_L, aux_L


def _largest_singular_values(
    apply: Callable[[PyTree], PyTree], like_L: PyTree, num_steps: int, key: jax.Array | None
) -> jax.Array:
    """[N] of N linear maps that ``apply`` applies to the rows of a tree like ``like_L``."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a power iteration needs at least one step.")
    transpose = jax.linear_transpose(apply, like_L)
    leaves, tree = jax.tree.flatten(like_L)
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(leaves))
    start = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]

    def step(_: int, v_L: PyTree) -> PyTree:
        return _normalized(transpose(apply(v_L))[0])

    v_L = jax.lax.fori_loop(0, num_steps - 1, step, _normalized(jax.tree.unflatten(tree, start)))
    return _norm(apply(v_L))


def _norm(v_L: PyTree) -> jax.Array:
    """[N] 2-norms of a state's rows, over all leaves, in float32."""
    squares = [jnp.square(leaf.astype(jnp.float32)).reshape(leaf.shape[0], -1).sum(-1) for leaf in jax.tree.leaves(v_L)]
    return jnp.sqrt(jnp.stack(squares).sum(0))


def _normalized(v_L: PyTree) -> PyTree:
    """Rows of norm 1; a row of zeros, which a map of norm 0 makes, stays."""
    scale_L = 1.0 / jnp.maximum(_norm(v_L), 1e-30)
    return jax.tree.map(lambda leaf: (scale_L.reshape(-1, *(1,) * (leaf.ndim - 1)) * leaf).astype(leaf.dtype), v_L)
