"""Milliseconds: of readers that are interleaved, and of compiled forward passes beside their fair sequential twin."""

import math
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
from snlp_jax.forward import read_logits, run_parts
from snlp_jax.memory import check_room, program_bytes
from snlp_jax.model import Model
from snlp_jax.parts import Weights
from snlp_jax.pieces import piece_len
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Array, Params

LAYOUTS: tuple[Literal["stack", "list"], ...] = ("stack", "list")
NUM_WARMUP = 2
TIMING_SEED = 0
LIST_BYTES = 2**31
"""Most that an unrolled pass may take besides its weights to be timed. A CPU runs layers together that do not wait for
each other: 20 of SmolLM2 on 2,048 tokens take 4.3 GiB unrolled and 0.6 in a loop."""
MOST_REPEATS = 10
"""Times as many rounds as were asked for, where they are short."""

Reader = Callable[[int], float]
"""Runs once, with the number of the round, and returns milliseconds."""


def interleave(
    readers: Sequence[Reader],
    num_repeats: int,
    *,
    least_seconds: float = 0.0,
    on_round: Callable[[str], None] = lambda _: None,
) -> np.ndarray:
    """Milliseconds [repeats, readers] after a warm-up; a new order every round, so that a change of the machine's
    speed meets all alike. Short rounds are repeated up to ``MOST_REPEATS`` times as often, for ``least_seconds``."""
    rng = np.random.default_rng(TIMING_SEED)
    for reader in readers:
        for number in range(NUM_WARMUP):
            reader(number)
    rounds: list[np.ndarray] = []
    began = time.perf_counter()
    while len(rounds) < num_repeats or (
        len(rounds) < MOST_REPEATS * num_repeats and time.perf_counter() - began < least_seconds
    ):
        on_round("timing")
        rounds.append(np.empty(len(readers)))
        for index in rng.permutation(len(readers)):
            rounds[-1][index] = readers[index](len(rounds) - 1)
    return np.stack(rounds)


class CompiledForward:
    """All logits of batches of tokens, which are read in turn: as many as there are rounds, or again. Of logits that
    are computed in pieces (snlp_jax/pieces.py) the likeliest tokens are kept."""

    def __init__(self, model: Model, weights: Weights, texts_BT: Sequence[np.ndarray], mesh: Mesh | None = None):
        num_rows, num_tokens = texts_BT[0].shape
        is_whole = piece_len(num_rows, num_tokens, model.config.padded_vocab_size, mesh) == num_tokens
        keep = lambda logits_BTV: logits_BTV if is_whole else logits_BTV.argmax(-1)  # noqa: E731

        def logits(weights: Weights, tokens_BT: Array) -> Array:
            states = run_parts(model, weights, tokens_BT, mesh=mesh)
            return read_logits(keep, model, weights.embed_head, [states.ends], mesh=mesh)

        self.weights, self.compiled = weights, jax.jit(logits).lower(weights, texts_BT[0]).compile()
        self.texts_BT = [jax.device_put(text_BT, self.compiled.input_shardings[0][1]) for text_BT in texts_BT]

    def read(self, number: int) -> float:
        """A :data:`Reader`."""
        tokens_BT = self.texts_BT[number % len(self.texts_BT)]
        began = time.perf_counter()
        jax.block_until_ready(self.compiled(self.weights, tokens_BT))
        return 1e3 * (time.perf_counter() - began)

    @property
    def memory_bytes(self) -> int | None:
        """See :class:`Timing`."""
        try:
            stats: Any = self.compiled.memory_analysis()
            return stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
        except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
            return None


@dataclass(frozen=True)
class Timing:
    """One schedule's forward pass in the layout that was faster. All times in ms, over the same number of runs."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    layout: str
    """``stack`` (scan and vmap over stacked weights) or ``list`` (unrolled over one tree a layer)."""
    layout_medians_ms: dict[str, float]
    """By layout; without ``list`` where that takes more than ``LIST_BYTES``."""
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
        on_progress: called with a word before each compilation (two a schedule), the warm-up and each round of runs.

    Raises:
        InputError: a pass takes more memory than is free.
    """
    shape = config.timing_batch, config.timing_len or config.window_len(model.config)
    tokens_BT = np.random.default_rng(TIMING_SEED).integers(model.config.vocab_size, size=shape, dtype=np.int32)
    passes: list[CompiledForward | None] = []
    for layout in LAYOUTS:
        lay_out = partial(prepare_all, model, params, num_tokens=tokens_BT.size, layout=layout, fits=fits)
        alone = iter(lay_out([schedule for schedule in schedules if schedule.is_sequential]))
        parallel = [schedule for schedule in schedules if not schedule.is_sequential]
        spread = iter(lay_out(parallel, mesh=mesh, sequential=config.sequential))
        for schedule in schedules:
            on_progress("compiling")
            weights, devices = (next(alone), None) if schedule.is_sequential else (next(spread), mesh)
            program = CompiledForward(model, weights, [tokens_BT], devices)
            needed = program_bytes(program.compiled)
            if layout == "list" and needed is not None and needed > LIST_BYTES:
                passes.append(None)
                continue
            what, remedy = "a timed forward", "lower --timing-len or --timing-batch, or give --timing-repeats 0"
            check_room(f"{what} of {tokens_BT.size} tokens", needed, remedy)
            passes.append(program)
    readers = [(lambda _: math.inf) if each is None else each.read for each in passes]
    on_progress("timing")
    times_ms = interleave(readers, config.timing_repeats, on_round=on_progress)
    medians = np.median(times_ms, axis=0).reshape(len(LAYOUTS), -1)
    timings = []
    for index, layout in enumerate(medians.argmin(axis=0)):
        column = layout * len(schedules) + index
        low, high = map(float, np.quantile(times_ms[:, column], [0.25, 0.75]))
        by_layout: dict[str, float] = {
            name: float(ms) for name, ms in zip(LAYOUTS, medians[:, index], strict=True) if ms < math.inf
        }
        best, fastest = LAYOUTS[layout], passes[column]
        assert fastest is not None
        timings.append(Timing(by_layout[best], (low, high), best, by_layout, fastest.memory_bytes))
    return timings
