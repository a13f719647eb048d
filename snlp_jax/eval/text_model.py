"""A model under one solver setting as tasks see it: texts in, log-likelihoods and continuations out."""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from snlp_jax.data.prompts import last_tokens, prompt_ids, split_stops, with_prefix
from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.errors import InputError
from snlp_jax.eval.fidelity import Scores, pass_over
from snlp_jax.infer import Engine, Placement, Request
from snlp_jax.infer.rules import CacheRule
from snlp_jax.infer.sampling import Sampling
from snlp_jax.layout import prepare
from snlp_jax.memory import rows_at_once
from snlp_jax.model import Model
from snlp_jax.parallel import put_batch
from snlp_jax.parts import Weights
from snlp_jax.solver import Calibration, Diagonal, Schedule
from snlp_jax.types import Array, Params

MIN_BUCKET = 16
"""Shortest padded length, in tokens."""

TokenFn = Callable[..., tuple[Any, Any]]
"""``(windows [B, T + 1], places [B, S] or None)`` -> (negative log-likelihood in nats, whether it is the likeliest) of
the targets at these places, [B, S], or of all, [B, T]."""
OnShare = Callable[[float], None]
"""Called after every batch with the share of the work that it was."""


class Span(NamedTuple):
    """A sequence whose last tokens are scored."""

    tokens: np.ndarray
    """int32 [n], at least one before those that are scored."""
    num_scored: int


class Score(NamedTuple):
    """Of the scored tokens of a span."""

    log_prob: float
    """Sum, in nats."""
    num_tokens: int
    is_greedy: bool
    """Whether each of them is the likeliest after those before it."""


