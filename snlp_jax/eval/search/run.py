"""The search on a trained run."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from snlp_jax.config import Config, MeshConfig, SearchConfig
from snlp_jax.data.pipeline import TokenData, held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import load_fits
from snlp_jax.eval.evaluate import mean_depth
from snlp_jax.eval.run import open_run
from snlp_jax.eval.search.cost import CostModel, Parts, choose_probes, depth_cost, parts_of
from snlp_jax.eval.search.measure import Decode, Prefill, Quality, Reader, interleave
from snlp_jax.eval.search.race import FIRST_RUNG, Bounds, Race, Sums
from snlp_jax.eval.search.record import Found, Row
from snlp_jax.eval.search.space import DRAFT_LEN, Candidate, candidates_of, rule_of
from snlp_jax.eval.solver_file import SolverFile
from snlp_jax.io.provenance import circumstances
from snlp_jax.linearize import fingerprint, stored_calibrations
from snlp_jax.notation import parse_schedule
from snlp_jax.run import Which

SEED = 0
"""Of the order of the windows."""
PROBE_REPEATS = 9
LEAST_REPEATS = 9
LEAST_SLACK = 0.05
"""Predicted times are not trusted to less, whatever the fit says, ..."""
MOST_SLACK = 0.15
"""... nor less than this."""
MAX_ROUNDS = 48
"""Of leaders that the clock or fresh windows may refute before the search settles for what is lossless."""
NEW_TOKENS = 48
"""Decoded in one reading."""


class Search:
    """One search, measured on a run's checkpoint; :meth:`run` does it."""

    def __init__(self, run_dir: Path, config: Config, search: SearchConfig, which: Which):
        if config.eval.mesh != MeshConfig():
            raise InputError("--search measures on one device; leave out --mesh.")
        if config.eval.weights != "compute":
            what = f"--weights {config.eval.weights}"
            raise InputError(f"--search measures weights in the compute dtype; leave out {what}.")
        candidates_of(config.model, search)  # a bad size should not wait for the corpus
        evaluation = dataclasses.replace(config.eval, solvers=("seq",), calibrations=())
        opened = open_run(run_dir, dataclasses.replace(config, eval=evaluation), which)
        self.model, self.params, self.about = opened.model, opened.params, opened.about
        self.config, self.search = config, search
        self.fingerprint = fingerprint(opened.params)
        calibrations = stored_calibrations(run_dir, self.fingerprint)
        self.candidates = candidates_of(config.model, search, calibrations)
        schedules = [candidate.schedule for candidate in self.candidates]
        drafters = [c.speculate for c in self.candidates if c.speculate not in ("", "mtp")]
        schedules += [parse_schedule(text, config.model.num_layers) for text in drafters]
        self.fits = load_fits(run_dir, opened.params, schedules)
        windows = shuffled_windows(opened.data, config.model.seq_len, 2 * config.eval.num_windows)
        self.num_windows = (len(windows["tokens"]) + 1) // 2
        """To choose on; the others confirm."""
        if len(windows["tokens"]) - self.num_windows < 2:
            raise InputError(
                f"a search needs at least 4 held-out windows, but there are {len(windows['tokens'])} of "
                f"{config.model.seq_len} tokens with eval.num_windows {config.eval.num_windows}; give more."
            )
        batch_size = min(config.eval.batch_size, FIRST_RUNG)
        self.quality = Quality(opened.model, opened.params, windows, batch_size, self.fits)
        self.iterations: dict[int, list[float]] = {}
        """Made on average in each region of candidates that stop by themselves."""
        self.seen_ms: list[tuple[Parts, float]] = []
        """What the cost model is fitted to."""
        self.readers: dict[Any, Reader] = {}
        self.clock = self._clock(windows["tokens"])
        self.cost_model: CostModel | None = None
        self.slack = 0.0
        self.twin = ""
        """Layout of the sequential pass's fair twin."""
        self.console = Console(stderr=True)

    def run(self) -> Found:
        """Costs, race, timing again, confirmation; until the cheapest stands."""
        began, alpha = time.perf_counter(), 1 - self.search.confidence
        costs, slack = self._costs()
        race = Race(self.candidates, costs, self.search.limit, alpha=alpha, num_windows=self.num_windows, slack=slack)
        self.slack, self.race, self.times_ms, attempt = slack, race, dict[int, np.ndarray](), 0
        with self.console.status("searching") as status:

            def measure(index: int, start: int, stop: int) -> tuple[Sums, float | None]:
                status.update(f"{self.candidates[index].name}: windows {start} to {stop}; {len(race.sums)} measured")
                sums, made = self.quality.measure(self.candidates[index].schedule, start, stop)
                return sums, self._observe(index, made, len(sums.total_W), start)

            for _ in range(MAX_ROUNDS):
                standing = race.run(measure)
                status.update("timing the leaders")
                winner = self._lead(standing)
                if winner is None or race.next() is not None:
                    continue  # the clock may have let others back in
                confirmed = self._confirm(winner, alpha / 2 / ((attempt + 1) * (attempt + 2)))  # in all alpha / 2
                if confirmed is None or confirmed.high <= self.search.limit:
                    break
                race.refuted.add(winner)
                attempt += 1
            else:
                lossless = [i for i, candidate in enumerate(self.candidates) if candidate.is_lossless]
                winner = min(lossless, key=lambda index: race.costs[index])
                confirmed = None
                self._time([0, winner])
        return self._found(winner, confirmed, time.perf_counter() - began)

    # -- Costs ---------------------------------------------------------------------------------------------------------

    def _clock(self, tokens_WT: np.ndarray) -> Prefill | Decode | None:
        config, objective = self.config, self.search.objective
        if objective == "depth":
            return None
        of: tuple = (self.model, self.params, self.fits)
        batch_size = config.eval.timing_batch
        if objective == "prefill":
            seq_len = config.eval.timing_len or config.model.seq_len
            if seq_len > config.model.max_context:
                raise InputError(
                    f"eval.timing_len takes {seq_len} tokens, but the model reads {config.model.max_context} at most; "
                    "lower it."
                )
            return Prefill(*of, batch_size=batch_size, seq_len=seq_len, windows=tokens_WT[: self.num_windows])
        prompt_len = max(1, min(config.eval.greedy_prompt_len or 64, tokens_WT.shape[1] - 1))
        num_tokens = min(NEW_TOKENS, config.model.max_context - prompt_len)
        prompts = tokens_WT[: self.num_windows, :prompt_len]
        return Decode(*of, batch_size=batch_size, prompts=prompts, num_tokens=num_tokens)

    def _costs(self) -> tuple[list[float], float]:
        """Of every candidate, and how far they may be off."""
        if self.clock is None:
            return list(map(self._cost, range(len(self.candidates)))), 0.0
        solvers = [index for index, candidate in enumerate(self.candidates) if not candidate.speculate]
        drafters = [index for index, candidate in enumerate(self.candidates) if candidate.speculate]
        parts = [parts_of(self.candidates[i].schedule, self._iterations(i)) for i in solvers]
        all_parts = [parts_of(self.candidates[i].schedule) for i in solvers]
        fixed = [place for place, i in enumerate(solvers) if not self.candidates[i].tolerance]
        probes = [fixed[place] for place in choose_probes([all_parts[place] for place in fixed])]
        readers = [self._reader(0, layout) for layout in ("stack", "list")]
        readers += [self._reader(solvers[place]) for place in probes[1:]]
        with self.console.status("timing probes"):
            readers += [self._reader(index) for index in drafters]
            medians = np.median(interleave(readers, PROBE_REPEATS), axis=0)
        by_layout = dict(zip(("stack", "list"), map(float, medians[:2]), strict=True))
        self.twin = min(by_layout, key=lambda layout: by_layout[layout])
        seen = [by_layout[self.clock.auto_layout], *map(float, medians[2 : 1 + len(probes)])]
        self.seen_ms = list(zip((all_parts[place] for place in probes), seen, strict=True))
        self.cost_model = CostModel.fit(*zip(*self.seen_ms, strict=True))
        costs = dict(zip(solvers, map(self.cost_model.predict, parts), strict=True))
        costs |= dict(zip(drafters, map(float, medians[1 + len(probes) :]), strict=True))
        costs[0] = by_layout[self.twin]
        slack = min(max(LEAST_SLACK, self.cost_model.error), MOST_SLACK)
        return [costs[index] for index in range(len(self.candidates))], slack

    def _reader(self, index: int, layout: Any = "auto") -> Reader:
        assert self.clock is not None
        key = index, layout
        if key not in self.readers:
            self.readers[key] = self.clock.reader(self.candidates[index], layout)
        return self.readers[key]

    def _observe(self, index: int, made: list[float], num_windows: int, seen: int) -> float | None:
        """Iterations of a candidate that stops by itself, and its cost with these."""
        candidate = self.candidates[index]
        if not candidate.tolerance:
            return None
        before = self.iterations.get(index, made)
        total = seen + num_windows
        its = [(a * seen + b * num_windows) / total for a, b in zip(before, made, strict=True)]
        self.iterations[index] = its
        for other, its_candidate in enumerate(self.candidates):
            if its_candidate.tolerance and other not in self.iterations:
                self.race.costs[other] = self._cost(other)
        return self.race.costs[index] if self.race.is_timed_P[index] else self._cost(index)

    def _cost(self, index: int) -> float:
        """Predicted, with what is known of iterations now."""
        schedule = self.candidates[index].schedule
        if self.clock is None:
            return depth_cost(schedule, self._mean_depth(index))
        assert self.cost_model is not None
        return self.cost_model.predict(parts_of(schedule, self._iterations(index)))

    def _iterations(self, index: int) -> list[float] | None:
        """Of each region: as measured; else the fewest that the same tolerance has led to, or one; None for all."""
        candidate = self.candidates[index]
        if index in self.iterations or not candidate.tolerance:
            return self.iterations.get(index)
        like = [
            min(made)
            for other, made in self.iterations.items()
            if (self.candidates[other].tolerance, self.candidates[other].num_iters)
            == (candidate.tolerance, candidate.num_iters)
        ]
        return [min(like, default=1.0)] * len(candidate.schedule.regions)

    def _mean_depth(self, index: int) -> float:
        schedule, made = self.candidates[index].schedule, self._iterations(index)
        return schedule.depth if made is None else mean_depth(schedule, [np.asarray(each) for each in made])

    # -- The end -------------------------------------------------------------------------------------------------------

    def _lead(self, standing: list[int]) -> int | None:
        """The first of the standing candidates: by the clock, where time is what counts, once all of them were timed;
        None before.

        A machine may have become slower or faster since the costs were measured: what is timed now counts by its
        ratio to the sequential pass of the same rounds. The cost model learns from it for those that were not timed.
        """
        if self.clock is None:
            return standing[0]
        race = self.race
        fresh = [index for index in standing if not race.is_timed_P[index]]
        leaders = (fresh or standing)[: self.search.finalists]
        self._time(list(dict.fromkeys([0, *leaders])))
        for index in leaders:
            race.costs[index] = float(np.median(self.times_ms[index] / self.times_ms[0])) * race.costs[0]
            race.is_timed_P[index] = True
            if not self.candidates[index].is_lossless:
                parts = parts_of(self.candidates[index].schedule, self._iterations(index))
                self.seen_ms.append((parts, float(race.costs[index])))
        self.cost_model = CostModel.fit(*zip(*self.seen_ms, strict=True))
        for index in map(int, np.flatnonzero(~race.is_timed_P)):
            race.costs[index] = self._cost(index)
        return None if fresh else min(leaders, key=lambda index: (race.costs[index], index))

    def _time(self, indices: list[int]) -> None:
        """Interleaved, all again, so that they can be compared."""
        if self.clock is None:
            return
        readers = [self._reader(index, self.twin if index == 0 else "auto") for index in indices]
        times_ms = interleave(readers, max(self.config.eval.timing_repeats, LEAST_REPEATS))
        self.times_ms = {index: times_ms[:, place] for place, index in enumerate(indices)}

    def _confirm(self, winner: int, alpha: float) -> Bounds | None:
        """On windows that nothing was chosen by; None where there is nothing to confirm."""
        if self.candidates[winner].is_lossless:
            return None
        total = len(self.quality.windows["tokens"])
        sums, _ = self.quality.measure(self.candidates[winner].schedule, self.num_windows, total)
        return sums.bounds(alpha)

    def _found(self, winner: int, confirmed: Bounds | None, seconds: float) -> Found:
        race, search = self.race, self.search
        alpha = 1 - search.confidence
        statuses: list[str] = [*race.statuses()]
        statuses[winner] = "winner"
        rows, ms_now = [], 1.0
        if self.clock is not None:
            ms_now = float(np.median(self.times_ms[0]) / race.costs[0])
        for index, candidate in enumerate(self.candidates):
            sums = race.sums.get(index)
            bounds = Bounds(0.0, 0.0, 0.0) if candidate.is_lossless else sums.bounds(alpha / 2) if sums else None
            mean = self._mean_depth(index)
            rows.append(
                Row(
                    candidate.name,
                    statuses[index],
                    candidate.schedule.depth,
                    mean,
                    candidate.schedule.num_block_evals,
                    mean if self.clock is None else float(race.costs[index]) * ms_now,
                    self.clock is None or bool(race.is_timed_P[index]),
                    len(sums.total_W) if sums else 0,
                    bounds.change if bounds else None,
                    (bounds.low, bounds.high) if bounds else None,
                )
            )
        chosen = self.candidates[winner]
        tokens = self.quality.windows["tokens"]
        about = circumstances() | {
            "objective": search.objective,
            "cost": "depth, dependent block evaluations" if self.clock is None else self.clock.what,
            "limit": search.limit,
            "confidence": search.confidence,
            "dtype": jnp.dtype(self.model.dtype).name,
            "seed": SEED,
        }
        measured = about | {"checkpoint": self.about["checkpoint"], "step": self.about["step"]}
        measured |= {"num_windows": len(tokens) - self.num_windows if confirmed else 0}
        measured |= {"ppl_change": confirmed.change if confirmed else 0.0}
        measured |= {"ppl_interval": [confirmed.low, confirmed.high] if confirmed else [0.0, 0.0]}
        measured |= {"depth": rows[winner].mean_depth, "sequential_depth": rows[0].depth}
        if self.clock is not None:
            ratios = self.times_ms[0] / self.times_ms[winner]
            low, middle, high = map(float, np.quantile(ratios, (0.25, 0.5, 0.75)))
            measured |= {"speedup": middle, "speedup_quartiles": [low, high], "speedup_runs": len(ratios)}
            medians = [float(np.median(self.times_ms[index])) for index in (winner, 0)]
            measured |= {"ms": medians[0], "sequential_ms": medians[1], "twin": self.twin}
        solver = SolverFile(
            chosen.setting,
            self.config.model.num_layers,
            rule_of(chosen.schedule),
            chosen.speculate,
            draft_len(chosen, self.config) if chosen.speculate else 0,
            self.fingerprint,
            measured,
        )
        info = (
            self.about
            | about
            | {
                "num_windows": self.num_windows,
                "num_fresh_windows": len(tokens) - self.num_windows,
                "window_len": tokens.shape[1] - 1,
                "rungs": race.rungs,
                "slack": self.slack,
                "num_measured": len(race.sums),
                "cost_model": None if self.cost_model is None else dataclasses.asdict(self.cost_model),
                "seconds": seconds,
                "search": dataclasses.asdict(search),
            }
        )
        return Found(solver, tuple(rows), info)


def search_run(run_dir: Path, config: Config, search: SearchConfig, which: Which = "best") -> Found:
    """The cheapest setting of a run's checkpoint within the limit of ``search``.

    Raises:
        InputError: see :func:`snlp_jax.eval.run.open_run`; a mesh, kernels of eight bits, a region
            size larger than the model, too little text.
    """
    return Search(run_dir, config, search, which).run()


def shuffled_windows(data: TokenData, seq_len: int, num_windows: int) -> dict[str, np.ndarray]:
    """Held-out windows in random order: the first half to choose on, the second to confirm.

    They share no token as targets, but may be of one document.
    """
    batches = held_out_batches(data, seq_len=seq_len, batch_size=1, num_batches=num_windows)
    order = np.random.default_rng(SEED).permutation(len(batches))
    return {name: np.concatenate([batches[index][name] for index in order]) for name in batches[0]}


def draft_len(candidate: Candidate, config: Config) -> int:
    """Drafts a round that were timed."""
    return min(DRAFT_LEN, config.model.num_mtp_heads) if candidate.speculate == "mtp" else DRAFT_LEN
