"""Greedy continuation without a cache: the plain reference that any cached engine has to reproduce."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from snlp_jax.forward import read_logits, run_parts
from snlp_jax.model import Model
from snlp_jax.parts import Weights
from snlp_jax.types import Array

GreedyFn = Callable[[Weights, ArrayLike], Array]


def make_greedy_fn(model: Model, *, prompt_len: int, num_tokens: int, mesh: Mesh | None = None) -> GreedyFn:
    """Jitted greedy decoding without a cache: ``(weights, tokens_BT) -> new tokens [B, num_tokens]``.

    ``tokens_BT`` holds the prompt and a first guess of the ``num_tokens`` that follow. All guesses are replaced at
    once by the most likely tokens under the current ones until nothing changes. The model is causal, so each step
    makes at least one more token final and the fixed point is the greedy continuation, whatever the guess; a good
    guess (another pass's text) ends it early.
    """

    likeliest = lambda logits_BTV: logits_BTV.argmax(-1)  # noqa: E731

    @jax.jit
    def decode(weights: Weights, tokens_BT: Array) -> Array:
        def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tokens_BT, count, _ = state
            states = run_parts(model, weights, tokens_BT[:, :-1], mesh=mesh)
            h_last, h_mid = (h[:, prompt_len - 1 :] for h in states.ends)
            new_BT = read_logits(likeliest, model, weights.embed_head, [(h_last, h_mid)], mesh=mesh)
            new_BT = new_BT.astype(tokens_BT.dtype)
            changed = jnp.any(new_BT != tokens_BT[:, prompt_len:])
            return jnp.concatenate([tokens_BT[:, :prompt_len], new_BT], axis=1), count + 1, changed

        state = (tokens_BT, jnp.asarray(0), jnp.asarray(True))
        final_BT, _, _ = jax.lax.while_loop(lambda state: state[2] & (state[1] < num_tokens), step, state)
        return final_BT[:, prompt_len:]

    return decode