@dataclass(frozen=True)
class Prompt:
    """A text to go on from."""

    text: str
    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, with_special: bool = False) -> list[Span]:
    """Spans of (context, continuation), whose continuations are scored.

    As in lm_eval the spaces that end a context belong to the continuation, and the tokens are those of the context and
    those that the joined text has after as many. Where there are none, the joined text is scored from the first token
    in which it differs from the context.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    different = list(dict.fromkeys(contexts))
    ids_of = dict(zip(different, tokenizer.encode_batch(different, with_special=with_special), strict=True))
    texts = tokenizer.encode_batch(["".join(pair) for pair in pairs], with_special=with_special)
    spans = []
    for context, whole in zip(contexts, texts, strict=True):
        before = ids_of[context]
        if len(before) >= len(whole):
            differs = np.flatnonzero(whole != before[: len(whole)])
            before = before[: differs[0] if differs.size else len(whole)]
        tokens = np.concatenate([before, whole[len(before) :]])
        spans.append(Span(with_prefix(tokenizer, tokens, needs_one=not len(before)), len(whole) - len(before)))
    return spans


def rolling_spans(tokens: np.ndarray, max_context: int, prefix_ids: Sequence[int] = ()) -> list[Span]:
    """Spans that score every token of a long text once, but what stands before it: ``max_context`` at a time, the rest
    at the end with as much context as there is room for.

    Args:
        tokens: what stands before the text, ``prefix_ids`` or another token, and the text.
        prefix_ids: stand before each part of the text.
    """
    first = max(len(prefix_ids), 1)
    step = max_context + 1 - first
    spans = []
    for start, stop in itertools.pairwise([first, *range(first + step, len(tokens), step), len(tokens)]):
        part = tokens[max(0, stop - max_context - 1) : stop]
        if prefix_ids and stop > max_context + 1:
            part = np.concatenate([prefix_ids, part[len(prefix_ids) :]])
        spans.append(Span(part, stop - start))
    return spans


def needs_solitude(schedule: Schedule) -> bool:
    """Whether other tokens than those to the left enter: a tolerance stops by the worst token of the whole sequence,
    and the random vectors of ``diag`` differ by row and, with ``mode=vjp``, bring noise back from later tokens."""
    return any(region.tolerance > 0 or isinstance(region.correction.innermost, Diagonal) for region in schedule.regions)


@dataclass
class TextModel:
    """One model under one setting; everything is laid out and compiled when first needed."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    schedule: Schedule
    rule: CacheRule = "last_eval"
    """What the cache keeps of a parallel region in :meth:`complete`, see :mod:`snlp_jax.infer.engine`."""
    batch_size: int = 8
    """Rows of generation; scoring takes batches of as many tokens as that many training windows have."""
    placement: Placement = Placement()  # noqa: RUF009  # frozen
    """Where the weights lie; scoring takes stacks."""
    fits: Mapping[str, Calibration] | None = None
    """See :func:`snlp_jax.layout.prepare`."""
    with_special: bool = False
    """Whether names of special tokens in a text are read as these tokens."""
    on_share: OnShare = lambda share: None
    num_cut: int = 0
    """Contexts so far that were longer than the model reads and lost their beginning."""

    @functools.cached_property
    def token_fn(self) -> TokenFn:
        """See :data:`TokenFn`; compiles once a shape."""
        mesh = self.placement.mesh
        weights = prepare(
            self.model,
            self.params,
            self.schedule,
            num_tokens=self._batch_tokens,
            layout="stack" if mesh is None else "auto",
            mesh=mesh,
            sequential=self.placement.sequential,
            fits=self.fits,
        )

        @jax.jit
        def score(weights: Weights, window_BT: Array, places_BS: Array | None) -> Scores:
            return pass_over(self.model, weights, window_BT, places_BS=places_BS, mesh=mesh)[1]

        return lambda windows, places=None: score(weights, *put_batch(mesh, (windows, places), is_whole=True))

    @functools.cached_property
    def engine(self) -> Engine:
        """The cached decoder."""
        return Engine(
            self.model,
            self.params,
            self.schedule,
            rule=self.rule,
            placement=self.placement,
            fits=self.fits,
            tokenizer=self.tokenizer,
        )

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Of each continuation after its context.

        Raises:
            InputError: see :meth:`score`.
        """
        spans = encode_pairs(self.tokenizer, pairs, with_special=self.with_special)
        self.num_cut += sum(len(span.tokens) - 1 > self.max_context for span in spans)
        return self.score(spans)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood in nats of each whole text, of any length."""
        special = self.tokenizer.special
        prefix = special.prefix_ids if special.opens_windows else ()
        encoded = self.tokenizer.encode_batch(texts, with_special=self.with_special)
        each = [with_prefix(self.tokenizer, ids, needs_one=True) for ids in encoded]
        spans = [rolling_spans(tokens, self.max_context, prefix) for tokens in each]
        scores = iter(self.score([span for parts in spans for span in parts]))
        return [sum(next(scores).log_prob for _ in parts) for parts in spans]

    def score(self, spans: Sequence[Span]) -> list[Score]:
        """Log-likelihoods of the scored tokens, in batches of equal padded length.

        There is one program for each length and power of two of scored tokens.

        Padding stands on the right, where attention with or without a window, the smear of a token by its predecessor
        and every solver iteration look away from it: what is scored depends neither on it nor on the other rows. Under
        settings for which that is not so (:func:`needs_solitude`) every sequence is scored alone and at its own length.
        Contexts that are longer than the model reads lose their beginning, but not what stands before it.

        Raises:
            InputError: the scored tokens alone are more than the model reads.
        """
        alone, longest, num_kept = (
            needs_solitude(self.schedule),
            self.max_context,
            len(self.tokenizer.special.prefix_ids),
        )
        cut = [last_tokens(self.tokenizer, span.tokens, longest + 1) for span in spans]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, (tokens, span) in enumerate(zip(cut, spans, strict=True)):
            is_cut = len(tokens) < len(span.tokens)
            if span.num_scored > len(tokens) - max(1, num_kept * is_cut):
                raise InputError(
                    f"a continuation of {span.num_scored} tokens is longer than the {longest} that the model reads; "
                    "shorten it."
                )
            count = len(tokens) - 1
            by_length[count if alone else min(max(MIN_BUCKET, _power_of_two(count)), longest)].append(index)
        scores = [Score(0.0, 0, True)] * len(spans)
        for length, members in sorted(by_length.items()):
            rows = _rounded(min(max(1, self._batch_tokens // length), len(members)), self._row_multiple)
            step, rows = (1, self._row_multiple) if alone else (rows, rows)
            num_places = min(_power_of_two(max(spans[index].num_scored for index in members)), length)
            for start in range(0, len(members), step):
                part = members[start : start + step]
                windows, firsts = np.zeros((rows, length + 1), np.int32), np.zeros((rows, 1), np.int32)
                for row, index in enumerate(part):
                    windows[row, : len(cut[index])] = cut[index]
                    firsts[row] = len(cut[index]) - 1 - spans[index].num_scored
                places_BS = np.minimum(firsts + np.arange(num_places, dtype=np.int32), length - 1)
                nll_BS, is_best_BS = jax.device_get(self.token_fn(windows, places_BS))
                for row, index in enumerate(part):
                    num_scored = spans[index].num_scored
                    log_prob = -float(nll_BS[row, :num_scored].sum(dtype=np.float64))
                    scores[index] = Score(log_prob, num_scored, bool(is_best_BS[row, :num_scored].all()))
                self.on_share(len(part) / len(spans))
        return scores

    def complete(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the cached decoder goes on with, up to an end of the text or a stop string.

        Raises:
            InputError: more new tokens than the model can take with a prompt of one.
        """
        requests = [self._request(prompt) for prompt in prompts]
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].tokens), requests[i].max_new_tokens))
        rows = _rounded(min(self.batch_size, len(requests)), self._row_multiple)
        texts = [""] * len(requests)
        for start in range(0, len(order), rows):
            members = order[start : start + rows]
            batch = [requests[i] for i in members]
            filler = replace(batch[-1], max_new_tokens=1)  # one number of rows, one program
            done = self.engine.generate(batch + [filler] * (rows - len(batch)))
            for index, completion in zip(members, done, strict=False):
                texts[index] = completion.text or ""
            self.on_share(len(members) / len(requests))
        return texts

    @property
    def max_context(self) -> int:
        """Most tokens that the model reads."""
        return self.model.config.max_context

    @property
    def _batch_tokens(self) -> int:
        config = self.model.config
        return config.seq_len * rows_at_once(config, config.seq_len, self.batch_size, backend=self.model.backend)

    @property
    def _row_multiple(self) -> int:
        return 1 if self.placement.mesh is None else self.placement.mesh.shape["data"]

    def _request(self, prompt: Prompt) -> Request:
        room = self.max_context - prompt.max_new_tokens
        if room < 1:
            raise InputError(
                f"{prompt.max_new_tokens} new tokens leave no room for a prompt, as the model reads "
                f"{self.max_context} in all; ask for fewer."
            )
        tokens = prompt_ids(self.tokenizer, prompt.text, with_special=self.with_special)
        self.num_cut += len(tokens) > room
        tokens = last_tokens(self.tokenizer, np.asarray(tokens, np.int32), room).tolist()
        return Request(
            tokens, prompt.max_new_tokens, prompt.sampling, *split_stops(self.tokenizer, prompt.stop_strings)
        )


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _power_of_two(count: int) -> int:
    """The least that is not below ``count``."""
    return 1 << (count - 1).bit_length()
