"""Milliseconds of a compiled forward pass, for every schedule and its fair sequential twin."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from snlp_jax.config import EvalConfig
from snlp_jax.eval.weights import prepare_all
from snlp_jax.forward import forward
from snlp_jax.model import Model
from snlp_jax.parts import Weights
from snlp_jax.solver import Calibration, Schedule
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
    model: Model,
    params: Params,
    schedules: Sequence[Schedule],
    config: EvalConfig,
    *,
    mesh: Mesh | None = None,
    fits: Mapping[str, Calibration] | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Time the forward pass (random tokens to all logits) of every schedule, the sequential one among them.

    What makes the comparison fair: all passes are compiled the same way, with their weights cast and laid out
    beforehand and passed as arguments; each is measured in both layouts and the faster one counts; the runs are
    interleaved, in a new order every round, so that a change of the machine's speed meets all alike; and a sequential
    schedule runs on one device, without ``mesh``.

    Args:
        config: sizes and repeats of the timing, and how layers in order lie on ``mesh``.
        fits: calibrations by the names that schedules give.
        on_progress: called with a word before each compilation (two a schedule) and each round of runs.
    """
    rng = np.random.default_rng(TIMING_SEED)
    shape = config.timing_batch, config.timing_len or model.config.seq_len
    tokens_BT = rng.integers(model.config.vocab_size, size=shape, dtype=np.int32)
    calls: list[tuple[Any, Weights, Array]] = []
    for layout in LAYOUTS:
        lay_out = partial(prepare_all, model, params, num_tokens=tokens_BT.size, layout=layout, fits=fits)
        alone = iter(lay_out([schedule for schedule in schedules if schedule.is_sequential]))
        parallel = [schedule for schedule in schedules if not schedule.is_sequential]
        spread = iter(lay_out(parallel, mesh=mesh, sequential=config.sequential))
        for schedule in schedules:
            on_progress("compiling")
            weights, devices = (next(alone), None) if schedule.is_sequential else (next(spread), mesh)
            compiled = _jit_forward(model, devices).lower(weights, tokens_BT).compile()
            calls.append((compiled, weights, jax.device_put(tokens_BT, compiled.input_shardings[0][1])))
    for compiled, weights, tokens in calls:
        for _ in range(NUM_WARMUP):
            jax.block_until_ready(compiled(weights, tokens))
    times_ms = np.empty((config.timing_repeats, len(calls)))
    for row in times_ms:
        on_progress("timing")
        for index in rng.permutation(len(calls)):
            compiled, weights, tokens = calls[index]
            start = time.perf_counter()
            jax.block_until_ready(compiled(weights, tokens))
            row[index] = 1e3 * (time.perf_counter() - start)
    results = []
    for i in range(len(schedules)):
        columns = [layout * len(schedules) + i for layout in range(len(LAYOUTS))]
        results.append(_faster(times_ms[:, columns], [_memory_bytes(calls[column][0]) for column in columns]))
    return results


def _jit_forward(model: Model, mesh: Mesh | None) -> Any:
    def logits(weights: Weights, tokens_BT: Array) -> Array:
        return forward(model, weights, tokens_BT, mesh=mesh).logits_BTV

    return jax.jit(logits)


def _faster(times_ms: np.ndarray, memory_bytes: Sequence[int | None]) -> Timing:
    """Of one schedule's times [repeats, layouts], those of the layout with the lowest median."""
    low, medians, high = np.quantile(times_ms, [0.25, 0.5, 0.75], axis=0)
    best = int(medians.argmin())
    return Timing(
        median_ms=float(medians[best]),
        quartiles_ms=(float(low[best]), float(high[best])),
        layout=LAYOUTS[best],
        layout_medians_ms=dict(zip(LAYOUTS, map(float, medians), strict=True)),
        memory_bytes=memory_bytes[best],
    )


def _memory_bytes(compiled: Any) -> int | None:
    try:
        stats = compiled.memory_analysis()
        return stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None
