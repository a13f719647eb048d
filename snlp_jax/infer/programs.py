"""The compiled parts of decoding: prefill, plain steps and speculative rounds, as functions of (weights, state).

A row's text lies in ``tokens_BS``; its first ``length_B`` tokens are in the cache and the one after them, the newest,
is not yet. A plain step evaluates the newest token and draws the next. A speculative round drafts up to G tokens with
one set of weights, which read and write the same cache, or with the heads that look further ahead, which read what the
last evaluation has left; then it evaluates the newest token and all drafts with the exact weights and keeps what
:func:`snlp_jax.infer.sampling.accept` says. Both loops run on the device until every row is done or a given number of
steps is made.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snlp_jax.cache import Past, RingPlan, append, fill
from snlp_jax.forward import CacheUpdate, Keep, States, run_parts
from snlp_jax.infer.sampling import Features, Rows, accept, distribution, draw, seen_in, seen_with_drafts
from snlp_jax.model import Model
from snlp_jax.model.block import Rings
from snlp_jax.parallel.mesh import over_data
from snlp_jax.parts import Weights
from snlp_jax.solver import ParallelSegment
from snlp_jax.types import Array


class Counts(NamedTuple):
    """What has happened so far, over all rows; int32 scalars."""

    steps: Array
    """Plain steps and speculative rounds."""
    rows: Array
    """Rows that were not done, summed over steps."""
    tokens: Array
    iterations: Array
    """Solver iterations of rows that were not done, over all steps and regions that stop by a tolerance."""
    tested: Array
    """Drafts that were compared: the accepted ones and the first rejected one of each round."""
    accepted: Array


class State(NamedTuple):
    """A batch of texts in the making."""

    tokens_BS: Array
    """What stands behind a row's newest token is scratch."""
    log_probs_BS: Array
    """Of every generated token, under the model itself: before temperature, filters and penalties."""
    length_B: Array
    target_B: Array
    """Tokens that the finished text may have."""
    is_active_B: Array
    stop_BX: Array
    """Token ids that end a row, filled up with -1."""
    seen_BV: Array | None
    """Tokens of the text, the newest included, where a repetition penalty asks for them."""
    rows: Rows
    rings: "tuple[Rings | tuple[Rings, ...] | None, ...]"
    warm: tuple[Array | None, ...]
    last: tuple[Array, Array] | None
    """The two states [B, 1, ...] that the head read of the last token in the cache, where drafts begin at them."""
    counts: Counts


