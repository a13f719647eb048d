"""Time of a decoded token: sequential, layer-parallel and self-speculative, by the same engine with the same cache.

    python benchmarks/decode.py                                        random weights: costs only
    python benchmarks/decode.py runs/demo --solvers idn:n=8,k=2 --drafters idn:n=8,k=1 exit:6
    python benchmarks/decode.py --shape d2048 --batches 1 --contexts 512 --drafters

Every arm is ``Engine.generate``, greedy, its weights cast and laid out beforehand; the arms of a cell (batch, context)
run round robin after a warm-up that compiles, every round on other prompts. The fair twin is the faster of two
sequential engines, over a stack and over a list; a ratio is the twin's time of the same round over the arm's. Solvers
keep their cache by the rule last_eval. Adaptive speculation begins with what its warm-up has measured.

Bytes of a token: layer weights as often as the layer is evaluated (at most, where a region stops by a tolerance) and
the head, once a step whatever the batch, and of every row the keys and values that the layers' windows show. Of
speculation: (verifications x those of the sequential pass + drafts x the drafter's + plain steps) / tokens of a row,
from the rounds that were made; the heads of ``mtp`` read a matrix each and, once a round, the projection. They are set
against the bandwidth of a copy, measured in the same run.

The cost model of speculation (benchmarks/draft_costs.py) is measured in every cell.
"""

import copy
import dataclasses
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.draft_costs import fit_costs
from benchmarks.machine import Dtype, ShapeArgs, header, made_up, out_path, random_params, work
from benchmarks.timing import Arm, RecordedEngine, Run, first_line, quartiles, round_robin
from snlp_jax.checks import check_schedule
from snlp_jax.config import EvalConfig, MachineConfig, ModelConfig
from snlp_jax.data.pipeline import held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.run import open_run
from snlp_jax.infer import Drafting, Placement, Request
from snlp_jax.infer.bench import measure_limits
from snlp_jax.infer.rules import check_settings
from snlp_jax.io.files import atomic_write
from snlp_jax.layout import Layout
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_drafter, parse_schedule
from snlp_jax.run import read_config
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params

COST_ROUNDS = 8
"""Steps or rounds in one reading of the cost model."""


@dataclass(frozen=True)
class Args(ShapeArgs):
    """Time decoding: sequential, layer-parallel and self-speculative."""

    run_dir: tyro.conf.Positional[str] = ""
    """A trained run, with prompts from its held-out text. Empty: random weights, whose speculation means nothing."""
    checkpoint: Literal["best", "last"] = "best"
    solvers: tuple[str, ...] = ("auto",)
    """Settings in the notation of snlp_jax/notation.py; auto: IDN over the last 3/4, K = 1 and 2, and over 1/4."""
    drafters: tuple[str, ...] = ("auto",)
    """The same, or mtp for the model's heads; auto: IDN over the last 3/4, K = 1, and the first half of the layers."""
    draft_lens: tuple[int, ...] = (0, 1, 3, 7)
    """Drafts a round; 0: the usual number, and none while that is measured slower."""
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
            raise InputError("draft_lens must not be negative; 0 takes the usual length and may switch drafting off.")


