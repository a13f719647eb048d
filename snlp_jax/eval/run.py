"""A run directory: the config, tokenizer and checkpoints that training left, evaluated on the run's held-out text."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from snlp_jax.config import Config, WeightPrecision, from_json
from snlp_jax.data.chat import prepare_data
from snlp_jax.data.pipeline import TokenData, held_out_batches
from snlp_jax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer_json
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import BATCH_SIZE, fit_to_run, load_fits, parse_calibrations, training_windows
from snlp_jax.eval.evaluate import evaluate, parse_settings
from snlp_jax.eval.report import Report
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, CONFIG_NAME, Checkpointer
from snlp_jax.model import LanguageModel
from snlp_jax.quantize import input_squares, quantize
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params

TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"
"""Of an imported model."""
Which = Literal["best", "last"]


def read_config(run_dir: Path) -> Config:
    """The config that a run saved.

    Raises:
        InputError: the directory does not exist or holds no run.
    """
    if not run_dir.is_dir():
        raise InputError(f"run directory {str(run_dir)!r} does not exist; train first or name another.")
    path = run_dir / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"run directory {str(run_dir)!r} holds no {CONFIG_NAME}; name one that training has written.")
    return from_json(path.read_text(encoding="utf-8"))


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
    model = LanguageModel(config.model)
    step, params = read_params(run_dir, model, which)
    data = read_data(run_dir, config)
    for spec in specs:
        _note(f"fitted calibration {spec.name!r} in {fit_to_run(run_dir, model, params, data, spec)[1]}.")
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
    sizes = {"seq_len": config.model.seq_len, "batch_size": batch_size, "num_batches": num_batches}
    batches = held_out_batches(run.data, **sizes)
    weights = [batch["weight"] for batch in batches] if "weight" in batches[0] else None
    documents = [batch["document"] for batch in batches] if "document" in batches[0] else None
    windows = [batch["tokens"] for batch in batches]
    report = evaluate(run.model, run.params, windows, config.eval, run.fits, weights, documents)
    return dataclasses.replace(report, info=run.about | {"config": dataclasses.asdict(config)} | report.info)


def read_params(run_dir: Path, model: LanguageModel, which: Which) -> tuple[int, Params]:
    """Step and parameters of a run's checkpoint; for ``which`` and errors see :func:`open_run`."""
    with Checkpointer(run_dir / CHECKPOINT_NAME, read_only=True) as checkpointer:
        if which == "best" and checkpointer.best_step is None:
            if checkpointer.latest_step is not None:
                _note(f"no checkpoint in {str(run_dir)!r} has a validation loss; taking the last one.")
            which = "last"
        return checkpointer.restore_params(model.abstract_params(), which)


def quantized_params(
    model: LanguageModel, params: Params, weights: WeightPrecision, calibration: int, data: TokenData | None
) -> Params:
    """:func:`snlp_jax.quantize.quantize`, clipped by about ``calibration`` tokens of the training text in ``data``.

    Raises:
        InputError: too little text for one batch.
    """
    squares = None
    if calibration:
        assert data is not None
        windows = training_windows(data, model.config.seq_len, calibration)
        starts = range(0, len(windows["tokens"]), BATCH_SIZE)
        batches = ({name: rows[i : i + BATCH_SIZE] for name, rows in windows.items()} for i in starts)
        squares = input_squares(model, params, batches)
    return quantize(params, weights, squares)


def read_tokenizer(run_dir: Path) -> Tokenizer:
    """The tokenizer that a run saved.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = run_dir / TOKENIZER_NAME
    if not path.is_file():
        raise InputError(
            f"run directory {str(run_dir)!r} holds no {TOKENIZER_NAME}; name one that training has written."
        )
    return load_tokenizer_json(path.read_text(encoding="utf-8"))


def read_data(run_dir: Path, config: Config) -> TokenData:
    """The corpus in the tokens of the run, even where it has changed since and would give another tokenizer."""
    tokenizer = read_tokenizer(run_dir)
    own = dataclasses.replace(config.data, tokenizer=str(run_dir / TOKENIZER_NAME))
    # Where a run started from another, the corpus never gave the tokenizer.
    data = prepare_data(own if config.train.init_from else config.data)
    if data.tokenizer.to_json() != tokenizer.to_json():
        _note("the corpus gives another tokenizer than it did in training; taking the run's own.")
        data = prepare_data(own)
    check_vocab(data.tokenizer, config.model.vocab_size)
    return data


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
