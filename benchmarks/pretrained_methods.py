"""What benchmarks/pretrained.py compares: the model and schedule of every method, fitted to training text."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.pretrained_args import Args, distinct, options_of
from snlp_jax.cli.linearize import draw_text
from snlp_jax.config import Config
from snlp_jax.data.pipeline import TokenData
from snlp_jax.eval.calibrations import fit_spec, parse_calibration
from snlp_jax.linearize.nbl import Candidate, apply, choose, linearize, measure
from snlp_jax.linearize.statistics import Batches, Branch, whole_layers
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.quantize import quantize
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params


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


def make_methods(
    model: LanguageModel, params: Params, data: TokenData, config: Config, args: Args
) -> tuple[list[Method], list[dict[str, Any]]]:
    """All methods, the sequential pass first, and the table by which layers were chosen."""
    L = model.config.num_layers
    options = options_of(args)
    fit, held_out, _ = draw_text(data, config, options)
    places: dict[Branch, Sequence[int]] = {"attention": whole_layers(model, "attention")}
    if args.mlp:
        places["mlp"] = whole_layers(model, "mlp")
    if not model.config.num_streams:
        places["block"] = whole_layers(model, "block")
    candidates = measure(model, params, fit, held_out, dict(places), options)
    sequential = Schedule.of(L)
    methods = [Method("sequential", "seq", model, params, sequential)]

    def replaced(branch: Branch, count: int, drop: bool = False) -> tuple[LanguageModel, Params]:
        chosen = choose(candidates, {branch: count}, options)
        return apply(model, params, candidates, chosen, drop=drop)

    sizes_of: dict[Branch, tuple[int, ...]] = {"attention": args.attention, "mlp": args.mlp, "block": args.blocks}
    for branch in places:
        for drop in (False, True):
            what = "drop" if drop else "nbl"
            for count in sizes_of[branch]:
                made = replaced(branch, count, drop)
                methods.append(Method(f"{what} {branch}", f"{what} {branch} {count}", *made, sequential))
    rankings = _rankings(model, params, fit, held_out, candidates, args) if args.rankings else ()
    methods += [Method("nbl, ranking", text, *chosen, sequential) for text, chosen in rankings]
    if args.int8:
        methods.append(Method("int8", "int8", model, quantize(params, "int8"), sequential))
    rounds = [(n, k) for n in args.regions for k in args.iterations if k <= n]
    settings = [f"{name}:n={n},k={k}" for name in _corrections(model) for n, k in rounds]
    sizes = distinct(*(n // 2 * 2 for n in (L // 4, L // 2, 3 * L // 4)))
    settings += [f"pairs:n={n}" for n in (sizes[:1] if args.quick else sizes)]
    settings += [f"skip:{L - 1 - count}-{L - 1}" for count in args.blocks if count < L - 1]
    for text in settings:
        methods.append(Method(text.partition(":")[0], text, model, params, parse_schedule(text, L)))
    if not args.calibration_tokens:
        return methods, [each.row() for each in candidates]
    for n in args.regions:
        most = max((k for k in args.iterations if k <= n), default=0)
        fits = [(k, 0) for k in args.iterations if k <= n] + [(most, args.tune_steps)] * (most > 0)
        methods += [_calibrated("", model, params, data, (n, k, steps), args) for k, steps in fits]
    n, k = args.regions[-1], min(2, args.iterations[-1])
    for count in args.attention[:1]:
        linearised = replaced("attention", count)
        methods.append(_calibrated(f"nbl {count} + ", *linearised, data, (n, k, args.tune_steps), args))
    return methods, [each.row() for each in candidates]


def _calibrated(
    prefix: str, model: LanguageModel, params: Params, data: TokenData, size: tuple[int, int, int], args: Args
) -> Method:
    """The solver with surrogates and an initial trace fitted to training text; ``size``: layers, iterations and steps
    of tuning."""
    n, k, steps = size
    about = parse_calibration(f"fit:n={n},k={k},tokens={args.calibration_tokens},tune={steps}", model.config.num_layers)
    calibration, _ = fit_spec(model, params, data, about)
    schedule = parse_schedule(f"cal:n={n},k={k},init=cal,fit=fit", model.config.num_layers)
    kind = "cal tuned" if steps else "cal"
    family = f"nbl + {kind}" if prefix else kind
    return Method(family, f"{prefix}{kind}:n={n},k={k}", model, params, schedule, {"fit": calibration})


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
        options = options_of(args, attention=count, blocks=0)
        for rank_by in ("random",) if args.quick else ("cca", "nmse", "random"):
            chosen = choose(candidates, {"attention": count}, dataclasses.replace(options, rank_by=rank_by))
            yield f"nbl attention {count} by {rank_by}", apply(model, params, candidates, chosen)
        made = linearize(model, params, fit, held_out, dataclasses.replace(options, greedy=True))
        yield f"nbl attention {count} greedy", (made.model, made.params)


def _corrections(model: LanguageModel) -> tuple[str, ...]:
    return ("idn", "hcn") if model.config.num_streams else ("idn", "sid") if model.config.use_x0_resid else ("idn",)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
