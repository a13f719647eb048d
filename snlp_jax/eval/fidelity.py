"""How close a solver's logits and its free-running text are to those of the sequential pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snlp_jax.eval.perplexity import token_nll
from snlp_jax.forward import Ends, States, read_logits, run_parts
from snlp_jax.model import Model
from snlp_jax.parts import Weights
from snlp_jax.solver import ParallelSegment, Schedule, Solution
from snlp_jax.types import Array

HORIZONS = (8, 16, 32, 64)
"""Numbers of generated tokens at which two texts are compared."""


class Comparison(NamedTuple):
    """One batch under one schedule, against the sequential pass. Device arrays, or numpy once fetched."""

    nll_BT: Any
    kl_BT: Any
    """KL(sequential || solver) in nats."""
    agrees_BT: Any
    """Whether the two most likely tokens are the same."""
    cosine_BT: Any
    """Of the two logit vectors."""
    error_BT: Any
    """||h - h*|| / ||h*|| of the last layer's outputs, norms over channels (and streams)."""
    residual_norms: tuple[Any, ...]
    """[1, num_iters] of each parallel region: mean over layers and tokens of ||f_l(h_{l-1}) - h_l|| / ||h_l||, before
    each correction; NaN for iterations that no sequence needed. [batches, num_iters] once joined."""
    iterations: tuple[Any, ...]
    """[1, B] of each parallel region: iterations made for each sequence; [batches, B] once joined."""


class Scores(NamedTuple):
    """What a pass says of the targets of windows: [B, T], or [B, S] of those that were asked for."""

    nll_BT: Array
    """Negative log-likelihood, in nats."""
    is_best_BT: Array
    """Whether no token is likelier."""


CompareFn = Callable[..., tuple[Ends, Comparison]]


def pass_over(
    model: Model,
    weights: Weights,
    window_BT: Array,
    document_BT: Array | None = None,
    *,
    places_BS: Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[States, Scores]:
    """A pass over windows [B, T + 1] without their last tokens, and what it says of their targets.

    Args:
        places_BS: int, the S targets of each window that are asked for, from 0; None asks for all T. The head, more
            than half of the work where the vocabulary is large, reads no other.
    """
    document_BT = None if document_BT is None else document_BT[:, :-1]
    states = run_parts(model, weights, window_BT[:, :-1], mesh=mesh, document_BT=document_BT)
    ends, targets_BS = states.ends, window_BT[:, 1:]
    if places_BS is not None:
        rows_B1 = jnp.arange(len(window_BT))[:, None]
        ends, targets_BS = jax.tree.map(lambda leaf: leaf[rows_B1, places_BS], (ends, targets_BS))
    return states, read_logits(_score, model, weights.embed_head, [ends], targets_BS, mesh=mesh)


def _score(logits_BTV: Array, targets_BT: Array) -> Scores:
    return Scores(token_nll(logits_BTV, targets_BT), logits_BTV.argmax(-1) == targets_BT)


def make_compare_fn(model: Model, mesh: Mesh | None = None) -> CompareFn:
    """Jitted ``(weights, windows [B, T + 1], documents [B, T + 1] or None, Ends or None) -> (Ends,
    Comparison)``, without a reference of the pass with itself; compiles once a schedule.

    Besides the reference's states only [B, T] arrays leave the device.
    """

    def compare_logits(logits_BTV: Array, *others: Array) -> dict[str, Array]:
        *reference, targets_BT = others
        reference_BTV = reference[0] if reference else logits_BTV
        dot_BT = lambda x_BTV, y_BTV: jnp.sum(x_BTV * y_BTV, axis=-1)  # noqa: E731
        log_p_BTV, log_q_BTV = jax.nn.log_softmax(reference_BTV), jax.nn.log_softmax(logits_BTV)
        # The root of a square, and so 1 for equal logits.
        norms_BT = jnp.sqrt(dot_BT(logits_BTV, logits_BTV) * dot_BT(reference_BTV, reference_BTV))
        return {
            "nll_BT": token_nll(logits_BTV, targets_BT),
            "kl_BT": jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1),
            "agrees_BT": logits_BTV.argmax(-1) == reference_BTV.argmax(-1),
            "cosine_BT": dot_BT(logits_BTV, reference_BTV) / jnp.maximum(norms_BT, 1e-30),
        }

    @jax.jit
    def compare(
        weights: Weights, window_BT: Array, document_BT: Array | None = None, reference: Ends | None = None
    ) -> tuple[Ends, Comparison]:
        document_BT = None if document_BT is None else document_BT[:, :-1]
        states = run_parts(model, weights, window_BT[:, :-1], mesh=mesh, with_stats=True, document_BT=document_BT)
        ends = [states.ends] if reference is None else [states.ends, reference]
        found = read_logits(compare_logits, model, weights.embed_head, ends, window_BT[:, 1:], mesh=mesh)
        reference = reference or states.ends
        size_BT = lambda x: jnp.linalg.norm(x.reshape(*x.shape[:2], -1), axis=-1)  # noqa: E731
        return reference, Comparison(
            **found,
            error_BT=size_BT(states.h_last - reference[0]) / jnp.maximum(size_BT(reference[0]), 1e-30),
            residual_norms=tuple(solution.stats["residual_norm"].mean(-1)[None] for solution in states.solutions),
            iterations=tuple(made_B[None] for made_B in iterations_of(weights, states.solutions, len(window_BT))),
        )

    return compare


