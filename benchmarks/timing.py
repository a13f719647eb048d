"""What the benchmarks of decoding share: engines that record what they did, and rounds over all that is timed."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from snlp_jax.infer.engine import Engine, Request, Statistics
from snlp_jax.infer.pace import Pace
from snlp_jax.layout import Layout
from snlp_jax.notation import Drafter

T = TypeVar("T")


class RecordedPace(Pace):
    """A pace that counts the rounds of every draft length; 0 stands for plain steps."""

    def __init__(self, max_draft: int, fixed: int | None = None) -> None:
        super().__init__(max_draft, fixed)
        self.rounds: Counter[int] = Counter()

    def report(self, draft_len: int, seconds: float, rounds: int, tested: int, accepted: int, tokens: int) -> None:
        self.rounds[draft_len] += rounds
        super().report(draft_len, seconds, rounds, tested, accepted, tokens)


class RecordedEngine(Engine):
    """An engine that remembers what it has compiled and how large its cache is; shallow copies share the programs."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.compiled: dict[str, float] = {}
        """Program, with the most drafts of a speculative one -> seconds."""
        self.widths: set[int] = set()
        """Most drafts of the speculative programs that were used."""
        self.num_cache_bytes = 0

    def _compiled(self, programs: Any, name: str, arguments: tuple, settings: Any = None, donate: Any = None) -> Any:
        before = self._compile_seconds
        run = super()._compiled(programs, name, arguments, settings, donate)
        if name == "speculate":
            self.widths.add(settings["max_draft"])
            name = f"{name} {settings['max_draft']}"
        if self._compile_seconds > before:
            self.compiled[name] = round(self._compile_seconds - before, 2)
        return run

    def _prefill(self, requests: Sequence[Request]) -> Any:
        state, programs = super()._prefill(requests)
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
    """0 adapts it; None does not speculate."""
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
            for length in range(engine.max_draft + 1):
                engine.pace = RecordedPace(engine.max_draft, length)
                state = engine._advance(programs, state, is_watched=True)
        if self.draft_len is not None:
            engine.pace = RecordedPace(engine.max_draft, self.draft_len or None)
        self.generate(requests)
        self.compile_s = dict(engine.compiled)

    def generate(self, requests: Sequence[Request]) -> Run:
        if self.draft_len == 0:
            self.engine.pace.rounds.clear()
        text_BT = np.asarray([completion.tokens for completion in self.engine.generate(requests)])
        found = self.engine.statistics
        fixed = Counter({self.draft_len or 0: found.steps})  # a pace of fixed length is told nothing
        rounds = Counter(self.engine.pace.rounds) if self.draft_len == 0 else fixed
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


def faster_rows(seconds: Mapping[tuple[int, Layout], Sequence[float]], what: str) -> dict[int, dict[str, Any]]:
    """Of everything that was timed in several layouts, in its faster one: median, quartiles, and ratio to the first of
    all of the same round."""
    rows: dict[int, dict[str, Any]] = {}
    twin: Sequence[float] | None = None
    for index in sorted({index for index, _ in seconds}):
        mine = {layout: times for (its, layout), times in seconds.items() if its == index}
        layout = min(mine, key=lambda each: float(np.median(mine[each])))
        twin = mine[layout] if twin is None else twin
        low, median, high = quartiles([1e3 * value for value in mine[layout]])
        low_ratio, ratio, high_ratio = quartiles([its / own for its, own in zip(twin, mine[layout], strict=True)])
        rows[index] = {
            f"{what}_ms": median,
            f"{what}_ms_quartiles": (low, high),
            f"{what}_layout": layout,
            f"{what}_ratio": ratio,
            f"{what}_ratio_quartiles": (low_ratio, high_ratio),
        }
    return rows


def first_line(error: Exception) -> str:
    """What a report says of what could not be measured."""
    return str(error).splitlines()[0][:300]