def main(args: Args) -> dict[str, Any]:
    """Measure everything and return what the JSON file holds. The file is rewritten after each cell."""
    began, on_cpu, run_dir = time.perf_counter(), jax.default_backend() == "cpu", Path(args.run_dir)
    run_config = read_config(run_dir) if args.run_dir else None
    config = run_config.model if run_config else made_up(args)
    dtype = ("float32" if on_cpu else "bfloat16") if args.dtype == "auto" else args.dtype
    # cuDNN attention takes no float32.
    machine = MachineConfig(compute_dtype=dtype, attention="xla" if dtype == "float32" else "auto")
    solvers, drafters = settings_of(args, config)
    report = header(config, dataclasses.asdict(args) | {"out": ""})
    if run_config:
        by_layers = (setting for setting in drafters if setting not in ("mtp", "ngram"))
        evaluation = EvalConfig(solvers=("seq", *solvers, *by_layers), greedy_tokens=0)
        run_config = dataclasses.replace(run_config, machine=machine, eval=evaluation)
        model, params, _, data, _, fits, report["run"] = open_run(run_dir, run_config, args.checkpoint)
    else:
        model, data, fits = LanguageModel(config, machine), None, {}
        params = random_params(model)
    report["limits"][dtype] = measure_limits(jnp.dtype(dtype), on_cpu)
    arms = make_arms(model, model.cast(params), solvers, drafters, args, fits)
    out, console = out_path(args.out, "decode", report), Console(width=None if sys.stdout.isatty() else 170)
    cells = list(itertools.product(args.batches, args.contexts))
    for index, (batch, context) in enumerate(cells):
        where, share = {"batch": batch, "context": context}, args.time_budget / len(cells)
        deadline = began + share * (index + 1)
        if data is None:
            prompts = [np.random.default_rng(0).integers(0, config.vocab_size, (batch, context))]
        else:
            held_out = held_out_batches(data, seq_len=context, batch_size=batch, num_batches=args.repeats)
            windows = [rows["tokens"] for rows in held_out]
            # Again from the start where the text is short.
            prompts = [np.resize(window[:, :-1], (batch, context)) for window in windows]
        by_round = [[Request(prompt.tolist(), args.new_tokens) for prompt in prompt_BT] for prompt_BT in prompts]
        requests, alive = by_round[0], []
        for arm in arms:
            arm.engine.rounds.clear()
        for arm in arms:
            if time.perf_counter() > deadline - share / 5:
                report["skipped"].append(where | arm.name)
                continue
            try:
                arm.warm_up(requests)
                alive.append(arm)
            except (RuntimeError, ValueError) as error:  # out of memory, or a kernel that refuses the shape
                report["failed"].append(where | arm.name | {"error": first_line(error)})

        def measure(arm: Arm, index: int, by_round: list[list[Request]] = by_round) -> None:
            arm.runs.append(arm.generate(by_round[index % len(by_round)]))

        round_robin(alive, args.repeats, deadline, measure)
        twin = min((arm for arm in alive if arm.setting == "seq"), key=median_seconds, default=None)
        summary = Summary(
            config, batch, context, report["limits"][dtype]["copy_bytes_per_s"], twin, data is not None, dtype
        )
        cell = where | {"twin": twin.layout if twin else None, "arms": [summary.row(arm) for arm in alive]}
        cell["costs"] = measure_costs(alive, twin, requests, args.repeats, deadline, data is not None) if twin else []
        report["cells"].append(cell)
        report["elapsed_s"] = round(time.perf_counter() - began, 1)
        report["load_average"]["end"] = os.getloadavg()[0]
        atomic_write(out, json.dumps(report, indent=1) + "\n")
        console.print(_table(cell), _cost_table(cell) if cell["costs"] else "")
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
    for setting in solvers:
        schedule = parse_schedule(setting, L)
        check_settings(schedule, "last_eval")
        check_schedule(config, schedule)
    for setting in drafters:
        drafter, most = parse_drafter(setting, L), max(args.draft_lens, default=0) or None
        check_settings(Schedule.of(L), "last_eval", Drafting(drafter, most), config.num_mtp_heads)
        if isinstance(drafter, Schedule):
            check_schedule(config, drafter)
    total = max(args.contexts) + args.new_tokens
    if total > config.max_context:
        raise InputError(
            f"a context of {max(args.contexts)} and {args.new_tokens} new tokens are {total}, more than the rotary "
            f"embedding's {config.max_context}; lower --contexts or --new-tokens."
        )
    return solvers, drafters if args.draft_lens else ()


