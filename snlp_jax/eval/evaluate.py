"""The evaluation of a model: every solver setting against the sequential pass, on the same windows and machine."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from snlp_jax.checks import check_mesh, check_schedule
from snlp_jax.config import EvalConfig, MeshConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.eval.fidelity import (
    Comparison,
    GreedyMatch,
    greedy_matches,
    join_comparisons,
    make_compare_fn,
    make_reference_fn,
)
from snlp_jax.eval.perplexity import (
    BOOTSTRAP_SEED,
    change_by_position,
    paired_interval,
    perplexity,
    relative_change,
    token_mean,
)
from snlp_jax.eval.report import Report, SettingResult
from snlp_jax.eval.timing import LAYOUTS, TIMING_SEED, Timing, time_schedules
from snlp_jax.eval.weights import prepare_all
from snlp_jax.infer.greedy import make_greedy_fn
from snlp_jax.io.provenance import circumstances
from snlp_jax.model import Model, num_params
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh, put_batch
from snlp_jax.parts import Weights
from snlp_jax.solver import Calibration, Schedule
from snlp_jax.types import Params

OnProgress = Callable[[str], None]


def default_solvers(model: ModelConfig) -> tuple[str, ...]:
    """The last third, half and two thirds of the layers with one and two iterations; the largest also batch_forward."""
    shares = (1 / 3, 1 / 2, 2 / 3)
    sizes = sorted({min(max(2, round(share * model.num_layers)), model.num_layers) for share in shares})
    corrections = ("idn", "hcn") if model.num_streams else ("idn", "sid") if model.use_x0_resid else ("idn",)
    grid = [f"{name}:n={size},k={k}" for name in corrections for size in sizes for k in (1, 2)]
    return (*grid, f"idn:n={sizes[-1]},k=1,init=batch_forward")


def parse_settings(model: ModelConfig, config: EvalConfig) -> dict[str, Schedule]:
    """Setting -> schedule: the sequential pass, then ``config.solvers`` or the default grid, without repetitions.

    Raises:
        InputError: names the setting that the model cannot run, or the length that it cannot read.
    """
    greedy_len = config.greedy_prompt_len + config.greedy_tokens if _has_greedy(config) else 0
    for what, length in (("eval.timing_len", config.timing_len), ("the greedy comparison", greedy_len)):
        if length > model.max_context:
            raise InputError(
                f"{what} takes {length} tokens, but the model reads {model.max_context} at most; lower it."
            )
    if _has_greedy(config) and config.greedy_prompt_len == 0:
        raise InputError("eval.greedy_prompt_len is 0; give at least 1, or set eval.greedy_tokens to 0.")
    texts = [" ".join(text.split()) for text in config.solvers] or default_solvers(model)
    schedules = {text: parse_schedule(text, model.num_layers) for text in ("seq", *texts)}
    for text, schedule in schedules.items():
        try:
            check_schedule(model, schedule)
        except InputError as error:
            raise InputError(f"solver setting {text!r}: {error}") from error
    return schedules


def evaluate(
    model: Model,
    params: Params,
    batches: Sequence[np.ndarray],
    config: EvalConfig,
    fits: Mapping[str, Calibration] | None = None,
    target_weights: Sequence[np.ndarray] | None = None,
    documents: Sequence[np.ndarray] | None = None,
) -> Report:
    """Measure every setting of ``config`` against the sequential pass.

    Args:
        batches: windows, int32 [B, T + 1], of equal shape. Quality is measured on them; greedy continuations start
            from the first tokens of some. The timed forward reads random tokens.
        fits: calibrations by the names that settings give (``config.calibrations`` is read by ``evaluate_run``).
        target_weights: how much each target counts, [B, T] a batch; all alike by default.
        documents: number of each token's document, [B, T + 1] a batch, where tokens attend to their own alone.

    Raises:
        InputError: a setting that the model or the devices cannot run, before anything is compiled.
    """
    settings = parse_settings(model.config, config)
    schedules = list(settings.values())
    mesh = None if config.mesh == MeshConfig() else make_mesh(config.mesh)
    if mesh is not None:
        _check_batches(batches[0].shape[0], config, mesh)
        for schedule in schedules:
            check_mesh(schedule, mesh)
    windows = np.concatenate(batches)
    model.check_tokens(windows)
    timings: Sequence[Timing | None] = [None] * len(schedules)
    timing_steps = len(LAYOUTS) * len(schedules) + config.timing_repeats if config.timing_repeats else 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = len(schedules) * (len(batches) + _has_greedy(config)) + timing_steps
        task = progress.add_task("", total=total)
        advance = lambda text: progress.update(task, description=text, advance=1)  # noqa: E731
        weights = prepare_all(
            model,
            params,
            schedules,
            num_tokens=batches[0].size,
            layout="stack",
            mesh=mesh,
            sequential=config.sequential,
            fits=fits,
        )
        comparisons = _compare(model, weights, batches, documents, mesh, advance)
        greedy = _decode(model, weights, windows, config, mesh, advance)
        del weights
        if config.timing_repeats:
            timings = time_schedules(model, params, schedules, config, mesh=mesh, fits=fits, on_progress=advance)
    weight_WT = None if target_weights is None else np.concatenate(target_weights)
    results = [
        _result(text, schedule, (comparison, comparisons[0]), matches, (timing, timings[0]), config, weight_WT)
        for (text, schedule), comparison, matches, timing in zip(
            settings.items(), comparisons, greedy, timings, strict=True
        )
    ]
    return Report(tuple(results), _circumstances(model, windows, config, mesh, weight_WT))


def _circumstances(
    model: Model, windows: np.ndarray, config: EvalConfig, mesh: Mesh | None, weight_WT: np.ndarray | None
) -> dict[str, Any]:
    return circumstances() | {
        "num_devices": jax.device_count(),
        "mesh": None if mesh is None else dict(mesh.shape) | {"sequential": config.sequential},
        "dtype": jnp.dtype(model.dtype).name,
        "num_layers": model.config.num_layers,
        "num_params": num_params(model.abstract_params()),
        "num_windows": windows.shape[0],
        "window_len": windows.shape[1] - 1,
        "num_targets": windows[:, 1:].size if weight_WT is None else float(weight_WT.sum()),
        "greedy_prompt_len": _prompt_len(windows, config),
        "timing_batch": config.timing_batch,
        "timing_len": config.timing_len or model.config.seq_len,
        "timing_repeats": config.timing_repeats,
        "seeds": {"bootstrap": BOOTSTRAP_SEED, "timing": TIMING_SEED},
    }


def _check_batches(num_rows: int, config: EvalConfig, mesh: Mesh) -> None:
    """Refuse batches that the mesh's data axis does not divide."""
    counts = {"eval.batch_size": num_rows}
    counts |= {"eval.greedy_prompts": config.greedy_prompts} if _has_greedy(config) else {}
    counts |= {"eval.timing_batch": config.timing_batch} if config.timing_repeats else {}
    for name, count in counts.items():
        if count % mesh.shape["data"]:
            raise InputError(f"{name} {count} is not a multiple of mesh.data {mesh.shape['data']}; change one.")


