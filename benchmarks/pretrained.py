"""What can be had from a trained model without training it: quality and time of every method, in one table.

    python benchmarks/pretrained.py runs/plain16
    python benchmarks/pretrained.py runs/llama --tasks arc_easy.jsonl --distances 256 1024 --layouts stack

    seq                  the sequential pass, the twin of all others
    nbl attention m      m attentions replaced by affine maps (snlp_jax/linearize); drop: the same ones left out
    ... by, greedy       the layers chosen by another measure or by chance, or one by one on the model so far
    nbl mlp m            m MLPs
    nbl block m          m whole layers, each by one map; drop: the same ones left out (LLM-Drop)
    int8                 kernels of eight bits
    idn, sid             the solver on the last layers (--regions, half of them by default), --iterations K
    cal                  the same with calibrated surrogates and initial trace, fitted to the states in closed form
    cal tuned            and tuned by the model's own output (snlp_jax/linearize/tune.py)
    nbl + cal            both: tuned surrogates of the linearised model
    pairs                layers two by two
    skip                 layers left out before the last

Perplexity and its paired bootstrap interval on held-out windows; multiple choice (``--tasks``); planted keys
(benchmarks/retrieval.py); ``prefill``, the whole forward of ``--prefill-len`` tokens with all logits; ``decode``, a
token of the cached engine behind ``--context`` tokens, by the rule last_eval; bytes of the cache and of the weights.
Weights are cast and laid out beforehand, every method is compiled in the same layouts of which the faster counts, and a
few at a time run round robin beside the twin after a warm-up (benchmarks/timing.py): a ratio is the twin's time of the
same round over the method's, and milliseconds are the twin's median over it. Every method and layout holds weights of
its own. Maps, surrogates and choices of layers see training text alone. The file is written after each of the three
measurements.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from benchmarks.machine import header, out_path
from benchmarks.pretrained_args import Args, options_of
from benchmarks.pretrained_measures import measure_decoding, measure_prefill, measure_quality, prompts_of
from benchmarks.pretrained_methods import make_methods, say
from benchmarks.pretrained_report import calibrated_share, draw, mark_fronts, table_of
from benchmarks.retrieval import Probe, planted_keys
from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, TaskConfig
from snlp_jax.data.pipeline import held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.task_data import load_tasks
from snlp_jax.io.files import atomic_write
from snlp_jax.linearize.nbl import check_linearize
from snlp_jax.model import LanguageModel
from snlp_jax.run import num_training_windows, read_config, read_data, read_params


def main(args: Args) -> dict[str, Any]:
    """Measure everything and return what the JSON file holds."""
    began, config = time.perf_counter(), read_config(args.run_dir)
    args = args.sized(config.model)
    _check(args, config)
    tasks = load_tasks(TaskConfig(args.tasks, args.num_examples)) if args.tasks else ()
    data = read_data(args.run_dir, config)
    if args.calibration_tokens:
        num_training_windows(data, config.model.seq_len, args.calibration_tokens)  # refused before anything is fitted
    model = LanguageModel(config.model)
    sizes = {"batch_size": args.batch_size, "num_batches": -(-args.num_windows // args.batch_size)}
    windows = held_out_batches(data, seq_len=config.model.seq_len, **sizes)
    batches = [window["tokens"] for window in windows]
    probe = Probe({})
    if args.distances:
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

    say("fitting maps and surrogates")
    methods, report["candidates"] = make_methods(model, params, data, config, args)
    measure_quality(methods, batches, probe, tasks, data, args)
    write()
    report["failed"] += measure_prefill(methods, batches, args)
    write()
    prompts = [prompts_of(batches, args.context, index) for index in range(args.repeats)]
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


def _check(args: Args, config: Config) -> None:
    """Refuse what would fail only after a long time."""
    model = LanguageModel(config.model)
    if args.attention:
        check_linearize(model, options_of(args, blocks=0))
    if args.blocks and not config.model.num_streams:
        check_linearize(model, options_of(args, attention=0))
    longest = max(args.prefill_len, args.context + args.new_tokens)
    if longest > config.model.max_context:
        raise InputError(f"{longest} tokens are timed, but the model reads {config.model.max_context}; lower them.")


if __name__ == "__main__":
    run_entry(lambda: main(tyro.cli(Args, description=__doc__)))
