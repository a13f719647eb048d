"""Milliseconds of candidates: a forward, or a decoded token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from snlp_jax.config import Config, SearchConfig
from snlp_jax.eval.evaluate import check_length
from snlp_jax.eval.search.space import Candidate, draft_len, rule_of
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


@dataclass(frozen=True)
class Clock:
    """How candidates are timed: a forward (``prefill``) or a decoded token. Every round reads another text, so that
    iterations stop as often as they do in use."""

    model: LanguageModel
    params: Params
    fits: Mapping[str, Calibration]
    texts_BT: Sequence[np.ndarray]
    """Of each round: what is read, or the prompts."""
    num_tokens: int
    """Decoded in one reading; 0 reads all texts by one forward."""

    @classmethod
    def of(
        cls,
        config: Config,
        search: SearchConfig,
        model: LanguageModel,
        params: Params,
        fits: Mapping[str, Calibration],
        tokens_WT: np.ndarray,
    ) -> "Clock | None":
        """None for objective ``depth``; ``tokens_WT`` is held-out text.

        Raises:
            InputError: a forward of more tokens than the model reads.
        """
        rows, longest = config.eval.timing_batch, config.model.max_context
        if search.objective == "depth":
            return None
        if search.objective == "prefill":
            length = config.eval.timing_len or config.model.seq_len
            check_length("eval.timing_len", length, config.model)
            text = tokens_WT[:, :length].reshape(-1)  # again from the start where it is short
            texts = np.resize(text, (NUM_TEXTS, rows, length))
            return cls(model, params, fits, list(texts.astype(np.int32)), 0)
        length = max(1, min(config.eval.greedy_prompt_len or 64, tokens_WT.shape[1] - 1))
        prompts = np.resize(tokens_WT[:, :length], (max(len(tokens_WT) // rows, 1), rows, length))
        return cls(model, params, fits, list(prompts), min(NEW_TOKENS, longest - length))

    @property
    def what(self) -> str:
        """What the milliseconds are of."""
        rows, length = self.texts_BT[0].shape
        forward_of = f"ms a forward of {rows} x {length} tokens"
        return f"ms a decoded token, {rows} rows after {length} tokens" if self.num_tokens else forward_of

    def reader(self, candidate: Candidate, layout: Layout) -> Reader:
        """One run of it, compiled."""
        schedule, drafter = candidate.schedule, candidate.speculate
        if not self.num_tokens:
            num_tokens = self.texts_BT[0].size
            weights = prepare(self.model, self.params, schedule, num_tokens=num_tokens, layout=layout, fits=self.fits)
            return CompiledForward.of(self.model, weights, self.texts_BT).read
        engine = Engine(
            self.model,
            self.params,
            schedule,
            rule="last_eval" if schedule.is_sequential else rule_of(schedule),
            draft=Drafting(drafter, draft_len(drafter, self.model.config)) if drafter else None,
            placement=Placement(layout=layout),
            fits=self.fits,
        )
        requests = [[Request(row.tolist(), self.num_tokens) for row in text] for text in self.texts_BT]

        def decode(number: int) -> float:
            engine.generate(requests[number % len(requests)])
            assert engine.statistics is not None
            return 1e3 * engine.statistics.decode_seconds / max(self.num_tokens - 1, 1)

        return decode
