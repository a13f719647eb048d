"""Where a region's error sits and why: the error of every layer after every iteration, the sizes of the layers'
Jacobians and of what each correction leaves of them, and how perturbations grow down the depth, at the states of
held-out text."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from snlp_jax.chains import chains_of, correction_of, method_data
from snlp_jax.config import Config
from snlp_jax.data.pipeline import held_out_batches
from snlp_jax.errors import InputError
from snlp_jax.eval.evaluate import parse_settings
from snlp_jax.eval.frontier import to_png
from snlp_jax.eval.iterations import TOLERANCE, Gains, Predictions, exponent, iterations_needed, predict
from snlp_jax.eval.report import Record, make_table
from snlp_jax.eval.run import open_run
from snlp_jax.forward import run_parts
from snlp_jax.io.progress import Progress
from snlp_jax.io.provenance import circumstances
from snlp_jax.layout import split
from snlp_jax.model import LanguageModel
from snlp_jax.parts import Weights
from snlp_jax.run import Which
from snlp_jax.solver import (
    Calibration,
    Chain,
    Exact,
    FusedSplit,
    Identity,
    ParallelSegment,
    PerLayer,
    Schedule,
    sequential,
)
from snlp_jax.solver.chain import MethodData
from snlp_jax.solver.diagnostics import (
    NUM_PROBES,
    NUM_STEPS,
    Growth,
    contraction,
    perturbation_growth,
    spectral_norms,
    trace_errors,
)
from snlp_jax.types import Array, Params

NUM_WINDOWS = 4
SHOWN_ITERS = (0, 1, 2, 4)
"""Columns of the table."""
COLOUR_RANGE = (1e-6, 1e1)
"""Errors that the heat maps tell apart; what lies outside takes the end's colour."""


@dataclass(frozen=True)
class RegionDiagnosis:
    """One parallel region, with its exact input, iterated until it is solved. Rows are iterations, columns nodes."""

    setting: str
    """As it was asked for, without the number of iterations."""
    surrogate: str
    """The correction, its options and, where it is not a layer, the node."""
    layers: list[int]
    """The (last) layer of every node, from 0."""
    errors: list[list[float]]
    """||h_l - h*_l|| / ||h*_l|| of the initial trace and after each iteration, mean over tokens."""
    residuals: list[list[float]]
    """||f_l(h_{l-1}) - h_l|| / ||h_l||, likewise."""
    spectral_norms: list[float]
    """||J_l||_2 at the exact trace, largest of the windows."""
    contractions: list[float]
    """||J_l - A_l||_2 with the first iteration's A_l at the exact trace, largest of the windows."""
    exponent: float
    """Largest Lyapunov exponent over the region: mean log growth of a perturbation of its input, a node."""
    gains: Gains
    """Of every node, means of the windows."""
    needed: int | None
    """Iterations until the output's error is at most the tolerance; None where the stage does not iterate."""
    predicted: Predictions


@dataclass(frozen=True)
class Diagnosis(Record):
    """All regions, and under what circumstances they were measured."""

    stem = "diagnose"
    regions: tuple[RegionDiagnosis, ...]
    exponent: float
    """Largest Lyapunov exponent over all layers of the model."""
    info: dict[str, Any]

    def to_png(self) -> bytes:
        """A heat map of errors a region, and the norms by layer."""
        import matplotlib

        with matplotlib.rc_context({"font.size": 7, "lines.markersize": 3}):
            return _draw(self)

    def tables(self) -> Iterator[Table]:
        """The error that leaves each region after some iterations, and the norms."""
        title = (
            f"Relative error of each region's output after k iterations, and norms of its Jacobians (median, largest): "
            f"{self.info['num_windows']} held-out windows of {self.info['window_len']} tokens"
        )
        rows = []
        for region in self.regions:
            errors = [f"{region.errors[k][-1]:.2g}" if k < len(region.errors) else "-" for k in SHOWN_ITERS]
            norms = (region.spectral_norms, region.contractions)
            rows.append([region.setting, *errors, *(f"{np.median(each):.3g}, {max(each):.3g}" for each in norms)])
        yield make_table(title, [*(f"k={k}" for k in SHOWN_ITERS), "||J||", "||J - A||"], rows, first="region")
        title = (
            f"Iterations to a relative error of {TOLERANCE:g}, and those that the growth of perturbations predicts; "
            f"largest Lyapunov exponent over all layers: {self.exponent:+.3f} a layer"
        )
        rows = []
        for region in self.regions:
            needed = "-" if region.needed is None else str(region.needed)
            rows.append([region.setting, f"{region.exponent:+.3f}", needed, *map(str, vars(region.predicted).values())])
        columns = ["exponent", "needed", "by the exponent", "by what A leaves", "by ||J - A||"]
        yield make_table(title, columns, rows, first="region")


