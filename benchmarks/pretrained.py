"""What can be had from a trained model without training it: quality and time of every method, in one table.

    python benchmarks/pretrained.py runs/plain16
    python benchmarks/pretrained.py runs/llama --tasks arc_easy.jsonl --distances 256 1024 --layouts stack

    seq                  the sequential pass, the twin of all others
    nbl attention m      m attentions replaced by affine maps (snlp_jax/linearize); drop: the same ones left out
    ... by, greedy       the layers chosen by another measure or by chance, or one by one on the model so far
    nbl block m          m whole layers, each by one map; drop: the same ones left out (LLM-Drop)
    idn, sid             the solver on the last half of the layers, K = 1, 2
    cal                  the same with calibrated surrogates and initial trace, fitted to the states in closed form
    cal tuned            and tuned by the model's own output (snlp_jax/linearize/tune.py)
    nbl + cal            both: tuned surrogates of the linearised model
    pairs                layers two by two
    skip                 layers left out before the last

Perplexity and its paired bootstrap interval on held-out windows; multiple choice (``--tasks``); planted keys
(benchmarks/retrieval.py); ``prefill``, the whole forward of ``--prefill-len`` tokens with all logits; ``decode``, a
token of the cached engine behind ``--context`` tokens, by the rule last_eval; bytes of the cache. Weights are cast and
laid out beforehand, every method is compiled in the same layouts of which the faster counts, and a few at a time run
round robin beside the twin after a warm-up (benchmarks/timing.py): a ratio is the twin's time of the same round over
the method's, and milliseconds are the twin's median over it. Every method and layout holds weights of its own. Maps,
surrogates and choices of layers see training text alone. The file is written after each of the three measurements.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks.machine import header, out_path
from benchmarks.pretrained_report import calibrated_share, draw, mark_fronts, table_of
from benchmarks.retrieval import Probe, planted_keys
from benchmarks.timing import Arm, RecordedEngine, time_beside_first
from snlp_jax.cli.entry import run_entry
from snlp_jax.cli.linearize import draw_text
from snlp_jax.config import Config, LinearizeConfig, ModelConfig, TaskConfig
from snlp_jax.data.pipeline import TokenData, held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import fit_spec, parse_calibration
from snlp_jax.eval.perplexity import paired_interval, perplexity, relative_change, token_mean
from snlp_jax.eval.task_data import Task, load_tasks
from snlp_jax.eval.tasks import Outcome, compare_outcomes, score_choices
from snlp_jax.eval.text_model import Score, TextModel
from snlp_jax.forward import forward
from snlp_jax.infer import Placement, Request
from snlp_jax.io.files import atomic_write
from snlp_jax.layout import Layout, prepare
from snlp_jax.linearize.nbl import Candidate, apply, check_linearize, choose, linearize, measure
from snlp_jax.linearize.statistics import Batches, Branch, whole_layers
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.run import read_config, read_data, read_params
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params

T = TypeVar("T")

AUTO = (-1,)
"""A few sizes that go with the depth."""


@dataclass(frozen=True)
class Args:
    """Compare methods on a trained model."""

    run_dir: tyro.conf.Positional[Path]
    checkpoint: Literal["best", "last"] = "best"
    attention: tuple[int, ...] = AUTO
    """Numbers of replaced attentions."""
    blocks: tuple[int, ...] = AUTO
    """Numbers of replaced layers."""
    rank_by: Literal["heldout", "nmse_residual", "nmse", "cca"] = "heldout"
    skip_first: int = 0
    """Tokens of each window that no map is fitted to."""
    fit_tokens: int = 524_288
    """Of training text, for the maps."""
    calibration_tokens: int = 65_536
    tune_steps: int = 200
    """Of the tuned calibrations."""
    num_windows: int = 256
    batch_size: int = 16
    tasks: tuple[str, ...] = ()
    """Files of multiple choice, see snlp_jax/eval/task_data.py."""
    num_examples: int = 200
    distances: tuple[int, ...] = AUTO
    """Tokens between a planted key and the question for it."""
    num_keys: int = 64
    prefill_len: int = 512
    context: int = 512
    new_tokens: int = 64
    layouts: tuple[Layout, ...] = ("stack", "list")
    repeats: int = 9
    num_bootstrap: int = 2000
    quick: bool = False
    """A few methods at small sizes, for tests."""
    out: str = ""
    """Empty: benchmarks/results/pretrained_NAME_DEVICE_DATE.json."""
    plot: str = "docs/linearize.png"
    """Empty draws none."""

    def __post_init__(self) -> None:
        for name in ("fit_tokens", "num_windows", "batch_size", "num_keys", "prefill_len", "context", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1.")
        if self.new_tokens < 2:
            raise InputError(
                f"--new-tokens is {self.new_tokens}; it must be at least 2, as the prefill makes the first."
            )

    def sized(self, model: ModelConfig) -> "Args":
        """With numbers in place of AUTO, and small ones with ``quick``."""
        L, T, changes = model.num_layers, model.seq_len, {}
        if self.attention == AUTO:
            changes["attention"] = _distinct(L // 8, L // 4, 3 * L // 8, L // 2)
        if self.blocks == AUTO:
            changes["blocks"] = _distinct(L // 16, L // 8, L // 4)
        if self.distances == AUTO:
            reach = model.max_context - 128  # the other tokens are a key, its question and what stands before it
            changes["distances"] = _distinct(*(min(d, reach) for d in (T // 8, T // 4, T // 2, T - 64, 2 * T)))
        sized = dataclasses.replace(self, **changes)
        if not self.quick:
            return sized
        return dataclasses.replace(
            sized,
            attention=sized.attention[-1:],
            blocks=sized.blocks[-1:],
            distances=sized.distances[:1],
            fit_tokens=min(self.fit_tokens, 4096),
            calibration_tokens=min(self.calibration_tokens, 512),
            tune_steps=min(self.tune_steps, 1),
            num_windows=min(self.num_windows, 8),
            num_keys=min(self.num_keys, 4),
            prefill_len=min(self.prefill_len, 16),
            context=min(self.context, 8),
            new_tokens=min(self.new_tokens, 4),
            layouts=self.layouts[:1],
            repeats=1,
            num_bootstrap=20,
        )


@dataclass
class Method:
    """One way to evaluate the model, and what was found of it."""

    family: str
    name: str
    model: LanguageModel
    params: Params
    schedule: Schedule
    fits: dict[str, Calibration] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)


def main(args: Args) -> dict[str, Any]:
    """Measure everything and return what the JSON file holds."""
    began, config = time.perf_counter(), read_config(args.run_dir)
    args = args.sized(config.model)
    _check(args, config)
    tasks = load_tasks(TaskConfig(args.tasks, args.num_examples)) if args.tasks else ()
    data = read_data(args.run_dir, config)
    model = LanguageModel(config.model)
    sizes = {"batch_size": args.batch_size, "num_batches": -(-args.num_windows // args.batch_size)}
    windows = held_out_batches(data, seq_len=config.model.seq_len, **sizes)
    batches = [window["tokens"] for window in windows]
    probe = planted_keys(data.tokenizer, data.val, args.distances, args.num_keys, config.model.max_context)
    step, params = read_params(args.run_dir, model, args.checkpoint)
    report = header(config.model, dataclasses.asdict(args) | {"run_dir": str(args.run_dir)})
    report = {name: value for name, value in report.items() if name not in ("limits", "cells", "skipped")}
    report["run"] = {"name": config.name, "step": step, "corpus_hash": data.content_hash}
    out = out_path(args.out, f"pretrained_{config.name}", report)

    def write() -> None:
        report["methods"] = [{"family": each.family, "name": each.name} | each.row for each in methods]
        mark_fronts(report["methods"])
        report["calibrated_loss_share"] = calibrated_share(report["methods"])
        report["elapsed_s"] = round(time.perf_counter() - began, 1)
        report["load_average"]["end"] = os.getloadavg()[0]
        atomic_write(out, json.dumps(report, indent=1) + "\n")

    _say("fitting maps and surrogates")
    methods, report["candidates"] = make_methods(model, params, data, config, args)
    measure_quality(methods, batches, probe, tasks, data, args)
    write()
    report["failed"] += measure_prefill(methods, batches, args)
    write()
    prompts = [_prompts(batches, args.context, index) for index in range(args.repeats)]
    report["failed"] += measure_decoding(methods, prompts, args)
    write()
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table_of(report["methods"], args.distances, args.tasks))
    for name, share in report["calibrated_loss_share"].items():
        print(f"{name}, K = 2: {share:.2f} of what the better of idn and sid loses.")
    if args.plot:
        atomic_write(Path(args.plot), draw(report["methods"], f"{config.name}, {report['device']['kind']}"))
        print(f"wrote {args.plot}")
    print(f"{report['elapsed_s']} s; wrote {out}")
    return report


# -- Methods -----------------------------------------------------------------------------------------------------------


def make_methods(
    model: LanguageModel, params: Params, data: TokenData, config: Config, args: Args
) -> tuple[list[Method], list[dict[str, Any]]]:
    """All methods, the sequential pass first, and the table by which layers were chosen."""
    L, half = model.config.num_layers, max(model.config.num_layers // 2, 1)
    options = _options(args)
    fit, held_out, _ = draw_text(data, config, options)
    places: dict[Branch, Sequence[int]] = {"attention": whole_layers(model, "attention")}
    if not model.config.num_streams:
        places["block"] = whole_layers(model, "block")
    candidates = measure(model, params, fit, held_out, dict(places), options)
    sequential = Schedule.of(L)
    methods = [Method("sequential", "seq", model, params, sequential)]

    def replaced(branch: Branch, count: int, drop: bool = False) -> tuple[LanguageModel, Params]:
        chosen = choose(candidates, {branch: count}, options)
        return apply(model, params, candidates, chosen, drop=drop)

    for branch, counts in (("attention", args.attention), ("block", args.blocks if "block" in places else ())):
        for drop in (False, True):
            what = "drop" if drop else "nbl"
            for count in counts:
                own = replaced(branch, count, drop)  # type: ignore[arg-type]
                methods.append(Method(f"{what} {branch}", f"{what} {branch} {count}", *own, sequential))
    for text, own in _rankings(model, params, fit, held_out, candidates, args):
        methods.append(Method("nbl, ranking", text, *own, sequential))
    iterations = (min(2, half),) if args.quick else tuple(k for k in (1, 2) if k <= half)
    settings = [f"{name}:n={half},k={k}" for name in _corrections(model) for k in iterations]
    sizes = _distinct(*(n // 2 * 2 for n in (L // 4, half, 3 * L // 4)))
    settings += [f"pairs:n={n}" for n in (sizes[:1] if args.quick else sizes)]
    skips = [c for c in args.blocks if c < L - 1]
    settings += [f"skip:{L - 1 - c}-{L - 1}" for c in skips]
    for text in settings:
        family = text.partition(":")[0]
        methods.append(Method(family, text, model, params, parse_schedule(text, L)))
    linearised = [
        (f"nbl {count} + ", *replaced("attention", count)) for count in args.attention[: 1 if args.quick else 2]
    ]
    fits = [("", model, params, k, 0) for k in iterations] + [("", model, params, iterations[-1], args.tune_steps)]
    fits += [(*each, iterations[-1], args.tune_steps) for each in linearised]
    for prefix, its_model, its_params, k, steps in fits:
        about = f"fit:n={half},k={k},tokens={args.calibration_tokens},tune={steps}"
        calibration, _ = fit_spec(its_model, its_params, data, parse_calibration(about, L))
        schedule, family = parse_schedule(f"cal:n={half},k={k},init=cal,fit=fit", L), "cal tuned" if steps else "cal"
        name = f"{prefix}{family}:n={half},k={k}"
        its_family = f"nbl + {family}" if prefix else family
        methods.append(Method(its_family, name, its_model, its_params, schedule, {"fit": calibration}))
    return methods, [each.row() for each in candidates]


def _rankings(
    model: LanguageModel,
    params: Params,
    fit: Batches,
    held_out: Batches,
    candidates: Sequence[Candidate],
    args: Args,
) -> Iterator[tuple[str, tuple[LanguageModel, Params]]]:
    """One number of attentions, otherwise chosen: by other measures, by chance, or one by one on the model so far."""
    for count in args.attention[:2][-1:]:
        options = _options(args, attention=count, blocks=0)
        for rank_by in ("random",) if args.quick else ("cca", "nmse", "random"):
            chosen = choose(candidates, {"attention": count}, dataclasses.replace(options, rank_by=rank_by))
            yield f"nbl attention {count} by {rank_by}", apply(model, params, candidates, chosen)
        made = linearize(model, params, fit, held_out, dataclasses.replace(options, greedy=True))
        yield f"nbl attention {count} greedy", (made.model, made.params)


def _options(args: Args, **fields: int) -> LinearizeConfig:
    chosen = {"attention": max(args.attention, default=0), "blocks": max(args.blocks, default=0), **fields}
    return LinearizeConfig(**chosen, rank_by=args.rank_by, tokens=args.fit_tokens, skip_first=args.skip_first)


def _check(args: Args, config: Config) -> None:
    """Refuse what would fail only after a long time."""
    model = LanguageModel(config.model)
    if args.attention:
        check_linearize(model, _options(args, blocks=0))
    if args.blocks and not config.model.num_streams:
        check_linearize(model, _options(args, attention=0))
    longest = max(args.prefill_len, args.context + args.new_tokens)
    if longest > config.model.max_context:
        raise InputError(f"{longest} tokens are timed, but the model reads {config.model.max_context}; lower them.")


def _corrections(model: LanguageModel) -> tuple[str, ...]:
    return ("idn", "hcn") if model.config.num_streams else ("idn", "sid") if model.config.use_x0_resid else ("idn",)


# -- Quality -----------------------------------------------------------------------------------------------------------


def measure_quality(
    methods: Sequence[Method],
    batches: Sequence[np.ndarray],
    probe: Probe,
    tasks: Sequence[Task],
    data: TokenData,
    args: Args,
) -> None:
    """Perplexity, planted keys and tasks of every method beside the first."""
    reference: tuple[np.ndarray, list[Score], list[Outcome]] | None = None
    for method in methods:
        _say(f"quality of {method.name}")
        settings: dict[str, Any] = {"batch_size": args.batch_size, "fits": method.fits}
        text_model = TextModel(method.model, method.params, data.tokenizer, method.schedule, **settings)
        nll_WT = np.concatenate([np.asarray(text_model.token_fn(windows)[0]) for windows in batches])
        keys = text_model.score(probe.all_spans)
        outcomes = [score_choices(text_model.log_likelihoods, task) for task in tasks]
        reference = reference or (nll_WT, keys, outcomes)
        method.row |= {
            "nll": token_mean(nll_WT),
            "ppl": perplexity(nll_WT),
            "ppl_change": relative_change(nll_WT, reference[0]),
            "ppl_interval": paired_interval(nll_WT, reference[0], num_bootstrap=args.num_bootstrap),
            "retrieval": probe.report(keys, reference[1], args.num_bootstrap),
            "tasks": {
                task.name: {
                    rule: dataclasses.asdict(found)
                    for rule, found in compare_outcomes(mine, its, args.num_bootstrap)[0].items()
                }
                for task, mine, its in zip(tasks, outcomes, reference[2], strict=True)
            },
            "depth": method.schedule.depth,
        }


# -- Time --------------------------------------------------------------------------------------------------------------


def measure_prefill(methods: Sequence[Method], batches: Sequence[np.ndarray], args: Args) -> list[dict[str, Any]]:
    """Milliseconds of a compiled forward pass; what could not be compiled."""
    tokens_BT = np.resize(batches[0][0, :-1], (1, args.prefill_len)).astype(np.int32)

    def compiled(method: Method, layout: Layout) -> tuple[Any, Any]:
        settings: dict[str, Any] = {"num_tokens": tokens_BT.size, "layout": layout, "fits": method.fits}
        weights = prepare(method.model, method.params, method.schedule, **settings)
        whole = jax.jit(lambda weights, tokens: forward(method.model, weights, tokens).logits_BTV)
        run = whole.lower(weights, tokens_BT).compile()
        jax.block_until_ready(run(weights, tokens_BT))
        return run, weights

    def seconds_of(call: tuple[Any, Any], _: int) -> float:
        run, weights = call
        began = time.perf_counter()
        jax.block_until_ready(run(weights, tokens_BT))
        return time.perf_counter() - began

    return _timed("prefill", methods, args, compiled, seconds_of)


def measure_decoding(methods: Sequence[Method], prompts: Sequence[list[int]], args: Args) -> list[dict[str, Any]]:
    """Milliseconds of a token by the cached engine, and the bytes of its cache; what could not be compiled."""
    by_round = [[Request(prompt, args.new_tokens)] for prompt in prompts]

    def warm(method: Method, layout: Layout) -> Arm:
        engine = RecordedEngine(
            method.model, method.params, method.schedule, placement=Placement(layout=layout), fits=method.fits
        )
        arm = Arm(method.name, layout, method.schedule, engine)
        arm.warm_up(by_round[0])
        method.row["cache_bytes"] = engine.num_cache_bytes
        return arm

    return _timed("decode", methods, args, warm, lambda arm, index: arm.generate(by_round[index]).seconds)


def _timed(
    what: str,
    methods: Sequence[Method],
    args: Args,
    make: Callable[[Method, Layout], T],
    seconds_of: Callable[[T, int], float],
) -> list[dict[str, Any]]:
    def made(index: int, layout: Layout) -> T:
        _say(f"{what} of {methods[index].name}, {layout}")
        return make(methods[index], layout)

    jax.clear_caches()  # programs of what was measured before
    rows, failed = time_beside_first(len(methods), args.layouts, made, seconds_of, args.repeats)
    for index, row in rows.items():
        methods[index].row |= {f"{what}_{name}": value for name, value in row.items()}
    return [{"name": methods[index].name, "layout": layout, "error": why} for index, layout, why in failed]


def _prompts(batches: Sequence[np.ndarray], context: int, index: int) -> list[int]:
    """Another piece of held-out text each round; again from the start where the text is short."""
    return np.resize(np.roll(np.concatenate(batches)[:, :-1].reshape(-1), -index * context), context).tolist()


def _distinct(*sizes: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(size for size in sizes if size > 0))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_entry(lambda: main(tyro.cli(Args, description=__doc__)))
