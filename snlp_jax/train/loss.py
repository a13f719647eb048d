"""The training loss: cross entropy of the sequential pass plus auxiliary terms that make a few iterations suffice.

    loss = w_seq CE(sequential) + sum over terms of  weight * ramp(step) * sum over region sizes n of R_n

R_n runs the solver on the last n layers from the sequential state h_{L-n}:

    hidden_norm   one iteration from h0; at every stride-th layer and the last, mean over tokens of ||h' - h|| / ||h||
    solver_ce     cross entropy of the logits after ``num_iters`` iterations
    layer_skip    the last layer alone on h_{L-n}, against h_L (published as the stride-0 solver loss; a control)

A model with heads that look further ahead adds ``mtp.weight * sum over heads k of CE(head k, the token k after the
next)``, on the same sequential pass.

Which terms and sizes a step computes is its :class:`Plan`, chosen on the host, so each distinct plan compiles once and
a term costs nothing before it starts. Training stays sequential in depth: the sequential pass is the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from snlp_jax.config import HiddenNormConfig, LayerSkipConfig, LossConfig, LossTerm, SolverCEConfig, SolverTerm
from snlp_jax.errors import InputError
from snlp_jax.model import Model
from snlp_jax.notation import CORRECTIONS, INITS
from snlp_jax.pieces import over_time
from snlp_jax.seeds import folded
from snlp_jax.solver import Correction, Diagonal, Jacobi, ParallelSegment, PrefixState, relative_norm
from snlp_jax.train.passes import Exact, Passes
from snlp_jax.types import Array, Batch, Params


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
            draw = np.random.default_rng((folded(seed), step, index)).integers(len(chosen))
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
    passes: Passes, config: LossConfig, plan: Plan, weights: Mapping[str, Array | float]
) -> tuple[Array, dict[str, Array]]:
    """The loss (scalar, float32) and the unweighted parts it is made of.

    Args:
        passes: those of one batch over the parameters. The batch's ``weight`` is taken to have mean 1 over the whole
            batch of a step (:func:`balanced`). The last token of a ``document`` is to predict the separator that the
            next one begins with, as in plain packing.
        weights: weight of each term of the plan at this step, see :func:`term_weight`.
    """
    L, mid = passes.model.config.num_layers, passes.model.config.mid_layer
    starts = {L - n - 1 for _, sizes in plan.sizes for n in sizes if n < L}
    wants_trace = any(isinstance(config.terms[name], HiddenNormConfig) for name, _ in plan.sizes)
    exact = passes.in_order(tuple(sorted({mid, L - 1, *starts})), with_trace=wants_trace)
    sequential_ce = _ce_of_states(passes, exact.h_after[L - 1], exact.h_after[mid])
    loss = config.sequential_weight * sequential_ce
    metrics = {"sequential_ce": sequential_ce}
    for name, sizes in plan.sizes:
        term = config.terms[name]
        total = jnp.stack([TERMS[name](passes, exact, term, n) for n in sizes]).sum()
        loss = loss + weights[name] * total
        metrics[name] = total / len(sizes)
    if config.mtp.weight > 0:
        heads = jnp.stack([_ce_ahead(passes, exact, k + 1) for k in range(passes.model.config.num_mtp_heads)])
        loss = loss + config.mtp.weight * heads.sum()
        metrics["mtp"] = heads.mean()
    return loss, {"loss": loss, **metrics}


def _ce_of_states(passes: Passes, h_last: Array, h_mid: Array) -> Array:
    """Cross entropy of the logits that the head makes of two states."""
    targets_BT, weight_BT = passes.batch.tokens[:, 1:], passes.batch.weight
    return cross_entropy(passes.model, passes.params, h_last, h_mid, targets_BT, weight_BT, mesh=passes.mesh)


def _hidden_norm(passes: Passes, exact: Exact, term: HiddenNormConfig, n: int) -> Array:
    L = passes.model.config.num_layers
    region = ParallelSegment(L - n, L, 1, make_correction(term), PrefixState())
    first = passes.first_row(region)
    assert exact.trace is not None
    target = exact.trace[first:]
    target = jax.lax.stop_gradient(target) if term.detach_target else target
    # To pick the compared layers off a spread trace would move it; the others count for nothing instead.
    is_compared = np.zeros(L, np.float32)
    is_compared[L - n + np.asarray(compared_layers(n, term.stride))] = 1.0
    trace = passes.solve(region, exact.h_after[L - n - 1]).trace
    return jnp.dot(relative_norm(trace, target), is_compared[first:])


def _solver_ce(passes: Passes, exact: Exact, term: SolverCEConfig, n: int) -> Array:
    L, mid = passes.model.config.num_layers, passes.model.config.mid_layer
    region = ParallelSegment(L - n, L, term.num_iters, make_correction(term), INITS[term.init]())
    taps = (mid,) if mid >= region.start else ()
    solution = passes.solve(region, exact.h_after[L - n - 1], taps)
    return _ce_of_states(passes, solution.value, solution.tapped[0] if taps else exact.h_after[mid])


def _layer_skip(passes: Passes, exact: Exact, term: LayerSkipConfig, n: int) -> Array:
    L = passes.model.config.num_layers
    target = exact.h_after[L - 1]
    target = jax.lax.stop_gradient(target) if term.detach_target else target
    alone = passes.solve(ParallelSegment(L - 1, L, 1, Jacobi(), PrefixState()), exact.h_after[L - n - 1])
    return relative_norm(alone.value[None], target[None]).sum()


def _ce_ahead(passes: Passes, exact: Exact, k: int) -> Array:
    """Of head k: position t against token t + 1 + k, of the same document. The mean is over the T - k positions that
    have such a token."""
    model, params, batch = passes.model, passes.params, passes.batch
    h_last, h_mid = exact.h_after[model.config.num_layers - 1], exact.h_after[model.config.mid_layer]
    y_BTD = model.readout(params, h_last, h_mid)[:, :-k]
    nll = lambda params, y_BTD, targets_BT: token_nll(  # noqa: E731
        model.unembed(params, model.look_ahead(params, y_BTD, k)), targets_BT, model.config.vocab_size
    )
    size = model.config.padded_vocab_size
    nll_BT = over_time(nll, params, y_BTD, batch.tokens[:, k + 1 :], vocab_size=size, mesh=passes.mesh)
    weight_BT = None if batch.weight is None else batch.weight[:, k:]
    if batch.document is not None:
        is_same_BT = (batch.document[:, : -k - 1] == batch.document[:, k + 1 :]).astype(jnp.float32)
        weight_BT = is_same_BT if weight_BT is None else weight_BT * is_same_BT
    return nll_BT.mean() if weight_BT is None else (weight_BT * nll_BT).mean()


TERMS: dict[str, Callable[[Passes, Exact, Any, int], Array]] = {
    "hidden_norm": _hidden_norm,
    "solver_ce": _solver_ce,
    "layer_skip": _layer_skip,
}
"""Term of a loss -> its value for one size of region."""


def make_correction(term: SolverTerm) -> Correction:
    """The correction that a loss term trains for.

    Raises:
        InputError: no correction has its name, or only a fitted one.
    """
    if term.correction not in CORRECTIONS or term.correction == "cal":
        known = ", ".join(name for name in CORRECTIONS if name != "cal")
        raise InputError(f"a loss term's correction {term.correction!r} is not one of {known}.")
    if term.correction == "diag":
        return Diagonal(mode=term.diagonal_mode, stride=term.diagonal_stride, detach=True)
    return CORRECTIONS[term.correction]()


def balanced(batch: Batch) -> Batch:
    """The batch with weights of mean 1, so that the plain mean of weighted losses is their weighted mean, and means of
    equal parts of the batch average to it."""
    if batch.weight is None:
        return batch
    return batch._replace(weight=batch.weight / jnp.maximum(batch.weight.mean(), 1e-9))


def cross_entropy(
    model: Model,
    params: Params,
    h_last: Array,
    h_mid: Array,
    targets_BT: Array,
    weight_BT: Array | None = None,
    *,
    mesh: Mesh | None = None,
) -> Array:
    """Mean negative log-likelihood of the targets times their weights, in nats, of the logits that the head makes of
    two states, [B, T, D] or [B, T, R, D]; in pieces where these are large (snlp_jax/pieces.py)."""
    size = model.config.padded_vocab_size
    nll = lambda params, h_last, h_mid, targets_BT: token_nll(  # noqa: E731
        model.padded_logits(params, h_last, h_mid), targets_BT, model.config.vocab_size
    )
    nll_BT = over_time(nll, params, h_last, h_mid, targets_BT, vocab_size=size, mesh=mesh)
    return nll_BT.mean() if weight_BT is None else (weight_BT * nll_BT).mean()


def token_nll(logits_BTV: Array, targets_BT: Array, vocab_size: int) -> Array:
    """Negative log-likelihoods [B, T] of the targets, in nats; entries past the vocabulary count for nothing.

    They are masked and not cut off: logits that are split over devices by vocabulary stay where they are.
    """
    is_entry_V = jnp.arange(logits_BTV.shape[-1]) < vocab_size
    masked_BTV = jnp.where(is_entry_V[None, None], logits_BTV, -jnp.inf)
    return optax.softmax_cross_entropy_with_integer_labels(masked_BTV, targets_BT)


def compared_layers(num_layers: int, stride: int) -> list[int]:
    """Layers of a region, from 0, at which traces are compared: every stride-th and the last."""
    return sorted({*range(stride - 1, num_layers, stride), num_layers - 1})
