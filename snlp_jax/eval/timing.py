"""Milliseconds of a compiled forward pass, for every schedule and its fair sequential twin."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from snlp_jax.eval.weights import prepare_all
from snlp_jax.forward import Weights, forward
from snlp_jax.model import LanguageModel
from snlp_jax.solver import Schedule
from snlp_jax.types import Array, Params

LAYOUTS: tuple[Literal["stack", "list"], ...] = ("stack", "list")
NUM_WARMUP = 3
TIMING_SEED = 0


@dataclass(frozen=True)
class Timing:
    """One schedule's forward pass in the layout that was faster. All times in ms, over the same number of runs."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    layout: str
    """``stack`` (scan and vmap over stacked weights) or ``list`` (unrolled over one tree a layer)."""
    layout_medians_ms: dict[str, float]
    memory_bytes: int | None
    """Arguments (weights included), temporaries and outputs of the compiled program on one device, as XLA counts
    them; None where the backend does not tell."""


def time_schedules(
    model: LanguageModel,
    params: Params,
    schedules: Sequence[Schedule],
    *,
    batch_size: int,
    seq_len: int,
    num_repeats: int,
    mesh: Mesh | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Time the forward pass (tokens to all logits) of every schedule, the sequential one among them.

    What makes the comparison fair: all passes are compiled the same way with their weights, cast and laid out
    beforehand, as arguments; each is measured in both layouts and the faster one counts; the runs are interleaved, in
    a new order every round, so that a change of the machine's speed meets all alike; and a sequential schedule runs
    on one device, without ``mesh``.

    Args:
        on_progress: called with a word before each compilation (two a schedule) and each round of runs.
    """
    rng = np.random.default_rng(TIMING_SEED)
    tokens_BT = rng.integers(model.config.vocab_size, size=(batch_size, seq_len), dtype=np.int32)
    num_tokens = batch_size * seq_len
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for layout in LAYOUTS:
        all_weights = prepare_all(model, params, schedules, num_tokens=num_tokens, layout=layout, mesh=mesh)
        for schedule, weights in zip(schedules, all_weights, strict=True):
            on_progress("compiling")
            args = (weights, jax.device_put(tokens_BT, weights_sharding(weights)))
            calls.append((_jit_forward(model, None if schedule.is_sequential else mesh).lower(*args).compile(), args))
    for compiled, args in calls:
        for _ in range(NUM_WARMUP):
            jax.block_until_ready(compiled(*args))
    times_ms = np.empty((num_repeats, len(calls)))
    for row in times_ms:
        on_progress("timing")
        for index in rng.permutation(len(calls)):
            compiled, args = calls[index]
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            row[index] = 1e3 * (time.perf_counter() - start)
    columns = times_ms.reshape(num_repeats, len(LAYOUTS), len(schedules))
    memory = np.reshape([_memory_bytes(compiled) for compiled, _ in calls], (len(LAYOUTS), len(schedules)))
    return [_choose(columns[:, :, i], memory[:, i]) for i in range(len(schedules))]
