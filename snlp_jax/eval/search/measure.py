"""What a search measures of a candidate: differences on windows, and milliseconds."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from snlp_jax.eval.perplexity import token_nll
from snlp_jax.eval.search.race import Sums
from snlp_jax.eval.search.space import DRAFT_LEN, Candidate, rule_of
from snlp_jax.forward import forward
from snlp_jax.infer import CacheRule, Drafting, Engine, Placement, Request
from snlp_jax.layout import Layout, Weights, prepare
from snlp_jax.model import LanguageModel
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Array, Params

NUM_WARMUP = 2
TIMING_SEED = 0
LEAST_SECONDS = 1.0
MOST_REPEATS = 10
NUM_TEXTS = 16
"""Of a timed forward."""

Reader = Callable[[int], float]
"""Runs once, with the number of the round, and returns milliseconds."""


class Quality:
    """Paired differences to the sequential pass, which is run once a window.

    Args:
        windows: ``tokens`` [W, T + 1] and, where there are any, ``weight`` [W, T] and ``document`` [W, T + 1].
        batch_size: windows at once.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        windows: Mapping[str, np.ndarray],
        batch_size: int,
        fits: Mapping[str, Calibration],
    ):
        self.model, self.params, self.windows, self.fits = model, model.cast(params), windows, fits
        self.batch_size = min(batch_size, len(windows["tokens"]))
        self._nll = jax.jit(partial(_nll, model), static_argnames="with_iterations")
        self._sequential = Schedule.of(model.config.num_layers)
        self._reference: dict[int, np.ndarray] = {}

    def measure(self, schedule: Schedule, start: int, stop: int) -> tuple[Sums, list[float]]:
        """Sums over windows ``start`` to ``stop``, and the mean iterations of each region."""
        missing = [index for index in range(start, stop) if index not in self._reference]
        if missing:
            found, _ = self._run(self._sequential, missing)
            self._reference |= dict(zip(missing, found, strict=True))
        nll_WT, iterations = self._run(schedule, range(start, stop))
        difference_WT = nll_WT - np.stack([self._reference[index] for index in range(start, stop)])
        weight_WT = self.windows.get("weight")
        weight_WT = np.ones(difference_WT.shape) if weight_WT is None else np.asarray(weight_WT[start:stop], np.float64)
        return Sums((weight_WT * difference_WT).sum(axis=1), weight_WT.sum(axis=1)), iterations

    def _run(self, schedule: Schedule, indices: Sequence[int]) -> tuple[np.ndarray, list[float]]:
        num_tokens = self.batch_size * (self.windows["tokens"].shape[1] - 1)
        weights = prepare(self.model, self.params, schedule, num_tokens=num_tokens, layout="stack", fits=self.fits)
        stops = any(region.tolerance > 0 for region in schedule.regions)
        rows, made = [], []
        for start in range(0, len(indices), self.batch_size):
            some = np.asarray(indices[start : start + self.batch_size])
            filled = np.resize(some, self.batch_size)  # one shape for all
            document = self.windows.get("document")
            its_documents = None if document is None else document[filled]
            nll_BT, its_made = self._nll(weights, self.windows["tokens"][filled], its_documents, with_iterations=stops)
            rows.append(np.asarray(nll_BT, np.float64)[: len(some)])
            made.append([np.asarray(each)[: len(some)] for each in its_made])
        regions = zip(*made, strict=True)
        return np.concatenate(rows), [float(np.concatenate(each).mean()) for each in regions]


def _nll(
    model: LanguageModel, weights: Weights, window_BT: Array, document_BT: Array | None, *, with_iterations: bool
) -> tuple[Array, list[Array]]:
    document_BT = None if document_BT is None else document_BT[:, :-1]
    output = forward(model, weights, window_BT[:, :-1], with_stats=with_iterations, document_BT=document_BT)
    made = []
    for region, solution in zip(_regions(weights), output.solutions, strict=True):
        its = solution.stats.get("sequence_iters") if with_iterations else None
        made.append(jax.numpy.full(window_BT.shape[:1], region.num_iters) if its is None else its)
    return token_nll(output.logits_BTV, window_BT[:, 1:]), made


def _regions(weights: Weights) -> tuple:
    return Schedule(0, weights.segments).regions


