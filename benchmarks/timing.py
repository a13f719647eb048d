"""What the benchmarks of decoding share: engines that record what they did, and rounds over all that is timed."""

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.errors import InputError
from snlp_jax.infer import Engine, Request, Statistics
from snlp_jax.infer.engine import CHUNK
from snlp_jax.infer.prefix import PrefixCache
from snlp_jax.infer.programs import Programs, State
from snlp_jax.layout import Layout
from snlp_jax.notation import Drafter

T = TypeVar("T")
GROUP = 4
"""Things that are timed together, beside the first."""


class RecordedEngine(Engine):
    """An engine that remembers what it has compiled and how large its cache is; shallow copies share the programs."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.compiled: dict[str, float] = {}
        """Program, with the most drafts of a speculative one -> seconds."""
        self.rounds: Counter[int] = Counter()
        """Draft length -> rounds, where drafting may be switched off; 0 stands for plain steps."""
        self.num_cache_bytes = 0

    @property
    def num_weight_bytes(self) -> int:
        """Of all arrays that are held, those of two layouts included."""
        leaves = jax.tree.leaves((self.weights, self.exact))
        return sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in leaves}.values())

    def _compiled(self, programs: Programs, name: str, arguments: tuple[Any, ...]) -> Any:
        before = self._compile_seconds
        run = super()._compiled(programs, name, arguments)
        if self._compile_seconds > before:
            full_name = f"{name} {programs.max_draft}" if name == "speculate" else name
            self.compiled[full_name] = round(self._compile_seconds - before, 2)
        return run

    def _run_steps(
        self, programs: Programs, state: State, steps: jax.Array, *, is_drafting: bool
    ) -> tuple[State, float]:
        if not self.may_switch:
            return super()._run_steps(programs, state, steps, is_drafting=is_drafting)
        before = int(state.counts.steps)
        state, seconds = super()._run_steps(programs, state, steps, is_drafting=is_drafting)
        self.rounds[self.draft_len if is_drafting else 0] += int(state.counts.steps) - before
        return state, seconds

    def _prefill(self, requests: Sequence[Request], kept: PrefixCache | None = None) -> Any:
        state, programs = super()._prefill(requests, kept)
        self.num_cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.rings))
        return state, programs


class Run(NamedTuple):
    """One call of :meth:`Engine.generate`."""

    seconds: float
    """Of a token of a row, without the prefill and the token that comes out of it."""
    statistics: Statistics
    text_BT: np.ndarray
    rounds: Counter[int]
    """Draft length -> rounds; 0 stands for plain steps."""


@dataclass
class Arm:
    """One way to decode."""

    setting: str
    layout: Layout
    schedule: Drafter
    """Of plain steps, or the drafter."""
    engine: RecordedEngine
    draft_len: int | None = None
    """0 takes the usual length and switches drafting off where that is slower; None does not speculate."""
    compile_s: dict[str, float] = field(default_factory=dict)
    """Of what an arm before it has not compiled already."""
    runs: list[Run] = field(default_factory=list)

    @property
    def name(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("setting", "layout", "draft_len")}

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Compile whatever may be needed, and run once."""
        engine, self.runs = self.engine, []
        engine.compiled.clear()
        if self.draft_len == 0:
            state, programs = engine._prefill(requests)
            for is_drafting in (True, False):
                state, _ = engine._run_steps(programs, state, jnp.int32(CHUNK), is_drafting=is_drafting)
        self.generate(requests)
        self.compile_s = dict(engine.compiled)

    def generate(self, requests: Sequence[Request]) -> Run:
        self.engine.rounds.clear()
        text_BT = np.asarray([completion.tokens for completion in self.engine.generate(requests)])
        found = self.engine.statistics
        assert found is not None
        rounds = Counter(self.engine.rounds) or Counter({self.draft_len or 0: found.steps})
        return Run(found.decode_seconds / (text_BT.shape[1] - 1), found, text_BT, rounds)


def round_robin(things: Sequence[T], repeats: int, deadline: float, measure: Callable[[T, int], None]) -> None:
    """Rounds over all things, counted from 0, every second one backwards; at least five, however late it is."""
    for index in range(repeats):
        if index >= 5 and time.perf_counter() > deadline:
            return
        for thing in things[:: -1 if index % 2 else 1]:
            measure(thing, index)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    lower, median, upper = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return lower, median, upper


def time_beside_first(
    num_things: int,
    layouts: Sequence[Layout],
    make: Callable[[int, Layout], T],
    seconds_of: Callable[[T, int], float],
    repeats: int,
) -> tuple[dict[int, dict[str, Any]], list[tuple[int, Layout, str]]]:
    """Thing -> the layout that is the faster for it, the median ratio of the first thing's time to its own in the same
    round, the quartiles of that, and milliseconds; and what could not be made, with the reason.

    A few things at once run round robin with the first, whose faster layout counts, and are then let go of: programs
    of all of them together are more than a process may map. Milliseconds are the first thing's median over all rounds
    divided by the ratio: the machine's speed changes between groups. There are no rows without the first thing.
    """
    rows: dict[int, dict[str, Any]] = {}
    failed: list[tuple[int, Layout, str]] = []

    def made(indices: Iterable[int]) -> dict[tuple[int, Layout], T]:
        things = {}
        for index in indices:
            for layout in layouts:
                try:
                    things[index, layout] = make(index, layout)
                except (RuntimeError, ValueError, InputError) as error:  # out of memory, or a layout it cannot have
                    failed.append((index, layout, first_line(error)))
        return things

    twins = made([0])
    if not twins:
        return {}, failed

    def timed(group: Sequence[int]) -> dict[tuple[int, Layout], list[float]]:
        things = twins | made(group)
        seconds: dict[tuple[int, Layout], list[float]] = {key: [] for key in things}
        round_robin(
            list(things), repeats, math.inf, lambda key, index: seconds[key].append(seconds_of(things[key], index))
        )
        return seconds

    twin_seconds: list[float] = []
    for start in range(1, num_things, GROUP):
        seconds = timed(range(start, min(start + GROUP, num_things)))
        gc.collect()
        fastest: dict[int, tuple[int, Layout]] = {}
        for key in sorted(seconds, key=lambda key: float(np.median(seconds[key]))):  # noqa: B023
            fastest.setdefault(key[0], key)
        twin_seconds += seconds[fastest[0]]
        for index, key in fastest.items():
            low, ratio, high = quartiles(np.divide(seconds[fastest[0]], seconds[key]).tolist())
            rows.setdefault(index, {"layout": key[1], "ratio": ratio, "ratio_quartiles": (low, high)})
    for row in rows.values():
        row["ms"] = 1e3 * float(np.median(twin_seconds)) / row["ratio"]
    return rows, failed


def first_line(error: Exception) -> str:
    """What a report says of what could not be measured."""
    return str(error).splitlines()[0][:300]
