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

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from snlp_jax.config import HiddenNormConfig, LayerSkipConfig, LossConfig, LossTerm, SolverCEConfig, SolverTerm
from snlp_jax.forward import layer_problem, run_in_order
from snlp_jax.layout import check_alike
from snlp_jax.model import LanguageModel
from snlp_jax.model.kinds import cut, each_stack, in_a_row
from snlp_jax.notation import CORRECTIONS, INITS
from snlp_jax.parallel import over_data, solve_sharded
from snlp_jax.parallel.mesh import kernels_on
from snlp_jax.parallel.sharding import gather_channels
from snlp_jax.solver import (
    Correction,
    Diagonal,
    Jacobi,
    LayerProblem,
    ParallelSegment,
    PrefixState,
    Segment,
    SequentialSegment,
    Solution,
    relative_norm,
    solve,
)
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
    batch: Batch,
    config: LossConfig,
    plan: Plan,
    weights: Mapping[str, Array | float],
    key: Array | None = None,
    *,
    mesh: Mesh | None = None,
    ring_microbatches: int = 1,
) -> tuple[Array, dict[str, Array]]:
    """The loss (scalar, float32) and the unweighted parts it is made of.

    On a mesh with a layer axis no weight moves along it: the sequential pass goes round the devices, and a region's
    iterations run on the whole stack, whose other layers pass their input on. Along a data axis weights are gathered
    where they are used: a layer at a time in the sequential pass, unless that is a ring, which would gather them again
    for every microbatch; all of them at once in a region, which reads them all at once.

    Args:
        batch: its ``weight`` is taken to have mean 1 over the whole batch of a step (:func:`balanced`). The last token
            of a ``document`` is to predict the separator that the next one begins with, as in plain packing.
        weights: weight of each term of the plan at this step, see :func:`term_weight`.
        key: of the random vectors that the Diagonal correction probes with.
        mesh: devices that hold ``params`` in the training layout (``snlp_jax/parallel/sharding.py``).
        ring_microbatches: parts in which the batch goes round the devices of the layer axis.
    """
    if mesh is not None:
        check_alike(model.config, mesh)
    inputs_BT, targets_BT = batch.tokens[:, :-1], batch.tokens[:, 1:]
    L, mid = model.config.num_layers, model.config.mid_layer
    ring = mesh if mesh is not None and mesh.shape["layer"] > 1 else None
    region_mesh = mesh if mesh is not None and mesh.shape["layer"] * mesh.shape["data"] > 1 else None
    gather = lambda tree, **how: tree  # noqa: E731
    if mesh is not None and mesh.shape["data"] > 1:
        gather = functools.partial(gather_channels, config=model.config, mesh=mesh, dtype=model.dtype)
    params = gather({"embed": params["embed"], "head": params["head"]}) | {"blocks": params["blocks"]}
    if ring is not None:
        params["blocks"] = gather(params["blocks"], prefix="blocks/")
    in_order = model.adapted(
        fetch=None if ring is not None else functools.partial(gather, prefix="blocks/", is_one_layer=True),
        kernels=kernels_on(mesh, is_spread=ring is not None),
    )
    at_once = model.adapted(kernels=kernels_on(mesh, is_spread=region_mesh is not None))
    document_BT = None if batch.document is None else batch.document[:, :-1]
    x0_BTD = over_data(mesh, model.embed(params, inputs_BT, document_BT=document_BT))
    shared = model.shared(x0_BTD, document_BT=document_BT)
    h_in = model.expand(x0_BTD)

    def first_row(segment: Segment) -> int:
        """The layer that row 0 of a segment's trace belongs to."""
        return segment.start if ring is None else 0

    def problem(segment: SequentialSegment | ParallelSegment, h_start: Array) -> LayerProblem:
        first, stop = (segment.start, segment.stop) if ring is None else (0, L)
        blocks, here, its_mesh = params["blocks"], in_order, ring
        if isinstance(segment, ParallelSegment):
            here, its_mesh = at_once, region_mesh
        if ring is None and isinstance(segment, ParallelSegment):
            blocks = each_stack(functools.partial(gather, prefix="blocks/"), cut(model.config, blocks, first, stop))
        elif ring is None:
            blocks = in_a_row(model.config, blocks, first, stop)
        settings: dict[str, Any] = {"key": key, "mesh": its_mesh, "stack": (first, stop)}
        return layer_problem(here, params, blocks, inputs_BT, shared, segment, h_start, **settings)

    def run(region: ParallelSegment, h_start: Array, taps: tuple[int, ...] = ()) -> Solution:
        """The region's solution; ``taps`` are layers of the model."""
        posed, rows = problem(region, h_start), tuple(tap - first_row(region) for tap in taps)
        settings: dict[str, Any] = {"num_iters": region.num_iters, "init": region.init, "taps": rows}
        if region_mesh is not None:
            return solve_sharded(posed, region.correction, mesh=region_mesh, **settings)
        return solve(posed, region.correction, **settings)

    whole = SequentialSegment(0, L)
    states = sorted({mid, L - 1, *(L - n - 1 for _, sizes in plan.sizes for n in sizes if n < L)})
    exact = run_in_order(problem(whole, h_in), ring, tuple(states), ring_microbatches, with_trace=True)
    h_after = dict(zip(states, exact.tapped, strict=True)) | {-1: h_in}

    def ce(h_last: Array, h_mid: Array) -> Array:
        logits_BTV = model.padded_logits(params, h_last, h_mid)
        return cross_entropy(logits_BTV, targets_BT, model.config.vocab_size, batch.weight)

    sequential_ce = ce(h_after[L - 1], h_after[mid])

    def ce_ahead(k: int) -> Array:
        """Of head k: position t against token t + 1 + k, of the same document. The mean is over the T - k positions
        that have such a token."""
        y_BTD = model.readout(params, h_after[L - 1], h_after[mid])[:, :-k]
        logits_BTV = model.unembed(params, model.look_ahead(params, y_BTD, k))
        weight_BT = None if batch.weight is None else batch.weight[:, k:]
        if batch.document is not None:
            is_same_BT = (batch.document[:, : -k - 1] == batch.document[:, k + 1 :]).astype(jnp.float32)
            weight_BT = is_same_BT if weight_BT is None else weight_BT * is_same_BT
        return cross_entropy(logits_BTV, targets_BT[:, k:], model.config.vocab_size, weight_BT)

    def hidden_norm(term: HiddenNormConfig, n: int, h_start: Array) -> Array:
        region = ParallelSegment(L - n, L, 1, make_correction(term), PrefixState())
        target = exact.trace[first_row(region) :]
        target = jax.lax.stop_gradient(target) if term.detach_target else target
        # To pick the compared layers off a sharded trace would move it; the others count for nothing instead.
        is_compared = np.zeros(L, np.float32)
        is_compared[L - n + np.asarray(compared_layers(n, term.stride))] = 1.0
        return jnp.dot(relative_norm(run(region, h_start).trace, target), is_compared[first_row(region) :])

    def solver_ce(term: SolverCEConfig, n: int, h_start: Array) -> Array:
        region = ParallelSegment(L - n, L, term.num_iters, make_correction(term), INITS[term.init]())
        has_mid = mid >= region.start
        solution = run(region, h_start, (mid,) if has_mid else ())
        return ce(solution.value, solution.tapped[0] if has_mid else h_after[mid])

    def layer_skip(term: LayerSkipConfig, _: int, h_start: Array) -> Array:
        target = jax.lax.stop_gradient(h_after[L - 1]) if term.detach_target else h_after[L - 1]
        alone = run(ParallelSegment(L - 1, L, 1, Jacobi(), PrefixState()), h_start)
        return relative_norm(alone.value[None], target[None]).sum()

    parts: dict[str, Callable[..., Array]] = {
        "hidden_norm": hidden_norm,
        "solver_ce": solver_ce,
        "layer_skip": layer_skip,
    }
    loss = config.sequential_weight * sequential_ce
    metrics = {"sequential_ce": sequential_ce}
    for name, sizes in plan.sizes:
        term = config.terms[name]
        values = [parts[name](term, n, h_after[L - n - 1]) for n in sizes]
        total = jnp.stack(values).sum()
        loss = loss + weights[name] * total
        metrics[name] = total / len(sizes)
    if config.mtp.weight > 0:
        heads = jnp.stack([ce_ahead(k + 1) for k in range(model.config.num_mtp_heads)])
        loss = loss + config.mtp.weight * heads.sum()
        metrics["mtp"] = heads.mean()
    return loss, {"loss": loss, **metrics}


