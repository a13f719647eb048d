"""The cache of one text, kept for a request that goes on from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from snlp_jax.infer.programs import Kept, Programs, State

BLOCK = 32
"""Tokens of a text that goes on which are evaluated at once. Rings have so many slots more, and so as many tokens can
be taken back of a text that is longer than a window."""


@dataclass
class PrefixCache:
    """What an engine has read and written of one text. Give it to :meth:`snlp_jax.infer.engine.Engine.generate` with
    one request at a time: tokens with which the request's prompt begins as the text did are not evaluated again.

    What it holds of them is what a prefill would give: where a solver's own keys and values are only near to those,
    the tokens that were generated are evaluated again. An error, also an interrupt, empties it.
    """

    num_reused: int = 0
    """Tokens of the last prompt that were not evaluated again."""
    capacity: int = 0
    """Tokens that the rings are made for; 0 where nothing is kept."""
    _tokens: list[int] = field(default_factory=list)
    _num_written: int = 0
    _state: State | None = None

    def begin(self, prompt: Sequence[int], windows: Sequence[int]) -> Kept | None:
        """What is kept for a prompt; it is handed over, and nothing is left. None where that is nothing.

        Args:
          windows: of all layers with attention.
        """
        state, self._state = self._state, None
        size = min(len(self._tokens), len(prompt) - 1)
        differs = np.asarray(self._tokens[:size]) != np.asarray(prompt[:size])
        common = int(differs.argmax()) if differs.any() else size
        is_whole = all(window >= self.capacity for window in windows)
        can_go_back = is_whole or self._num_written - common <= BLOCK
        self.num_reused = common if state is not None and can_go_back else 0
        if state is None or not self.num_reused:
            self.capacity = 0
            return None
        return Kept(jnp.full(1, self.num_reused, jnp.int32), state.rings, state.warm)

    def keep(self, state: State, programs: Programs, num_prompt: int, *, is_exact: bool) -> None:
        """Keep what a request has left.

        Args:
          num_prompt: tokens of its prompt.
          is_exact: whether generated tokens left what a prefill would.
        """
        length = int(np.asarray(state.length_B)[0])
        tokens = np.asarray(state.tokens_BS)[0, : length if is_exact else num_prompt]
        self._tokens, self.capacity, self._state = tokens.tolist(), programs.num_slots - programs.block, state
        # Drafts, and what filled up a block, were written behind the text.
        self._num_written = max(length + programs.max_draft + 1, num_prompt + BLOCK if self.num_reused else 0)
