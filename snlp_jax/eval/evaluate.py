"""The evaluation of a model: every solver setting against the sequential pass, on the same windows and machine."""

import dataclasses
import datetime
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from snlp_jax.config import Config, EvalConfig, ModelConfig, from_json
from snlp_jax.data.pipeline import TokenData, prepare_tokens, val_batches
from snlp_jax.data.tokenizer import check_vocab
from snlp_jax.errors import InputError
from snlp_jax.eval.fidelity import (
    Comparison,
    GreedyMatch,
    greedy_matches,
    make_compare_fn,
    make_greedy_fn,
    make_reference_fn,
    stack_comparisons,
)
from snlp_jax.eval.perplexity import BOOTSTRAP_SEED, change_by_position, paired_interval, perplexity, relative_change
from snlp_jax.eval.report import Report, SettingResult
from snlp_jax.eval.timing import LAYOUTS, TIMING_SEED, Timing, time_schedules
from snlp_jax.eval.weights import prepare_all
from snlp_jax.forward import Weights, forward, split
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, CONFIG_NAME, Checkpointer
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh
from snlp_jax.solver import Schedule
from snlp_jax.types import Params

TOKENIZER_NAME = "tokenizer.json"
Which = Literal["best", "last"]
OnProgress = Callable[[str], None]


# -- A run directory -----------------------------------------------------------------------------------------------


def read_config(run_dir: Path) -> Config:
    """The config that a run saved. Raises InputError when the directory does not exist or holds no run."""
    if not run_dir.is_dir():
        raise InputError(f"run directory {str(run_dir)!r} does not exist; train first or name another.")
    path = run_dir / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"run directory {str(run_dir)!r} holds no {CONFIG_NAME}, so it is no run; name another.")
    return from_json(path.read_text(encoding="utf-8"))


def evaluate_run(run_dir: Path, config: Config, which: Which = "best") -> Report:
    """:func:`evaluate` of a run's checkpoint on its held-out text.

    Args:
        config: the run's, with the ``eval`` section that is wanted.
        which: the checkpoint of the lowest validation loss (the newest one where none is known), or the newest.

    Raises:
        InputError: no good checkpoint, or anything that :func:`evaluate` refuses.
    """
    model = LanguageModel(config.model)
    parse_settings(config.model, config.eval)  # a bad setting should not wait for the corpus
    with Checkpointer(run_dir / CHECKPOINT_NAME, read_only=True) as checkpointer:
        if which == "best" and checkpointer.latest_step is not None and checkpointer.best_step is None:
            _note(f"no checkpoint of {run_dir} has a validation loss; taking the last one.")
            which = "last"
        step, params = checkpointer.restore_params(model.abstract_params(), which if checkpointer.steps() else "last")
    data = _read_data(run_dir, config)
    batch_size = min(config.eval.batch_size, config.eval.num_windows)
    batches = val_batches(
        data, seq_len=config.model.seq_len, batch_size=batch_size, num_batches=config.eval.num_windows // batch_size
    )
    report = evaluate(model, params, batches, config.eval)
    about = {"name": config.name, "run_dir": str(run_dir), "checkpoint": which, "step": step}
    about |= {"tokenizer": data.tokenizer.name, "corpus_hash": data.content_hash, "config": dataclasses.asdict(config)}
    return dataclasses.replace(report, info=report.info | about)


def _read_data(run_dir: Path, config: Config) -> TokenData:
    """The corpus in the tokens of the run, even if it has changed since and would give another tokenizer now."""
    path = run_dir / TOKENIZER_NAME
    if not path.is_file():
        raise InputError(f"run directory {str(run_dir)!r} holds no {TOKENIZER_NAME}; train it again or name another.")
    data = prepare_tokens(config.data)
    if data.tokenizer.to_json() != path.read_text(encoding="utf-8"):
        _note("the corpus now gives another tokenizer than in training; using the run's own.")
        data = prepare_tokens(dataclasses.replace(config.data, tokenizer=str(path)))
    check_vocab(data.tokenizer, config.model.vocab_size)
    return data


# -- A model -------------------------------------------------------------------------------------------------------


