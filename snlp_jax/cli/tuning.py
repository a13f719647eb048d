"""Which form of a kernel the products of few rows like on this CPU: measured once by ``--tune``, or by default.

Kernels [I, O] as they are trained, or [O, I] on the left of the product (``snlp_jax/model/layers.py``). Which is faster
depends on whether a layer's kernels stay in the cache, and so on the machine. The table of one machine is in
docs/log.md (products of few rows).
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.config import MachineConfig
from snlp_jax.io.files import atomic_write, cache_folder, read_json
from snlp_jax.model.layers import project
from snlp_jax.types import Array

NEVER = 2**31 - 1
WIDTHS = (128, 256, 384, 512, 768, 1024)
ROWS = (1, 2, 4, 8)
NUM_LAYERS = 12
FILE = "products.json"


class Reading(NamedTuple):
    """Milliseconds of the two products of an MLP of ``NUM_LAYERS`` layers, D to 4 D and back."""

    width: int
    rows: int
    plain_ms: float
    transposed_ms: float


def tuned(machine: MachineConfig) -> MachineConfig:
    """With what was measured on this machine, where the flags leave it open and something was."""
    found = read_json(cache_folder() / FILE)
    value = found.get("transposed_from") if isinstance(found, dict) else None
    if machine.transposed_from or type(value) is not int or value < 1:
        return machine
    return dataclasses.replace(machine, transposed_from=value)


def keep(readings: Sequence[Reading]) -> int:
    """Choose by the readings, write the choice where :func:`tuned` reads it, and return it."""
    chosen = choose(readings)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [reading._asdict() for reading in readings]
    atomic_write(folder / FILE, json.dumps({"transposed_from": chosen, "readings": rows}, indent=1) + "\n")
    return chosen


def choose(readings: Sequence[Reading]) -> int:
    """The least width from which on transposed kernels take no more time, over all numbers of rows; NEVER where they
    always do."""
    gains = {
        width: sum(each.plain_ms - each.transposed_ms for each in readings if each.width == width)
        for width in {each.width for each in readings}
    }
    chosen = NEVER
    for width in sorted(gains, reverse=True):
        if gains[width] < 0:
            break
        chosen = width
    return chosen


def measure(widths: Sequence[int] = WIDTHS, rows: Sequence[int] = ROWS, repeats: int = 15) -> Iterator[Reading]:
    """Both forms in turns, for every width and number of rows; medians."""
    for width in widths:
        up, down = (_kernels(shape) for shape in ((width, 4 * width), (4 * width, width)))
        forms = [(up, down), tuple([kernel.T + 0.0 for kernel in kernels] for kernels in (up, down))]
        for count in rows:
            x = jax.random.normal(jax.random.key(1), (count, width))
            pairs = [(_mlps(is_transposed=is_transposed), forms[is_transposed]) for is_transposed in (False, True)]
            times = [[_seconds(run, *form, x) for run, form in pairs] for _ in range(repeats + 1)]
            plain, transposed = 1e3 * np.median(times[1:], axis=0)  # the first compiles
            yield Reading(width, count, float(plain), float(transposed))


def _kernels(shape: tuple[int, int]) -> list[Array]:
    keys = jax.random.split(jax.random.key(0), NUM_LAYERS)
    return [jax.random.normal(key, shape) * shape[0] ** -0.5 for key in keys]


def _mlps(*, is_transposed: bool) -> Callable[..., Array]:
    """A chain of layers, so that one product waits for the other, as in a model."""

    def run(up: list[Array], down: list[Array], x: Array) -> Array:
        for one, other in zip(up, down, strict=True):
            for kernel in (one, other):
                x = jnp.tanh(project(x, kernel, jnp.float32, is_transposed=is_transposed))
        return x

    return jax.jit(run)


def _seconds(run: Callable[..., Array], *arguments: object) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - began
