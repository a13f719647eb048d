"""One jitted, donated training step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from snlp_jax.config import Config
from snlp_jax.model import LanguageModel
from snlp_jax.train.loss import Plan, loss_fn, term_weight
from snlp_jax.types import Array

TrainState = dict[str, Any]
"""``{'params': ..., 'opt_state': ..., 'step': int32 scalar}``."""
StepFn = Callable[..., tuple[TrainState, dict[str, Array]]]


def init_state(model: LanguageModel, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Fresh parameters, optimizer state and step 0. Jit it."""
    params = model.init(jax.random.key(seed))
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}


def make_step(model: LanguageModel, optimizer: optax.GradientTransformation, config: Config) -> StepFn:
    """``step(state, tokens_BT1, plan=Plan(...)) -> (state, metrics)``; donates ``state``, compiles once a plan.

    The batch is split into ``train.num_microbatches`` equal parts whose gradients are averaged.
    """
    num_steps, num_microbatches = config.train.num_steps, config.train.num_microbatches

    @functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
    def step(state: TrainState, tokens_BT1: Array, *, plan: Plan) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
        weights = {name: term_weight(config.loss.terms[name], state["step"], num_steps) for name, _ in plan.sizes}

        def gradient(tokens: Array) -> tuple[Any, dict[str, Array]]:
            loss = lambda params: loss_fn(model, params, tokens, config.loss, plan, weights, key)  # noqa: E731
            return jax.grad(loss, has_aux=True)(state["params"])

        if num_microbatches == 1:
            grads, metrics = gradient(tokens_BT1)
        else:
            parts = tokens_BT1.reshape(num_microbatches, -1, tokens_BT1.shape[-1])
            zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradient, parts[0]))
            add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)  # noqa: E731
            total, _ = jax.lax.scan(add, zero, parts)
            grads, metrics = jax.tree.map(lambda leaf: leaf / num_microbatches, total)

        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    return step