def diagnose_run(run_dir: Path, config: Config, which: Which = "best") -> Diagnosis:
    """:func:`diagnose` of a run's checkpoint on a few held-out windows, for the settings of ``config.eval``.

    Raises:
        InputError: see :func:`snlp_jax.eval.run.open_run`; or no setting has a parallel region.
    """
    regions = parallel_regions(parse_settings(config.model, config.eval))  # refused before anything is read or fitted
    run = open_run(run_dir, config, which)
    seq_len = config.eval.window_len(config.model)
    (windows,) = held_out_batches(run.data, seq_len=seq_len, batch_size=NUM_WINDOWS, num_batches=1)
    tokens_BT, document_BT = windows["tokens"][:, :-1], windows["document"][:, :-1] if "document" in windows else None
    diagnosis = diagnose(run.model, run.params, tokens_BT, regions, run.fits, document_BT)
    return dataclasses.replace(diagnosis, info=run.about | diagnosis.info)


def parallel_regions(settings: Mapping[str, Schedule]) -> dict[str, ParallelSegment]:
    """Name -> region, for the distinct parallel regions of all settings; those that differ only in their number of
    iterations or their tolerance are one. Layers that a setting leaves out are none of them.

    Raises:
        InputError: there is none.
    """
    names: dict[ParallelSegment, str] = {}
    for text, schedule in settings.items():
        name = re.sub(r"(?<=[:,])(k|tol)=[^,+]*,?", "", text).rstrip(",").replace(",+", "+")
        for region in schedule.regions:
            place = f" [{region.start}-{region.stop}]" if len(schedule.regions) > 1 else ""
            names.setdefault(dataclasses.replace(region, num_iters=1, tolerance=0.0), name + place)
    if not names:
        raise InputError("none of the settings has a parallel region to diagnose; give one such as idn:n=4.")
    return {name: region for region, name in names.items()}


def diagnose(
    model: LanguageModel,
    params: Params,
    tokens_BT: np.ndarray,
    regions: Mapping[str, ParallelSegment],
    fits: Mapping[str, Calibration] | None = None,
    document_BT: np.ndarray | None = None,
) -> Diagnosis:
    """Measure every region, one sequence at a time: that bounds the memory, and a Jacobian does not mix sequences.

    Each region gets its exact input from the layers before it, run in order, and is compared with its own chain of
    nodes (of fused chunks that is the fused model), for as many iterations as it has nodes.
    """
    model.check_tokens(tokens_BT)
    params = model.cast(params)
    measure = jax.jit(lambda weights, *windows: jax.lax.map(partial(_measure, model, weights), windows))
    results = []
    with Progress("diagnosing", len(regions)) as progress:
        for name, region in regions.items():
            progress.begin(name)
            weights = split(model, params, Schedule.of(model.config.num_layers, region), fits)
            results.append(_of_region(name, region, *jax.device_get(measure(weights, tokens_BT, document_BT))))
        weights = split(model, params, Schedule.of(model.config.num_layers, whole_depth(model)))
        grow = jax.jit(lambda weights, *windows: jax.lax.map(partial(_grow, model, weights), windows))
        growth = jax.device_get(grow(weights, tokens_BT, document_BT))
    info = circumstances() | {
        "dtype": jnp.dtype(model.dtype).name,
        "num_layers": model.config.num_layers,
        "num_windows": tokens_BT.shape[0],
        "window_len": tokens_BT.shape[1],
        "power_iteration_steps": NUM_STEPS,
        "perturbations": NUM_PROBES,
        "tolerance": TOLERANCE,
    }
    return Diagnosis(tuple(results), exponent(growth.log_growth.mean(0)), info)


