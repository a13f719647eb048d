"""Logits to tokens inside a compiled decoding loop, for a batch whose rows have different requests.

All noise comes from (seed, position, purpose): equal logits and equal draft lengths give a request the same text in any
batch and any row. Other draft lengths change a sampled text, not its law. Drafts have the axes
G (drafts of a block) and X = G + 1 (the current token and the drafts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from snlp_jax.config.check import Checked, Rule, Share, require
from snlp_jax.seeds import folded
from snlp_jax.types import Array

_DRAW, _ACCEPT, _RESAMPLE = range(3)
"""Purposes of noise: a token from its distribution, the test of a draft, the token in a rejected draft's place."""
_ALL = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Sampling(Checked):
    """How one request picks its tokens. The defaults pick the likeliest token and change nothing else."""

    temperature: Annotated[float, Rule(lambda x: x == 0 or 1e-4 <= x <= 1e4, "give 0, or 0.0001 to 10000")] = 0.0
    """Divides the logits; 0 is greedy, the first of the likeliest tokens."""
    top_k: Annotated[int, Rule(lambda k: 0 <= k <= _ALL, f"give 0 to {_ALL}")] = 0
    """Keeps tokens that fewer than ``top_k`` others beat, so ties stay together; 0 keeps all."""
    top_p: Annotated[float, Rule(lambda p: 0 < p <= 1, "give more than 0, and 1 to keep all tokens")] = 1.0
    """Keeps tokens for which the likelier ones hold less than ``top_p`` of what top-k has left; 1 keeps all."""
    min_p: Share = 0.0
    """Drops tokens less likely than ``min_p`` times the likeliest; 0 keeps all."""
    repetition_penalty: Annotated[float, Rule(lambda x: 0.01 <= x <= 100, "give 0.01 to 100, and 1 for none")] = 1.0
    """CTRL's (Keskar et al. 2019): divides positive and multiplies negative logits of every token of the prompt and
    of the output, but those that end it; 1 changes nothing."""
    seed: int = 0