@dataclass(frozen=True)
class Programs:
    """Builds the functions; see the module."""

    model: Model
    features: Features
    plans: tuple[RingPlan | None, ...]
    evaluation: Literal["last", "refreshed", "every"]
    """Of a region, see :class:`snlp_jax.forward.Keep`."""
    mesh: Mesh | None
    num_slots: int
    """Length S of ``tokens_BS``."""
    warm_segments: tuple[int, ...] = ()
    """Segments whose trace of the last token is the guess for the next."""
    max_draft: int = 0
    """Most drafts of a round: a verification evaluates one token more."""
    by_heads: bool = False
    """Whether the model's heads that look further ahead draft, and no layer."""

    def prefill(
        self,
        weights: Weights,
        prompt_BP: Array,
        length_B: Array,
        target_B: Array,
        stop_BX: Array,
        rows: Rows,
    ) -> State:
        """Evaluate the prompts, filled up to one length behind their ends, and draw every row's first token."""
        B, P = prompt_BP.shape
        keep = Keep(self.evaluation, self.warm_segments)
        states = run_parts(self.model, weights, prompt_BP, mesh=self.mesh, keep=keep)
        last_B = length_B - 1
        last = _pick(states.h_last, last_B), _pick(states.h_mid, last_B)
        logits_BV = self._logits(weights, *last)[:, 0]
        seen_BV = None
        if self.features.penalizes:
            is_token_BP = jnp.arange(P)[None] < length_B[:, None]
            seen_BV = seen_in(prompt_BP, is_token_BP, logits_BV.shape[-1])
        rings = tuple(
            None if plan is None or update is None else _fill(plan, update.kv, length_B)
            for plan, update in zip(self.plans, states.updates, strict=True)
        )
        traces = [
            update.trace if update and index in self.warm_segments else None
            for index, update in enumerate(states.updates)
        ]
        zero = jnp.zeros((), jnp.int32)
        state = State(
            tokens_BS=jnp.zeros((B, self.num_slots), jnp.int32).at[:, :P].set(prompt_BP),
            log_probs_BS=jnp.zeros((B, self.num_slots)),
            length_B=last_B,
            target_B=target_B,
            is_active_B=length_B < target_B,
            stop_BX=stop_BX,
            seen_BV=seen_BV,
            rows=rows,
            rings=rings,
            warm=tuple(None if trace is None else _pick(trace, last_B, axis=2) for trace in traces),
            last=last if self.by_heads else None,
            counts=Counts(zero - 1, zero, zero, zero, zero, zero),  # the prefill is no step
        )
        return self._take(state, logits_BV)

    def decode(self, weights: Weights, state: State, num_steps: Array) -> State:
        """Plain steps."""

        def step(state: State) -> State:
            states = self._evaluate(weights, state, state.length_B, 1)
            logits_BV = self._logits(weights, states.h_last, states.h_mid)[:, 0]
            new = self._take(self._count(state, states), logits_BV)
            return self._remember(new, states, _after(new.tokens_BS, state.length_B))

        return _repeat(step, state, num_steps)

    def speculate(self, drafter: Weights, exact: Weights, state: State, num_rounds: Array, draft_len: Array) -> State:
        """Rounds of ``draft_len`` <= ``max_draft`` drafts and one verification of ``max_draft + 1`` tokens."""

        def one_round(state: State) -> State:
            state, log_probs_BGV = self._draft(drafter, state, draft_len)
            return self._verify(exact, state, log_probs_BGV, draft_len)

        return _repeat(one_round, state, num_rounds)

    def _draft(self, drafter: Weights, state: State, draft_len: Array) -> tuple[State, Array | None]:
        """Write drafts behind the newest token, which stays the newest; and the laws they were drawn from."""
        B, V = state.tokens_BS.shape[0], self.model.config.vocab_size
        row_B = jnp.arange(B)
        # The k-th head says what comes k after the newest token, whatever that and the drafts in between are.
        ahead_BGV = self.model.logits_ahead(drafter.embed_head, *state.last, self.max_draft) if state.last else None

        def propose(state: State, index: Array) -> tuple[Array, States | None]:
            """The logits of a draft, and what was evaluated for it."""
            if ahead_BGV is not None:
                return ahead_BGV[:, index], None
            states = self._evaluate(drafter, state, state.length_B + index, 1)
            return self._logits(drafter, states.h_last, states.h_mid)[:, 0], states

        def one(index: Array, carry: tuple) -> tuple:
            state, log_probs_BGV, seen_BV = carry
            length_B = state.length_B + index
            logits_BV, states = propose(state, index)
            log_probs_BV, token_B = self._draw(logits_BV, seen_BV, state.rows, length_B + 1)
            if log_probs_BGV is not None:
                log_probs_BGV = jax.lax.dynamic_update_index_in_dim(log_probs_BGV, log_probs_BV, index, 1)
            if seen_BV is not None:
                seen_BV = seen_BV.at[row_B, token_B].set(True)
            if states is not None:
                state = self._remember(self._count(state, states), states, _after(token_B[:, None], length_B))
            tokens_BS = state.tokens_BS.at[row_B, length_B + 1].set(token_B)
            return state._replace(tokens_BS=tokens_BS), log_probs_BGV, seen_BV

        log_probs_BGV = jnp.zeros((B, self.max_draft, V)) if self.features.samples else None
        state, log_probs_BGV, _ = jax.lax.fori_loop(0, draft_len, one, (state, log_probs_BGV, state.seen_BV))
        return state, log_probs_BGV

    def _verify(self, exact: Weights, state: State, draft_log_probs_BGV: Array | None, draft_len: Array) -> State:
        """Keep the drafts that the exact pass accepts, and the token after them."""
        start_B, is_active_B, X = state.length_B, state.is_active_B, self.max_draft + 1
        block_BX = _slices(state.tokens_BS, start_B, X)
        states = self._evaluate(exact, state, start_B, X)
        logits_BXV = self._logits(exact, states.h_last, states.h_mid)
        seen_BXV = None if state.seen_BV is None else seen_with_drafts(state.seen_BV, block_BX)
        target_BXV = distribution(logits_BXV, seen_BXV, state.rows, self.features)
        drafts_BG = block_BX[:, 1:]
        laws = (draft_log_probs_BGV, target_BXV)
        count_B, next_B = accept(drafts_BG, draft_len, *laws, state.rows, start_B + 1, self.features)
        shifted_BX = jnp.concatenate([drafts_BG, next_B[:, None]], axis=1)
        new_BX = jnp.where(jnp.arange(X)[None] == count_B[:, None], next_B[:, None], shifted_BX)
        new = self._extend(state, new_BX, count_B + 1, logits_BXV)
        tested_B = jnp.where(is_active_B, jnp.minimum(count_B + 1, draft_len), 0)
        accepted_B = jnp.where(is_active_B, count_B, 0)
        counts = new.counts._replace(
            tested=new.counts.tested + tested_B.sum(), accepted=new.counts.accepted + accepted_B.sum()
        )
        last_B = jnp.maximum(new.length_B - start_B - 1, 0)
        return self._remember(new._replace(counts=counts), states, _after(next_B[:, None], start_B), last_B)

    # -- Pieces --------------------------------------------------------------------------------------------------------

    def _evaluate(self, weights: Weights, state: State, length_B: Array, num_tokens: int) -> States:
        """The tokens after the first ``length_B``."""
        tokens_BX = _slices(state.tokens_BS, length_B - 1, num_tokens + 1)
        past = Past(tokens_BX[:, :1], length_B, state.rings, state.warm)
        traced = tuple(index for index, warm in enumerate(state.warm) if warm is not None)
        keep = Keep(self.evaluation, traced)
        return run_parts(self.model, weights, tokens_BX[:, 1:], mesh=self.mesh, past=past, keep=keep)

    def _logits(self, weights: Weights, h_last: Array, h_mid: Array) -> Array:
        logits_BTV = self.model.padded_logits(weights.embed_head, h_last, h_mid)
        # Cropping what is split by vocabulary would move pieces of it about.
        return over_data(self.mesh, logits_BTV)[..., : self.model.config.vocab_size]

    def _remember(self, state: State, states: States, length_B: Array, last_B: Array | None = None) -> State:
        """Write what the evaluated tokens leave behind; ``last_B``: index of the last that stays, where it is not 0."""

        def write(rings: Any, update: CacheUpdate | None) -> Any:
            if update is None or rings is None:
                return rings
            extend = functools.partial(append, length_B=length_B, is_on_mesh=self.mesh is not None)
            if isinstance(rings, Rings):
                return extend(rings, update.kv)
            return tuple(extend(of_evaluation, kv) for of_evaluation, kv in zip(rings, update.kv, strict=True))

        def guess(warm: Array | None, update: CacheUpdate | None) -> Array | None:
            if warm is None or update is None or update.trace is None:
                return warm
            return update.trace if last_B is None else _pick(update.trace, last_B, axis=2)

        def pick(h_BX: Array) -> Array:
            return h_BX if last_B is None else _pick(h_BX, last_B)

        return state._replace(
            rings=tuple(map(write, state.rings, states.updates)),
            warm=tuple(map(guess, state.warm, states.updates)),
            last=None if state.last is None else (pick(states.h_last), pick(states.h_mid)),
        )

    def _count(self, state: State, states: States) -> State:
        """Add the iterations that an evaluation took."""
        stats = [solution.stats for solution in states.solutions if "sequence_iters" in solution.stats]
        iterations = state.counts.iterations
        for of_region in stats:
            iterations += jnp.where(state.is_active_B, of_region["sequence_iters"], 0).sum()
        return state._replace(counts=state.counts._replace(iterations=iterations))

    def _draw(self, logits_BV: Array, seen_BV: Array | None, rows: Rows, position_B: Array) -> tuple[Array, Array]:
        """The law of the next token and a token drawn from it."""
        seen_BTV = None if seen_BV is None else seen_BV[:, None]
        log_probs_BV = distribution(logits_BV[:, None], seen_BTV, rows, self.features)[:, 0]
        return log_probs_BV, draw(log_probs_BV, rows, position_B, self.features)

    def _take(self, state: State, logits_BV: Array) -> State:
        """Draw the token after the newest one and make it the newest."""
        _, token_B = self._draw(logits_BV, state.seen_BV, state.rows, state.length_B + 1)
        return self._extend(state, token_B[:, None], jnp.ones_like(token_B), logits_BV[:, None])

    def _extend(self, state: State, new_BX: Array, num_new_B: Array, logits_BXV: Array) -> State:
        """Put the first ``num_new_B`` tokens behind the newest one of active rows, up to a stop token or the end."""
        start_B, index_X, X = state.length_B + 1, jnp.arange(new_BX.shape[1])[None], new_BX.shape[1]
        is_stop_BX = (new_BX[:, :, None] == state.stop_BX[:, None]).any(-1)
        before_stop_B = jnp.where(is_stop_BX, index_X, X).min(-1)
        room_B = state.target_B - start_B
        num_new_B = jnp.minimum(jnp.minimum(num_new_B, before_stop_B + 1), room_B)
        num_new_B = jnp.where(state.is_active_B, num_new_B, 0)
        is_new_BX = index_X < num_new_B[:, None]
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV | seen_in(new_BX, is_new_BX, logits_BXV.shape[-1])
        counts = state.counts
        counts = counts._replace(
            steps=counts.steps + 1,
            rows=counts.rows + state.is_active_B.sum(),
            tokens=counts.tokens + num_new_B.sum(),
        )
        return state._replace(
            tokens_BS=_put(state.tokens_BS, new_BX, is_new_BX, start_B),
            log_probs_BS=_put(state.log_probs_BS, _log_prob_of(logits_BXV, new_BX), is_new_BX, start_B),
            length_B=state.length_B + num_new_B,
            is_active_B=state.is_active_B & (num_new_B < room_B) & (before_stop_B >= num_new_B),
            seen_BV=seen_BV,
            counts=counts,
        )