def iterations_of(weights: Weights, solutions: Sequence[Solution], batch_size: int) -> tuple[Array, ...]:
    """[B] of each region: how many were made for each sequence; all, unless a tolerance has stopped them."""
    regions = [segment for segment in weights.segments if isinstance(segment, ParallelSegment)]
    every = [jnp.full(batch_size, region.num_iters) for region in regions]
    return tuple(made.stats.get("sequence_iters", all_B) for made, all_B in zip(solutions, every, strict=True))


def mean_cost(schedule: Schedule, iterations: Sequence[Any]) -> tuple[float, float]:
    """Dependent block evaluations and all of them, of an average sequence, which may stop before the last iteration.

    Args:
        iterations: of each region, those that were made: a number or an array of them.
    """
    depth, num_evals = float(schedule.depth), float(schedule.num_block_evals)
    for region, made in zip(schedule.regions, iterations, strict=True):
        left_out = region.num_iters - float(np.mean(made))
        depth -= left_out * (region.depth - region.init.num_evals) / region.num_iters
        num_evals -= left_out * region.num_layers
    return depth, num_evals


def join_comparisons(parts: Sequence[Comparison]) -> Comparison:
    """Comparisons of several batches as one. Numpy."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def mean_norms(norms_PK: np.ndarray, iterations_PB: np.ndarray) -> np.ndarray:
    """Of each iteration the mean residual norm over the batches P that made it, NaN where none did."""
    is_made_PK = np.arange(norms_PK.shape[1]) < iterations_PB.max(1)[:, None]
    return np.ma.masked_array(norms_PK, ~is_made_PK).mean(0).filled(np.nan)


@dataclass(frozen=True)
class GreedyMatch:
    """Agreement of two greedy continuations of the same prompts over their first ``num_tokens`` tokens."""

    num_tokens: int
    prefix_len: float
    """Mean number of tokens before the first difference."""
    match_rate: float
    """Share of positions with the same token, those after a difference included."""


def greedy_matches(text_BT: np.ndarray, reference_BT: np.ndarray) -> tuple[GreedyMatch, ...]:
    """Agreement of two batches of generated tokens at each of ``HORIZONS`` that fits, and over the whole length."""
    horizons = sorted({n for n in HORIZONS if n < text_BT.shape[1]} | {text_BT.shape[1]})
    equals = [text_BT[:, :n] == reference_BT[:, :n] for n in horizons]
    prefixes = [float(np.cumprod(equal_BT, axis=1).sum(axis=1).mean()) for equal_BT in equals]
    return tuple(map(GreedyMatch, horizons, prefixes, (float(equal_BT.mean()) for equal_BT in equals)))
