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
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from snlp_jax.chains import chains_of
from snlp_jax.data.pipeline import TokenData
from snlp_jax.errors import InputError
from snlp_jax.forward import run_parts
from snlp_jax.layout import split
from snlp_jax.linearize import About, Kind, check_name, fingerprint, fit_calibration, load_calibration, save_calibration
from snlp_jax.linearize.tune import TUNE_BATCH, tune_calibration
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import Shared
from snlp_jax.notation import INITS, parse_fields, parse_number, parse_span, parse_stage
from snlp_jax.parts import Weights
from snlp_jax.run import BATCH_SIZE, SEED, training_windows
from snlp_jax.solver import Calibration, Chain, Chunkwise, Identity, MethodData, ParallelSegment, Schedule
from snlp_jax.types import Array, Params

KEYS = ("n", "k", "kind", "rank", "intercept", "init", "init_rank", "tokens", "tune", "stage", "scales", "branches")


@dataclass(frozen=True)
class CalibrationSpec:
    """What to fit, and under which name to keep it."""

    name: str
    region: ParallelSegment
    kind: Kind = "basis"
    rank: int = 32
    """At most the model's width."""
    intercept: bool = False
    init_rank: int = 128
    """At most the model's width."""
    num_tokens: int = 65536
    tune_steps: int = 0

    @property
    def init_name(self) -> str:
        return next(name for name, init in INITS.items() if init is type(self.region.init))


def parse_calibration(text: str, num_layers: int) -> CalibrationSpec:
    """Read a calibration as written above.

    Raises:
        InputError: one sentence that names the text and what is wrong with it.
    """
    name, _, rest = "".join(text.split()).partition(":")
    check_name(name)
    try:
        fields = parse_fields(rest, KEYS)
        start, stop = parse_span(fields, num_layers)
        number = lambda key, default: parse_number(int, fields.get(key, str(default)), key)  # noqa: E731
        init_name = fields.get("init", "cal")
        if init_name not in INITS or INITS[init_name]().is_oracle:
            raise ValueError(f"init={init_name} is not one of h0, batch_forward, cal, preheat.")
        kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
        kind = fields.get("kind", CalibrationSpec.kind)
        if kind not in kinds:
            raise ValueError(f"kind={kind} is not one of {', '.join(kinds)}.")
        region = ParallelSegment(
            start, stop, number("k", 2), Identity(), INITS[init_name](), parse_stage(fields, stop - start), fit=name
        )
        Schedule.of(num_layers, region)
        for key in ("rank", "init_rank"):
            if number(key, 1) < 1:
                raise ValueError(f"{key}={fields[key]} is less than 1.")
        if number("tune", 0) < 0:
            raise ValueError(f"tune={fields['tune']} is negative.")
        return CalibrationSpec(
            name,
            region,
            kinds[kind],
            number("rank", CalibrationSpec.rank),
            bool(number("intercept", 0)),
            number("init_rank", CalibrationSpec.init_rank),
            number("tokens", CalibrationSpec.num_tokens),
            number("tune", CalibrationSpec.tune_steps),
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


def fit_to_run(
    run_dir: Path, model: LanguageModel, params: Params, data: TokenData, spec: CalibrationSpec
) -> tuple[Calibration, Path]:
    """Fit to training windows and save beside the checkpoint.

    Raises:
        InputError: a kind or rank that the model cannot have, or too little text for one batch.
    """
    calibration, num_tokens = fit_spec(model, params, data, spec)
    return calibration, save_fit(run_dir, params, spec, calibration, num_tokens)


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


def fit_spec(model: LanguageModel, params: Params, data: TokenData, spec: CalibrationSpec) -> tuple[Calibration, int]:
    """The calibration, and the number of tokens of training text that it is fitted to, before any tuning. For errors
    see :func:`fit_to_run`."""
    windows = training_windows(data, model.config.seq_len, spec.num_tokens)
    calibration = fit_calibration(
        region_chains(model, params, spec.region, windows["tokens"], windows.get("document")),
        num_iters=spec.region.num_iters,
        kind=spec.kind,
        rank=min(spec.rank, model.config.embed_dim),
        intercept=spec.intercept,
        init=spec.region.init,
        init_rank=min(spec.init_rank, model.config.embed_dim),
    )
    num_tokens = windows["tokens"][:, 1:].size
    if spec.tune_steps:
        seq_len = model.config.seq_len
        windows = training_windows(data, seq_len, max(spec.tune_steps * TUNE_BATCH * seq_len, spec.num_tokens))
        given = (windows["tokens"], windows.get("document"))
        calibration = tune_calibration(model, params, spec.region, calibration, *given, num_steps=spec.tune_steps)
    return calibration, num_tokens


def load_fits(run_dir: Path, params: Params, schedules: Sequence[Schedule]) -> dict[str, Calibration]:
    """The calibrations that the schedules name, from a run's folder.

    Raises:
        InputError: one is missing, or was fitted to another checkpoint or region.
    """
    regions = [region for schedule in schedules for region in schedule.regions if region.fit]
    of_params = fingerprint(params) if regions else ""
    fits = {}
    for region in regions:
        start, stop, stage = region.start, region.stop, stage_text(region)
        fits[region.fit], _ = load_calibration(
            run_dir, region.fit, fingerprint=of_params, start=start, stop=stop, stage=stage
        )
    return fits


def stage_text(region: ParallelSegment) -> str:
    """The stage as it stands in a calibration file: "" for one node a layer."""
    if not isinstance(region.stage, Chunkwise):
        return ""
    chunks = f"{region.num_nodes}xF{region.layers_per_node}"
    return f"{chunks},scales={region.stage.scales},branches={region.stage.branches}"


def region_chains(
    model: LanguageModel,
    params: Params,
    region: ParallelSegment,
    windows: np.ndarray,
    documents: np.ndarray | None = None,
) -> Callable[[], Iterator[tuple[Chain, MethodData]]]:
    """The region's chains on batches of windows, int32 [n, T + 1], made anew at every call: nothing is kept.

    ``documents`` numbers each token's document, [n, T + 1], where tokens attend to their own alone.
    """
    alone = dataclasses.replace(region, fit="")  # what is being fitted is not there yet
    weights = split(model, model.cast(params), Schedule.of(model.config.num_layers, alone))
    position = weights.segments.index(alone)
    part, before = weights.parts[position], weights.before(position)

    @jax.jit
    def enter(weights: Weights, tokens_BT: Array, document_BT: Array | None) -> tuple[Shared, Array]:
        states = run_parts(model, weights, tokens_BT, document_BT=document_BT)
        return states.shared, states.h_last

    def stream() -> Iterator[tuple[Chain, MethodData]]:
        for start in range(0, len(windows) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            tokens_BT = jnp.asarray(windows[rows, :-1])
            shared, h_in = enter(before, tokens_BT, None if documents is None else jnp.asarray(documents[rows, :-1]))
            (chain,) = chains_of(model, weights.embed_head, part, tokens_BT, shared, h_in)
            yield chain, MethodData(anchor=shared.x0_BTD)

    return stream
