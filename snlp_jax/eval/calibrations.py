"""Calibrations of a run: fitted to its training text, saved beside its checkpoint, found again by name.

As --calibrations of eval.py, or of python -m snlp_jax.linearize, which fits them to the model that it makes:

    cal8:n=8,k=2                                       shared bases of rank 32 and a fitted initial trace
    cal8:n=8,k=2,kind=channel,init=h0,tokens=131072    diagonal surrogates for the guess h0
    pre8:4-12,k=1,kind=scalar,init=preheat,init_rank=8
    cal8:n=8,k=2,tune=200                              tuned by the model's output afterwards, in 200 steps

Keys: a region as in solver settings (n= or a span, stage=), ``k`` iterations, ``kind`` scalar, channel or basis,
``rank`` of the bases, ``intercept`` 0 or 1, ``init`` (h0, batch_forward, cal, preheat), ``init_rank``, ``tokens``,
``tune`` steps (snlp_jax/linearize/tune.py).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.chains import chains_of
from snlp_jax.data.pipeline import TokenData
from snlp_jax.errors import InputError
from snlp_jax.forward import run_parts
from snlp_jax.io.progress import Progress
from snlp_jax.layout import split
from snlp_jax.linearize import About, Kind, check_name, fingerprint, fit_calibration, load_calibration, save_calibration
from snlp_jax.linearize.store import stage_text
from snlp_jax.linearize.tune import TUNE_BATCH, tune_calibration
from snlp_jax.memory import check_room, rows_at_once
from snlp_jax.model import LanguageModel
from snlp_jax.notation import INITS, look_up, parse_fields, parse_number, parse_span, parse_stage
from snlp_jax.run import BATCH_SIZE, SEED, num_training_windows, training_windows
from snlp_jax.solver import Calibration, Chain, Identity, MethodData, ParallelSegment, Schedule
from snlp_jax.types import Params

KEYS = ("n", "k", "kind", "rank", "intercept", "init", "init_rank", "tokens", "tune", "stage", "scales", "branches")


@dataclass(frozen=True)
class CalibrationSpec:
    """What to fit, and under which name to keep it."""

    name: str
    region: ParallelSegment
    init_name: str
    kind: Kind
    rank: int
    """At most the model's width."""
    intercept: bool
    init_rank: int
    """At most the model's width."""
    num_tokens: int
    tune_steps: int


def parse_calibration(text: str, num_layers: int) -> CalibrationSpec:
    """Read a calibration as written above.

    Raises:
        InputError: one sentence that names the text and what is wrong with it.
    """
    name, _, rest = "".join(text.split()).partition(":")
    check_name(name)

    def number(key: str, default: int, least: int) -> int:
        value = parse_number(int, fields.get(key, str(default)), key)
        if value < least:
            raise ValueError(f"{key}={value} is less than {least}.")
        return value

    try:
        fields = parse_fields(rest, KEYS)
        start, stop = parse_span(fields, num_layers)
        init_name = fields.get("init", "cal")
        init = look_up({key: init for key, init in INITS.items() if not init().is_oracle}, init_name, "init")()
        stage = parse_stage(fields, stop - start)
        region = ParallelSegment(start, stop, number("k", 2, 1), Identity(), init, stage, fit=name)
        Schedule.of(num_layers, region)
        return CalibrationSpec(
            name,
            region,
            init_name,
            kind=look_up({kind: kind for kind in get_args(Kind)}, fields.get("kind", "basis"), "kind"),
            rank=number("rank", 32, 1),
            intercept=bool(number("intercept", 0, 0)),
            init_rank=number("init_rank", 128, 1),
            num_tokens=number("tokens", 65536, 1),
            tune_steps=number("tune", 0, 0),
        )
    except ValueError as error:
        raise InputError(f"calibration {text.strip()!r}: {error}") from error


def parse_calibrations(texts: Sequence[str], num_layers: int) -> tuple[CalibrationSpec, ...]:
    """One each. Raises InputError also where two have the same name, of which the second would replace the first."""
    specs = tuple(parse_calibration(text, num_layers) for text in texts)
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"calibration {name!r} is given {names.count(name)} times; give each a name of its own.")
    return specs


def save_fit(run_dir: Path, params: Params, spec: CalibrationSpec, calibration: Calibration, num_tokens: int) -> Path:
    """Save what :func:`fit_spec` has found of these parameters beside their checkpoint."""
    about = About(
        kind=spec.kind,
        start=spec.region.start,
        stop=spec.region.stop,
        num_iters=spec.region.num_iters,
        num_tokens=num_tokens,
        seed=SEED,
        fingerprint=fingerprint(params),
        stage=stage_text(spec.region),
        init=spec.init_name,
        tune_steps=spec.tune_steps,
    )
    return save_calibration(run_dir, spec.name, calibration, about)