class Prefill:
    """Readers of a forward from held-out tokens to all logits; every round has another text, so that iterations stop by
    themselves as often as they do in use."""

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        fits: Mapping[str, Calibration],
        *,
        batch_size: int,
        seq_len: int,
        windows: np.ndarray,
    ):
        self.model, self.params, self.fits = model, model.cast(params), fits
        shape = (NUM_TEXTS, batch_size, seq_len)
        text = windows[:, :seq_len].reshape(-1)  # again from the start where it is short
        self.texts_BT = list(jax.numpy.asarray(np.resize(text, shape), "int32"))
        self.what = f"ms a forward of {batch_size} x {seq_len} tokens"

    @property
    def auto_layout(self) -> Layout:
        """That of the layers in order under the layout ``auto``."""
        return "list" if self.model.backend == "cpu" else "stack"

    def reader(self, candidate: Candidate, layout: Layout = "auto") -> Reader:
        settings: dict[str, Any] = {"num_tokens": self.texts_BT[0].size, "layout": layout, "fits": self.fits}
        weights = prepare(self.model, self.params, candidate.schedule, **settings)
        logits = lambda weights, tokens: forward(self.model, weights, tokens).logits_BTV  # noqa: E731
        compiled = jax.jit(logits).lower(weights, self.texts_BT[0]).compile()

        def read(number: int) -> float:
            tokens_BT = self.texts_BT[number % NUM_TEXTS]
            began = time.perf_counter()
            jax.block_until_ready(compiled(weights, tokens_BT))
            return 1e3 * (time.perf_counter() - began)

        return read


class Decode:
    """Readers of a decoded token of all rows, after a prompt of held-out text; every round has another prompt.

    Args:
        prompts: [N, P]; each round takes ``batch_size`` of them.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Params,
        fits: Mapping[str, Calibration],
        *,
        batch_size: int,
        prompts: np.ndarray,
        num_tokens: int,
    ):
        self.model, self.params, self.fits = model, model.cast(params), fits
        self.num_tokens = num_tokens
        rounds = max(len(prompts) // batch_size, 1)
        self.requests = [
            [Request(prompt.tolist(), num_tokens) for prompt in each]
            for each in np.resize(prompts, (rounds, batch_size, prompts.shape[1]))
        ]
        self.what = f"ms a decoded token, {batch_size} rows after {prompts.shape[1]} tokens"

    @property
    def auto_layout(self) -> Layout:
        """See :class:`Prefill`; the engine scans where all windows are alike."""
        is_alike = len(set(self.model.config.windows)) == 1
        return "stack" if is_alike or self.model.backend != "cpu" else "list"

    def reader(self, candidate: Candidate, layout: Layout = "auto") -> Reader:
        config = self.model.config
        drafting: Drafting | None = None
        rule: CacheRule = "last_eval"
        if candidate.speculate:
            length = min(DRAFT_LEN, config.num_mtp_heads) if candidate.speculate == "mtp" else DRAFT_LEN
            drafting = Drafting(candidate.speculate, length)
        elif not candidate.schedule.is_sequential:
            rule = rule_of(candidate.schedule)
        engine = Engine(
            self.model,
            self.params,
            candidate.schedule,
            rule=rule,
            draft=drafting,
            placement=Placement(layout=layout),
            fits=self.fits,
        )

        def read(number: int) -> float:
            engine.generate(self.requests[number % len(self.requests)])
            assert engine.statistics is not None
            return 1e3 * engine.statistics.decode_seconds / max(self.num_tokens - 1, 1)

        return read


def interleave(readers: Sequence[Reader], num_repeats: int) -> np.ndarray:
    """Milliseconds [repeats, readers] after a warm-up; a new order every round, so that a change of the machine's
    speed meets all alike. Short readings are repeated up to ``MOST_REPEATS`` times as often, for ``LEAST_SECONDS``."""
    rng = np.random.default_rng(TIMING_SEED)
    for number in range(NUM_WARMUP):
        for reader in readers:
            reader(number)
    times_ms: list[np.ndarray] = []
    began = time.perf_counter()
    while len(times_ms) < num_repeats or (
        len(times_ms) < MOST_REPEATS * num_repeats and time.perf_counter() - began < LEAST_SECONDS
    ):
        row = np.empty(len(readers))
        for index in rng.permutation(len(readers)):
            row[index] = readers[index](len(times_ms))
        times_ms.append(row)
    return np.stack(times_ms)
