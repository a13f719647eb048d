"""Replace sub-layers of a trained model by affine maps (neural block linearization), without training.

    python -m snlp_jax.linearize runs/mine --attention 4                    # the attentions of 4 layers, in closed form
    python -m snlp_jax.linearize runs/mine --attention 4 --drop             # the control: the same ones dropped
    python -m snlp_jax.linearize runs/llama --attention 12 --greedy --data notes.jsonl --out runs/llama-nbl
    python -m snlp_jax.linearize runs/mine --attention 4 --calibrations c2:n=8,k=2   # and surrogates for the solver

Prints what a map would leave of every candidate, which ones were chosen, and perplexity before and after. The run that
is made (RUN_DIR-nblN) is as training leaves one, at step 0: eval.py, python -m snlp_jax.infer and --train.init-from
read it. linearize.json in it holds the table, calibrations/ what --calibrations has fitted.

Maps and calibrations share the command and the training text, not the statistics: maps are fitted to what the branches
of the given model read and add, calibrations to the residuals and states of whole regions of the model that is made, in
passes of their own (docs/math.md, section 4).
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from snlp_jax.cli.flags import parse
from snlp_jax.cli.made import check_free, write_run
from snlp_jax.config import Config, LinearizeConfig, MeshConfig
from snlp_jax.data.pipeline import TokenData, held_out_batches, in_parts
from snlp_jax.errors import InputError
from snlp_jax.eval.calibrations import CalibrationSpec, fit_spec, parse_calibrations, save_fit
from snlp_jax.eval.fidelity import pass_over
from snlp_jax.eval.perplexity import paired_interval, perplexity, relative_change
from snlp_jax.io.moved import kept_files
from snlp_jax.io.progress import Progress
from snlp_jax.io.provenance import circumstances
from snlp_jax.layout import prepare
from snlp_jax.linearize.maps import check_samples
from snlp_jax.linearize.nbl import Linearized, Round, check_linearize, linearize, num_steps, statistics_bytes
from snlp_jax.linearize.statistics import Batches
from snlp_jax.linearize.store import fingerprint
from snlp_jax.memory import check_room, rows_at_once
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule
from snlp_jax.parallel import make_mesh, put_batch
from snlp_jax.run import TOKENIZER_NAME, num_training_windows, read_config, read_data, read_params, with_sources
from snlp_jax.seeds import folded
from snlp_jax.solver import PerLayer, Schedule
from snlp_jax.types import Params

TABLE_NAME = "linearize.json"


@dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[Path]
    """What training, an import or an earlier linearization wrote."""
    linearize: Annotated[LinearizeConfig, tyro.conf.arg(name="")]
    data: tuple[str, ...] = ()
    """Files, folders or globs of text to fit to and, on documents that are held out, to measure on; by default the
    run's own corpus."""
    out: str = ""
    """The run directory that is made; empty means RUN_DIR-nblN, or RUN_DIR-dropN, N replaced sub-layers."""
    calibrations: tuple[str, ...] = ()
    """Surrogates and initial traces to fit to the new model on the same training text, such as c2:n=8,k=2, which
    settings then name by fit=c2; written as --calibrations of eval.py (snlp_jax/eval/calibrations.py)."""
    checkpoint: Literal["best", "last"] = "best"
    """The one of the lowest validation loss, or the newest."""
    mesh_data: Annotated[int, tyro.conf.arg(name="mesh.data")] = 1
    """Devices over which each batch of the maps' statistics is spread; 0 takes all there are."""
    num_windows: int = 64
    """Held-out windows of the model's seq_len tokens on which perplexity is measured."""

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise InputError(f"--num-windows is {self.num_windows}; it must be at least 1.")


def main() -> None:
    args = parse(Args, prog="python -m snlp_jax.linearize", description=__doc__)
    linearize_run(args)


