"""What the solver's own numbers do not say: the error of every layer, the sizes of the Jacobians and of what a
correction leaves of them. These cost a sequential pass and more, so :func:`snlp_jax.solver.solve` never calls them.

A small residual does not bound the error: ``h_l - h*_l`` is the sum over i <= l of the residual r_i times the product
of the Jacobians from i to l, so layers of norm above 1 amplify it with depth.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from snlp_jax.solver.chain import Chain, MethodData
from snlp_jax.solver.corrections import Correction, Iteration
from snlp_jax.solver.init import NO_DATA, Guess, Init
from snlp_jax.solver.linear import shift, subtract
from snlp_jax.solver.sequential import sequential
from snlp_jax.solver.solve import check_num_iters, relative_norm, safe_norm, start, step

PyTree = Any

NUM_STEPS = 20
"""Of the power iteration: where sigma_2 = 0.95 sigma_1, 0.95^(4 x 19) = 2 % of the second direction's energy is left,
and the estimate is 0.2 % too low."""
NUM_PROBES = 4
"""Random perturbations that are sent down the depth."""
TINY = 1e-30
"""In place of the norm of a perturbation that a layer has removed."""


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


class Growth(NamedTuple):
    """How perturbations fare on their way down the nodes."""

    log_growth: jax.Array
    """[N]: ``log(||J_l v|| / ||v||)`` of the perturbation v that reaches node l, mean over those that were sent. Their
    mean over the nodes is the largest Lyapunov exponent over the depth, in nats a node."""
    left: jax.Array
    """[N]: ``||J_l v - A_l v|| / ||v||`` of the same v, mean likewise: what the correction does not know of it."""
    carried: jax.Array
    """[N]: ``||A_l v|| / ||v||``."""
    sizes: jax.Array
    """[N + 1]: geometric mean over tokens of ``||h_l||``, of the chain's input and of every node's output."""


def perturbation_growth(
    chain: Chain,
    correction: Correction,
    trace: PyTree,
    data: MethodData = NO_DATA,
    num_probes: int = NUM_PROBES,
    key: jax.Array | None = None,
    *,
    index: int = 0,
) -> Growth:
    """What becomes of random perturbations of the chain's input: ``v_0`` normal, ``v_l = J_l v_{l-1}`` at the exact
    trace (Benettin's algorithm; the norms need no rescaling at the depth of a network).

    A random v_0 has a share in the direction that grows fastest, which wins with depth; over few layers the mean of
    ``log_growth`` lies below ``log(||J_N .. J_1||_2) / N``, the largest that any perturbation reaches. It never exceeds
    the mean of ``log ||J_l||_2``. Since ``| ||Jv|| - ||Av|| | <= ||Jv - Av||``, growth alone says of a correction at
    best what ``left`` says.

    Cost: ``num_probes`` sequential passes with a JVP, one after another. Needs layers with a forward-mode derivative.

    Args:
        trace: the exact trace.
        index: the iteration, counted from 0, whose A_l is meant where a correction has one for each.
    """
    _refuse_axis(chain)
    x_L = shift(trace, chain.h_in)
    y_L, aux_L = chain.sweep(x_L)
    it = Iteration(index, x_L, y_L, aux_L, trace, chain.h_in)
    state = correction.start(chain, x_L, data)
    h_in_1 = jax.tree.map(lambda leaf: leaf[None], chain.h_in)

    def trace_of(h_in: PyTree) -> PyTree:
        return sequential(dataclasses.replace(chain, h_in=h_in), with_trace=True).trace

    def send(key: jax.Array) -> tuple[jax.Array, ...]:
        v = jax.tree.map(lambda leaf: leaf[0], _normalized(_random_like(h_in_1, key)))
        after = jax.jvp(trace_of, (chain.h_in,), (v,))[1]
        before = shift(after, v)
        carried = correction.apply(chain, it, state, before, after)
        norm = jnp.maximum(_norm(before), TINY)
        grown = jnp.log(jnp.maximum(_norm(after), TINY) / norm)
        return grown, _norm(subtract(after, carried)) / norm, _norm(carried) / norm

    grown, left, carried = jax.lax.map(send, jax.random.split(_key(key), num_probes))
    sizes = jnp.concatenate([_sizes(h_in_1), _sizes(trace)])
    return Growth(grown.mean(0), left.mean(0), carried.mean(0), sizes)


def _sizes(h_L: PyTree) -> jax.Array:
    """[N] geometric means over tokens of the norms over the last axis, mean over leaves."""
    sizes = [
        jnp.exp(jnp.log(jnp.maximum(safe_norm(leaf).reshape(leaf.shape[0], -1), TINY)).mean(-1))
        for leaf in jax.tree.leaves(h_L)
    ]
    return jnp.stack(sizes).mean(0)


def _linearized(chain: Chain, trace: PyTree) -> tuple[Callable[[PyTree], PyTree], PyTree, PyTree, PyTree]:
    """``v_L -> J_l v_l`` for all layers at once, their inputs, outputs and what they leave behind."""
    _refuse_axis(chain)
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

    def step(_: int, v_L: PyTree) -> PyTree:
        return _normalized(transpose(apply(v_L))[0])

    v_L = jax.lax.fori_loop(0, num_steps - 1, step, _normalized(_random_like(like_L, _key(key))))
    return _norm(apply(v_L))


def _refuse_axis(chain: Chain) -> None:
    if chain.place.axis is not None:
        raise ValueError("diagnostics of layers that are sharded over a mesh axis are not available.")


def _key(key: jax.Array | None) -> jax.Array:
    return jax.random.key(0) if key is None else key


def _random_like(tree: PyTree, key: jax.Array) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _norm(v_L: PyTree) -> jax.Array:
    """[N] 2-norms of a state's rows, over all leaves, in float32."""
    squares = [jnp.square(leaf.astype(jnp.float32)).reshape(leaf.shape[0], -1).sum(-1) for leaf in jax.tree.leaves(v_L)]
    return jnp.sqrt(jnp.stack(squares).sum(0))


def _normalized(v_L: PyTree) -> PyTree:
    """Rows of norm 1; a row of zeros, which a map of norm 0 makes, stays."""
    scale_L = 1.0 / jnp.maximum(_norm(v_L), 1e-30)
    return jax.tree.map(lambda leaf: (scale_L.reshape(-1, *(1,) * (leaf.ndim - 1)) * leaf).astype(leaf.dtype), v_L)
