"""The compiled parts of decoding: prefill, plain steps and speculative rounds, as functions of (weights, state).

A row's text lies in ``tokens_BS``; its first ``length_B`` tokens are in the cache and the one after them, the newest,
is not yet. A plain step evaluates the newest token and draws the next. A speculative round drafts up to G tokens: with
one set of weights, which read and write the same cache; with the heads that look further ahead, which read what the
last evaluation has left; or out of the text itself. Then it evaluates the newest token and all drafts with the exact
weights and keeps what :func:`snlp_jax.infer.sampling.accept` says. Both loops run on the device until every row is done
or a given number of steps is made.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snlp_jax.cache import Past, RingPlan, append, fill, resized
from snlp_jax.forward import CacheRule, Keep, States, logits_of, run_parts
from snlp_jax.infer.ngram import look_up
from snlp_jax.infer.sampling import Features, Rows, accept, distribution, draw, seen_in, seen_with_drafts
from snlp_jax.model import Model
from snlp_jax.model.block import Rings
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

    def add(self, **counted: Array) -> "State":
        """With so much more in ``counts``."""
        added = {name: getattr(self.counts, name) + count for name, count in counted.items()}
        return self._replace(counts=self.counts._replace(**added))


class Kept(NamedTuple):
    """What is kept of one text for another that begins with it."""

    length_B: Array
    """Tokens of it, 1 or more."""
    rings: "tuple[Rings | tuple[Rings, ...] | None, ...]"
    warm: tuple[Array | None, ...]


@dataclass(frozen=True)
class Programs:
    """Builds the functions; see the module."""

    model: Model
    features: Features
    plans: tuple[RingPlan | None, ...]
    rule: CacheRule
    mesh: Mesh | None
    num_slots: int
    """Length S of ``tokens_BS``."""
    warm_segments: tuple[int, ...] = ()
    """Segments whose trace of the last token is the guess for the next."""
    max_draft: int = 0
    """Most drafts of a round: a verification evaluates one token more."""
    drafter: str = "layers"
    """What drafts: "layers", the heads that look further ahead ("mtp"), or the text itself ("ngram")."""
    block: int = 1
    """Tokens that are written to the rings at once where a text goes on."""

    def prefill(
        self, weights: Weights, prompt_BP: Array, length_B: Array, target_B: Array, stop_BX: Array, rows: Rows
    ) -> State:
        """Evaluate the prompts, filled up to one length behind their ends, and draw every row's first token."""
        keep = Keep(self.rule, self.warm_segments)
        states = run_parts(self.model, weights, prompt_BP, mesh=self.mesh, keep=keep)
        last_B = length_B - 1
        rings: list[Any] = [None] * len(self.plans)
        warm: list[Array | None] = [None] * len(self.plans)
        for index, (plan, update) in enumerate(zip(self.plans, states.updates, strict=True)):
            if update is not None and plan is not None:
                rings[index] = _each(functools.partial(fill, plan, length_B=length_B), update.kv)
            if update is not None and update.trace is not None and index in self.warm_segments:
                warm[index] = _pick(update.trace, last_B, axis=2)
        kept = Kept(last_B, tuple(rings), tuple(warm))
        last = _pick(states.h_last, last_B), _pick(states.h_mid, last_B)
        state = self._begin(kept, prompt_BP, length_B, target_B, stop_BX, rows)
        return self._take_first(weights, state._replace(last=last))

    def extend(
        self,
        weights: Weights,
        kept: Kept,
        prompt_BP: Array,
        length_B: Array,
        target_B: Array,
        stop_BX: Array,
        rows: Rows,
    ) -> State:
        """:meth:`prefill` of one prompt that begins with the text of ``kept``: evaluates the tokens behind it alone."""
        state = self._begin(kept, prompt_BP, length_B, target_B, stop_BX, rows)
        pairs = zip(self.plans, kept.rings, strict=True)
        rings = [
            ring
            if plan is None or ring is None
            else _each(lambda ring, plan=plan: resized(plan, ring, kept.length_B), ring)
            for plan, ring in pairs
        ]
        shapes = jax.eval_shape(lambda state: self._evaluate(weights, state, kept.length_B, 1), state)
        last = jnp.zeros_like(shapes.h_last), jnp.zeros_like(shapes.h_mid)

        def one(carry: tuple[State, Array]) -> tuple[State, Array]:
            state, start_B = carry
            states = self._evaluate(weights, state, start_B, self.block)
            last_B = jnp.clip(length_B - 1 - start_B, 0, self.block - 1)
            return self._remember(state, states, start_B, last_B), start_B + self.block

        state = state._replace(rings=tuple(rings), last=last)
        state, _ = jax.lax.while_loop(lambda carry: (carry[1] < length_B).any(), one, (state, kept.length_B))
        return self._take_first(weights, state)

    def _begin(
        self, kept: Kept, prompt_BP: Array, length_B: Array, target_B: Array, stop_BX: Array, rows: Rows
    ) -> State:
        """Prompts whose tokens are still to be evaluated, or are in ``kept``."""
        B, P = prompt_BP.shape
        # Ends of texts and turns stand in most prompts; a penalty on them would keep the text from ending.
        is_stop_BP = (prompt_BP[:, :, None] == stop_BX[:, None]).any(-1)
        is_seen_BP = (jnp.arange(P)[None] < length_B[:, None]) & ~is_stop_BP
        seen_BV = seen_in(prompt_BP, is_seen_BP, self.model.config.vocab_size) if self.features.penalizes else None
        zero = jnp.zeros((), jnp.int32)
        return State(
            tokens_BS=jnp.zeros((B, self.num_slots), jnp.int32).at[:, :P].set(prompt_BP),
            log_probs_BS=jnp.zeros((B, self.num_slots)),
            length_B=length_B - 1,
            target_B=target_B,
            is_active_B=length_B < target_B,
            stop_BX=stop_BX,
            seen_BV=seen_BV,
            rows=rows,
            rings=kept.rings,
            warm=kept.warm,
            last=None,
            counts=Counts(zero - 1, zero, zero, zero, zero, zero),  # the prefill is no step
        )

    def _take_first(self, weights: Weights, state: State) -> State:
        """Draw every row's first token by what the head reads of the prompt's last."""
        assert state.last is not None
        logits_BV = logits_of(self.model, weights, *state.last, self.mesh)[:, 0]
        return self._take(state if self.drafter == "mtp" else state._replace(last=None), logits_BV)

    def decode(self, weights: Weights, state: State, num_steps: Array) -> State:
        """Plain steps."""

        def step(state: State) -> State:
            states = self._evaluate(weights, state, state.length_B, 1)
            logits_BV = logits_of(self.model, weights, states.h_last, states.h_mid, self.mesh)[:, 0]
            new = self._take(self._count(state, states), logits_BV)
            return self._remember(new, states, _after(new.tokens_BS, state.length_B), jnp.zeros_like(state.length_B))

        return _repeat(step, state, num_steps)

    def speculate(self, drafter: Weights, exact: Weights, state: State, num_rounds: Array, draft_len: Array) -> State:
        """Rounds of ``draft_len`` <= ``max_draft`` drafts and one verification of ``max_draft + 1`` tokens."""

        def one_round(state: State) -> State:
            if self.drafter == "ngram":
                drafts_BG, count_B = look_up(state.tokens_BS, state.length_B, self.max_draft)
                is_draft_BG = jnp.ones(drafts_BG.shape, bool)
                tokens_BS = _put(state.tokens_BS, drafts_BG, is_draft_BG, state.length_B + 1)
                state = state._replace(tokens_BS=tokens_BS)
                return self._verify(exact, state, None, jnp.minimum(count_B, draft_len))
            state, log_probs_BGV = self._draft(drafter, state, draft_len)
            return self._verify(exact, state, log_probs_BGV, draft_len)

        return _repeat(one_round, state, num_rounds)

    def _draft(self, drafter: Weights, state: State, draft_len: Array) -> tuple[State, Array | None]:
        """Write drafts behind the newest token, which stays the newest; and the laws they were drawn from."""
        B, V = state.tokens_BS.shape[0], self.model.config.vocab_size
        row_B = jnp.arange(B)
        # The k-th head says what comes k after the newest token, whatever that and the drafts in between are.
        ahead_BGV = self.model.logits_ahead(drafter.embed_head, *state.last, self.max_draft) if state.last else None

        def one(index: Array, carry: tuple) -> tuple:
            state, log_probs_BGV, seen_BV = carry
            length_B = state.length_B + index
            if ahead_BGV is None:
                states = self._evaluate(drafter, state, length_B, 1)
                logits_BV = logits_of(self.model, drafter, states.h_last, states.h_mid, self.mesh)[:, 0]
            else:
                logits_BV = ahead_BGV[:, index]
            log_probs_BV, token_B = self._draw(logits_BV, seen_BV, state.rows, length_B + 1)
            if log_probs_BGV is not None:
                log_probs_BGV = jax.lax.dynamic_update_index_in_dim(log_probs_BGV, log_probs_BV, index, 1)
            if seen_BV is not None:
                seen_BV = seen_BV.at[row_B, token_B].set(True)
            if ahead_BGV is None:
                after_B = _after(token_B[:, None], length_B)
                state = self._remember(self._count(state, states), states, after_B, jnp.zeros_like(length_B))
            tokens_BS = state.tokens_BS.at[row_B, length_B + 1].set(token_B)
            return state._replace(tokens_BS=tokens_BS), log_probs_BGV, seen_BV

        log_probs_BGV = jnp.zeros((B, self.max_draft, V)) if self.features.samples else None
        state, log_probs_BGV, _ = jax.lax.fori_loop(0, draft_len, one, (state, log_probs_BGV, state.seen_BV))
        return state, log_probs_BGV

    def _verify(self, exact: Weights, state: State, draft_log_probs_BGV: Array | None, draft_len: Array) -> State:
        """Keep the drafts that the exact pass accepts, and the token after them; ``draft_len`` of each row or of all,
        ``draft_log_probs_BGV`` as in :func:`snlp_jax.infer.sampling.accept`."""
        start_B, is_active_B, X = state.length_B, state.is_active_B, self.max_draft + 1
        block_BX = _slices(state.tokens_BS, start_B, X)
        states = self._evaluate(exact, state, start_B, X)
        logits_BXV = logits_of(self.model, exact, states.h_last, states.h_mid, self.mesh)
        seen_BXV = None if state.seen_BV is None else seen_with_drafts(state.seen_BV, block_BX)
        target_BXV = distribution(logits_BXV, seen_BXV, state.rows, self.features)
        drafts_BG = block_BX[:, 1:]
        laws = (draft_log_probs_BGV, target_BXV)
        count_B, next_B = accept(drafts_BG, draft_len, *laws, state.rows, start_B + 1, self.features)
        shifted_BX = jnp.concatenate([drafts_BG, next_B[:, None]], axis=1)
        new_BX = jnp.where(jnp.arange(X)[None] == count_B[:, None], next_B[:, None], shifted_BX)
        tested_B = jnp.where(is_active_B, jnp.minimum(count_B + 1, draft_len), 0)
        accepted_B = jnp.where(is_active_B, count_B, 0)
        new = self._extend(state, new_BX, count_B + 1, logits_BXV)
        new = new.add(tested=tested_B.sum(), accepted=accepted_B.sum())
        last_B = jnp.maximum(new.length_B - start_B - 1, 0)
        return self._remember(new, states, _after(next_B[:, None], start_B), last_B)

    # -- Pieces --------------------------------------------------------------------------------------------------------

    def _evaluate(self, weights: Weights, state: State, length_B: Array, num_tokens: int) -> States:
        """The tokens after the first ``length_B``."""
        tokens_BX = _slices(state.tokens_BS, length_B - 1, num_tokens + 1)
        past = Past(tokens_BX[:, :1], length_B, state.rings, state.warm)
        keep = Keep(self.rule, tuple(index for index, warm in enumerate(state.warm) if warm is not None))
        return run_parts(self.model, weights, tokens_BX[:, 1:], mesh=self.mesh, past=past, keep=keep)

    def _remember(self, state: State, states: States, length_B: Array, last_B: Array) -> State:
        """Write what the evaluated tokens leave behind; ``last_B``: index of the last that stays."""
        extend = functools.partial(append, length_B=length_B, is_on_mesh=self.mesh is not None)
        rings, warm = list(state.rings), list(state.warm)
        for index, update in enumerate(states.updates):
            if update is not None and rings[index] is not None:
                rings[index] = _each(extend, rings[index], update.kv)
            if update is not None and update.trace is not None and warm[index] is not None:
                warm[index] = _pick(update.trace, last_B, axis=2)
        last = state.last and (_pick(states.h_last, last_B), _pick(states.h_mid, last_B))
        return state._replace(rings=tuple(rings), warm=tuple(warm), last=last)

    def _count(self, state: State, states: States) -> State:
        """Add the iterations that an evaluation took."""
        for solution in states.solutions:
            if "sequence_iters" in solution.stats:
                state = state.add(iterations=jnp.where(state.is_active_B, solution.stats["sequence_iters"], 0).sum())
        return state

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
        new = state._replace(
            tokens_BS=_put(state.tokens_BS, new_BX, is_new_BX, start_B),
            log_probs_BS=_put(state.log_probs_BS, _log_prob_of(logits_BXV, new_BX), is_new_BX, start_B),
            length_B=state.length_B + num_new_B,
            is_active_B=state.is_active_B & (num_new_B < room_B) & (before_stop_B >= num_new_B),
            seen_BV=seen_BV,
        )
        return new.add(steps=jnp.int32(1), rows=state.is_active_B.sum(), tokens=num_new_B.sum())


def _after(tokens_BX: Array, length_B: Array) -> Array:
    """``length_B``, not known before the tokens are: token ids are never negative, but the compiler cannot know.

    What is written there is then written after everything has been read that led to the tokens, and so in place; else
    XLA copies every ring in every step.
    """
    return length_B + jnp.minimum(tokens_BX.min(-1), 0)


def _repeat(step: Callable[[State], State], state: State, num_steps: Array) -> State:
    last = state.counts.steps + num_steps
    return jax.lax.while_loop(lambda state: state.is_active_B.any() & (state.counts.steps < last), step, state)


def _each(function: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Of one evaluation, or of several in a tuple."""
    return tuple(map(function, first, *rest)) if type(first) is tuple else function(first, *rest)


def _pick(x: Array, index_B: Array, axis: int = 1) -> Array:
    """[.., B, 1, ..]: of each row the entry ``index_B`` of ``axis``, which stands behind the batch."""
    if x.shape[axis] == 1:
        return x
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