def linearize_run(args: Args) -> Path:
    """Make a run of a run, and return its directory. Nothing is compiled before all input has been checked.

    Raises:
        InputError: no such run, a directory that holds something already, more layers than there are, too little text,
            a calibration that cannot be read or that fuses layers; too few devices, or several processes.
    """
    run_dir, options, config = args.run_dir, args.linearize, read_config(args.run_dir)
    target = Path(args.out) if args.out else _default_target(run_dir, options)
    check_free(target, " with --out")
    model = LanguageModel(config.model, config.machine)
    check_linearize(model, options)
    specs = _specs_of(args.calibrations, config.model.num_layers)
    mesh = _mesh_of(args.mesh_data)
    if args.data:
        config = with_sources(run_dir, config, args.data)
    tokens = read_data(run_dir, config)
    fit, held_out, about = draw_text(tokens, config, options, mesh)
    for spec in specs:
        num_training_windows(tokens, config.model.seq_len, spec.num_tokens)  # refuses too little text
    size = min(options.batch_size, args.num_windows)
    num_batches = args.num_windows // size
    windows = held_out_batches(tokens, seq_len=config.model.seq_len, batch_size=size, num_batches=num_batches)
    windows = in_parts(windows, rows_at_once(config.model, config.model.seq_len, len(windows[0]["tokens"])))
    step, params = read_params(run_dir, model, args.checkpoint)
    remedy = "lower --layers-at-once, or replace one kind of branch after another"
    check_room("statistics and maps", statistics_bytes(model, options), remedy, on_host=True)
    before = held_out_nll(model, params, windows)
    with Progress("fitting maps", num_steps(model, options, about["batches"])) as progress:
        tell = lambda each: progress.note(_choice(each, options))  # noqa: E731
        made = linearize(model, params, fit, held_out, options, mesh=mesh, on_step=progress.advance, on_round=tell)
    after = held_out_nll(made.model, made.params, windows)
    fits = [(spec, *fit_spec(made.model, made.params, tokens, spec)) for spec in specs]
    ppl = _perplexities(before, after, windows, config)
    rounds = [{"chosen": [list(place) for place in each.chosen], "table": _rows(each)} for each in made.rounds]
    record: dict[str, Any] = {"options": dataclasses.asdict(options), "ppl": ppl, "rounds": rounds}
    record |= {"run_dir": str(run_dir), "checkpoint": args.checkpoint, "step": step, "fingerprint": fingerprint(params)}
    record |= {"calibrations": {spec.name: {"setting": _setting(spec), "tokens": count} for spec, _, count in fits}}
    record |= {"corpus_hash": tokens.content_hash, "text": about, **circumstances()}
    files = kept_files(run_dir) | {TOKENIZER_NAME: (run_dir / TOKENIZER_NAME).read_bytes()}
    files[TABLE_NAME] = json.dumps(record, indent=1) + "\n"
    for each in fits:
        save_fit(target, made.params, *each)
    config = _config_of(config, target, made)
    write_run(target, config, made.params, files, {"val_loss": math.log(ppl["after"])})
    _print(made, ppl)
    for name, each in record["calibrations"].items():
        print(f"calibrated {name} on {each['tokens']} tokens of training text: --solvers {each['setting']}")
    print(f"wrote {target}")
    return target


def _specs_of(texts: tuple[str, ...], num_layers: int) -> tuple[CalibrationSpec, ...]:
    specs = parse_calibrations(texts, num_layers)
    for spec in specs:
        if not isinstance(spec.region.stage, PerLayer):
            raise InputError(
                f"calibration {spec.name!r} fuses layers as trained, and which of them are replaced is not known yet; "
                "leave out stage=, or fit it with eval.py --calibrations."
            )
    return specs


def _mesh_of(num_devices: int) -> Mesh | None:
    if jax.process_count() > 1:
        raise InputError(
            f"a model is linearised by one process, but there are {jax.process_count()}; start one, and give it more "
            "devices with --mesh.data."
        )
    return None if num_devices == 1 else make_mesh(MeshConfig(data=num_devices))


def _setting(spec: CalibrationSpec) -> str:
    """The solver's, with what was fitted."""
    region = spec.region
    return f"cal:{region.start}-{region.stop},k={region.num_iters},init={spec.init_name},fit={spec.name}"


# -- Text --------------------------------------------------------------------------------------------------------------


