"""How close a solver's logits and its free-running text are to those of the sequential pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snlp_jax.eval.perplexity import token_nll
from snlp_jax.forward import forward
from snlp_jax.model import Model
from snlp_jax.parts import Weights
from snlp_jax.solver import Solution
from snlp_jax.types import Array

HORIZONS = (8, 16, 32, 64)
"""Numbers of generated tokens at which two texts are compared."""


class Comparison(NamedTuple):
    """One batch under one schedule, against the sequential pass. Device arrays, or numpy once fetched."""

    nll_BT: Array
    kl_BT: Array
    """KL(sequential || solver) in nats."""
    agrees_BT: Array
    """Whether the two most likely tokens are the same."""
    cosine_BT: Array
    """Of the two logit vectors."""
    error_BT: Array
    """||h - h*|| / ||h*|| of the last layer's outputs, norms over channels (and streams)."""
    residual_norms: tuple[Any, ...]
    """[num_iters] of each parallel region: mean over layers and tokens of ||f_l(h_{l-1}) - h_l|| / ||h_l||, before
    each correction; NaN for iterations that no sequence needed."""
    iterations: tuple[Any, ...]
    """[B] of each parallel region: iterations made for each sequence; [batches, B] once joined."""


class Reference(NamedTuple):
    """What other passes over a batch are compared with."""

    logits_BTV: Array
    h_last: Array


ReferenceFn = Callable[..., tuple[Reference, Comparison]]
CompareFn = Callable[..., Comparison]


def make_reference_fn(model: Model, mesh: Mesh | None = None) -> ReferenceFn:
    """Jitted ``(weights, windows [B, T + 1], documents [B, T + 1] or None) -> (Reference, the comparison of the pass
    with itself)``."""

    @jax.jit
    def reference(weights: Weights, window_BT: Array, document_BT: Array | None = None) -> tuple[Reference, Comparison]:
        document_BT = None if document_BT is None else document_BT[:, :-1]
        output = forward(model, weights, window_BT[:, :-1], mesh=mesh, document_BT=document_BT)
        nll_BT = token_nll(output.logits_BTV, window_BT[:, 1:])
        zeros_BT, ones_BT = jnp.zeros_like(nll_BT), jnp.ones_like(nll_BT)
        comparison = Comparison(nll_BT, zeros_BT, ones_BT > 0, ones_BT, zeros_BT, (), ())
        return Reference(output.logits_BTV, output.h_last), comparison

    return reference


def make_compare_fn(model: Model, mesh: Mesh | None = None) -> CompareFn:
    """Jitted ``(weights, windows [B, T + 1], Reference, documents [B, T + 1] or None) -> Comparison``; compiles once a
    schedule.

    Only [B, T] arrays leave the device: the logits and last states of one batch are the most that is ever held.
    """

    @jax.jit
    def compare(
        weights: Weights, window_BT: Array, reference: Reference, document_BT: Array | None = None
    ) -> Comparison:
        document_BT = None if document_BT is None else document_BT[:, :-1]
        output = forward(model, weights, window_BT[:, :-1], mesh=mesh, with_stats=True, document_BT=document_BT)
        logits_BTV, reference_BTV = output.logits_BTV, reference.logits_BTV
        flat = lambda h: h.reshape(*window_BT[:, :-1].shape, -1)  # noqa: E731
        difference_BT = jnp.linalg.norm(flat(output.h_last - reference.h_last), axis=-1)
        log_p_BTV, log_q_BTV = jax.nn.log_softmax(reference_BTV), jax.nn.log_softmax(logits_BTV)
        norms_BT = jnp.linalg.norm(logits_BTV, axis=-1) * jnp.linalg.norm(reference_BTV, axis=-1)
        return Comparison(
            nll_BT=token_nll(logits_BTV, window_BT[:, 1:]),
            kl_BT=jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1),
            agrees_BT=logits_BTV.argmax(-1) == reference_BTV.argmax(-1),
            cosine_BT=jnp.sum(logits_BTV * reference_BTV, axis=-1) / jnp.maximum(norms_BT, 1e-30),
            error_BT=difference_BT / jnp.maximum(jnp.linalg.norm(flat(reference.h_last), axis=-1), 1e-30),
            residual_norms=tuple(solution.stats["residual_norm"].mean(-1) for solution in output.solutions),
            iterations=tuple(_iterations(solution, window_BT.shape[0]) for solution in output.solutions),
        )

    return compare


def _iterations(solution: Solution, batch_size: int) -> Array:
    made = solution.stats.get("sequence_iters")
    return jnp.full((batch_size,), solution.stats["residual_norm"].shape[0]) if made is None else made


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
    num_tokens = text_BT.shape[1]
    equal_BT = text_BT == reference_BT
    horizons = sorted({n for n in HORIZONS if n < num_tokens} | {num_tokens})
    return tuple(_match(equal_BT[:, :horizon]) for horizon in horizons)


def _match(equal_BT: np.ndarray) -> GreedyMatch:
    prefix_B = np.cumprod(equal_BT, axis=1).sum(axis=1)
    return GreedyMatch(equal_BT.shape[1], float(prefix_B.mean()), float(equal_BT.mean()))


def join_comparisons(parts: Sequence[Comparison]) -> Comparison:
    """Comparisons of several batches as one, along the batch axis; residual norms are averaged. Numpy.

    An iteration's residual norm is the mean over the batches that made it.
    """
    by_token: Iterator[Any] = (np.concatenate(arrays) for arrays in zip(*(part[:5] for part in parts), strict=True))
    nll_BT, kl_BT, agrees_BT, cosine_BT, error_BT = by_token
    iterations = tuple(np.stack(region) for region in zip(*(part.iterations for part in parts), strict=True))
    norms_by_region = (np.stack(region) for region in zip(*(part.residual_norms for part in parts), strict=True))
    norms = tuple(map(_mean_of_made, norms_by_region, iterations))
    return Comparison(nll_BT, kl_BT, agrees_BT, cosine_BT, error_BT, norms, iterations)


def _mean_of_made(norms_PK: np.ndarray, iterations_PB: np.ndarray) -> np.ndarray:
    """Mean over the parts P of each iteration's norm, NaN where no part made that iteration."""
    made_PK = np.arange(norms_PK.shape[1])[None] < iterations_PB.max(1)[:, None]
    count_K = made_PK.sum(0)
    total_K = np.where(made_PK, norms_PK, 0).sum(0)
    return np.where(count_K > 0, total_K / np.maximum(count_K, 1), np.nan)