def whole_depth(model: LanguageModel) -> ParallelSegment:
    """All layers as one region."""
    return ParallelSegment(0, model.config.num_layers, num_iters=1, correction=Identity())


def _of_region(
    name: str,
    region: ParallelSegment,
    errors: np.ndarray,
    residuals: np.ndarray,
    norms: np.ndarray,
    contractions: np.ndarray,
    growth: Growth,
) -> RegionDiagnosis:
    """From what :func:`_measure` gives, with a leading axis of windows."""
    errors_KN, contractions_N = errors.mean(0), contractions.max(0)
    gains = Gains(*(np.asarray(values.mean(0)).tolist() for values in growth))
    is_split = isinstance(region.stage, FusedSplit)
    return RegionDiagnosis(
        name,
        _surrogate_of(region),
        layers=list(range(region.start + region.layers_per_node - 1, region.stop, region.layers_per_node)),
        errors=errors_KN.tolist(),
        residuals=residuals.mean(0).tolist(),
        spectral_norms=norms.max(0).tolist(),
        contractions=contractions_N.tolist(),
        exponent=exponent(gains.log_growth),
        gains=gains,
        needed=None if is_split else iterations_needed(errors_KN[:, -1].tolist()),
        predicted=predict(errors_KN[0].tolist(), gains, contractions_N.tolist()),
    )


def _grow(model: LanguageModel, weights: Weights, window: tuple[Array, Array | None]) -> Growth:
    """Of perturbations of the embedding, over all layers, for one window; see :func:`_measure`."""
    chain_of, region, _ = _region_chain(model, weights, window)
    chain = chain_of(dataclasses.replace(region, correction=Exact()))
    return perturbation_growth(chain, Identity(), sequential(chain, with_trace=True).trace)


def _measure(model: LanguageModel, weights: Weights, window: tuple[Array, Array | None]) -> tuple[Any, ...]:
    """Errors and residuals, iterations by nodes, spectral norms, contractions and the growth of perturbations, of one
    window: tokens [T], and their documents. The layers after the region are not run."""
    chain_of, region, data_of = _region_chain(model, weights, window)
    chain, correction = chain_of(region), correction_of(model.config, region)
    data = data_of(chain)
    is_split = isinstance(region.stage, FusedSplit)
    errors = trace_errors(chain, correction, region.init, data, num_iters=1 if is_split else region.num_nodes)
    # Exact asks for layers with a forward mode. A split stage is another way to evaluate the layers: the Jacobians are
    # those of the layers themselves.
    stage = PerLayer() if is_split else region.stage
    chain = chain_of(dataclasses.replace(region, correction=Exact(), stage=stage))
    trace = sequential(chain, with_trace=True).trace
    left = contraction(chain, correction, trace, data)
    return *errors, spectral_norms(chain, trace), left, perturbation_growth(chain, correction, trace, data)