def _compare(
    model: Model,
    weights: Sequence[Weights],
    batches: Sequence[np.ndarray],
    documents: Sequence[np.ndarray] | None,
    mesh: Mesh | None,
    step: OnProgress,
) -> list[Comparison]:
    """Every setting over all batches; the first one is the reference, run once a batch."""
    reference_fn, compare_fn = make_reference_fn(model, mesh), make_compare_fn(model, mesh)
    parts: list[list[Comparison]] = [[] for _ in weights]
    for index, rows in enumerate(batches):
        step("comparing")
        batch, document = put_batch(mesh, (rows, documents[index] if documents else None), is_whole=True)
        reference, exact = reference_fn(weights[0], batch, document)
        parts[0].append(jax.device_get(exact))
        for setting, laid_out in enumerate(weights[1:], start=1):
            step("comparing")
            parts[setting].append(jax.device_get(compare_fn(laid_out, batch, reference, document)))
    return [join_comparisons(part) for part in parts]


def _decode(
    model: Model,
    weights: Sequence[Weights],
    windows: np.ndarray,
    config: EvalConfig,
    mesh: Mesh | None,
    step: OnProgress,
) -> list[tuple[GreedyMatch, ...]]:
    """Greedy continuations of every setting against those of the first; () each where they are not wanted."""
    if not _has_greedy(config):
        return [()] * len(weights)
    prompt_len, num_prompts = _prompt_len(windows, config), min(config.greedy_prompts, len(windows))
    decode = make_greedy_fn(model, prompt_len=prompt_len, num_tokens=config.greedy_tokens, mesh=mesh)
    prompts = windows[np.arange(num_prompts) * len(windows) // num_prompts, :prompt_len]
    guess = np.zeros((num_prompts, config.greedy_tokens), windows.dtype)
    texts: list[np.ndarray] = []
    for laid_out in weights:
        step("decoding")
        start = put_batch(mesh, np.concatenate([prompts, guess], axis=1), is_whole=True)
        texts.append(np.asarray(decode(laid_out, start)))
        guess = texts[0]  # the other passes will say much the same
    return [greedy_matches(text, texts[0]) for text in texts]


def _has_greedy(config: EvalConfig) -> bool:
    return config.greedy_prompts > 0 and config.greedy_tokens > 0


def _prompt_len(windows: np.ndarray, config: EvalConfig) -> int:
    return min(config.greedy_prompt_len, windows.shape[1] - 1)


def _result(
    text: str,
    schedule: Schedule,
    compared: tuple[Comparison, Comparison],
    greedy: tuple[GreedyMatch, ...],
    timed: tuple[Timing | None, Timing | None],
    config: EvalConfig,
    weight_WT: np.ndarray | None,
) -> SettingResult:
    """One row; the second of each pair is the sequential pass's."""
    (comparison, reference), (timing, twin) = compared, timed
    iterations = tuple(
        (float(made.mean()), float(made.max(1).mean()))
        for made, region in zip(comparison.iterations, schedule.regions, strict=True)
        if region.tolerance
    )
    nlls = np.asarray(comparison.nll_BT), np.asarray(reference.nll_BT)
    return SettingResult(
        setting=text,
        is_oracle=schedule.is_oracle,
        depth=schedule.depth,
        mean_depth=mean_depth(schedule, comparison.iterations),
        num_block_evals=schedule.num_block_evals,
        ppl=perplexity(nlls[0], weight_WT),
        ppl_change=relative_change(*nlls, weight_WT),
        ppl_interval=paired_interval(*nlls, num_bootstrap=config.num_bootstrap, weight_WT=weight_WT),
        kl=token_mean(np.asarray(comparison.kl_BT), weight_WT),
        top1=token_mean(np.asarray(comparison.agrees_BT), weight_WT),
        cosine=token_mean(np.asarray(comparison.cosine_BT), weight_WT),
        state_error=token_mean(np.asarray(comparison.error_BT), weight_WT),
        nll_change_by_position=change_by_position(*nlls, weight_WT=weight_WT),
        iterations=iterations,
        residual_norms=tuple(tuple(map(float, region)) for region in comparison.residual_norms),
        greedy=greedy,
        timing=timing,
        speedup=twin.median_ms / timing.median_ms if timing and twin else None,
    )


def mean_depth(schedule: Schedule, iterations: Sequence[Any]) -> float:
    """Dependent block evaluations of an average sequence, which may stop before the last iteration."""
    depth = float(schedule.depth)
    for region, made in zip(schedule.regions, iterations, strict=True):
        depth -= (region.num_iters - float(made.mean())) * (region.depth - region.init.num_evals) / region.num_iters
    return depth
