"""Time of a decoded token: sequential, layer-parallel and self-speculative, by the same engine with the same cache.

    python benchmarks/decode.py                                        random weights: costs only
    python benchmarks/decode.py runs/demo --solvers idn:n=8,k=2 --drafters idn:n=8,k=1 exit:6
    python benchmarks/decode.py --shape d2048 --batches 1 --contexts 512 --drafters

Every arm is ``Engine.generate``, greedy, on the same prompts, its weights cast and laid out beforehand; the arms of a
cell (batch, context) run round robin after a warm-up that compiles. The fair twin is the faster of two sequential
engines, over a stack and over a list; a ratio is the twin's time of the same round over the arm's. Solvers keep their
cache by the rule last_eval. Adaptive speculation begins with what its warm-up has measured.

Bytes of a token: layer weights, as often as the layer is evaluated, the head, and those keys and values of the context
that the layer's window shows, each once a step whatever the batch; where a region stops by a tolerance, of all its
iterations. Of speculation: (verifications x those of the sequential pass + drafts x the drafter's + plain steps) / tokens
of a row, from the rounds that were made. They are set against the bandwidth of a copy, measured in the same run.

Cost model of speculation, measured in every cell: s(g) = v_W + c g seconds for g drafts and a verification of W + 1
tokens, W >= g the least width that is compiled, against p of a plain step of the twin. With drafts that are accepted
independently at rate a it gives (1 + a + ... + a^g) p / s(g) times the twin's speed.
"""

import copy
import dataclasses
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.speed import Dtype, ShapeArgs, header, made_up, measure_limits, out_path, random_params, work
from snlp_jax.config import EvalConfig, ModelConfig
from snlp_jax.data.pipeline import val_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.fidelity import greedy_matches
from snlp_jax.eval.run import open_run, read_config
from snlp_jax.infer.engine import Engine, Request, Statistics, check_settings
from snlp_jax.infer.pace import Pace
from snlp_jax.io.files import atomic_write
from snlp_jax.layout import Layout, check_schedule
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.solver import Schedule

COST_ROUNDS = 8
"""Steps or rounds in one reading of the cost model."""
WORTHWHILE = 1.15
"""Times the twin's speed for which the acceptance is told that it takes."""


@dataclass(frozen=True)
class Args(ShapeArgs):
    """Time decoding: sequential, layer-parallel and self-speculative."""

    run_dir: tyro.conf.Positional[str] = ""
    """A trained run, with prompts from its held-out text. Empty: random weights, whose speculation means nothing."""
    checkpoint: Literal["best", "last"] = "best"
    solvers: tuple[str, ...] = ("auto",)
    """Settings in the notation of snlp_jax/notation.py; auto: IDN over the last 3/4, K = 1 and 2, and over 1/4."""
    drafters: tuple[str, ...] = ("auto",)
    """The same; auto: IDN over the last 3/4, K = 1, and the first half of the layers."""
    draft_lens: tuple[int, ...] = (0, 2, 4, 8)
    """Drafts a round; 0 adapts the number."""
    layouts: tuple[Layout, ...] = ("auto",)
    """Of solvers and speculation; the sequential engines are always a stack and a list."""
    batches: tuple[int, ...] = (1, 4)
    contexts: tuple[int, ...] = (64, 512)
    new_tokens: int = 128
    dtype: Literal["auto"] | Dtype = "auto"
    """auto: float32 on a CPU, bfloat16 elsewhere."""
    repeats: int = 7
    time_budget: float = 1200.0
    """Seconds, shared out evenly over the cells, after which nothing new is compiled; the rest is listed as skipped."""
    out: str = ""
    """Empty: benchmarks/results/decode_DEVICE_DATE.json."""

    def __post_init__(self) -> None:
        if not (self.batches and self.contexts) or min(*self.contexts, *self.batches, self.repeats) < 1:
            raise InputError("batches, contexts and repeats must all be at least 1.")
        if self.new_tokens < 2:
            raise InputError(f"new_tokens is {self.new_tokens}; it must be at least 2, as the prefill makes the first.")
        if min(self.draft_lens, default=0) < 0:
            raise InputError("draft_lens must not be negative; 0 adapts the length.")


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

    statistics: Statistics
    text_BT: np.ndarray
    rounds: Counter[int]
    """Draft length -> rounds; 0 stands for plain steps."""

    @property
    def seconds(self) -> float:
        """Of a token of a row, without the prefill and the token that comes out of it."""
        return self.statistics.decode_seconds / (self.text_BT.shape[1] - 1)


