"""What is asked of a decoding engine, and what it gives back: requests, completions, statistics and streamed text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from snlp_jax.config.check import require
from snlp_jax.data.tokenizer import Tokenizer
from snlp_jax.infer.sampling import Sampling
from snlp_jax.infer.text import TextStream

OnTokens = Callable[[int, list[int], str], bool | None]
"""Called with a row, its new tokens and their text ("" without a tokenizer), some tokens at a time. True ends the
row."""
Finish = Literal["length", "stop"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on."""

    tokens: Sequence[int]
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    """Any of these ends the text and is not part of it."""
    stop_strings: tuple[str, ...] = ()
    """The same for text; needs the engine's tokenizer."""


@dataclass(frozen=True)
class Completion:
    """What came of a request."""

    tokens: list[int]
    log_probs: list[float]
    """Of each token under the model itself, before temperature, filters and penalties."""
    finish: Finish
    text: str | None
    """None without a tokenizer."""


@dataclass(frozen=True)
class Statistics:
    """Of the last :meth:`Engine.generate`."""

    prompt_tokens: int
    new_tokens: int
    """Tokens of the completions; what was computed behind a stop does not count."""
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    """Without the first token of every row, which comes out of the prefill."""
    steps: int
    """Plain steps and speculative rounds, over all rows at once."""
    iterations: int
    """Solver iterations, summed over rows, of regions that stop by a tolerance."""
    tested: int
    """Drafts that were compared with what the exact pass says."""
    accepted: int

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)

    @property
    def acceptance(self) -> float | None:
        """Share of the tested drafts that were accepted; None where nothing was drafted."""
        return self.accepted / self.tested if self.tested else None


def check_request(request: Request, max_context: int, *, has_tokenizer: bool) -> None:
    """Refuse a request that no model of ``max_context`` positions can serve.

    Raises:
        InputError: an empty prompt, one that is no list of numbers, too many tokens, no tokens asked for, a stop string
            without a tokenizer.
    """
    tokens = np.asarray(request.tokens)
    total = tokens.size + request.max_new_tokens
    require(tokens.size > 0, "the prompt is empty; give at least one token.")
    is_flat = tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)
    require(is_flat, "the prompt must be a flat sequence of token ids.")
    require(request.max_new_tokens >= 1, f"max_new_tokens is {request.max_new_tokens}; it must be at least 1.")
    require(
        total <= max_context,
        f"a prompt of {tokens.size} and {request.max_new_tokens} new tokens are {total}, more than the rotary "
        f"embedding's {max_context}; ask for fewer or shorten the prompt.",
    )
    require(has_tokenizer or not request.stop_strings, "stop strings need a tokenizer; give the engine one.")


class Delivery:
    """Hands out the tokens and texts of a batch while they are made, and ends rows whose text holds a stop string."""

    def __init__(self, requests: Sequence[Request], tokenizer: Tokenizer | None, on_tokens: OnTokens | None):
        stream = lambda one: None if tokenizer is None else TextStream(tokenizer, one.stop_strings, one.tokens)  # noqa: E731
        self._rows = [_Row(request, stream(request)) for request in requests]
        self._on_tokens = on_tokens
        self.is_watched = on_tokens is not None or any(request.stop_strings for request in requests)
        """Whether somebody waits for the text before it is finished."""

    def take(self, tokens_BS: np.ndarray, length_B: np.ndarray, is_active_B: np.ndarray) -> np.ndarray:
        """Hand out what is new of every row.

        Args:
            tokens_BS: prompts and texts; the newest token of a row is at its ``length_B``.

        Returns:
            The rows [B] that go on.
        """
        for index, row in enumerate(self._rows):
            if row.is_done:
                continue
            new, text = row.take(tokens_BS[index, : int(length_B[index]) + 1], is_last=not is_active_B[index])
            if self._on_tokens is not None and (new or text) and self._on_tokens(index, new, text):
                row.is_done, row.finish = True, "stop"
        return np.asarray([not row.is_done for row in self._rows])

    def completions(self, log_probs_BS: np.ndarray) -> list[Completion]:
        """Of rows that are all done."""
        done = []
        for row, log_probs_S in zip(self._rows, log_probs_BS, strict=True):
            start = len(row.request.tokens)
            log_probs = [float(value) for value in log_probs_S[start : start + len(row.tokens)]]
            done.append(Completion(row.tokens, log_probs, row.finish, row.stream.text if row.stream else None))
        return done


@dataclass
class _Row:
    """One request's text so far."""

    request: Request
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    finish: Finish = "length"
    is_done: bool = False

    def take(self, tokens_S: np.ndarray, *, is_last: bool) -> tuple[list[int], str]:
        """The tokens that were not handed out yet, and their text."""
        before = len(self.tokens)
        self.tokens += map(int, tokens_S[len(self.request.tokens) + before :])
        if len(self.tokens) > before and self.tokens[-1] in self.request.stop_tokens:
            self.tokens.pop()
            self.finish = "stop"
        text, self.is_done = "", is_last
        if self.stream is not None:
            text = self.stream.push(self.tokens[before:])
            if is_last:
                text += self.stream.finish()
            if self.stream.is_stopped:
                self.tokens = self.tokens[: self.stream.num_tokens]
                self.finish, self.is_done = "stop", True
        return self.tokens[before:], text
