"""The search on a trained run.

Along a line of settings that differ in their number of layers alone, the perplexity grows with that number, and depth
and time change with it in one direction. So of every line one setting matters: the one with the most layers within the
limit, which bisection finds. A line with one iteration more keeps at least as many layers, so its bisection begins
there, or where it can first be cheaper than what stands already: what cannot, in depth and evaluations, is not
measured. Of what the lines give, those are timed (or for objective ``depth`` compared) that no other beats in both
depth and block evaluations. The fastest is confirmed on windows that nothing was chosen by; if they refute it, its line
falls back by one setting, and the rest is compared again.

That perplexity grows along a line is a guide, no theorem: a model may have been trained for one of the larger regions.
The limit itself rests on no guide: it is what the confirmation tests.

A setting is measured on 16, 32, 64, ... windows until its one-sided Student bounds lie on one side of the limit. The
last look spends half of alpha and the looks before it share the other half, so that a setting within the limit fails,
and one above it passes, with probability alpha at most (to the accuracy of Student's interval).
"""

import dataclasses
import itertools
import time
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from snlp_jax.config import Config, MeshConfig, SearchConfig
from snlp_jax.data.pipeline import held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import load_fits
from snlp_jax.eval.fidelity import mean_cost
from snlp_jax.eval.frontier import pareto_front
from snlp_jax.eval.run import open_run
from snlp_jax.eval.search.clock import Clock
from snlp_jax.eval.search.quality import EXACT, Bounds, Measured, Quality
from snlp_jax.eval.search.record import Found, Row
from snlp_jax.eval.search.space import Candidate, Line, lines_of, lossless_of
from snlp_jax.eval.solver_file import SolverFile
from snlp_jax.eval.timing import LAYOUTS, interleave
from snlp_jax.io.progress import Progress
from snlp_jax.io.provenance import circumstances
from snlp_jax.layout import Layout, canonical
from snlp_jax.linearize import fingerprint, stored_calibrations
from snlp_jax.linearize.store import FOLDER
from snlp_jax.run import Which

SEED = 0
"""Of the order of the windows."""
FIRST_RUNG = 16
"""Windows of the first look."""
LEAST_REPEATS = 9
LEAST_SECONDS = 1.0
"""Of a timing."""


