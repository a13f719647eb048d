"""Tunes a fitted calibration by what the model says, not by what its states are.

Least squares counts all directions of a state alike; the head does not. From the closed-form fit on, Adam minimises

    mean over tokens t of KL( p(. | x_<=t) || p_theta(. | x_<=t) )

over the numbers theta of the calibration alone: p is the model's own sequential pass, p_theta the solver's, on training
text without its labels. The model stays as it is, so that k iterations go on to settle k layers exactly. A step costs a
sequential pass, and the region's evaluations with their gradient; layers before the region have none.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from snlp_jax.forward import read_logits, run_parts
from snlp_jax.layout import in_order, prepare
from snlp_jax.memory import rows_at_once
from snlp_jax.model import LanguageModel
from snlp_jax.parts import Weights
from snlp_jax.solver import Calibrated, Calibration, ParallelSegment, Schedule
from snlp_jax.types import Array, Params

TUNE_BATCH = 8
"""Windows of a step."""
LEARNING_RATE = 2e-3
"""At its peak, after a twentieth of the steps; it then falls along a cosine to 0."""


def tune_calibration(
    model: LanguageModel,
    params: Params,
    region: ParallelSegment,
    calibration: Calibration,
    windows: np.ndarray,
    documents: np.ndarray | None = None,
    *,
    num_steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> Calibration:
    """The calibration of a region after ``num_steps`` steps on windows, int32 [n, T + 1], taken in turns.

    The region's correction counts as ``Calibrated``, whatever it is; its initial trace, its number of iterations and
    its stage are those that the numbers are tuned for. ``documents`` as in ``eval/calibrations.py``; ``on_step`` is
    called after each step.
    """
    segment = dataclasses.replace(region, correction=Calibrated())
    schedule, fits = Schedule.of(model.config.num_layers, segment), {region.fit: calibration}
    num_tokens = TUNE_BATCH * (windows.shape[1] - 1)
    num_rows = rows_at_once(model.config, windows.shape[1] - 1, TUNE_BATCH, backend=model.backend)
    if num_rows < TUNE_BATCH:  # neither does a gradient keep what lies within a layer
        model = LanguageModel(dataclasses.replace(model.config, remat=True), model.machine, backend=model.backend)
    weights = prepare(model, params, schedule, num_tokens=num_tokens, layout="stack", fits=fits)
    position = weights.segments.index(segment)
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(num_steps // 20, 1), max(num_steps, 2))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def divergence(truth_BTV: Array, found_BTV: Array) -> Array:
        truth_BTV, found_BTV = jax.nn.log_softmax(truth_BTV), jax.nn.log_softmax(found_BTV)
        return jnp.sum(jnp.exp(truth_BTV) * (truth_BTV - found_BTV), axis=-1)

    def loss_fn(fitted: Calibration, weights: Weights, tokens_BT: Array, document_BT: Array | None) -> Array:
        part = dataclasses.replace(weights.parts[position], fit=fitted)
        parts = (*weights.parts[:position], part, *weights.parts[position + 1 :])
        run = lambda weights: run_parts(model, weights, tokens_BT, document_BT=document_BT).ends  # noqa: E731
        truth, found = jax.lax.stop_gradient(run(in_order(weights))), run(dataclasses.replace(weights, parts=parts))
        return jnp.mean(read_logits(divergence, model, weights.embed_head, [truth, found]))

    def gradient_of(fitted: Calibration, weights: Weights, *batch: Array | None) -> Calibration:
        if num_rows == TUNE_BATCH:
            return jax.grad(loss_fn)(fitted, weights, *batch)
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, num_rows, *leaf.shape[1:]), batch)
        of_parts = jax.lax.map(lambda part: jax.grad(loss_fn)(fitted, weights, *part), parts)
        return jax.tree.map(lambda leaf: leaf.mean(0), of_parts)

    @jax.jit
    def step(fitted: Calibration, state: optax.OptState, weights: Weights, *batch: Array | None) -> tuple:
        gradient = gradient_of(fitted, weights, *batch)
        updates, state = optimizer.update(gradient, state, fitted)
        return optax.apply_updates(fitted, updates), state

    state = optimizer.init(calibration)
    for index in range(num_steps):
        rows = np.arange(index * TUNE_BATCH, (index + 1) * TUNE_BATCH) % len(windows)
        document_BT = None if documents is None else jnp.asarray(documents[rows, :-1])
        calibration, state = step(calibration, state, weights, jnp.asarray(windows[rows, :-1]), document_BT)
        on_step()
    return calibration
