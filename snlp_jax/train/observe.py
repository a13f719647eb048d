"""What a run shows of itself while it trains: the frontier, residuals by layer, a profile, memory, and who ran it."""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from snlp_jax.checks import check_mesh
from snlp_jax.config import Config
from snlp_jax.eval.evaluate import parse_settings
from snlp_jax.eval.solver_file import with_settings
from snlp_jax.forward import run_parts
from snlp_jax.io.files import atomic_write, read_json
from snlp_jax.io.provenance import circumstances
from snlp_jax.layout import arrange, split, weights_shardings
from snlp_jax.model import Model
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel.mesh import put_batch
from snlp_jax.solver import Schedule
from snlp_jax.train.flops import peak_flops, train_flops_per_token
from snlp_jax.train.loss import balanced, cross_entropy
from snlp_jax.types import Array, Batch, Params

RUN_NAME = "run.json"
PROFILE_FOLDER = "profile"
NUM_BATCHES = 2
"""Held-out batches on which the frontier is measured."""

Observe = Callable[[Params, list[Batch]], dict[str, float]]


def frontier_settings(config: Config) -> dict[str, Schedule]:
    """Text -> schedule of ``eval.solvers``, or half and two thirds of the layers with one and two iterations; the
    sequential pass first. Those with fitted maps, which belong to one checkpoint, are left out.

    Raises:
        InputError: names the setting that the model cannot run, or the solver file that cannot be read.
    """
    chosen = with_settings(config.eval, config.model.num_layers, config.run_path)
    solvers = chosen.solvers or _short_list(config)
    settings = parse_settings(config.model, dataclasses.replace(chosen, solvers=solvers, greedy_tokens=0, timing_len=0))
    return {text: schedule for text, schedule in settings.items() if not any(region.fit for region in schedule.regions)}


def _short_list(config: Config) -> tuple[str, ...]:
    num_layers, name = config.model.num_layers, "hcn" if config.model.num_streams else "idn"
    sizes = sorted({max(1, round(share * num_layers)) for share in (1 / 2, 2 / 3)})
    return tuple(f"{name}:n={size},k={k}" for size in sizes for k in (1, 2) if k <= size)


def make_observe(model: Model, config: Config, mesh: Mesh) -> Observe:
    """``(params, batches) -> frontier/SETTING``, the held-out cross entropy of each setting, and ``residual/LAYER``,
    ``||f_l(h_{l-1}) - h_l|| / ||h_l||`` of the trace after one iteration (Identity, or HyperConnection with streams)
    of the largest region that the loss trains, or of two thirds of the layers. Each setting compiles once.

    On a mesh the weights are moved to where each setting reads them, for the length of its evaluation.

    Raises:
        InputError: names the setting that the model or the mesh cannot run, before anything is compiled.
    """
    settings = frontier_settings(config)
    probe = _probe(config)
    is_spread = mesh.size > 1
    for schedule in settings.values() if is_spread else ():
        check_mesh(schedule, mesh)

    @functools.partial(jax.jit, static_argnames="schedule")
    def measure(params: Params, batch: Batch, *, schedule: Schedule) -> tuple[Array, tuple[Array, ...]]:
        params, batch = model.cast(params), balanced(batch)
        if is_spread:
            weights = arrange(model, params, schedule, mesh)
            weights = jax.lax.with_sharding_constraint(weights, weights_shardings(model, weights, mesh))
        else:
            weights = split(model, params, schedule)
        on, document_BT = mesh if is_spread else None, None if batch.document is None else batch.document[:, :-1]
        states = run_parts(model, weights, batch.tokens[:, :-1], mesh=on, with_stats=True, document_BT=document_BT)
        targets_BT, ends = batch.tokens[:, 1:], (states.h_last, states.h_mid)
        ce = cross_entropy(model, weights.embed_head, *ends, targets_BT, batch.weight, mesh=on)
        return ce, tuple(solution.stats["residual_norm"] for solution in states.solutions)

    def observe(params: Params, batches: list[Batch]) -> dict[str, float]:
        placed = [put_batch(mesh, batch, is_whole=True) for batch in batches[:NUM_BATCHES]]
        # Batches of conversations have different numbers of targets.
        counts = [1.0 if batch.weight is None else float(batch.weight.sum()) for batch in batches[:NUM_BATCHES]]
        run = lambda schedule: [measure(params, batch, schedule=schedule) for batch in placed]  # noqa: E731
        mean = lambda values: np.average(values, axis=0, weights=counts)  # noqa: E731
        metrics = {
            f"frontier/{text}": float(mean([ce for ce, _ in run(schedule)])) for text, schedule in settings.items()
        }
        if probe is not None:
            # Row k of the statistics is the trace after k iterations.
            residual_N = mean([norms[1] for _, (norms,) in run(probe)])
            first = probe.regions[0].start
            metrics |= {f"residual/{first + i:02d}": float(value) for i, value in enumerate(residual_N)}
        return metrics

    return observe


