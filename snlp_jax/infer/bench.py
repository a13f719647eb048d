"""How fast engines decode on this machine, beside what its memory and its arithmetic allow.

Each engine and number of rows is a record, with the keys of nanochat's ``scripts/infer_bench.py`` and a few more:

    batch, ttft_sec        rows; seconds to the first tokens, which is the prefill of all rows
    tpot_sec, tok_per_sec  seconds of a token of one row; tokens a second of all rows, without the prefill
    gb_per_sec, mbu_pct    bytes that a step has to read (kernels as often as they are evaluated, the head, the cache in
                           the middle of the text) over its seconds; its share of the bandwidth measured in this process
    mfu_pct                the same for arithmetic: two operations a parameter and row
    peak_vram_bytes        most memory so far, of the device or on a CPU of the process
    acceptance             share of the tested drafts that were right; None without drafts
    ratio                  tokens a second over those of the first engine, median of the same rounds

All engines decode the same prompt greedily, in turns, after a run that compiles. Figures are medians over rounds.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.infer.engine import Engine
from snlp_jax.infer.requests import Request, Statistics

Record = dict[str, float | int | str | None]


def measure(
    engines: Mapping[str, Engine],
    prompt: Sequence[int],
    rows: Sequence[int],
    new_tokens: int,
    repeats: int,
    limits: Mapping[str, float],
    on_run: Callable[[], None] = lambda: None,
) -> Iterator[Record]:
    """Records of all engines, for one number of rows after another.

    Args:
        prompt: of every row.
        limits: of :func:`measure_limits`.
        on_run: called after each of the ``len(rows) * (repeats + 1) * len(engines)`` runs.
    """
    context = len(prompt) + new_tokens // 2
    for count in rows:
        requests = [Request(prompt, new_tokens)] * count
        readings: dict[str, list[Statistics]] = {name: [] for name in engines}
        for index in range(repeats + 1):
            for name, engine in engines.items():
                engine.generate(requests)
                on_run()
                if index and engine.statistics is not None:  # the first compiles
                    readings[name].append(engine.statistics)
        # Tokens a second of all rows, without the first of each, which come out of the prefill.
        speeds = {
            name: np.asarray([(each.new_tokens - count) / max(each.decode_seconds, 1e-9) for each in found])
            for name, found in readings.items()
        }
        first = next(iter(speeds.values()))
        for name, engine in engines.items():
            tpot_sec = count / float(np.median(speeds[name]))
            yield {
                "setting": name,
                "batch": count,
                "ttft_sec": float(np.median([each.prefill_seconds for each in readings[name]])),
                "tpot_sec": tpot_sec,
                "tok_per_sec": count / tpot_sec,
                **_shares(engine, tpot_sec, count, context, limits),
                "peak_vram_bytes": peak_bytes(),
                "decode_steps": readings[name][-1].steps,
                "acceptance": readings[name][-1].acceptance,
                "ratio": float(np.median(speeds[name] / first)),
            }


def _shares(engine: Engine, tpot_sec: float, rows: int, context: int, limits: Mapping[str, float]) -> Record:
    """What a step reads and computes a second; None where the number of evaluations depends on the text."""
    if engine.draft is not None or any(region.tolerance > 0 for region in engine.schedule.regions):
        return {"gb_per_sec": None, "mbu_pct": None, "mfu_pct": None}
    num_bytes, flops = step_cost(engine, rows, context)
    return {
        "gb_per_sec": num_bytes / tpot_sec / 1e9,
        "mbu_pct": 100 * num_bytes / tpot_sec / limits["copy_bytes_per_s"],
        "mfu_pct": 100 * flops / tpot_sec / limits["matmul_flops_per_s"],
    }


def step_cost(engine: Engine, rows: int, context: int) -> tuple[float, float]:
    """Bytes that one plain step has to read, and operations that it has to make, with ``context`` tokens in the cache
    of each row. Every layer counts alike."""
    config, weights = engine.model.config, engine.weights
    parts = [part for part in weights.parts if part.blocks is not None]
    held = {layer for part in parts for layer in range(*part.held)}
    leaves = {id(leaf): leaf for part in parts for leaf in jax.tree.leaves(part.blocks)}.values()
    evals = engine.schedule.num_block_evals / len(held)
    num_weights = sum(leaf.size for leaf in leaves)
    head = [leaf for name, leaf in weights.embed_head["head"].items() if name.startswith("kernel")]
    head += [weights.embed_head["embed"]["token"]] if config.use_tied_head else []
    keys = sum(min(window, context) for window in config.windows) / config.num_layers * len(held)
    cache = 2 * rows * keys * config.num_kv_heads * config.head_dim
    itemsize = jnp.dtype(engine.model.dtype).itemsize
    num_bytes = evals * (sum(leaf.nbytes for leaf in leaves) + cache * itemsize) + sum(leaf.nbytes for leaf in head)
    scores = 4 * rows * keys * config.num_heads * config.head_dim
    flops = evals * (2 * rows * num_weights + scores) + 2 * rows * sum(leaf.size for leaf in head)
    return num_bytes, flops


def peak_bytes() -> int:
    """Most memory that the first device has held, or on a CPU the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_limits(dtype: Any, on_cpu: bool) -> dict[str, float]:
    """What this machine reaches now: bytes read plus written by an addition in place, and FLOPs of a square product."""
    num_bytes, side = (2**26, 1024) if on_cpu else (2**30, 8192)
    a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    copy = jax.jit(lambda x: x + jnp.ones((), dtype), donate_argnums=0)  # into the same memory: no new pages
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))

    def fastest(run: Callable[[jax.Array], jax.Array], x: jax.Array, in_place: bool) -> float:
        readings = []
        for _ in range(11):  # the first compiles
            began = time.perf_counter()
            y = jax.block_until_ready(run(x))
            readings.append(time.perf_counter() - began)
            x = y if in_place else x
        return min(readings)

    x = jnp.ones(num_bytes // dtype.itemsize, dtype)
    return {
        "copy_bytes_per_s": 2 * num_bytes / fastest(copy, x, True),
        "matmul_flops_per_s": 2 * side**3 / fastest(product, a, False),
    }