def make_arms(
    model: LanguageModel,
    params: Params,
    solvers: Sequence[str],
    drafters: Sequence[str],
    args: Args,
    fits: Mapping[str, Calibration],
) -> list[Arm]:
    """Sequential engines, solvers, then every drafter at every length, which share an engine's programs."""
    num_layers = model.config.num_layers

    def arm(setting: str, layout: Layout) -> Arm:
        schedule = parse_schedule(setting, num_layers)
        engine = RecordedEngine(model, params, schedule, placement=Placement(layout=layout), fits=fits)
        return Arm(setting, layout, schedule, engine)

    arms = [arm("seq", "stack"), arm("seq", "list")]
    arms += [arm(setting, layout) for layout in args.layouts for setting in solvers]
    for layout, setting in itertools.product(args.layouts, drafters):
        drafter = parse_drafter(setting, num_layers)
        shared = RecordedEngine(model, params, draft=drafter, placement=Placement(layout=layout), fits=fits)
        for draft_len in args.draft_lens:
            engine = copy.copy(shared)
            if draft_len:
                engine.draft_len = engine.max_draft = draft_len
                engine.may_switch = False
            arms.append(Arm(setting, layout, drafter, engine, draft_len))
    return arms


def median_seconds(arm: Arm) -> float:
    return float(np.median([run.seconds for run in arm.runs]))


@dataclass(frozen=True)
class Summary:
    """What the runs of a cell's arms say."""

    config: ModelConfig
    batch: int
    context: int
    copy_bytes_per_s: float
    twin: Arm | None
    is_trained: bool
    """Of random weights, the acceptance of drafts and all that follows from it are left out."""
    dtype: str = "float32"

    def row(self, arm: Arm) -> dict[str, Any]:
        """Times, ratios to the fair twin, traffic, and how far the text is the twin's."""
        runs, num_steps, seconds = arm.runs, arm.runs[0].text_BT.shape[1] - 1, median_seconds(arm)
        row = arm.name | {"runs": len(runs), "rounds": {str(g): n for g, n in sorted(runs[-1].rounds.items())}}
        row |= {"weight_bytes": arm.engine.num_weight_bytes, "cache_bytes": arm.engine.num_cache_bytes}
        row |= {"prefill_ms": 1e3 * float(np.median([run.statistics.prefill_seconds for run in runs]))}
        row |= {"compile_s": arm.compile_s}
        if self.twin is not None:
            row |= _text(runs, self.twin.runs)
        if any(region.tolerance > 0 for region in arm.engine.schedule.regions):
            iterations = sum(run.statistics.iterations for run in runs)
            row["iterations_per_token"] = iterations / (len(runs) * num_steps * self.batch)
        if arm.draft_len is not None:
            tokens_per_round = [num_steps / run.rounds.total() for run in runs]
            tested = sum(run.statistics.tested for run in runs)
            accepted = sum(run.statistics.accepted for run in runs)
            row["ms_per_round"] = 1e3 * float(
                np.median([n * run.seconds for n, run in zip(tokens_per_round, runs, strict=True)])
            )
            if not self.is_trained:
                return row
            row["acceptance"] = accepted / tested if tested else None
            row["tokens_per_round"] = float(np.mean(tokens_per_round))
        row |= _with_quartiles("ms_per_token", [1e3 * run.seconds for run in runs])
        row |= {"min_ms_per_token": 1e3 * min(run.seconds for run in runs), "tokens_per_s": self.batch / seconds}
        if self.twin is not None:
            pairs = zip(self.twin.runs, runs, strict=True)
            row |= _with_quartiles("ratio", [its.seconds / own.seconds for its, own in pairs])
        row["bytes_per_token"] = sum(map(self._bytes, itertools.repeat(arm), runs)) / (len(runs) * num_steps)
        return row | {"fraction_of_copy": row["bytes_per_token"] / self.copy_bytes_per_s / seconds}

    def _bytes(self, arm: Arm, run: Run) -> int:
        context = self.context + run.text_BT.shape[1] // 2

        def of(schedule: Schedule, length: int) -> int:
            return step_bytes(self.config, schedule, self.batch, length, context, self.dtype)

        exact, own = arm.engine.schedule, arm.schedule
        one = of(own, 1) if isinstance(own, Schedule) else 0
        drafts = lambda g: g * one if isinstance(own, Schedule) else heads_bytes(self.config, g, self.dtype)  # noqa: E731
        return sum(count * (of(exact, g + 1) + (drafts(g) if g else 0)) for g, count in run.rounds.items())