class Rows(NamedTuple):
    """The fields of :class:`Sampling`, each [B]."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    seed: Array


@dataclass(frozen=True)
class Features:
    """What any row of a batch needs, known when the loop is compiled: the rest costs nothing."""

    samples: bool
    """Some row has a temperature."""
    filters: bool
    """Some row that samples has top-k, top-p or min-p."""
    penalizes: bool
    """Some row has a repetition penalty."""


class Accepted(NamedTuple):
    count_B: Array
    """Accepted drafts, 0 to ``draft_len``."""
    next_B: Array
    """The token after them."""


def rows_of(samplings: Sequence[Sampling]) -> tuple[Rows, Features]:
    """One row for each request, and what they need together."""
    require(len(samplings) > 0, "there are no requests to sample for; give at least one.")
    dtypes = {"top_k": np.int32, "seed": np.uint32}
    columns = {name: [getattr(sampling, name) for sampling in samplings] for name in Rows._fields}
    columns["seed"] = [folded(sampling.seed) for sampling in samplings]
    rows = Rows(*(jnp.asarray(np.asarray(column, dtypes.get(name, np.float32))) for name, column in columns.items()))
    sampled = [sampling for sampling in samplings if sampling.temperature > 0]
    features = Features(
        samples=bool(sampled),
        filters=any(sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0 for sampling in sampled),
        penalizes=any(sampling.repetition_penalty != 1 for sampling in samplings),
    )
    return rows, features


def distribution(logits_BTV: Array, seen_BTV: Array | None, rows: Rows, features: Features) -> Array:
    """Log-probabilities [B, T, V] in float32 of penalty, temperature, top-k, top-p and min-p, in this order.

    Excluded tokens have -inf; at least the likeliest stays. A greedy row has 0 at its first likeliest token and -inf
    elsewhere. ``seen_BTV`` marks the tokens before each logit (:func:`seen_with_drafts`) and is read where
    ``features.penalizes``. Cost: some passes over the logits, and two binary searches of 31 passes each with
    ``features.filters``; nothing is sorted.
    """
    x_BTV = logits_BTV.astype(jnp.float32)
    if features.penalizes:
        if seen_BTV is None:
            raise ValueError("a repetition penalty needs seen_BTV, the tokens that came before each logit.")
        penalty_B11 = _column(rows.repetition_penalty)
        penalized_BTV = jnp.where(x_BTV > 0, x_BTV / penalty_B11, x_BTV * penalty_B11)
        x_BTV = jnp.where(seen_BTV, penalized_BTV, x_BTV)

    best_BT1 = x_BTV.argmax(-1, keepdims=True)
    is_best_BTV = jax.lax.broadcasted_iota(best_BT1.dtype, x_BTV.shape, 2) == best_BT1
    greedy_BTV = jnp.where(is_best_BTV, 0.0, -jnp.inf)
    if not features.samples:
        return greedy_BTV

    temperature_B11 = _column(rows.temperature)
    is_greedy_B11 = temperature_B11 == 0
    x_BTV = (x_BTV - x_BTV.max(-1, keepdims=True)) / jnp.where(is_greedy_B11, 1.0, temperature_B11)
    if features.filters:
        x_BTV = jnp.where(_is_kept(x_BTV, rows), x_BTV, -jnp.inf)
    return jnp.where(is_greedy_B11, greedy_BTV, jax.nn.log_softmax(x_BTV))


def draw(log_probs_BV: Array, rows: Rows, position_B: Array, features: Features) -> Array:
    """``argmax_v (log p_v + g_v)`` with Gumbel noise g, which has the law p; ``argmax_v log p_v`` in greedy rows.

    ``position_B`` is the drawn token's index in its own request, prompt included and padding left out: with the seed
    it fixes the noise. The drafter draws here as well, with its own distributions: a noise that a draft has used is
    used again at its position only where that draft was not reached, and so tells nothing.
    """
    if not features.samples:
        return log_probs_BV.argmax(-1).astype(jnp.int32)
    return _gumbel_max(log_probs_BV, rows, position_B, jnp.full_like(rows.top_k, _DRAW))


def accept(
    drafts_BG: Array,
    draft_len: ArrayLike,
    draft_log_probs_BGV: Array | None,
    target_log_probs_BXV: Array,
    rows: Rows,
    position_B: Array,
    features: Features,
) -> Accepted:
    """Speculative sampling: draft d_i is accepted with probability ``min(1, p_i(d_i) / q_i(d_i))``, the first rejected
    one is replaced by a draw from ``(p_i - q_i)+``, normalised; after ``draft_len`` accepted ones comes a draw from p.

    The tokens have the law of p exactly, whatever q is, if d_i was drawn from q_i (Leviathan et al. 2023; Chen et al.
    2023); a draft is accepted with probability ``sum_v min(p_v, q_v)``. In greedy rows that is the longest prefix of
    drafts that are the likeliest tokens, and the likeliest token after it. Without drafts it is :func:`draw`, with
    q = p it gives the tokens that :func:`draw` gives.

    Drafts that nothing was drawn for (``draft_log_probs_BGV`` None) are accepted where :func:`draw` gives the same
    token: with probability p(d), as for a law q that is certain, and the text is that of plain draws, token for token.

    ``target_log_probs_BXV[:, i]`` is the law after i drafts, ``draft_len`` a number or one for each row, at most G,
    and ``position_B`` the first draft's position. Cost: G numbers of p and q and one row of each; where no row
    samples only a comparison with the likeliest tokens, and ``draft_log_probs_BGV`` is not read; G + 1 draws where
    drafts have no law.
    """
    num_rows, num_drafts = drafts_BG.shape
    length_B = jnp.broadcast_to(jnp.asarray(draft_len, jnp.int32), num_rows)
    is_tested_BG = jnp.arange(num_drafts)[None] < length_B[:, None]
    row_B = jnp.arange(num_rows)

    if not features.samples or draft_log_probs_BGV is None or num_drafts == 0:
        position_BX = position_B[:, None] + jnp.arange(num_drafts + 1)[None]
        draw_all = jax.vmap(lambda p_BV, at_B: draw(p_BV, rows, at_B, features), in_axes=1, out_axes=1)
        drawn_BX = draw_all(target_log_probs_BXV, position_BX)
        count_B = _count_leading(is_tested_BG & (drafts_BG == drawn_BX[:, :num_drafts]))
        return Accepted(count_B, drawn_BX[row_B, count_B])

    p_BG, q_BG = (
        jnp.exp(jnp.take_along_axis(log_probs_BTV[:, :num_drafts], drafts_BG[:, :, None], axis=-1)[:, :, 0])
        for log_probs_BTV in (target_log_probs_BXV, draft_log_probs_BGV)
    )
    position_BG = position_B[:, None] + jnp.arange(num_drafts)[None]
    uniform = lambda seed, position: jax.random.uniform(_key(seed, position, _ACCEPT))  # noqa: E731
    u_BG = jax.vmap(jax.vmap(uniform, (None, 0)))(rows.seed, position_BG)
    count_B = _count_leading(is_tested_BG & (u_BG * q_BG < p_BG))

    was_rejected_B = count_B < length_B
    log_p_BV = target_log_probs_BXV[row_B, count_B]
    log_q_BV = draft_log_probs_BGV[row_B, jnp.minimum(count_B, num_drafts - 1)]
    rest_BV = jnp.maximum(jnp.exp(log_p_BV) - jnp.exp(log_q_BV), 0.0)
    # Where p = q up to rounding nothing is left, and a rejection, if there is one, is rounding too.
    has_rest_B = was_rejected_B & jnp.any(rest_BV > 0, axis=-1)
    next_log_probs_BV = jnp.where(has_rest_B[:, None], jnp.log(rest_BV), log_p_BV)
    purpose_B = jnp.where(was_rejected_B, _RESAMPLE, _DRAW)
    return Accepted(count_B, _gumbel_max(next_log_probs_BV, rows, position_B + count_B, purpose_B))


def seen_in(tokens_BT: Array, is_token_BT: Array, vocab_size: int) -> Array:
    """The set of tokens of each row as marks [B, V]; padding, where ``is_token_BT`` is False, is left out."""
    row_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    index_BT = jnp.where(is_token_BT, tokens_BT, vocab_size)
    empty_BV = jnp.zeros((tokens_BT.shape[0], vocab_size), bool)
    return empty_BV.at[row_B1, index_BT].set(True, mode="drop")


def seen_with_drafts(seen_BV: Array, tokens_BX: Array) -> Array:
    """``seen_BXV[b, i]`` = ``seen_BV[b]`` and the tokens ``tokens_BX[b, 0..i]``, input i included.

    With a block's input tokens (the current token, then the drafts) this is what the logits at index i come after.
    ``seen_BXV[b, count_b]`` is then the set before the next block, whose first input is ``next_b``. Cost: marks
    [B, X, V].
    """
    shape = (*tokens_BX.shape, seen_BV.shape[-1])
    is_input_BXV = jax.lax.broadcasted_iota(tokens_BX.dtype, shape, 2) == tokens_BX[:, :, None]
    return jax.lax.associative_scan(jnp.logical_or, is_input_BXV, axis=1) | seen_BV[:, None]


def _is_kept(x_BTV: Array, rows: Rows) -> Array:
    """What top-k, top-p and min-p keep of logits whose largest is 0."""
    top_k_B11, top_p_B11, min_p_B11 = map(_column, (rows.top_k, rows.top_p, rows.min_p))
    # Floats of one sign are ordered as their bits are: 0 is the likeliest, and a larger number is less likely.
    order_BTV = jax.lax.bitcast_convert_type(jnp.abs(x_BTV), jnp.int32)

    def last_kept(weight_BTV: Array, limit_BT1: Array) -> Array:
        """The largest c with ``sum(weight, where order < c) < limit``, found bit by bit; 0 if the limit is 0."""

        def step(index: Array, found_BT1: Array) -> Array:
            trial_BT1 = found_BT1 + (jnp.int32(1) << (30 - index))
            before_BT1 = jnp.where(order_BTV < trial_BT1, weight_BTV, 0.0).sum(-1, keepdims=True)
            return jnp.where(before_BT1 < limit_BT1, trial_BT1, found_BT1)

        return jax.lax.fori_loop(0, 31, step, jnp.zeros_like(order_BTV[..., :1]))

    by_count_BT1 = last_kept(jnp.ones_like(x_BTV), top_k_B11.astype(jnp.float32))
    by_count_BT1 = jnp.where(top_k_B11 > 0, by_count_BT1, _ALL)
    mass_BTV = jnp.where(order_BTV <= by_count_BT1, jnp.exp(x_BTV), 0.0)
    by_mass_BT1 = last_kept(mass_BTV, top_p_B11 * mass_BTV.sum(-1, keepdims=True))
    by_mass_BT1 = jnp.where(top_p_B11 < 1, by_mass_BT1, _ALL)
    return (order_BTV <= jnp.minimum(by_count_BT1, by_mass_BT1)) & (x_BTV >= jnp.log(min_p_B11))


def _gumbel_max(log_probs_BV: Array, rows: Rows, position_B: Array, purpose_B: Array) -> Array:
    """A draw in rows that sample, the first likeliest token in greedy ones."""

    def gumbel(seed: Array, position: Array, purpose: Array) -> Array:
        bits_V = jax.random.bits(_key(seed, position, purpose), log_probs_BV.shape[-1:], jnp.uint32)
        # The upper tail decides, so the uniforms are fine near 0: 2**-33 is the smallest, and 1 is left out.
        u_V = jnp.minimum((bits_V.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
        return -jnp.log(-jnp.log1p(-u_V))

    noise_BV = jax.vmap(gumbel)(rows.seed, position_B, purpose_B)
    is_greedy_B1 = rows.temperature[:, None] == 0
    return (log_probs_BV + jnp.where(is_greedy_B1, 0.0, noise_BV)).argmax(-1).astype(jnp.int32)


def _key(seed: Array, position: Array, purpose: ArrayLike) -> Array:
    """Threefry by name: the bits of other generators change under vmap, and so with the batch."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, position), jnp.asarray(purpose))


def _count_leading(is_good_BG: Array) -> Array:
    return jnp.cumprod(is_good_BG.astype(jnp.int32), axis=1).sum(axis=1)


def _column(field_B: Array) -> Array:
    return field_B[:, None, None]