def _probe(config: Config) -> Schedule | None:
    """One region in two iterations, whose residuals are recorded; None where one iteration leaves none."""
    num_layers = config.model.num_layers
    trained = [size for term in config.loss.terms.values() for size in term.region_sizes]
    size = max(trained, default=round(2 / 3 * num_layers))
    name = "hcn" if config.model.num_streams else "idn"
    return parse_schedule(f"{name}:n={size},k=2", num_layers) if size >= 2 else None


class Meter:
    """Tokens per second, the share of the time that went by waiting for data and, where the device's peak is known,
    model FLOP utilisation, between two readings."""

    def __init__(self, config: Config, tokens_per_step: int, num_devices: int):
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = train_flops_per_token(config.model) / num_devices
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._last: tuple[int, float] | None = None
        self._spent = {"wait": 0.0, "pause": 0.0}

    @contextlib.contextmanager
    def spending(self, on: Literal["wait", "pause"]) -> Iterator[None]:
        """Time on waiting for data, or on what is not training and is left out."""
        begin = time.perf_counter()
        yield
        self._spent[on] += time.perf_counter() - begin

    def rates(self, step: int) -> dict[str, float]:
        """Since the last call; empty at the first, which includes compilation."""
        now, last, spent = time.perf_counter(), self._last, self._spent
        self._last, self._spent = (step, now), {"wait": 0.0, "pause": 0.0}
        seconds = now - last[1] - spent["pause"] if last else 0.0
        if last is None or seconds <= 0:
            return {}
        tokens_per_second = (step - last[0]) * self._tokens_per_step / seconds
        rates = {"tokens_per_s": tokens_per_second, "data_wait": spent["wait"] / seconds}
        if self._peak is not None:
            rates["mfu"] = tokens_per_second * self._flops_per_token / self._peak
        return rates


class Profiler:
    """Records ``train.profile_steps`` steps from ``train.profile_start`` on, or from the first that is left to take."""

    def __init__(self, run_path: Path, start: int, num_steps: int, first_step: int) -> None:
        """``first_step``: steps made before this process began."""
        self.path = run_path / PROFILE_FOLDER
        self._first = max(start, first_step + 1)
        self._last = self._first + num_steps - 1
        self._is_on = False

    def before(self, step: int) -> None:
        """Call it before step number ``step``, counted from 1."""
        if step == self._first <= self._last:
            jax.profiler.start_trace(self.path)
            self._is_on = True

    def after(self, step: int, results: Any) -> str:
        """Call it after the step was dispatched; a sentence where the profile lies after its last step, else ""."""
        if not self._is_on or step < self._last:
            return ""
        jax.block_until_ready(results)
        self.close()
        return (
            f"profile of steps {self._first} to {self._last}: {self.path}; look at it with "
            f"`tensorboard --logdir {self.path}` (pip install tensorboard-plugin-profile), or open the "
            ".trace.json.gz in it at https://ui.perfetto.dev"
        )

    def close(self) -> None:
        """Write what there is; a run that ends inside of a profile has one too."""
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False


class RunRecord:
    """``run.json``: what the run is, and the sessions, one a process, that took its steps. For the report."""

    def __init__(
        self, run_path: Path | None, first_step: int, started: float, facts: dict[str, Any] | None = None
    ) -> None:
        """A session that begins at step 0 begins the record anew. None as the path writes nothing.

        Args:
            started: ``time.time()`` of its start.
            facts: what is the same in all sessions.
        """
        self._path, self._started = run_path, started
        self._session: dict[str, Any] = circumstances() | {"num_devices": jax.device_count(), "first_step": first_step}
        earlier = read_record(run_path)["sessions"] if run_path is not None and first_step else []
        self._record = {**(facts or {}), "sessions": [*earlier, self._session]}

    def update(self, step: int) -> None:
        """Note that ``step`` steps are safe."""
        if self._path is not None:
            self._session |= {"last_step": step, "seconds": round(time.time() - self._started, 2)}
            atomic_write(self._path / RUN_NAME, json.dumps(self._record, indent=2) + "\n")


def read_record(run_path: Path) -> dict[str, Any]:
    """A run's ``run.json``, empty where there is none or none that reads: runs are older than it."""
    record = read_json(run_path / RUN_NAME)
    return record if isinstance(record, dict) and _is_record(record) else {"sessions": []}


def _is_record(record: dict[str, Any]) -> bool:
    sessions = record.get("sessions")
    if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
        return False
    facts = [record.get(name, 0) for name in ("num_params", "flops_per_token")]
    numbers = [*facts, *(session.get("seconds", 0) for session in sessions)]
    return all(isinstance(number, int | float) and abs(number) < 1e30 for number in numbers)


def memory() -> dict[str, float]:
    """MiB that the process holds in the host's memory now, and its first device's at most so far, where they tell."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):
        found["host_mib"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found if peak is None else found | {"device_mib": peak / 2**20}
