"""A run's checkpoint on its held-out text: what every evaluation begins with, and the evaluation of its settings."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from snlp_jax.config import Config
from snlp_jax.data.pipeline import TokenData, held_out_batches
from snlp_jax.eval.calibrations import fit_spec, load_fits, parse_calibrations, save_fit
from snlp_jax.eval.evaluate import evaluate, parse_settings
from snlp_jax.eval.report import Report
from snlp_jax.model import LanguageModel
from snlp_jax.run import Which, note, quantized_params, read_data, read_params
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params


class OpenRun(NamedTuple):
    """What an evaluation needs of a run."""

    model: LanguageModel
    params: Params
    """With kernels as ``config.eval.weights`` says."""
    step: int
    data: TokenData
    settings: dict[str, Schedule]
    """Text of a solver setting -> schedule; the sequential pass first."""
    fits: dict[str, Calibration]
    about: dict[str, Any]
    """Name, checkpoint, step, corpus: for the record."""


def open_run(run_dir: Path, config: Config, which: Which = "best") -> OpenRun:
    """Read a run's checkpoint and corpus and the settings of ``config.eval``.

    Calibrations that the config asks for are fitted, those that settings name are read from the run's folder; both
    belong to the weights as they were trained, quantised or not.

    Args:
        config: the run's, with the ``eval`` section that is wanted.
        which: the checkpoint of the lowest validation loss (with a notice the newest, where none is known), or the
            newest.

    Raises:
        InputError: no good checkpoint, another tokenizer, a setting that the model cannot run, a calibration that is
            missing or of another checkpoint.
    """
    # A bad setting should not wait for the corpus.
    settings = parse_settings(config.model, config.eval)
    specs = parse_calibrations(config.eval.calibrations, config.model.num_layers)
    model = LanguageModel(config.model, config.machine)
    step, params = read_params(run_dir, model, which)
    data = read_data(run_dir, config)
    for spec in specs:
        path = save_fit(run_dir, params, spec, *fit_spec(model, params, data, spec))
        note(f"fitted calibration {spec.name!r} in {path}.")
    fits = load_fits(run_dir, params, list(settings.values()))
    params = quantized_params(model, params, config.eval.weights, config.eval.weight_calibration, data)
    about = {"name": config.name, "run_dir": str(run_dir), "checkpoint": which, "step": step}
    about |= {"tokenizer": data.tokenizer.name, "corpus_hash": data.content_hash}
    return OpenRun(model, params, step, data, settings, fits, about)


def evaluate_run(run_dir: Path, config: Config, which: Which = "best") -> Report:
    """:func:`evaluate` of a run's checkpoint on its held-out text. For arguments and errors see :func:`open_run`."""
    run = open_run(run_dir, config, which)
    batch_size = min(config.eval.batch_size, config.eval.num_windows)
    num_batches = config.eval.num_windows // batch_size
    batches = held_out_batches(run.data, seq_len=config.model.seq_len, batch_size=batch_size, num_batches=num_batches)
    weights = [batch["weight"] for batch in batches] if "weight" in batches[0] else None
    documents = [batch["document"] for batch in batches] if "document" in batches[0] else None
    windows = [batch["tokens"] for batch in batches]
    report = evaluate(run.model, run.params, windows, config.eval, run.fits, weights, documents)
    return dataclasses.replace(report, info=run.about | {"config": dataclasses.asdict(config)} | report.info)