def draw_text(
    data: TokenData, config: Config, options: LinearizeConfig, mesh: Mesh | None = None
) -> tuple[Batches, Batches, dict[str, Any]]:
    """Batches of training windows to fit to, others that choose and rank, and how many tokens these are.

    Raises:
        InputError: too few tokens for the width, or fewer windows in a batch than devices.
    """
    source, length = data.windows("train", config.model.seq_len), config.model.seq_len
    rows = mesh.shape["data"] if mesh is not None else 1
    if options.skip_first >= length:
        raise InputError(f"--skip-first is {options.skip_first}, but windows have {length} tokens; lower it.")
    if options.batch_size < rows:
        raise InputError(
            f"--batch-size is {options.batch_size}, but each of {rows} devices takes a window or more; raise it, or "
            "lower --mesh.data."
        )
    fewest = -(-2 * config.model.embed_dim // (length - options.skip_first))
    wanted = min(-(-options.tokens // length), len(source) * 4 // 5)
    size = min(options.batch_size, wanted, len(source) // 5) // rows * rows
    num_fit = wanted // max(size, 1)
    num_held_out = max(min(-(-num_fit // 4), len(source) // max(size, 1) - num_fit), 0)
    if num_fit * size < fewest or num_held_out == 0:
        check_samples(num_fit * size * (length - options.skip_first), config.model.embed_dim)
        raise InputError(
            f"the training split has {len(source)} windows of {length} tokens, too few to fit maps to some and try "
            "them on others; give more text with --data, or lower --batch-size."
        )
    order = np.random.default_rng(folded(options.seed)).permutation(len(source))
    at_once = rows_at_once(config.model, length, size, backend=jax.default_backend(), multiple=rows)

    def batches(first: int, count: int) -> Batches:
        def stream() -> Any:
            for start in range(first * size, (first + count) * size, at_once):
                items = [source[int(index)] for index in order[start : start + at_once]]
                kept = [name for name in ("tokens", "document") if name in items[0]]
                yield {name: np.stack([item[name] for item in items]) for name in kept}

        return stream

    counts = {"tokens": num_fit * size * length, "held_out_tokens": num_held_out * size * length}
    num_batches = (num_fit + num_held_out) * (size // at_once)
    about = counts | {"batch_size": at_once, "batches": num_batches, "skip_first": options.skip_first}
    return batches(0, num_fit), batches(num_fit, num_held_out), about


def held_out_nll(model: LanguageModel, params: Params, batches: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Of every target in nats, [windows, T]."""
    first = batches[0]["tokens"]
    weights = prepare(model, params, Schedule.of(model.config.num_layers), num_tokens=first.size, layout="stack")
    run = jax.jit(lambda weights, *inputs: pass_over(model, weights, *inputs)[1].nll_BT)
    parts = []
    with Progress("measuring perplexity", len(batches)) as progress:
        for batch in batches:
            inputs = put_batch(None, (batch["tokens"], batch.get("document")), is_whole=True)
            parts.append(np.asarray(run(weights, *inputs)))
            progress.advance()
    return np.concatenate(parts)


# -- What is written and said ------------------------------------------------------------------------------------------


def _default_target(run_dir: Path, options: LinearizeConfig) -> Path:
    count = options.attention + options.mlp + options.blocks
    return run_dir.parent / f"{run_dir.absolute().name}-{'drop' if options.drop else 'nbl'}{count}"


def _config_of(config: Config, target: Path, made: Linearized) -> Config:
    """Of the new run: the old one's, but for what its layers cannot do."""

    def runs(setting: str) -> bool:
        schedule = parse_schedule(setting, config.model.num_layers)
        return all(isinstance(region.stage, PerLayer) and not region.fit for region in schedule.regions)

    evaluation = dataclasses.replace(
        config.eval, solvers=tuple(filter(runs, config.eval.solvers)), calibrations=()
    )  # fused layers must be alike, and the old run's calibrations are of other parameters
    return dataclasses.replace(
        config,
        name=target.absolute().name,
        run_dir=str(target),
        model=made.model.config,
        eval=evaluation,
        mesh=MeshConfig(),
    )


def _perplexities(before: np.ndarray, after: np.ndarray, batches: list[dict[str, np.ndarray]], config: Config) -> Any:
    weight = np.concatenate([batch["weight"] for batch in batches]) if "weight" in batches[0] else None
    interval = paired_interval(after, before, num_bootstrap=config.eval.num_bootstrap, weight_WT=weight)
    ppl: dict[str, Any] = {"before": perplexity(before, weight), "after": perplexity(after, weight)}
    return ppl | {
        "change": relative_change(after, before, weight),
        "interval": interval,
        "num_windows": len(before),
    }


def _rows(round: Round) -> list[dict[str, Any]]:
    ranks = {place: rank for rank, place in enumerate(round.chosen, 1)}
    return [each.row() | {"chosen": ranks.get(each.place, 0)} for each in round.candidates]


def _choice(round: Round, options: LinearizeConfig) -> str:
    names = ", ".join(f"{branch} {layer}" for branch, layer in round.chosen)
    return f"{'dropped' if options.drop else 'replaced'} {names}"


def _print(made: Linearized, ppl: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    for number, each in enumerate(made.rounds, 1):
        title = f"round {number} of {len(made.rounds)}" if len(made.rounds) > 1 else None
        table = Table(title=title, padding=(0, 1))
        for name in ("layer", "branch", "ridge", "condition", "NMSE", "with residual", "held out", "CCA bound", ""):
            table.add_column(name, justify="left" if name in ("branch", "") else "right")
        for row in _rows(each):
            numbers = [f"{row['ridge']:.0e}" if row["ridge"] else "0", f"{row['condition'] or math.inf:.1e}"]
            numbers += [f"{row[name]:.5f}" for name in ("nmse", "nmse_residual", "held_out")]
            chosen = f"chosen {row['chosen']}" if row["chosen"] else ""
            table.add_row(str(row["layer"]), row["branch"], *numbers, f"{row['cca_bound']:.3f}", chosen)
        console.print(table)
    low, high = ppl["interval"] or (math.nan, math.nan)
    print(
        f"perplexity on {ppl['num_windows']} held-out windows: {ppl['before']:.4f} before, {ppl['after']:.4f} after, "
        f"{ppl['change']:+.2%} ({low:+.2%} to {high:+.2%})"
    )