def make_correction(term: SolverTerm) -> Correction:
    """The correction that a loss term trains for."""
    if term.correction == "diag":
        return Diagonal(mode=term.diagonal_mode, stride=term.diagonal_stride, detach=True)
    return CORRECTIONS[term.correction]()


def balanced(batch: Batch) -> Batch:
    """The batch with weights of mean 1, so that the plain mean of weighted losses is their weighted mean, and means of
    equal parts of the batch average to it."""
    if batch.weight is None:
        return batch
    return batch._replace(weight=batch.weight / jnp.maximum(batch.weight.mean(), 1e-9))


def cross_entropy(logits_BTV: Array, targets_BT: Array, vocab_size: int, weight_BT: Array | None = None) -> Array:
    """Mean negative log-likelihood of the targets times their weights, in nats; entries past the vocabulary count for
    nothing.

    They are masked and not cut off: logits that are split over devices by vocabulary stay where they are.
    """
    is_entry_V = jnp.arange(logits_BTV.shape[-1]) < vocab_size
    masked_BTV = jnp.where(is_entry_V[None, None], logits_BTV, -jnp.inf)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(masked_BTV, targets_BT)
    return nll_BT.mean() if weight_BT is None else (weight_BT * nll_BT).mean()


def compared_layers(num_layers: int, stride: int) -> list[int]:
    """Layers of a region, from 0, at which traces are compared: every stride-th and the last."""
    return sorted({*range(stride - 1, num_layers, stride), num_layers - 1})
