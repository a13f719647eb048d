"""Quality and time of what benchmarks/pretrained.py compares."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from benchmarks.pretrained_args import Args
from benchmarks.pretrained_methods import Method, say
from benchmarks.retrieval import Probe
from benchmarks.timing import Arm, RecordedEngine, time_beside_first
from snlp_jax.data.pipeline import TokenData
from snlp_jax.eval.perplexity import paired_interval, perplexity, relative_change, token_mean
from snlp_jax.eval.task_data import Task
from snlp_jax.eval.tasks import Outcome, compare_outcomes, score_choices
from snlp_jax.eval.text_model import Score, TextModel
from snlp_jax.forward import forward
from snlp_jax.infer import Placement, Request
from snlp_jax.layout import Layout, prepare

T = TypeVar("T")


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
        say(f"quality of {method.name}")
        settings: dict[str, Any] = {"batch_size": args.batch_size, "fits": method.fits}
        text_model = TextModel(method.model, method.params, data.tokenizer, method.schedule, **settings)
        nll_WT = np.concatenate([np.asarray(text_model.token_fn(windows)[0]) for windows in batches])
        keys = text_model.score(probe.all_spans)
        change = relative_change(nll_WT, reference[0]) if reference else 0.0
        asked = tasks if change <= args.tasks_up_to else ()
        outcomes = [score_choices(text_model.log_likelihoods, task) for task in asked]
        reference = reference or (nll_WT, keys, outcomes)
        method.row |= {
            "nll": token_mean(nll_WT),
            "ppl": perplexity(nll_WT),
            "ppl_change": change,
            "ppl_interval": paired_interval(nll_WT, reference[0], num_bootstrap=args.num_bootstrap),
            "retrieval": probe.report(keys, reference[1], args.num_bootstrap),
            "tasks": {
                task.name: {
                    rule: dataclasses.asdict(found)
                    for rule, found in compare_outcomes(mine, its, args.num_bootstrap)[0].items()
                }
                for task, mine, its in zip(asked, outcomes, reference[2], strict=False)  # of the first all
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
        method.row |= {"cache_bytes": engine.num_cache_bytes, "weight_bytes": engine.num_weight_bytes}
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
        say(f"{what} of {methods[index].name}, {layout}")
        return make(methods[index], layout)

    jax.clear_caches()  # programs of what was measured before
    rows, failed = time_beside_first(len(methods), args.layouts, made, seconds_of, args.repeats)
    for index, row in rows.items():
        methods[index].row |= {f"{what}_{name}": value for name, value in row.items()}
    return [{"name": methods[index].name, "layout": layout, "error": why} for index, layout, why in failed]


def prompts_of(batches: Sequence[np.ndarray], context: int, index: int) -> list[int]:
    """Another piece of held-out text each round; again from the start where the text is short."""
    return np.resize(np.roll(np.concatenate(batches)[:, :-1].reshape(-1), -index * context), context).tolist()
