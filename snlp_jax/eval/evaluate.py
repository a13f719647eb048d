"""The evaluation of a model: every solver setting against the sequential pass, on the same windows and machine."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snlp_jax.checks import check_mesh, check_schedule
from snlp_jax.config import EvalConfig, MeshConfig, ModelConfig
from snlp_jax.data.pipeline import in_parts
from snlp_jax.errors import InputError
from snlp_jax.eval.fidelity import (
    Comparison,
    GreedyMatch,
    greedy_matches,
    join_comparisons,
    make_compare_fn,
    mean_cost,
    mean_norms,
)
from snlp_jax.eval.intervals import BOOTSTRAP_SEED
from snlp_jax.eval.perplexity import change_by_position, paired_interval, perplexity, relative_change, token_mean
from snlp_jax.eval.report import Report, SettingResult
from snlp_jax.eval.timing import LAYOUTS, TIMING_SEED, Timing, time_schedules
from snlp_jax.eval.weights import prepare_all
from snlp_jax.infer.greedy import make_greedy_fn
from snlp_jax.io.progress import Progress
from snlp_jax.io.provenance import circumstances
from snlp_jax.memory import check_room, program_bytes, rows_at_once
from snlp_jax.model import Model, num_params
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh, put_batch
from snlp_jax.parallel.sharding import with_shardings
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
    lengths = {"eval.seq_len": config.seq_len, "eval.timing_len": config.timing_len}
    for what, length in (lengths | {"the greedy comparison": greedy_len}).items():
        check_length(what, length, model)
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


def check_length(what: str, num_tokens: int, model: ModelConfig) -> None:
    """Refuse what takes more tokens than the model reads."""
    longest = model.max_context
    if num_tokens > longest:
        raise InputError(f"{what} takes {num_tokens} tokens, but the model reads {longest} at most; lower it.")


def mesh_of(config: EvalConfig, schedules: Iterable[Schedule], num_rows: Mapping[str, int]) -> Mesh | None:
    """The mesh that ``config`` asks for, if it does.

    Raises:
        InputError: too few devices, a schedule that cannot lie on them, or a number of rows, by its name, that they do
            not divide.
    """
    if config.mesh == MeshConfig():
        return None
    mesh = make_mesh(config.mesh)
    for name, count in num_rows.items():
        if count % mesh.shape["data"]:
            raise InputError(f"{name} {count} is not a multiple of mesh.data {mesh.shape['data']}; change one.")
    for schedule in schedules:
        check_mesh(schedule, mesh)
    return mesh


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
    num_rows = {"eval.batch_size": len(batches[0])}
    num_rows |= {"eval.greedy_prompts": config.greedy_prompts} if _has_greedy(config) else {}
    num_rows |= {"eval.timing_batch": config.timing_batch} if config.timing_repeats else {}
    mesh = mesh_of(config, schedules, num_rows)
    windows = np.concatenate(batches)
    model.check_tokens(windows)
    inputs = [{"tokens": rows} for rows in batches]
    if documents is not None:
        inputs = [batch | {"document": rows} for batch, rows in zip(inputs, documents, strict=True)]
    inputs = in_parts(inputs, _rows_at_once(model, batches[0], mesh))
    timings: Sequence[Timing | None] = [None] * len(schedules)
    num_steps = len(schedules) * (1 + len(inputs) + _has_greedy(config))
    num_steps += len(LAYOUTS) * len(schedules) + 1 + config.timing_repeats if config.timing_repeats else 0
    with Progress("evaluating", num_steps) as progress:
        weights = prepare_all(
            model,
            params,
            schedules,
            num_tokens=inputs[0]["tokens"].size,
            layout="stack",
            mesh=mesh,
            sequential=config.sequential,
            fits=fits,
        )
        comparisons = _compare(model, dict(zip(settings, weights, strict=True)), inputs, mesh, progress.begin)
        greedy = _decode(model, weights, windows, config, mesh, progress.begin)
        del weights
        if config.timing_repeats:
            timings = time_schedules(model, params, schedules, config, mesh=mesh, fits=fits, on_progress=progress.begin)
    weight_WT = None if target_weights is None else np.concatenate(target_weights)
    results = []
    for (text, schedule), found, matches, timing in zip(settings.items(), comparisons, greedy, timings, strict=True):
        result = _quality(text, schedule, found, comparisons[0].nll_BT, config.num_bootstrap, weight_WT)
        speedup = timings[0].median_ms / timing.median_ms if timings[0] and timing else None
        results.append(dataclasses.replace(result, greedy=matches, timing=timing, speedup=speedup))
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
        "timing_len": config.timing_len or config.window_len(model.config),
        "timing_repeats": config.timing_repeats,
        "seeds": {"bootstrap": BOOTSTRAP_SEED, "timing": TIMING_SEED},
    }


def _rows_at_once(model: Model, window_BT: np.ndarray, mesh: Mesh | None) -> int:
    num_rows, num_tokens = window_BT.shape[0], window_BT.shape[1] - 1
    multiple = 1 if mesh is None else mesh.shape["data"]
    return rows_at_once(model.config, num_tokens, num_rows, backend=model.backend, multiple=multiple)


def _compare(
    model: Model,
    weights: Mapping[str, Weights],
    batches: Sequence[Mapping[str, np.ndarray]],
    mesh: Mesh | None,
    step: OnProgress,
) -> list[Comparison]:
    """Every setting over all batches; the first one is the reference, run once a batch.

    Raises:
        InputError: a setting takes more memory than is free; all are compiled before any runs.
    """
    compare: Any = make_compare_fn(model, mesh)
    place = lambda batch: put_batch(mesh, (batch["tokens"], batch.get("document")), is_whole=True)  # noqa: E731
    reference, programs, first = None, [], place(batches[0])
    num_rows, num_tokens = batches[0]["tokens"].shape
    for name, laid_out in weights.items():
        step(f"compiling {name}")
        programs.append(compare.lower(laid_out, *first, reference).compile())
        what = f"setting {name!r} on {num_rows} windows of {num_tokens - 1} tokens"
        check_room(what, program_bytes(programs[-1]), "lower --seq-len or --batch-size, or evaluate smaller regions")
        if reference is None:  # its shapes, as the others will read it
            made, _ = jax.eval_shape(compare, laid_out, *first)
            reference = with_shardings(made, programs[0].output_shardings[0])
    rounds: list[list[Comparison]] = []
    for number, batch in enumerate(batches, 1):
        inputs, reference, found = place(batch), None, []
        for (name, laid_out), program in zip(weights.items(), programs, strict=True):
            step(f"{name}, windows {number} of {len(batches)}")
            reference, comparison = program(laid_out, *inputs, reference)
            found.append(jax.device_get(comparison))
        rounds.append(found)
    return [join_comparisons(parts) for parts in zip(*rounds, strict=True)]


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


def _quality(
    text: str,
    schedule: Schedule,
    found: Comparison,
    reference_WT: np.ndarray,
    num_bootstrap: int,
    weight_WT: np.ndarray | None,
) -> SettingResult:
    """One row without its costs; ``reference_WT`` are the sequential pass's negative log-likelihoods."""
    nll_WT, of_regions = found.nll_BT, list(zip(found.iterations, schedule.regions, strict=True))
    return SettingResult(
        setting=text,
        is_oracle=schedule.is_oracle,
        depth=schedule.depth,
        mean_depth=mean_cost(schedule, found.iterations)[0],
        num_block_evals=schedule.num_block_evals,
        ppl=perplexity(nll_WT, weight_WT),
        ppl_change=relative_change(nll_WT, reference_WT, weight_WT),
        ppl_interval=paired_interval(nll_WT, reference_WT, num_bootstrap=num_bootstrap, weight_WT=weight_WT),
        kl=token_mean(found.kl_BT, weight_WT),
        top1=token_mean(found.agrees_BT, weight_WT),
        cosine=token_mean(found.cosine_BT, weight_WT),
        state_error=token_mean(found.error_BT, weight_WT),
        nll_change_by_position=change_by_position(nll_WT, reference_WT, weight_WT=weight_WT),
        residual_norms=tuple(
            tuple(map(float, mean_norms(*region)))
            for region in zip(found.residual_norms, found.iterations, strict=True)
        ),
        iterations=tuple((float(n.mean()), float(n.max(1).mean())) for n, region in of_regions if region.tolerance),
    )