class Search:
    """The search for the cheapest setting of a run's checkpoint within the limit of ``search``; :meth:`run` does it.

    Raises:
        InputError: see :func:`snlp_jax.eval.run.open_run`; a mesh, kernels of eight bits, a region size larger than
            the model, too little text.
    """

    def __init__(self, run_dir: Path, config: Config, search: SearchConfig, which: Which = "best"):
        if config.eval.mesh != MeshConfig():
            raise InputError("--search measures on one device; leave out --mesh.")
        if config.eval.weights != "compute":
            what = f"--weights {config.eval.weights}"
            raise InputError(f"--search measures weights in the compute dtype; leave out {what}.")
        lines_of(config.model, search, {})  # a bad size should not wait for the corpus
        evaluation = dataclasses.replace(config.eval, solvers=("seq",), calibrations=())
        has_fits = any((run_dir / FOLDER).glob("*.npz"))  # which the space may hold
        opened = open_run(run_dir, dataclasses.replace(config, eval=evaluation), which, has_fits=has_fits)
        self.config, self.search, self.about = config, search, opened.about
        self.fingerprint = fingerprint(opened.params)
        self.lines = lines_of(config.model, search, stored_calibrations(run_dir, self.fingerprint))
        self.lossless = lossless_of(config.model, search)
        self.candidates = [*self.lossless, *(each for line in self.lines for each in line.candidates)]
        fits = load_fits(run_dir, opened.params, [each.schedule for each in self.candidates])
        params = canonical(opened.model, opened.params)  # one copy for all candidates
        seq_len = config.eval.window_len(config.model)
        batches = held_out_batches(opened.data, seq_len=seq_len, batch_size=1, num_batches=2 * config.eval.num_windows)
        total = len(batches)
        order = np.random.default_rng(SEED).permutation(total)
        windows = {name: np.concatenate([batches[index][name] for index in order]) for name in batches[0]}
        self.num_windows = (total + 1) // 2
        """To choose on; the others confirm. They share no token as targets, but may be of one document."""
        if total - self.num_windows < 2:
            raise InputError(
                f"a search needs at least 4 held-out windows, but there are {total} of {seq_len} tokens "
                f"with eval.num_windows {config.eval.num_windows}; give more."
            )
        self.quality = Quality(opened.model, params, windows, min(config.eval.batch_size, FIRST_RUNG), fits)
        texts_WT = windows["tokens"][: self.num_windows]
        self.clock: Clock | None = None
        if search.objective != "depth":
            self.clock = Clock(config, search.objective, opened.model, params, fits, texts_WT)
        self.measured: dict[Candidate, Measured] = {}
        self.status: dict[Candidate, str] = {}
        self.times_ms: dict[Candidate, np.ndarray] = {}
        """Of the last timing, interleaved."""

    def run(self) -> Found:
        """The lines, timing, confirmation; until the fastest stands."""
        began, alpha = time.perf_counter(), 1 - self.search.confidence
        with self.progress:
            standing = self._last_within()
            for attempt in range(1, len(self.candidates) + 1):  # each refutes one, and the sequential pass stands
                winner = self._fastest([*self.lossless, *(line.candidates[i] for line, i in standing.items())])
                confirmed = self._confirm(winner, alpha / 2 / (attempt * (attempt + 1)))  # in all alpha / 2
                if confirmed.high <= self.search.limit:
                    break
                self.status[winner] = "refuted"
                line = next(line for line, i in standing.items() if line.candidates[i] == winner)
                places = range(standing.pop(line) - 1, -1, -1)
                place = next((place for place in places if self._is_within(line.candidates[place])), None)
                standing |= {} if place is None else {line: place}
        return self._found(winner, confirmed, time.perf_counter() - began)

    @cached_property
    def progress(self) -> Progress:
        return Progress("searching", len(self.lines) + 2)

    # -- Quality -------------------------------------------------------------------------------------------------------

    def _last_within(self) -> dict[Line, int]:
        """Of every line that keeps within the limit, the place of its last candidate that does."""
        found: dict[Line, int] = {}
        most: dict[str, int] = {}
        for line in self.lines:
            self.progress.begin(line.candidates[-1].name)
            family, candidates = line.family or line.candidates[0].setting, line.candidates
            standing = [self.cost(other.candidates[i]) for other, i in found.items()]
            known = -1  # the last that is within as its family says, or gains nothing over what stands
            while known + 1 < len(candidates) and (
                candidates[known + 1].num_layers <= most.get(family, 0)
                or any(self._is_beaten(candidates[known + 1], cost) for cost in standing)
            ):
                known += 1
            low, high = known, len(candidates)
            while high - low > 1:
                middle = high - 1 if low == known and high == len(candidates) else (low + high) // 2  # the last first
                low, high = (middle, high) if self._is_within(candidates[middle]) else (low, middle)
            if low > known:
                found[line] = low
                most[family] = max(most.get(family, 0), candidates[low].num_layers)
        return found

    def _is_beaten(self, candidate: Candidate, cost: tuple[float, float]) -> bool:
        """Whether it cannot be cheaper than what costs so much, as few iterations as it may make."""
        depth, num_evals = candidate.least_cost
        if self.search.objective == "depth":
            return cost <= (depth, num_evals)
        return cost[0] <= depth and cost[1] <= num_evals

    def _is_within(self, candidate: Candidate) -> bool:
        """Whether it passes on the windows to choose on."""
        rungs = [FIRST_RUNG * 2**i for i in range(32) if FIRST_RUNG * 2**i < self.num_windows] + [self.num_windows]
        half = (1 - self.search.confidence) / 2
        for start, stop in itertools.pairwise([0, *rungs]):
            self.progress.step = f"{candidate.name} on {stop} windows"
            part = self.quality.measure(candidate.schedule, start, stop)
            self.measured[candidate] = self.measured[candidate].join(part) if start else part
            alpha = half if stop == self.num_windows else half / (len(rungs) - 1)
            low, _, high = self.measured[candidate].bounds(alpha)
            if low > self.search.limit or high <= self.search.limit:
                break
        within = high <= self.search.limit
        self.status[candidate] = "passed" if within else "failed" if low > self.search.limit else "undecided"
        return within

    def _confirm(self, winner: Candidate, alpha: float) -> Bounds:
        """On windows that nothing was chosen by."""
        if winner.is_lossless:
            return EXACT
        self.progress.step = f"confirming {winner.name}"
        return self.quality.measure(winner.schedule, self.num_windows, self.quality.num_windows).bounds(alpha)

    # -- Cost ----------------------------------------------------------------------------------------------------------

    def cost(self, candidate: Candidate) -> tuple[float, float]:
        """Dependent block evaluations and all of them, of an average sequence."""
        if candidate in self.measured:
            return mean_cost(candidate.schedule, self.measured[candidate].iterations)
        return float(candidate.schedule.depth), float(candidate.schedule.num_block_evals)

    def _fastest(self, candidates: list[Candidate]) -> Candidate:
        costs = [self.cost(candidate) for candidate in candidates]
        self.progress.begin("comparing what is within the limit")
        if self.clock is None:
            return candidates[min(range(len(candidates)), key=lambda i: costs[i])]
        front = [each for each, is_on in zip(candidates, pareto_front(costs), strict=True) if is_on]
        self.time([*self.lossless, *front])
        finalists = sorted(self.times_ms, key=self.ratio)[: self.search.finalists]
        self.time([self.lossless[0], *finalists])
        return min(finalists, key=self.ratio)

    @cached_property
    def twin(self) -> Layout:
        """That of the fair sequential pass: the faster one."""
        assert self.clock is not None
        readers = [self.clock.reader(self.lossless[0], layout) for layout in LAYOUTS]
        times_ms = interleave(readers, LEAST_REPEATS, least_seconds=LEAST_SECONDS)
        return LAYOUTS[int(np.median(times_ms, axis=0).argmin())]

    def time(self, candidates: list[Candidate]) -> None:
        """Interleaved, all again, so that they can be compared; the sequential pass is the first."""
        assert self.clock is not None
        layouts: dict[Candidate, Layout] = {candidate: "auto" for candidate in candidates}
        layouts[candidates[0]] = self.twin
        readers = [self.clock.reader(candidate, layout) for candidate, layout in layouts.items()]
        num_repeats = max(self.config.eval.timing_repeats, LEAST_REPEATS)
        times_ms = interleave(readers, num_repeats, least_seconds=LEAST_SECONDS)
        self.times_ms = dict(zip(layouts, times_ms.T, strict=True))

    def ratio(self, candidate: Candidate) -> float:
        """Time over that of the sequential pass in the same rounds: the machine may have changed its speed between."""
        return float(np.median(self.times_ms[candidate] / self.times_ms[self.lossless[0]]))

    # -- The record ----------------------------------------------------------------------------------------------------

    def _found(self, winner: Candidate, confirmed: Bounds, seconds: float) -> Found:
        config, search, clock = self.config, self.search, self.clock
        self.status[winner] = "winner"
        num_fresh = self.quality.num_windows - self.num_windows
        about = circumstances() | {
            "objective": search.objective,
            "cost": "depth, dependent block evaluations" if clock is None else clock.what,
            "limit": search.limit,
            "confidence": search.confidence,
            "dtype": jnp.dtype(self.quality.model.dtype).name,
            "seed": SEED,
        }
        measured = about | {
            "checkpoint": self.about["checkpoint"],
            "step": self.about["step"],
            "num_windows": 0 if winner.is_lossless else num_fresh,
            "ppl_change": confirmed.change,
            "ppl_interval": [confirmed.low, confirmed.high],
            "depth": self.cost(winner)[0],
            "sequential_depth": config.model.num_layers,
        }
        if clock is not None:
            times_ms, twin_ms = self.times_ms[winner], self.times_ms[self.lossless[0]]
            low, middle, high = map(float, np.quantile(twin_ms / times_ms, (0.25, 0.5, 0.75)))
            measured |= {"speedup": middle, "speedup_quartiles": [low, high], "speedup_runs": len(times_ms)}
            measured |= {"ms": float(np.median(times_ms)), "sequential_ms": float(np.median(twin_ms))}
            measured |= {"twin": self.twin}
        size, drafts = config.model.num_layers, (winner.speculate, winner.draft_len)
        solver = SolverFile(winner.setting, size, winner.rule, *drafts, self.fingerprint, measured)
        info = {
            "num_windows": self.num_windows,
            "num_fresh_windows": num_fresh,
            "window_len": self.quality.num_tokens,
            "num_measured": len(self.measured),
            "seconds": seconds,
            "search": dataclasses.asdict(search),
        }
        return Found(solver, tuple(map(self._row, self.candidates)), self.about | about | info)

    def _row(self, candidate: Candidate) -> Row:
        measured, timed = self.measured.get(candidate), self.times_ms.get(candidate)
        alpha = (1 - self.search.confidence) / 2
        bounds = EXACT if candidate.is_lossless else measured.bounds(alpha) if measured else None
        return Row(
            candidate.name,
            self.status.get(candidate, "passed" if candidate.is_lossless else "implied"),
            candidate.schedule.depth,
            self.cost(candidate)[0],
            candidate.schedule.num_block_evals,
            None if timed is None else float(np.median(timed)),
            len(measured.total_W) if measured else 0,
            bounds.change if bounds else None,
            (bounds.low, bounds.high) if bounds else None,
        )
