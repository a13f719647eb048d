"""Greedy continuation without a cache: the plain reference that any cached engine has to reproduce."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snlp_jax.forward import Weights, forward
from snlp_jax.model import LanguageModel
from snlp_jax.types import Array


def make_greedy(model: LanguageModel, num_new: int, *, mesh: Mesh | None = None) -> Callable[[Weights, Array], Array]:
    """A jitted ``(weights, prompt_BT) -> new_BT`` of the ``num_new`` most likely next tokens under the schedule.

    Every step runs the whole forward on one buffer of prompt and continuation; what lies to the right of a position
    cannot influence it, so the yet unwritten part does no harm. Every pass sees positions from 0.
    """

    @jax.jit
    def greedy(weights: Weights, prompt_BT: Array) -> Array:
        num_prompt = prompt_BT.shape[1]
        buffer_BT = jnp.pad(prompt_BT, ((0, 0), (0, num_new)))

        def append(index: Array, buffer_BT: Array) -> Array:
            logits_BTV = forward(model, weights, buffer_BT, mesh=mesh).logits_BTV
            last_BV = jax.lax.dynamic_index_in_dim(logits_BTV, index - 1, axis=1, keepdims=False)
            next_B1 = jnp.argmax(last_BV, axis=-1).astype(buffer_BT.dtype)[:, None]
            return jax.lax.dynamic_update_slice_in_dim(buffer_BT, next_B1, index, axis=1)

        return jax.lax.fori_loop(num_prompt, num_prompt + num_new, append, buffer_BT)[:, num_prompt:]

    return greedy