def default_solvers(model: ModelConfig) -> tuple[str, ...]:
    """Regions of a third, a half and two thirds of the layers under one and two iterations, and one batch_forward."""
    sizes = sorted({max(2, round(share * model.num_layers)) for share in (1 / 3, 1 / 2, 2 / 3)})
    sizes = [size for size in sizes if size <= model.num_layers] or [model.num_layers]
    corrections = ("idn", "sid") if model.use_x0_resid else ("idn",)
    grid = [f"{name}:n={size},k={k}" for name in corrections for size in sizes for k in (1, 2)]
    return (*grid, f"idn:n={sizes[-1]},k=1,init=batch_forward")


def parse_settings(model: ModelConfig, config: EvalConfig) -> dict[str, Schedule]:
    """Setting -> schedule: the sequential pass, then ``config.solvers`` or the default grid, without repetitions.

    Raises:
        InputError: names the setting that the model cannot run, or the length it cannot read.
    """
    lengths = {"eval.timing_len": config.timing_len, "the greedy comparison": config.greedy_prompt_len + config.greedy_tokens}
    for name, length in lengths.items():
        if length > model.max_context:
            raise InputError(
                f"{name} needs {length} tokens, but the model reads at most {model.max_context}; shorten it."
            )
    if config.greedy_prompts and config.greedy_tokens and not config.greedy_prompt_len:
        raise InputError("eval.greedy_prompt_len is 0; give at least 1, or set eval.greedy_tokens to 0.")
    settings = (text.replace(" ", "") for text in config.solvers or default_solvers(model))
    return {text: parse_schedule(text, model.num_layers) for text in ("seq", *settings)}


def evaluate(
    model: LanguageModel, params: Params, batches: Sequence[np.ndarray], config: EvalConfig
) -> Report:
    """Measure every setting of ``config`` against the sequential pass.

    Quality is measured on ``batches`` of windows, int32 [B, T + 1], B the same for all; greedy continuations start
    from the first tokens of the first windows; times are of a forward over random tokens.

    Raises:
        InputError: a setting that the model or the devices cannot run, before anything is compiled.
    """
    settings = parse_settings(model.config, config)
    schedules = list(settings.values())
    mesh = make_mesh(layer=config.layer_devices) if config.layer_devices > 1 else None
    if mesh is not None:
        _check_mesh(model, params, schedules, mesh)
    timing_len = config.timing_len or model.config.seq_len
    has_greedy = min(config.greedy_prompts, config.greedy_tokens) > 0
    num_steps = len(schedules) * (len(batches) + has_greedy)
    num_steps += (len(LAYOUTS) * len(schedules) + config.timing_repeats) if config.timing_repeats else 0
    with _progress() as progress:
        task = progress.add_task("preparing", total=num_steps)
        advance = lambda text: progress.update(task, description=text, advance=1)  # noqa: E731
        B, T = batches[0].shape[0], batches[0].shape[1] - 1
        all_weights = prepare_all(model, params, schedules, num_tokens=B * T, layout="stack", mesh=mesh)
        comparisons = _compare(model, all_weights, batches, mesh, advance)
        greedy = _decode(model, all_weights, np.concatenate(batches), config, mesh, advance) if has_greedy else None
        del all_weights
        timings = None
        if config.timing_repeats:
            shape = {"batch_size": config.timing_batch, "seq_len": timing_len, "num_repeats": config.timing_repeats}
            timings = time_schedules(model, params, schedules, **shape, mesh=mesh, on_progress=advance)
    results = [
        _result(text, schedule, comparisons[i], comparisons[0], config.num_bootstrap)
        for i, (text, schedule) in enumerate(settings.items())
    ]
    for i, result in enumerate(results):
        if greedy is not None:
            result = dataclasses.replace(result, greedy=greedy[i])
        if timings is not None:
            speedup = timings[0].median_ms / timings[i].median_ms
            result = dataclasses.replace(result, timing=timings[i], speedup=speedup)
        results[i] = result
    info = _describe(model, params) | {
        "num_windows": sum(len(batch) for batch in batches),
        "window_len": T,
        "timing_batch": config.timing_batch,
        "timing_len": timing_len,
        "timing_repeats": config.timing_repeats,
        "layer_devices": config.layer_devices,
        "seeds": {"bootstrap": BOOTSTRAP_SEED, "timing": TIMING_SEED},
    }
    return Report(tuple(results), info)
