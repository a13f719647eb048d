"""The training run: check everything, build, restore, step, evaluate, save. Reads from top to bottom."""

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from snlp_jax.config import Config, to_json
from snlp_jax.data.chat import prepare_data
from snlp_jax.data.pipeline import TokenData, held_out_batches, train_iterator
from snlp_jax.data.tokenizer import Tokenizer, check_vocab
from snlp_jax.errors import DivergedError, InputError
from snlp_jax.infer.greedy import make_greedy_fn
from snlp_jax.io.checkpoint import Checkpointer, check_run_dir
from snlp_jax.io.files import atomic_write
from snlp_jax.io.metrics import MetricsWriter
from snlp_jax.layout import training_weights
from snlp_jax.model import LanguageModel, num_params
from snlp_jax.parallel.mesh import data_shard, make_mesh, put_batch
from snlp_jax.parallel.processes import Vote, all_or_none, check_same, is_first
from snlp_jax.parallel.sharding import bytes_per_device
from snlp_jax.train.flops import train_flops_per_token
from snlp_jax.train.loss import Plan, balanced, loss_fn, make_plan, start_step
from snlp_jax.train.memory import check_state
from snlp_jax.train.observe import Meter, Profiler, RunRecord, make_observe, memory
from snlp_jax.train.report import REPORT_NAME, write_html
from snlp_jax.train.start import its_data, read_origin
from snlp_jax.train.step import (
    TrainState,
    abstract_saved,
    abstract_state,
    from_saved,
    make_init,
    make_reader,
    make_step,
    optimizer_of,
    to_saved,
)
from snlp_jax.types import Array, Batch

logger = logging.getLogger(__name__)

SAMPLE_PROMPT_LEN = 32
"""Tokens of held-out text that a sample continues."""