def _region_chain(
    model: LanguageModel, weights: Weights, window: tuple[Array, Array | None]
) -> tuple[Callable[[ParallelSegment], Chain], ParallelSegment, Callable[[Chain], MethodData]]:
    """What makes the chain of the first region of these weights, or of it with other fields; that region; and what
    gives a chain the data of its method."""
    tokens_BT, document_BT = jax.tree.map(lambda x: x[None], window)
    position, region = next((i, s) for i, s in enumerate(weights.segments) if isinstance(s, ParallelSegment))
    part = weights.parts[position]
    states = run_parts(model, weights.before(position), tokens_BT, document_BT=document_BT)

    def chain_of(region: ParallelSegment) -> Chain:
        posed = dataclasses.replace(part, segment=region)
        (chain,) = chains_of(model, weights.embed_head, posed, tokens_BT, states.shared, states.h_last)
        return chain

    return chain_of, region, lambda chain: method_data(part, states.shared, chain)


def _surrogate_of(region: ParallelSegment) -> str:
    stage = "" if isinstance(region.stage, PerLayer | FusedSplit) else f", {_words(region.stage)}"
    return _words(region.correction) + stage + (f", fit {region.fit}" if region.fit else "")


def _words(method: Any) -> str:
    """The class and the fields that are not at their defaults."""
    values, kind = vars(method), type(method)
    changed = ", ".join(f"{name}={value}" for name, value in values.items() if value != getattr(kind, name, None))
    return kind.__name__ + (f"({changed})" if changed else "")


def _draw(diagnosis: Diagnosis) -> bytes:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    regions, info = diagnosis.regions, diagnosis.info
    num_columns = min(4, len(regions))
    num_rows = math.ceil(len(regions) / num_columns)
    figure = Figure(figsize=(max(3.0 * num_columns + 0.8, 6.4), 2.7 * num_rows + 3.6), layout="constrained", dpi=140)
    grid = figure.add_gridspec(num_rows + 1, num_columns, height_ratios=[1.0] * num_rows + [1.2])
    maps = [figure.add_subplot(grid[divmod(index, num_columns)]) for index in range(len(regions))]
    for axis, region in zip(maps, regions, strict=True):
        errors_NK = np.nan_to_num(np.asarray(region.errors), nan=np.inf).T.clip(*COLOUR_RANGE)
        num_nodes, num_iters = errors_NK.shape
        image = axis.pcolormesh(
            range(num_iters), range(num_nodes), errors_NK, norm=LogNorm(*COLOUR_RANGE), cmap="magma"
        )
        places = sorted({0, num_nodes // 2, num_nodes - 1})
        axis.set_yticks(places, [str(region.layers[place]) for place in places])
        axis.locator_params(axis="x", integer=True, nbins=6)
        axis.set(title=region.setting, xlabel="iterations", ylabel="layer")
    figure.colorbar(image, ax=maps, shrink=0.8, extend="both", label="||h - h*|| / ||h*||, mean over tokens")
    _draw_norms(figure.add_subplot(grid[-1, :]), regions)
    text = f"{info['num_windows']} windows of {info['window_len']} tokens; {info['device']}, {info['dtype']}"
    figure.suptitle(f"Error of every layer, and why: {text}", fontsize=10)
    return to_png(figure)


def _draw_norms(axis: Any, regions: Sequence[RegionDiagnosis]) -> None:
    """Norms by layer. Regions of one surrogate, which agree where they overlap, share a colour."""
    surrogates = list(dict.fromkeys(region.surrogate for region in regions))
    for region in regions:
        _, chunks, options = region.surrogate.partition(", Chunkwise")
        label = f"||J|| of {chunks[2:]}{options}" if chunks else "||J||"
        colour = f"C{surrogates.index(region.surrogate)}"
        norms, left = np.maximum([region.spectral_norms, region.contractions], COLOUR_RANGE[0])
        axis.plot(region.layers, norms, "o-", color="#333d43", linewidth=1.6, label=label, zorder=1)
        axis.plot(region.layers, left, "o--", color=colour, linewidth=1.1, label=f"||J - A||, {region.surrogate}")
    axis.axhline(1.0, color="#9aa5ad", linewidth=0.8, linestyle=":")
    axis.set(yscale="log", xlabel="layer", ylabel="2-norm at the exact trace")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(color="#e6e9eb", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    axis.legend(shown.values(), shown.keys(), frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
