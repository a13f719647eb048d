"""Milliseconds of candidates: a forward, or a decoded token."""

import functools
from collections.abc import Mapping

import numpy as np

from snlp_jax.config import Config
from snlp_jax.eval.evaluate import check_length
from snlp_jax.eval.search.space import Candidate
from snlp_jax.eval.timing import CompiledForward, Reader
from snlp_jax.infer import Drafting, Engine, Placement, Request
from snlp_jax.layout import Layout, prepare
from snlp_jax.model import LanguageModel
from snlp_jax.solver import Calibration
from snlp_jax.types import Params

NUM_TEXTS = 16
"""Of a timed forward."""
NEW_TOKENS = 48
"""Decoded in one reading."""


class Clock:
    """How candidates are timed: a forward (objective ``prefill``) or a decoded token. Every round reads another text,
    so that iterations stop as often as they do in use.

    Args:
        tokens_WT: held-out text.

    Raises:
        InputError: a forward of more tokens than the model reads.
    """

    def __init__(
        self,
        config: Config,
        objective: str,
        model: LanguageModel,
        params: Params,
        fits: Mapping[str, Calibration],
        tokens_WT: np.ndarray,
    ):
        self.model, self.params, self.fits = model, params, fits
        self.reader = functools.cache(self._reader)
        """Of a candidate and a layout: one run of it, compiled."""
        rows, self.num_tokens = config.eval.timing_batch, 0
        if objective == "prefill":
            length, num_texts = config.eval.timing_len or config.eval.window_len(config.model), NUM_TEXTS
            check_length("eval.timing_len", length, config.model)
            self.what = f"ms a forward of {rows} x {length} tokens"
        else:
            length = max(1, min(config.eval.greedy_prompt_len or 64, tokens_WT.shape[1] - 1))
            num_texts = max(len(tokens_WT) // rows, 1)
            self.num_tokens = min(NEW_TOKENS, config.model.max_context - length)
            self.what = f"ms a decoded token, {rows} rows after {length} tokens"
        # Again from the start where the text is short.
        self.texts_BT = list(np.resize(tokens_WT[:, :length], (num_texts, rows, length)).astype(np.int32))
        """Of each round: what is read, or the prompts, after which ``num_tokens`` are decoded."""

    def _reader(self, candidate: Candidate, layout: Layout) -> Reader:
        schedule = candidate.schedule
        if not self.num_tokens:
            num_tokens = self.texts_BT[0].size
            weights = prepare(self.model, self.params, schedule, num_tokens=num_tokens, layout=layout, fits=self.fits)
            return CompiledForward(self.model, weights, self.texts_BT).read
        engine = Engine(
            self.model,
            self.params,
            schedule,
            rule="last_eval" if schedule.is_sequential else candidate.rule,
            draft=Drafting(candidate.speculate, candidate.draft_len) if candidate.speculate else None,
            placement=Placement(layout=layout),
            fits=self.fits,
        )
        requests = [[Request(row.tolist(), self.num_tokens) for row in text] for text in self.texts_BT]

        def decode(number: int) -> float:
            engine.generate(requests[number % len(requests)])
            assert engine.statistics is not None
            return 1e3 * engine.statistics.decode_seconds / max(self.num_tokens - 1, 1)

        return decode