def _text(runs: list[Run], reference: list[Run]) -> dict[str, Any]:
    """Of all rounds: share of equal tokens, rows that differ from the reference, the first token that does."""
    differs_BT = np.concatenate([own.text_BT != its.text_BT for own, its in zip(runs, reference, strict=True)])
    first = int(differs_BT.any(axis=0).argmax()) if differs_BT.any() else None
    same, rows = 1 - float(differs_BT.mean()), int(differs_BT.any(axis=1).sum())
    return {"equal_tokens": same, "rows_different": rows, "first_difference": first}


def _with_quartiles(name: str, values: Sequence[float]) -> dict[str, float]:
    lower, median, upper = quartiles(values)
    return {name: median, f"{name}_lower": lower, f"{name}_upper": upper}


def step_bytes(
    config: ModelConfig, schedule: Schedule, batch: int, num_tokens: int, context: int, dtype: Any = "float32"
) -> int:
    """Bytes that an evaluation of ``num_tokens`` more tokens of every row must read: weights, keys and values."""
    num_bytes = work(config, schedule, batch, num_tokens, dtype)[0]
    pair = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    for segment in schedule.segments:
        evals = segment.num_block_evals // segment.num_layers
        windows = config.windows[segment.start : segment.stop]
        num_bytes += evals * batch * pair * sum(min(window, context) for window in windows)
    return num_bytes


def heads_bytes(config: ModelConfig, num_drafts: int, dtype: Any = "float32") -> int:
    """Bytes of weights that drafts by the model's heads must read."""
    D = config.embed_dim
    return (num_drafts * D * D + D * config.padded_vocab_size) * jnp.dtype(dtype).itemsize