def train(config: Config, *, resume: bool = False, started: float | None = None) -> Path:
    """Run (or, with ``resume``, continue) the experiment and return its run directory.

    The directory receives config.json, tokenizer.json, metrics.jsonl and checkpoints/. SIGTERM or Ctrl-C saves a
    checkpoint and returns early. Several processes call this together (snlp_jax/parallel/processes.py) on a directory
    they all see; the first one writes and speaks for all, and a signal to any of them stops all after the same step.
    A run that is killed and resumed ends with the same parameters, bit for bit, as an unbroken one on the same mesh
    wherever the backend's kernels are deterministic: always on CPU; on GPU with
    ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``.

    Args:
        started: ``time.time()`` of the start of the process, for the reported time to the first step.

    Raises:
        InputError: bad input, before anything is compiled.
        DivergedError: NaN or infinity in the metrics; names the step, the metrics and the last good checkpoint.
    """
    started = started or time.time()
    console, run_path, tc = Console(quiet=not is_first()), config.run_path, config.train

    # -- Check: everything that can be wrong is looked at before anything is compiled or written ----------------------
    with all_or_none():
        mesh = make_mesh(config.mesh)
        part, num_parts = data_shard(mesh)
        model = LanguageModel(config.model)
        data = prepare_data(its_data(config, resume))
        check_vocab(data.tokenizer, config.model.vocab_size)
        seq_len, eval_rows = config.model.seq_len, tc.batch_size // tc.num_microbatches
        sizes = {"seq_len": seq_len, "batch_size": tc.batch_size, "seed": config.data.seed}
        batches = train_iterator(data, **sizes, process_index=part, process_count=num_parts)
        windows = held_out_batches(data, seq_len=seq_len, batch_size=eval_rows, num_batches=tc.eval_batches)
        held_out = [Batch(**rows) for rows in windows]
        _check_division(held_out, config, mesh)
        optimizer = optimizer_of(model, config, mesh)
        abstract = abstract_state(model, optimizer, mesh, config)
        check_state(abstract, config, mesh)
        observe = make_observe(model, config, mesh) if tc.frontier_every else None
    check_same("config", to_json(config))
    check_same("corpus", data.content_hash)
    with all_or_none():
        if is_first():
            check_run_dir(run_path, to_json(config), resume)
            _check_corpus(run_path, data)
            atomic_write(run_path / "tokenizer.json", data.tokenizer.to_json())

    # -- Build --------------------------------------------------------------------------------------------------------
    tokens_per_step = tc.batch_size * config.model.seq_len
    saved = abstract_saved(abstract, model, mesh)
    read = make_reader(model, config, mesh)
    step_fn, eval_fn, sample_fn = make_step(model, optimizer, config, mesh), _make_eval(model, config, mesh), None
    console.print(
        f"{config.name}: {num_params(saved['params']) / 1e6:.2f} M parameters, {data.train.size / 1e6:.1f} M training "
        f"tokens, {tc.num_steps} steps of {tokens_per_step} tokens on {_describe_devices(mesh, config, abstract)}"
    )

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpointer(run_path / "checkpoints", tc.keep_last, config_json=to_json(config))
        )
        with all_or_none():
            about = {"name": config.name, "config": dataclasses.asdict(config)}
            sinks: dict[str, Any] = {"tensorboard": tc.tensorboard, "wandb_project": tc.wandb_project, "about": about}
            writer = stack.enter_context(MetricsWriter(run_path if is_first() else None, **sinks))

        # -- Restore --------------------------------------------------------------------------------------------------
        restored = checkpoints.restore(saved, batches) if resume else None
        first_step = 0
        if restored is None:
            its_step, origin = read_origin(config, saved["params"]) if tc.init_from else (0, None)
            state: TrainState = make_init(model, optimizer, tc.seed, mesh, config)(origin)
            del origin
            if tc.init_from:
                console.print(f"starting from step {its_step} of {tc.init_from}")
        else:
            first_step, state, batches = restored[0], from_saved(restored[1]), restored[2]
            console.print(f"resumed from the checkpoint of step {first_step}")
        # What a killed run recorded beyond its last checkpoint comes again.
        writer.truncate_after(first_step if restored else -1)
        if first_step >= tc.num_steps:
            if is_first() and not (run_path / REPORT_NAME).exists():
                write_html(run_path)  # killed after its last checkpoint
            console.print(f"{run_path} is finished ({first_step} steps)")
            return run_path

        facts = {"num_params": num_params(saved["params"]), "flops_per_token": train_flops_per_token(config.model)}
        record = RunRecord(run_path if is_first() else None, first_step, started, facts)
        profiler = Profiler(run_path, tc.profile_start, tc.profile_steps if is_first() else 0, first_step)
        stack.callback(profiler.close)

        # -- Step -----------------------------------------------------------------------------------------------------
        stop, vote = stack.enter_context(_stop_on_signal()), Vote()
        progress = stack.enter_context(_progress(console))
        meter = Meter(config, tokens_per_step, mesh.size)
        task = progress.add_task("train", total=tc.num_steps, completed=first_step, note="compiling")
        pending: tuple[int, dict[str, Array]] | None = None

        def read_pending() -> None:
            """Read the metrics of the step before, which the device has finished by now, and stop on NaN."""
            nonlocal pending
            if pending is None:
                return
            step, device_metrics = pending
            pending = None
            metrics = {name: float(value) for name, value in device_metrics.items()}
            if not all(map(math.isfinite, metrics.values())):
                raise DivergedError(
                    f"step {step} gave {metrics}; the last good checkpoint is that of step {checkpoints.latest_step} "
                    f"in {run_path}. Lower optim.lr_scale or set optim.max_grad_norm and start again from it."
                )
            if step == first_step + 1:
                logger.info("first step done %.1f s after the start", time.time() - started)
            if step % tc.log_every == 0 or step == tc.num_steps:
                rates = meter.rates(step)
                writer.write(step, {**metrics, **rates, **memory()})
                note = f"loss {metrics['loss']:.3f}  " + "  ".join(f"{k} {v:.3g}" for k, v in rates.items())
                progress.update(task, completed=step, note=note)
                if not console.is_terminal:
                    console.print(f"step {step}/{tc.num_steps}  {note}", highlight=False)

        def evaluate(done: int, params: Any) -> dict[str, float]:
            """Record and print the held-out metrics after ``done`` steps."""
            with meter.paused():
                val_metrics = eval_fn(params, held_out, max(done - 1, 0))
            writer.write(done, val_metrics)
            text = "  ".join(f"{name} {value:.4f}" for name, value in val_metrics.items())
            console.print(f"step {done}  {text}", highlight=False)
            return val_metrics

        if tc.init_from and first_step == 0:
            evaluate(0, read(state))  # what it starts from

        params: Any = None
        for step in range(first_step, tc.num_steps):
            plan = make_plan(config.loss, step, tc.num_steps, tc.seed)
            with meter.waiting():
                batch = Batch(**next(batches))
            model.check_tokens(batch.tokens)
            profiler.before(step + 1)
            state, metrics = step_fn(state, put_batch(mesh, batch), plan=plan)
            if notice := profiler.after(step + 1, metrics):
                console.print(notice, highlight=False, soft_wrap=True)
            read_pending()
            pending = step + 1, metrics

            done = step + 1
            is_stopping = vote(stop.requested)  # asked once: a signal that comes later waits for the next step
            is_last = done == tc.num_steps
            should_eval = is_last or _is_due(done, tc.eval_every)
            should_sample = _is_due(done, tc.sample_every)
            should_observe = observe is not None and (is_last or _is_due(done, tc.frontier_every))
            # Who sends a signal may not wait for long: nothing but what is due anyway comes before the checkpoint.
            should_save = is_last or is_stopping or _is_due(done, tc.checkpoint_every)
            if should_eval or should_sample or should_observe or should_save:
                read_pending()  # waits for the step: no checkpoint before its metrics proved finite, and honest rates
                with meter.paused():
                    params = read(state)
            val_metrics = evaluate(done, params) if should_eval else {}
            if observe is not None and should_observe:
                with meter.paused():
                    observed = observe(params, held_out)
                writer.write(done, observed)
                text = "  ".join(f"{n} {v:.4f}" for n, v in observed.items() if n.startswith("frontier/"))
                console.print(f"step {done}  {text}", highlight=False, style="dim")
            if should_sample:
                with meter.paused():
                    sample_fn = sample_fn or _make_sample(model, config, held_out, data.tokenizer, mesh)
                    console.print(sample_fn(params), style="dim", highlight=False, markup=False)
            if should_save:
                with meter.paused():
                    checkpoints.save(done, to_saved(state, params), batches, val_metrics)
                    record.update(done)
            params = None  # a merged copy need not outlive this
            if is_stopping:
                console.print(f"stopped by a signal; step {done} is saved, continue with --resume")
                return run_path
    if is_first():
        write_html(run_path)
    console.print(f"finished in {time.time() - started:.0f} s: {run_path}")
    return run_path


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_corpus(run_path: Path, data: TokenData) -> None:
    """Refuse to continue a run on other text: the position in the data would mean something else."""
    path = run_path / "corpus.txt"
    if path.exists() and path.read_text().strip() != data.content_hash:
        raise InputError(f"the corpus has changed since {str(run_path)!r} began; restore it or use another --run-dir.")
    atomic_write(path, data.content_hash + "\n")