def fit_spec(
    model: LanguageModel, params: Params, data: TokenData, spec: CalibrationSpec, seq_len: int = 0
) -> tuple[Calibration, int]:
    """The calibration, and the number of tokens of training text that it is fitted to, before any tuning.

    ``seq_len`` are tokens of a window, by default the model's.

    Raises:
        InputError: a kind or rank that the model cannot have, or too little text for one batch.
    """
    config, steps, seq_len = model.config, spec.tune_steps, seq_len or model.config.seq_len
    num_windows = num_training_windows(data, seq_len, spec.num_tokens)
    # More text is tuned to than is fitted to; it begins with the same windows.
    drawn = training_windows(data, seq_len, max(spec.num_tokens, steps * TUNE_BATCH * seq_len))
    windows, documents = drawn["tokens"], drawn.get("document")
    is_fitted = spec.init_name.startswith(("cal", "pre"))
    if spec.kind == "basis" or is_fitted:
        # Of every node two matrices: in float64 of what is done, at hand and merged, in float32 of a batch.
        needed = 2 * spec.region.num_nodes * config.embed_dim**2 * (3 * 8 + 4)
        remedy = "give fewer layers, or kind=channel,init=h0"
        check_room(f"the statistics of calibration {spec.name!r}", needed, remedy, on_host=True)
    num_passes = spec.region.num_iters * (1 + (spec.kind == "basis")) + is_fitted
    with Progress(f"calibrating {spec.name}", num_passes * num_windows + TUNE_BATCH * steps) as progress:
        calibration = fit_calibration(
            region_chains(model, params, spec.region, windows[:num_windows], documents, progress.advance),
            num_iters=spec.region.num_iters,
            kind=spec.kind,
            rank=min(spec.rank, config.embed_dim),
            intercept=spec.intercept,
            init=spec.region.init,
            init_rank=min(spec.init_rank, config.embed_dim),
        )
        if steps:
            on_step = partial(progress.advance, TUNE_BATCH)
            given = model, params, spec.region, calibration, windows, documents
            calibration = tune_calibration(*given, num_steps=steps, on_step=on_step)
    return calibration, num_windows * (windows.shape[1] - 1)


def load_fits(run_dir: Path, params: Params, schedules: Sequence[Schedule]) -> dict[str, Calibration]:
    """The calibrations that the schedules name, from a run's folder.

    Raises:
        InputError: one is missing, or was fitted to another checkpoint or region.
    """
    regions = [region for schedule in schedules for region in schedule.regions if region.fit]
    of_params = fingerprint(params) if regions else ""
    return {region.fit: load_calibration(run_dir, region, of_params) for region in regions}


def region_chains(
    model: LanguageModel,
    params: Params,
    region: ParallelSegment,
    windows: np.ndarray,
    documents: np.ndarray | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Callable[[], Iterator[tuple[Chain, MethodData]]]:
    """The region's chains on batches of windows, int32 [n, T + 1], made anew at every call: nothing is kept. As many
    windows at once as memory is budgeted for (:func:`snlp_jax.memory.rows_at_once`).

    ``documents`` numbers each token's document, [n, T + 1], where tokens attend to their own alone. ``on_rows`` is
    told how many windows have been read.
    """
    alone = dataclasses.replace(region, fit="")  # what is being fitted is not there yet
    weights = split(model, model.cast(params), Schedule.of(model.config.num_layers, alone))
    position = weights.segments.index(alone)
    part, before = weights.parts[position], weights.before(position)
    enter = jax.jit(partial(run_parts, model))

    num_rows = rows_at_once(model.config, windows.shape[1] - 1, BATCH_SIZE, backend=model.backend)

    def stream() -> Iterator[tuple[Chain, MethodData]]:
        for start in range(0, len(windows) // BATCH_SIZE * BATCH_SIZE, num_rows):
            rows = slice(start, start + num_rows)
            tokens_BT = jnp.asarray(windows[rows, :-1])
            document_BT = None if documents is None else jnp.asarray(documents[rows, :-1])
            states = enter(before, tokens_BT, document_BT=document_BT)
            (chain,) = chains_of(model, weights.embed_head, part, tokens_BT, states.shared, states.h_last)
            yield chain, MethodData(anchor=states.shared.x0_BTD)
            on_rows(num_rows)

    return stream
