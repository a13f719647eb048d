"""The training loss: cross entropy of the sequential pass plus auxiliary terms that make a few iterations suffice.

    loss = w_seq CE(sequential) + sum over terms of  weight * ramp(step) * sum over region sizes n of R_n

R_n runs the solver on the last n layers from the sequential state h_{L-n}:

    hidden_norm   one iteration from h0; at every stride-th layer and the last, mean over tokens of ||h' - h|| / ||h||
    solver_ce     cross entropy of the logits after ``num_iters`` iterations
    layer_skip    the last layer alone on h_{L-n}, against h_L (published as the stride-0 solver loss; a control)

Which terms and sizes a step computes is its :class:`Plan`, chosen on the host, so each distinct plan compiles once and
a term costs nothing before it starts. Training stays sequential in depth: the sequential pass is the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snlp_jax.config import HiddenNormConfig, LayerSkipConfig, LossConfig, LossTerm, SolverCEConfig, SolverTerm
from snlp_jax.forward import layer_problem
from snlp_jax.model import LanguageModel
from snlp_jax.notation import CORRECTIONS, INITS
from snlp_jax.solver import (
    Correction,
    Diagonal,
    ParallelSegment,
    PrefixState,
    SequentialSegment,
    Solution,
    relative_norm,
    sequential,
    solve,
)
from snlp_jax.types import Array, Params


@dataclass(frozen=True)
class Plan:
    """What one training step computes besides the sequential cross entropy: region sizes by term. Hashable."""

    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()


def make_plan(config: LossConfig, step: int, num_steps: int, seed: int) -> Plan:
    """The terms that have begun at ``step`` (from 0) and their sizes; sampled sizes depend on (seed, step) alone."""
    sizes = []
    for index, (name, term) in enumerate(config.terms.items()):
        if step < start_step(term, num_steps):
            continue
        chosen = term.region_sizes
        if term.sample_region:
            draw = np.random.default_rng((seed, step, index)).integers(len(chosen))
            chosen = (chosen[draw],)
        sizes.append((name, chosen))
    return Plan(tuple(sizes))


def start_step(term: LossTerm, num_steps: int) -> int:
    """First step, from 0, that computes the term."""
    return round(term.start_fraction * num_steps)


def term_weight(term: LossTerm, step: Array, num_steps: int) -> Array:
    """Weight of the term at ``step``: a linear ramp from its start; sampled sizes count for the whole set."""
    ramp_steps = max(term.ramp_fraction * num_steps, 1.0)
    ramp = jnp.clip((step - start_step(term, num_steps)) / ramp_steps, 0.0, 1.0)
    if term.ramp_fraction == 0:
        ramp = jnp.ones_like(ramp)
    return term.weight * ramp * (len(term.region_sizes) if term.sample_region else 1)


def loss_fn(
    model: LanguageModel,
    params: Params,
    tokens_BT1: Array,
    config: LossConfig,
    plan: Plan,
    weights: Mapping[str, Array | float],
    key: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss (scalar, float32) and the unweighted parts it is made of.

    Args:
        tokens_BT1: [B, T + 1]; the first T are inputs, the last T targets.
        weights: weight of each term of the plan at this step, see :func:`term_weight`.
        key: of the random vectors that the Diagonal correction probes with.
    """
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    L, mid = model.config.num_layers, model.config.mid_layer
    x0_BTD = model.embed(params, inputs_BT)
    shared = model.shared(x0_BTD)
    h_in = model.expand(x0_BTD)

    def run(segment: SequentialSegment | ParallelSegment, h_start: Array) -> Solution:
        blocks = jax.tree.map(lambda leaf: leaf[segment.start : segment.stop], params["blocks"])
        problem = layer_problem(model, params, blocks, inputs_BT, shared, segment, h_start, key=key)
        if isinstance(segment, SequentialSegment):
            return sequential(problem, with_trace=True)
        return solve(problem, segment.correction, num_iters=segment.num_iters, init=segment.init)

    h_L = run(SequentialSegment(0, L), h_in).trace
    sequential_ce = cross_entropy(model.logits(params, h_L[-1], h_L[mid]), targets_BT)

    def hidden_norm(term: HiddenNormConfig, n: int, h_start: Array) -> Array:
        region = ParallelSegment(L - n, L, 1, make_correction(term), PrefixState())
        compared = np.asarray(compared_layers(n, term.stride))
        target = h_L[L - n + compared]
        target = jax.lax.stop_gradient(target) if term.detach_target else target
        return relative_norm(run(region, h_start).trace[compared], target).sum()

    def solver_ce(term: SolverCEConfig, n: int, h_start: Array) -> Array:
        region = ParallelSegment(L - n, L, term.num_iters, make_correction(term), INITS[term.init]())
        solution = run(region, h_start)
        h_mid = solution.trace[mid - (L - n)] if mid >= L - n else h_L[mid]
        return cross_entropy(model.logits(params, solution.value, h_mid), targets_BT)

    def layer_skip(term: LayerSkipConfig, _: int, h_start: Array) -> Array:
        target = jax.lax.stop_gradient(h_L[-1:]) if term.detach_target else h_L[-1:]
        return relative_norm(run(SequentialSegment(L - 1, L), h_start).trace, target).sum()

    parts: dict[str, Callable[..., Array]] = {
        "hidden_norm": hidden_norm,
        "solver_ce": solver_ce,
        "layer_skip": layer_skip,
    }
    loss = config.sequential_weight * sequential_ce
    metrics = {"sequential_ce": sequential_ce}
    for name, sizes in plan.sizes:
        term = config.terms[name]
        values = [parts[name](term, n, h_in if n == L else h_L[L - n - 1]) for n in sizes]
        total = jnp.stack(values).sum()
        loss = loss + weights[name] * total
        metrics[name] = total / len(sizes)
    return loss, {"loss": loss, **metrics}


def make_correction(term: SolverTerm) -> Correction:
    """The correction that a loss term trains for."""
    if term.correction == "diag":
        return Diagonal(mode=term.diagonal_mode, stride=term.diagonal_stride, detach=True)
    return CORRECTIONS[term.correction]()


def cross_entropy(logits_BTV: Array, targets_BT: Array) -> Array:
    """Mean negative log-likelihood of the targets, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()


def compared_layers(num_layers: int, stride: int) -> list[int]:
    """Layers of a region, from 0, at which traces are compared: every stride-th and the last."""
    return sorted({*range(stride - 1, num_layers, stride), num_layers - 1})