@dataclass
class Arm:
    """One way to decode."""

    kind: Literal["seq", "solver", "speculate"]
    setting: str
    layout: Layout
    schedule: Schedule
    """Of plain steps, or of the drafter."""
    engine: RecordedEngine
    draft_len: int | None = None
    """0 adapts it; None does not speculate."""
    compile_s: dict[str, float] = field(default_factory=dict)
    """Of what an arm before it has not compiled already."""
    runs: list[Run] = field(default_factory=list)

    @property
    def name(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kind", "setting", "layout", "draft_len")}

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Compile whatever may be needed, and run once."""
        engine, self.runs = self.engine, []
        engine.compiled.clear()
        if self.draft_len is not None:
            longest = engine.max_draft
            if self.draft_len == 0:
                state, programs = engine._prefill(requests)
                for length in range(longest + 1):
                    engine.pace = RecordedPace(longest, length)
                    state = engine._advance(programs, state, is_watched=True)
            engine.pace = RecordedPace(longest, self.draft_len or None)
        self.generate(requests)
        self.compile_s = dict(engine.compiled)

    def generate(self, requests: Sequence[Request]) -> Run:
        engine = self.engine
        if isinstance(engine.pace, RecordedPace):
            engine.pace.rounds.clear()
        completions, found = engine.generate(requests), engine.statistics
        # A pace of fixed length is told nothing; the prefill counts as a step.
        rounds = Counter(engine.pace.rounds) if self.draft_len == 0 else Counter({self.draft_len or 0: found.steps - 1})
        return Run(found, np.asarray([completion.tokens for completion in completions]), rounds)


@dataclass(frozen=True)
class Costs:
    """Seconds of speculation by one drafter, see the module."""

    plain: float
    verify: dict[int, float]
    """Width W -> v_W."""
    draft: float

    def ratio(self, acceptance: float, draft_len: int) -> float:
        verify = self.verify[min(width for width in self.verify if width >= draft_len)]
        tokens = sum(acceptance**index for index in range(draft_len + 1))
        return tokens * self.plain / (verify + self.draft * draft_len)

    def best(self, acceptance: float) -> tuple[int, float]:
        """The draft length of the highest ratio, and that ratio."""
        best = max(range(1, max(self.verify) + 1), key=lambda length: self.ratio(acceptance, length))
        return best, self.ratio(acceptance, best)

    def acceptance_for(self, ratio: float) -> float | None:
        """The least one that reaches ``ratio`` by some draft length; None where not even 1 does."""
        low, high = 0.0, 1.0
        if self.best(high)[1] < ratio:
            return None
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self.best(middle)[1] >= ratio else (middle, high)
        return high


def main(args: Args) -> dict[str, Any]:
    """Measure everything and return what the JSON file holds. The file is rewritten after each cell."""
    began, on_cpu = time.perf_counter(), jax.default_backend() == "cpu"
    config = read_config(Path(args.run_dir)) if args.run_dir else None
    dtype = ("float32" if on_cpu else "bfloat16") if args.dtype == "auto" else args.dtype
    shape = config.model if config else made_up(args)
    # cuDNN attention takes no float32.
    attention = "xla" if dtype == "float32" else shape.attention
    shape = dataclasses.replace(shape, compute_dtype=dtype, attention=attention)
    solvers, drafters = settings_of(args, shape)
    report = header(shape, dataclasses.asdict(args) | {"out": ""})
    fits, data = {}, None
    if config is None:
        model = LanguageModel(shape)
        params = random_params(model)
    else:
        evaluation = EvalConfig(solvers=(*solvers, *drafters) or ("seq",), greedy_tokens=0)
        run = open_run(Path(args.run_dir), dataclasses.replace(config, model=shape, eval=evaluation), args.checkpoint)
        model, params, fits, data = run.model, run.model.cast(run.params), run.fits, run.data
        report["run"] = run.about
    report["limits"][dtype] = limits = measure_limits(jnp.dtype(dtype), on_cpu)
    arms = make_arms(model, params, solvers, drafters, args, fits)
    out = out_path(args.out, "decode", report)
    console = Console(width=None if sys.stdout.isatty() else 160)
    cells = list(itertools.product(args.batches, args.contexts))
    for index, (batch, context) in enumerate(cells):
        where, share = {"batch": batch, "context": context}, args.time_budget / len(cells)
        deadline = began + share * (index + 1)
        if data is None:
            prompt_BT = np.random.default_rng(0).integers(0, shape.vocab_size, (batch, context))
        else:
            windows = val_batches(data, seq_len=context, batch_size=batch, num_batches=1)[0]
            prompt_BT = np.resize(windows[:, :-1], (batch, context))  # again from the start where the text is short
        requests = [Request(prompt.tolist(), args.new_tokens) for prompt in prompt_BT]
        alive = []
        for arm in arms:
            arm.engine.widths.clear()
        for arm in arms:
            if time.perf_counter() > deadline - share / 5:
                report["skipped"].append(where | arm.name)
                continue
            try:
                arm.warm_up(requests)
                alive.append(arm)
            except (RuntimeError, ValueError) as error:  # out of memory, or a kernel that refuses the shape
                report["failed"].append(where | arm.name | {"error": str(error).splitlines()[0][:300]})
        rounds(alive, args.repeats, deadline, lambda arm: arm.runs.append(arm.generate(requests)))  # noqa: B023
        cell = where | summarize(alive, shape, batch, context, limits["copy_bytes_per_s"], data is not None)
        twin = next((arm for arm in alive if arm.kind == "seq" and arm.layout == cell["twin"]), None)
        cell["costs"] = cost_rows(alive, twin, requests, args.repeats, deadline, data is not None) if twin else []
        report["cells"].append(cell)
        report["elapsed_s"] = round(time.perf_counter() - began, 1)
        report["load_average"]["end"] = os.getloadavg()[0]
        atomic_write(out, json.dumps(report, indent=1) + "\n")
        for table in (_table(cell, args.new_tokens), *([_cost_table(cell)] if cell["costs"] else [])):
            console.print(table)
    for who in report["skipped"] + report["failed"]:
        console.print("not measured:", *(value for value in who.values() if value is not None), markup=False)
    console.print(f"{report['elapsed_s']} s; wrote {out}", markup=False)
    return report


def settings_of(args: Args, config: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Solvers and drafters; a mistake is told before anything is measured."""
    L = config.num_layers
    most, quarter = max(1, round(0.75 * L)), max(1, L // 4)
    idn = (f"idn:n={most},k=1", f"idn:n={most},k={min(2, most)}", f"idn:n={quarter},k=1")
    solvers = tuple(dict.fromkeys(idn)) if args.solvers == ("auto",) else args.solvers
    drafters = (idn[0], *([f"exit:{L // 2}"] if L > 1 else [])) if args.drafters == ("auto",) else args.drafters
    parsed = {setting: parse_schedule(setting, L) for setting in (*solvers, *drafters)}
    for schedule in parsed.values():
        check_schedule(config, schedule)
    for setting in solvers:
        check_settings(parsed[setting], "last_eval", None, None, 0)
    for setting in drafters if args.draft_lens else ():
        check_settings(Schedule.of(L), "last_eval", parsed[setting], None, _longest(args))
    total = max(args.contexts) + args.new_tokens
    if total > config.max_context:
        raise InputError(
            f"a context of {max(args.contexts)} and {args.new_tokens} new tokens are {total}, more than the rotary "
            f"embedding's {config.max_context}; lower --contexts or --new-tokens."
        )
    return solvers, drafters if args.draft_lens else ()


def make_arms(
    model: LanguageModel, params: Any, solvers: Sequence[str], drafters: Sequence[str], args: Args, fits: Any = None
) -> list[Arm]:
    """Sequential engines, solvers, then every drafter at every length, which share an engine's programs."""
    parse: Callable[[str], Schedule] = lambda text: parse_schedule(text, model.config.num_layers)  # noqa: E731
    open_engine = lambda **settings: RecordedEngine(model, params, fits=fits, **settings)  # noqa: E731
    both: tuple[Layout, ...] = ("stack", "list")
    arms = [Arm("seq", "seq", layout, parse("seq"), open_engine(layout=layout)) for layout in both]
    for layout, text in itertools.product(args.layouts, solvers):
        arms.append(Arm("solver", text, layout, parse(text), open_engine(schedule=parse(text), layout=layout)))
    for layout, text in itertools.product(args.layouts, drafters):
        shared = open_engine(draft=parse(text), max_draft=_longest(args), layout=layout)
        for draft_len in args.draft_lens:
            engine = copy.copy(shared)
            engine.draft_len = draft_len or None
            arms.append(Arm("speculate", text, layout, parse(text), engine, draft_len))
    return arms


def _longest(args: Args) -> int:
    return max(args.draft_lens) or 8


def rounds(things: Sequence[Any], repeats: int, deadline: float, measure: Callable[[Any], None]) -> None:
    """Rounds over all things, every second one backwards; at least five, however late it is."""
    for index in range(repeats):
        if index >= 5 and time.perf_counter() > deadline:
            return
        for thing in things[:: -1 if index % 2 else 1]:
            measure(thing)


def summarize(
    arms: list[Arm], config: ModelConfig, batch: int, context: int, bytes_per_s: float, is_trained: bool
) -> dict[str, Any]:
    """Times, ratios to the fair twin, traffic, and how far the text is the twin's."""
    sequential = [arm for arm in arms if arm.kind == "seq"]
    twin = min(sequential, key=lambda arm: float(np.median([run.seconds for run in arm.runs])), default=None)
    rows = [_row(arm, twin, config, batch, context, bytes_per_s, is_trained) for arm in arms]
    return {"twin": twin.layout if twin else None, "arms": rows}


def _row(
    arm: Arm, twin: Arm | None, config: ModelConfig, batch: int, context: int, bytes_per_s: float, is_trained: bool
) -> dict[str, Any]:
    runs, num_steps = arm.runs, arm.runs[0].text_BT.shape[1] - 1
    seconds = np.asarray([run.seconds for run in runs])
    found = [run.statistics for run in runs]
    row = arm.name | {"runs": len(runs)} | _quartiles("ms_per_token", 1e3 * seconds)
    row |= {"min_ms_per_token": 1e3 * float(seconds.min()), "tokens_per_s": batch / float(np.median(seconds))}
    row |= {"ratio": None, "ratio_lower": None, "ratio_upper": None}
    if twin is not None:
        row |= _quartiles("ratio", [its.seconds / own.seconds for its, own in zip(twin.runs, runs, strict=True)])
    middle = context + num_steps // 2
    bytes_of = lambda schedule, length: step_bytes(config, schedule, batch, length, middle)  # noqa: E731
    exact = Schedule.of(config.num_layers)
    total = 0
    for length, count in sum((run.rounds for run in runs), Counter()).items():
        if length:
            total += count * (bytes_of(exact, length + 1) + length * bytes_of(arm.schedule, 1))
        else:
            total += count * bytes_of(exact if arm.kind == "speculate" else arm.schedule, 1)
    row["bytes_per_token"] = total / (len(runs) * num_steps)
    row["fraction_of_bandwidth"] = row["bytes_per_token"] / bytes_per_s / float(np.median(seconds))
    row |= {"weight_bytes": arm.engine.num_weight_bytes, "cache_bytes": arm.engine.num_cache_bytes}
    row |= _quartiles("prefill_ms", [1e3 * each.prefill_seconds for each in found]) | {"compile_s": arm.compile_s}
    row |= {"acceptance": None, "tokens_per_round": None, "ms_per_round": None, "rounds": None}
    if arm.kind == "speculate":
        num_rounds = np.asarray([sum(run.rounds.values()) for run in runs])
        tested, accepted = sum(each.tested for each in found), sum(each.accepted for each in found)
        row["acceptance"] = accepted / tested if tested else None
        row["tokens_per_round"] = float(np.mean(num_steps / num_rounds))
        row["ms_per_round"] = 1e3 * float(np.median(seconds * num_steps / num_rounds))
        row["rounds"] = {str(length): count for length, count in sorted(runs[-1].rounds.items())}
        if not is_trained:  # acceptance is that of noise
            kept = ("kind", "setting", "layout", "draft_len", "runs", "weight_bytes", "cache_bytes", "compile_s")
            kept += ("ms_per_round", "rounds", *(name for name in row if name.startswith("prefill")))
            row = {name: value if name in kept else None for name, value in row.items()}
    if arm.engine.schedule.regions:
        row["iterations_per_token"] = sum(each.iterations for each in found) / (len(runs) * batch * num_steps)
    return row | (_text(runs, twin.runs[-1].text_BT) if twin else {})


def _text(runs: list[Run], reference_BT: np.ndarray) -> dict[str, Any]:
    """Of the worst run: rows that differ from the reference, the first token that does, share of equal tokens."""
    matches = [greedy_matches(run.text_BT, reference_BT)[-1].match_rate for run in runs]
    worst = min(range(len(runs)), key=lambda index: matches[index])
    differs_BT = runs[worst].text_BT != reference_BT
    first = int(differs_BT.any(axis=0).argmax()) if differs_BT.any() else None
    return {
        "equal_tokens": matches[worst],
        "rows_different": int(differs_BT.any(axis=1).sum()),
        "first_difference": first,
    }


def _quartiles(name: str, values: Any) -> dict[str, float]:
    lower, median, upper = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {name: median, f"{name}_lower": lower, f"{name}_upper": upper}


def step_bytes(config: ModelConfig, schedule: Schedule, batch: int, num_tokens: int, context: int) -> int:
    """Bytes that an evaluation of ``num_tokens`` more tokens of every row must read: weights, keys and values."""
    num_bytes = work(config, schedule, batch, num_tokens)[0]
    pair = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(config.compute_dtype).itemsize
    for segment in schedule.segments:
        evals = segment.num_block_evals // segment.num_layers
        for window in config.windows[segment.start : segment.stop]:
            num_bytes += evals * batch * pair * min(window, context)
    return num_bytes


def cost_rows(
    arms: list[Arm], twin: Arm, requests: Sequence[Request], repeats: int, deadline: float, is_trained: bool
) -> list[dict[str, Any]]:
    """The cost model of every drafter, from the programs that are compiled, and what it predicts."""
    by_drafter: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        if arm.kind == "speculate" and arm.engine.widths:
            by_drafter.setdefault((arm.setting, arm.layout), []).append(arm)
    steps, readings = jnp.int32(COST_ROUNDS), {}
    state, programs = twin.engine._prefill(requests)
    run = twin.engine._compiled(programs, "decode", (twin.engine.weights, state, steps), donate=1)
    readings["plain"] = (run, (twin.engine.weights,), state, (steps,), [])
    for key, mine in by_drafter.items() if by_drafter else ():
        engine = mine[0].engine
        state, programs = engine._prefill(requests)
        for width in sorted(engine.widths):
            settings, head = {"max_draft": width}, (engine.weights, engine.exact)
            arguments = (*head, state, steps, jnp.int32(width))
            run = engine._compiled(programs, "speculate", arguments, settings, donate=2)
            for length in sorted({0, (width + 1) // 2, width}):
                readings[key, width, length] = (run, head, state, (steps, jnp.int32(length)), [])

    def read(reading: tuple) -> None:
        run, before, state, after, seconds = reading
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # the program takes it
        made = int(state.counts.steps)
        began = time.perf_counter()
        state = jax.block_until_ready(run(*before, state, *after))
        seconds.append((time.perf_counter() - began) / (int(state.counts.steps) - made))

    rounds([*readings.values()] if by_drafter else [], repeats, deadline, read)
    medians = {key: float(np.median(reading[-1])) for key, reading in readings.items() if reading[-1]}
    rows = []
    for key, mine in by_drafter.items():
        points = [(width, length, medians[key, width, length]) for who, width, length in _keys(medians) if who == key]
        costs, error = fit_costs(medians["plain"], points)
        row = {"setting": key[0], "layout": key[1], "plain_ms": 1e3 * costs.plain, "draft_ms": 1e3 * costs.draft}
        row |= {"verify_ms": {str(width): 1e3 * seconds for width, seconds in costs.verify.items()}}
        row |= {"fit_error": error, "points": [[width, length, 1e3 * seconds] for width, length, seconds in points]}
        tested = sum(run.statistics.tested for arm in mine for run in arm.runs) if is_trained else 0
        row |= {"acceptance": None, "best_draft_len": None, "predicted_ratio": None}
        if tested:
            row["acceptance"] = sum(run.statistics.accepted for arm in mine for run in arm.runs) / tested
            row["best_draft_len"], row["predicted_ratio"] = costs.best(row["acceptance"])
        rows.append(row | {"ratio_if_all_accepted": costs.best(1.0)[1], "worthwhile": WORTHWHILE})
        rows[-1]["acceptance_for_worthwhile"] = costs.acceptance_for(WORTHWHILE)
    return rows


def _keys(medians: dict[Any, float]) -> list[tuple]:
    return [key for key in medians if key != "plain"]


def fit_costs(plain: float, points: Sequence[tuple[int, int, float]]) -> tuple[Costs, float]:
    """s = v_W + c g by least squares through (W, g, s), and the largest relative error of it."""
    widths = sorted({width for width, _, _ in points})
    design = np.asarray([[*(float(width == each) for each in widths), length] for width, length, _ in points])
    seconds = np.asarray([each for _, _, each in points])
    *verify, draft = np.linalg.lstsq(design, seconds, rcond=None)[0]
    error = float(np.max(np.abs(design @ np.asarray([*verify, draft]) / seconds - 1)))
    return Costs(plain, dict(zip(widths, map(float, verify), strict=True)), max(float(draft), 0.0)), error


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(cell: dict[str, Any], new_tokens: int) -> Table:
    title = f"batch {cell['batch']}, context {cell['context']}, {new_tokens} new tokens; twin: seq {cell['twin']}"
    names = ("g", "ms/token", "quartiles", "tokens/s", "ratio", "quartiles", "of copy", "weights MB", "cache MB")
    names += ("accepted", "tokens/round", "ms/round", "text", "prefill ms", "compile s")
    table = Table("setting", "layout", *(Column(name, justify="right") for name in names), title=title)
    for arm in cell["arms"]:
        spread = [f"{_show(arm[f'{name}_lower'], form)}-{_show(arm[f'{name}_upper'], form)}" for name, form in
                  (("ms_per_token", ".2f"), ("ratio", ".2f"))]  # fmt: skip
        draft_len = "-" if arm["draft_len"] is None else str(arm["draft_len"] or "adapt")
        numbers = [draft_len, _show(arm["ms_per_token"], ".3f"), spread[0], _show(arm["tokens_per_s"], ".0f")]
        numbers += [_show(arm["ratio"], ".2f"), spread[1], _show(arm["fraction_of_bandwidth"], ".0%")]
        numbers += [f"{arm[name] / 1e6:.1f}" for name in ("weight_bytes", "cache_bytes")]
        numbers += [_show(arm["acceptance"], ".0%"), _show(arm["tokens_per_round"], ".2f")]
        same, text = arm.get("equal_tokens"), "-"
        if same is not None:
            text = "equal" if same == 1 else f"{same:.0%}, from {arm['first_difference']}"
        numbers += [_show(arm["ms_per_round"], ".3f"), text, f"{arm['prefill_ms']:.1f}"]
        table.add_row(arm["setting"], arm["layout"], *numbers, f"{sum(arm['compile_s'].values()):.1f}")
    return table


def _cost_table(cell: dict[str, Any]) -> Table:
    title = f"speculation, batch {cell['batch']}, context {cell['context']}: s(g) = v_W + c g, ms"
    names = ("p", "c", "v by W", "error", "accepted", "best g", "predicted", "if all accepted", f"for {WORTHWHILE}x")
    table = Table("drafter", "layout", *(Column(name, justify="right") for name in names), title=title)
    for row in cell["costs"]:
        verify = " ".join(f"{width}:{ms:.2f}" for width, ms in row["verify_ms"].items())
        numbers = [f"{row['plain_ms']:.3f}", f"{row['draft_ms']:.3f}", verify, f"{row['fit_error']:.0%}"]
        numbers += [_show(row["acceptance"], ".0%"), _show(row["best_draft_len"], "d")]
        numbers += [_show(row["predicted_ratio"], ".2f"), f"{row['ratio_if_all_accepted']:.2f}"]
        table.add_row(row["setting"], row["layout"], *numbers, _show(row["acceptance_for_worthwhile"], ".0%"))
    return table


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