def _check_division(held_out: list[Batch], config: Config, mesh: Mesh) -> None:
    """Training batches are checked with the config; a short held-out split may give smaller ones."""
    rows, parts = held_out[0].tokens.shape[0], mesh.shape["data"] * config.mesh.ring_microbatches
    if config.train.batch_size // config.train.num_microbatches % parts or rows % parts:
        raise InputError(
            f"batches of {config.train.batch_size // config.train.num_microbatches} windows to train and {rows} to "
            f"evaluate do not divide into {parts} parts (data x ring_microbatches); change the mesh or "
            "train.batch_size, or give a larger corpus."
        )


def _describe_devices(mesh: Mesh, config: Config, state: TrainState) -> str:
    kind = jax.devices()[0].device_kind
    if mesh.size == 1:
        return kind
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    text = f"{mesh.size} x {kind}{processes} ({shape}), {bytes_per_device(state) / 2**20:.1f} MiB of state on each"
    if mesh.shape["layer"] > 1:
        text += (
            f"\nlayers over {mesh.shape['layer']} devices: the sequential pass is a ring with "
            f"{config.mesh.ring_microbatches} microbatches"
        )
    return text


def _make_eval(model: LanguageModel, config: Config, mesh: Mesh) -> Callable[[Any, list[Batch], int], dict[str, float]]:
    """Held-out means of every part of the loss that has begun, all region sizes included.

    ``val_loss``, by which the best checkpoint is chosen, is the whole loss at full weights and appears only once every
    term has begun, so that no checkpoint from before counts as the best.
    """
    terms = config.loss.terms
    weights: dict[str, Array | float] = {name: term.weight for name, term in terms.items()}
    ring = config.mesh.ring_microbatches

    @functools.partial(jax.jit, static_argnames="plan")
    def evaluate(params: Any, batch: Batch, *, plan: Plan) -> dict[str, Array]:
        return loss_fn(model, params, balanced(batch), config.loss, plan, weights, mesh=mesh, ring_microbatches=ring)[1]

    def run(params: Any, batches: list[Batch], step: int) -> dict[str, float]:
        begun = [name for name, term in terms.items() if step >= start_step(term, config.train.num_steps)]
        plan = Plan(tuple((name, terms[name].region_sizes) for name in begun))
        parts = [evaluate(params, put_batch(mesh, rows, is_whole=True), plan=plan) for rows in batches]
        # Each is a mean over the batch's targets, of which batches of conversations have different numbers.
        counts = [1.0 if rows.weight is None else float(rows.weight.sum()) for rows in batches]
        means = {f"val_{name}": float(np.average([part[name] for part in parts], weights=counts)) for name in parts[0]}
        if len(begun) < len(terms):
            del means["val_loss"]
        return means

    return run


def _make_sample(
    model: LanguageModel, config: Config, held_out: list[Batch], tokenizer: Tokenizer, mesh: Mesh
) -> Callable[[Any], str]:
    """Greedy continuation of a piece of held-out text by the sequential pass."""
    prompt, num_tokens = held_out[0].tokens[:1, :SAMPLE_PROMPT_LEN], config.train.sample_tokens
    greedy = make_greedy_fn(model, prompt_len=prompt.shape[1], num_tokens=num_tokens, mesh=mesh)
    # The same text for every part of the batch that the mesh has.
    start = np.pad(np.repeat(prompt, mesh.shape["data"], axis=0), ((0, 0), (0, num_tokens)))

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def decode(params: Any) -> Array:
        return greedy(training_weights(model, params, mesh), start)

    def sample(params: Any) -> str:
        return f"{tokenizer.decode(prompt[0])} >>> {tokenizer.decode(np.asarray(decode(params))[0])}"

    return sample


@dataclasses.dataclass
class _Stop:
    requested: bool = False


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """A flag that SIGTERM or Ctrl-C raises; the loop saves and ends after its step.

    A second signal ends it at once, unless it follows within a second: launchers often send one twice.
    """
    stop = _Stop()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    first = math.inf

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, _: object) -> None:
        nonlocal first
        stop.requested, first = True, min(first, time.monotonic())
        if time.monotonic() > first + 1:
            restore()
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