def _after(tokens_BX: Array, length_B: Array) -> Array:
    """``length_B``, not known before the tokens are: token ids are never negative, but the compiler cannot know.

    What is written there is then written after everything has been read that led to the tokens, and so in place; else
    XLA copies every ring in every step.
    """
    return length_B + jnp.minimum(tokens_BX.min(-1), 0)


def _repeat(step: Callable[[State], State], state: State, num_steps: Array) -> State:
    last = state.counts.steps + num_steps
    return jax.lax.while_loop(lambda state: state.is_active_B.any() & (state.counts.steps < last), step, state)


def _fill(plan: RingPlan, kv: Any, length_B: Array) -> Any:
    """Of one evaluation, or of several in a tuple."""
    if type(kv) is tuple:
        return tuple(fill(plan, of_evaluation, length_B) for of_evaluation in kv)
    return fill(plan, kv, length_B)


def _pick(x: Array, index_B: Array, axis: int = 1) -> Array:
    """[.., B, 1, ..]: of each row the entry ``index_B`` of ``axis``, which stands behind the batch."""
    one = lambda row, index: jax.lax.dynamic_slice_in_dim(row, index, 1, axis - 1)  # noqa: E731
    return jax.vmap(one, in_axes=(axis - 1, 0), out_axes=axis - 1)(x, index_B)


def _slices(x_BS: Array, start_B: Array, size: int) -> Array:
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))(x_BS, start_B)


def _put(x_BS: Array, new_BX: Array, is_new_BX: Array, start_B: Array) -> Array:
    """``new_BX`` at ``start_B`` and on, where ``is_new_BX``."""
    index_BX = jnp.where(is_new_BX, start_B[:, None] + jnp.arange(new_BX.shape[1])[None], x_BS.shape[1])
    return x_BS.at[jnp.arange(len(x_BS))[:, None], index_BX].set(new_BX, mode="drop")


def _log_prob_of(logits_BTV: Array, tokens_BT: Array) -> Array:
    chosen_BT = jnp.take_along_axis(logits_BTV, tokens_BT[:, :, None], axis=-1)[:, :, 0]
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def warm_segments(weights: Weights) -> tuple[int, ...]:
    """Segments whose guess is the trace of the token before."""
    pairs = enumerate(weights.segments)
    return tuple(i for i, segment in pairs if isinstance(segment, ParallelSegment) and segment.init.is_oracle)