def measure_costs(
    arms: list[Arm], twin: Arm, requests: Sequence[Request], repeats: int, deadline: float, is_trained: bool
) -> list[dict[str, Any]]:
    """The cost model of every drafter, from the programs that are compiled, and what it predicts."""
    by_drafter: dict[tuple[str, Layout], dict[int, RecordedEngine]] = defaultdict(dict)
    for arm in arms:
        if arm.draft_len is not None:
            by_drafter[arm.setting, arm.layout][arm.engine.max_draft] = arm.engine
    if not by_drafter:
        return []
    steps, engine, jobs, seconds = jnp.int32(COST_ROUNDS), twin.engine, {}, defaultdict(list)
    state, programs = engine._prefill(requests)
    run = engine._compiled(programs, "decode", (engine.weights, state, steps))
    jobs["plain"] = run, (engine.weights,), state, (steps,)
    for who, engines in by_drafter.items():
        for width, engine in sorted(engines.items()):
            state, programs = engine._prefill(requests)
            both = (engine.weights, engine.exact)
            run = engine._compiled(programs, "speculate", (*both, state, steps, jnp.int32(width)))
            for length in sorted({0, (width + 1) // 2, width}):
                jobs[who, width, length] = run, both, state, (steps, jnp.int32(length))

    def measure(key: Any, _: int) -> None:
        run, before, state, after = jobs[key]
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # the program takes it
        made, began = int(state.counts.steps), time.perf_counter()
        state = jax.block_until_ready(run(*before, state, *after))
        seconds[key].append((time.perf_counter() - began) / (int(state.counts.steps) - made))

    round_robin(list(jobs), repeats, deadline, measure)
    medians = {key: float(np.median(readings)) for key, readings in seconds.items()}
    plain, rows = medians.pop("plain"), []
    for who in by_drafter:
        points = [(width, length, s) for (whose, width, length), s in medians.items() if whose == who]
        costs, error = fit_costs(plain, points)
        row = {"setting": who[0], "layout": who[1], "plain_ms": 1e3 * costs.plain, "draft_ms": 1e3 * costs.draft}
        row |= {"verify_ms": {str(width): 1e3 * v for width, v in costs.verify.items()}, "fit_error": error}
        row |= {"points": [[width, length, 1e3 * s] for width, length, s in points]}
        row |= {"ratio_if_all_accepted": costs.best(1.0)[1], "acceptance_for_1.15x": costs.acceptance_for(1.15)}
        same = [arm for arm in arms if arm.draft_len is not None and (arm.setting, arm.layout) == who]
        mine = [run.statistics for arm in same for run in arm.runs]
        if is_trained and (tested := sum(each.tested for each in mine)):
            row["acceptance"] = sum(each.accepted for each in mine) / tested
            row["best_draft_len"], row["predicted_ratio"] = costs.best(row["acceptance"])
        rows.append(row)
    return rows


def _show(row: dict[str, Any], name: str, form: str) -> str:
    """The number, with its quartiles where there are any."""
    if row.get(name) is None:
        return "-"
    quartiles = [format(row[f"{name}_{end}"], form) for end in ("lower", "upper") if f"{name}_{end}" in row]
    return format(row[name], form) + (f" ({'-'.join(quartiles)})" if quartiles else "")


def _table(cell: dict[str, Any]) -> Table:
    title = f"batch {cell['batch']}, context {cell['context']}; twin: seq {cell['twin']}"
    names = ("g", "ms/token", "tok/s", "ratio", "of copy", "accept", "tok/rnd", "ms/rnd", "equal text")
    names += ("prefill", "weights MB", "cache", "compile s")
    columns: dict[str, Any] = {"title": title, "padding": (0, 0)}
    table = Table("setting", "layout", *(Column(name, justify="right") for name in names), **columns)
    formats = {"ms_per_token": ".2f", "tokens_per_s": ".0f", "ratio": ".2f", "fraction_of_copy": ".0%"}
    formats |= {"acceptance": ".0%", "tokens_per_round": ".2f", "ms_per_round": ".2f"}
    for arm in cell["arms"]:
        same = _show(arm, "equal_tokens", ".0%")
        same += f" from {arm['first_difference']}" if arm.get("rows_different") else ""
        sizes = [f"{arm[name] / 1e6:.1f}" for name in ("weight_bytes", "cache_bytes")]
        last = [same, f"{arm['prefill_ms']:.1f}", *sizes, f"{sum(arm['compile_s'].values()):.1f}"]
        draft_len = {None: "-", 0: "switch"}.get(arm["draft_len"], str(arm["draft_len"]))
        numbers = [_show(arm, name, form) for name, form in formats.items()]
        table.add_row(arm["setting"], arm["layout"], draft_len, *numbers, *last)
    return table


def _cost_table(cell: dict[str, Any]) -> Table:
    names = ("p ms", "c ms", "v ms by W", "fit error", "accepted", "best g", "predicted", "all accepted", "for 1.15x")
    table = Table(
        "drafter", "layout", *(Column(name, justify="right") for name in names), title="speculation: s(g) = v_W + c g"
    )
    formats = {"fit_error": ".0%", "acceptance": ".0%", "best_draft_len": "d", "predicted_ratio": ".2f"}
    formats |= {"ratio_if_all_accepted": ".2f", "acceptance_for_1.15x": ".0%"}
    for row in cell["costs"]:
        verify = " ".join(f"{width}:{ms:.2f}" for width, ms in row["verify_ms"].items())
        numbers = [_show(row, name, form) for name, form in formats.items()]
        table.add_row(
            row["setting"], row["layout"], f"{row['plain_ms']:.3f}", f"{row['draft_ms']:.3f}", verify, *numbers
        )
    return table


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
