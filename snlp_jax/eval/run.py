"""A run's checkpoint on its held-out text: what every evaluation begins with, and the evaluation of its settings."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snlp_jax.config import Config
from snlp_jax.data.pipeline import TokenData, held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import fit_spec, load_fits, parse_calibrations, save_fit
from snlp_jax.eval.evaluate import evaluate, parse_settings
from snlp_jax.eval.report import Report
from snlp_jax.io.files import may_be_made
from snlp_jax.linearize.store import FOLDER as CALIBRATIONS
from snlp_jax.model import LanguageModel
from snlp_jax.run import Which, note, quantized_params, read_data, read_given_text, read_params
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params


class OpenRun(NamedTuple):
    """What an evaluation needs of a run."""

    model: LanguageModel
    params: Params
    """With kernels as ``config.eval.weights`` says."""
    data: TokenData
    settings: dict[str, Schedule]
    """Text of a solver setting -> schedule; the sequential pass first."""
    fits: dict[str, Calibration]
    about: dict[str, Any]
    """Name, checkpoint, step, corpus: for the record."""


def open_run(run_dir: Path, config: Config, which: Which = "best", *, has_fits: bool = False) -> OpenRun:
    """Read a run's checkpoint and corpus and the settings of ``config.eval``.

    Calibrations that the config asks for are fitted, those that settings name are read from the run's folder; both
    belong to the weights as they were trained, quantised or not.

    Args:
        config: the run's, with the ``eval`` section that is wanted.
        which: the checkpoint of the lowest validation loss (with a notice the newest, where none is known), or the
            newest.
        has_fits: whether what was fitted to a part of ``config.eval.data`` will be read; where settings say so it is
            known.

    Raises:
        InputError: no good checkpoint, another tokenizer, a setting that the model cannot run, a calibration that is
            missing or of another checkpoint.
    """
    # A bad setting should not wait for the corpus.
    settings = parse_settings(config.model, config.eval)
    specs = parse_calibrations(config.eval.calibrations, config.model.num_layers)
    if specs and not may_be_made(run_dir / CALIBRATIONS):
        raise InputError(f"{str(run_dir)!r} may not be written to, but calibrations are kept in it; copy the run.")
    model = LanguageModel(config.model, config.machine)
    step, params = read_params(run_dir, model, which)
    data, seq_len = read_evaluation_text(run_dir, config, has_fits=has_fits), config.eval.window_len(config.model)
    for spec in specs:
        path = save_fit(run_dir, params, spec, *fit_spec(model, params, data, spec, seq_len))
        note(f"fitted calibration {spec.name!r} in {path}.")
    fits = load_fits(run_dir, params, list(settings.values()))
    clipped_on = config.eval.weight_calibration, data, seq_len
    params = quantized_params(model, params, config.eval.weights, *clipped_on)
    about = {"name": config.name, "run_dir": str(run_dir), "checkpoint": which, "step": step}
    about |= {"tokenizer": data.tokenizer.name, "corpus_hash": data.content_hash}
    if config.eval.data:
        share = "half of the documents" if len(data.train) else "all"
        about["text"] = {"sources": list(config.eval.data), "hash": data.content_hash, "measured_on": share}
    return OpenRun(model, params, data, settings, fits, about)


def read_evaluation_text(run_dir: Path, config: Config, *, has_fits: bool) -> TokenData:
    """The run's corpus, or the text that ``config.eval.data`` names, see ``snlp_jax/config/evaluate.py``.

    Raises:
        InputError: it cannot be read.
    """
    evaluation = config.eval
    if not evaluation.data:
        return read_data(run_dir, config)
    schedules = parse_settings(config.model, evaluation).values()
    has_fits |= bool(evaluation.calibrations or evaluation.weight_calibration)
    has_fits |= any(region.fit for schedule in schedules for region in schedule.regions)
    return read_given_text(run_dir, config, evaluation.data, has_fits=has_fits)


def held_out(data: TokenData, config: Config) -> list[dict[str, np.ndarray]]:
    """Batches of ``config.eval.num_windows`` held-out windows, or as many as there are."""
    size, seq_len = min(config.eval.batch_size, config.eval.num_windows), config.eval.window_len(config.model)
    return held_out_batches(data, seq_len=seq_len, batch_size=size, num_batches=config.eval.num_windows // size)


def evaluate_run(run_dir: Path, config: Config, which: Which = "best") -> Report:
    """:func:`evaluate` of a run's checkpoint on its held-out text. For arguments and errors see :func:`open_run`."""
    run = open_run(run_dir, config, which)
    batches = held_out(run.data, config)
    columns = {name: [batch[name] for batch in batches] for name in batches[0]}
    weights, documents = columns.get("weight"), columns.get("document")
    report = evaluate(run.model, run.params, columns["tokens"], config.eval, run.fits, weights, documents)
    return dataclasses.replace(report, info=run.about | {"config": dataclasses.asdict(config)} | report.info)
