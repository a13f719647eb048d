"""The training run: set up, restore, step, finish, which :func:`train` does in this order.

``Setup`` (snlp_jax/train/setup.py) is what was checked and the programs, ``Loop`` a run on its way.
"""

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from snlp_jax.config import Config, to_json
from snlp_jax.errors import DivergedError
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.io.metrics import MetricsWriter
from snlp_jax.model import num_params
from snlp_jax.parallel.mesh import put_batch
from snlp_jax.parallel.processes import Vote, all_or_none, is_first
from snlp_jax.train.flops import train_flops_per_token
from snlp_jax.train.loss import make_plan
from snlp_jax.train.observe import Meter, Profiler, RunRecord, memory
from snlp_jax.train.report import REPORT_NAME, write_html
from snlp_jax.train.setup import Setup
from snlp_jax.train.start import read_origin
from snlp_jax.train.step import TrainState, from_saved, make_init, to_saved
from snlp_jax.types import Array, Batch, Params

logger = logging.getLogger(__name__)


def train(config: Config, *, resume: bool = False, started: float | None = None) -> Path:
    """Run (or, with ``resume``, continue) the experiment and return its run directory.

    The directory receives config.json, tokenizer.json, metrics.jsonl, checkpoints/, run.json and, at the end,
    report.html. SIGTERM or Ctrl-C saves a checkpoint and returns early; during the last step they change nothing.
    Several processes call this together (snlp_jax/parallel/processes.py) on a directory they all see. The first one
    writes and speaks for all, and a signal to any of them stops all after the same step.
    A run that is killed and resumed ends with the same parameters, bit for bit, as an unbroken one on the same mesh
    wherever the backend's kernels are deterministic: always on CPU; on GPU with
    ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``.

    Args:
        started: ``time.time()`` of the start of the process, for the reported time to the first step.

    Raises:
        InputError: bad input, before anything is compiled.
        DivergedError: NaN or infinity in the metrics; names the step, the metrics and the last good checkpoint.
    """
    started, run_path = started or time.time(), config.run_path
    console = Console(quiet=not is_first())
    setup = Setup(config, resume)
    console.print(setup.description)
    with contextlib.ExitStack() as stack:
        loop = Loop(setup, console, started, stack, resume=resume)
        was_finished = loop.done >= config.train.num_steps
        if not was_finished and not loop.run():
            return run_path
    # Finish. A run may have been killed after its last checkpoint and before its report.
    if is_first() and not (was_finished and (run_path / REPORT_NAME).exists()):
        write_html(run_path)
    if was_finished:
        console.print(f"{run_path} is finished ({loop.done} steps)")
    else:
        console.print(f"finished in {time.time() - started:.0f} s: {run_path}")
    return run_path


class Loop:
    """A run on its way: what takes its steps, where they are recorded, and how far it has come."""

    def __init__(
        self, setup: Setup, console: Console, started: float, stack: contextlib.ExitStack, *, resume: bool
    ) -> None:
        """Open the run's checkpoints and logs, on ``stack``, and go to where it stands: to its newest good checkpoint,
        to the parameters of ``train.init_from``, or to fresh ones."""
        self.setup, self.console, self.started = setup, console, started
        config, run_path = setup.config, setup.config.run_path
        folder, num_kept = run_path / "checkpoints", config.train.keep_last
        self.checkpoints = stack.enter_context(Checkpointer(folder, num_kept, config_json=to_json(config)))
        found = self.checkpoints.restore(setup.saved, setup.batches) if resume else None
        if found is None:
            self.done, self.state = 0, self._first_state()
        else:
            self.done, self.state = found[0], from_saved(found[1])
            console.print(f"resumed from the checkpoint of step {self.done}")
        self.begun_at = self.done
        with all_or_none():
            writer = MetricsWriter(
                run_path if is_first() else None,
                last_step=self.done if found else -1,  # what a killed run recorded beyond it comes again
                tensorboard=config.train.tensorboard,
                wandb_project=config.train.wandb_project,
                name=config.name,
                config=dataclasses.asdict(config),
            )
        self.writer = stack.enter_context(writer)
        flops_per_token = train_flops_per_token(config.model)
        facts = {"num_params": num_params(setup.saved["params"]), "flops_per_token": flops_per_token}
        self.record = RunRecord(run_path if is_first() else None, self.done, started, facts)
        num_profiled = config.train.profile_steps if is_first() else 0
        self.profiler = Profiler(run_path, config.train.profile_start, num_profiled, self.done)
        stack.callback(self.profiler.close)
        self.meter = Meter(config, config.train.batch_size * config.model.seq_len, setup.mesh.size)
        self.unread: dict[str, Array] | None = None
        """Metrics of the last step, which the device may still be computing."""

    def _first_state(self) -> TrainState:
        setup, config = self.setup, self.setup.config
        init = make_init(setup.model, setup.optimizer, config, setup.mesh)
        if not config.train.init_from:
            return init(None)
        step, origin = read_origin(config, setup.saved["params"])
        self.console.print(f"starting from step {step} of {config.train.init_from}")
        return init(origin)

    def run(self) -> bool:
        """Take the steps that are left. False where a signal ended the run before its last step."""
        config, vote = self.setup.config.train, Vote()
        self.record.update(self.done)
        columns = TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        shown = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=self.console, disable=not self.console.is_terminal
        )
        with _stop_on_signal() as stop, shown as progress:
            progress.add_task("train", total=config.num_steps, completed=self.done, note="compiling")
            if config.init_from and self.done == 0:
                self.evaluate(self.setup.read(self.state))  # what it starts from
            while self.done < config.num_steps:
                self.step(progress)
                is_last = self.done == config.num_steps
                # Asked once a step: a signal that comes later waits for the next. The last step ends the run anyway.
                is_stopping = vote(stop.requested) and not is_last
                self.after_step(progress, is_last=is_last, is_stopping=is_stopping)
                if is_stopping:
                    self.console.print(f"stopped by a signal; step {self.done} is saved, continue with --resume")
                    return False
        return True

    def step(self, progress: Progress) -> None:
        """Dispatch one step, and read the metrics of the one before, which the device has finished by now."""
        config, number = self.setup.config, self.done + 1
        plan = make_plan(config.loss, self.done, config.train.num_steps, config.train.seed)
        with self.meter.spending("wait"):
            batch = Batch(**next(self.setup.batches))
        self.setup.model.check_tokens(batch.tokens)
        self.profiler.before(number)
        placed = put_batch(self.setup.mesh, batch)
        with jax.transfer_guard("disallow"):  # nothing moves between host and device but by put_batch and device_get
            self.state, metrics = self.setup.step(self.state, placed, plan=plan)
        if notice := self.profiler.after(number, metrics):
            self.console.print(notice, highlight=False, soft_wrap=True)
        self.read_metrics(progress)
        self.done, self.unread = number, metrics

    def read_metrics(self, progress: Progress) -> None:
        """Wait for the last step, record it where that is due, and stop on NaN. Nothing if it was read before.

        Raises:
            DivergedError: a metric is not finite.
        """
        if self.unread is None:
            return
        metrics = {name: float(value) for name, value in jax.device_get(self.unread).items()}
        self.unread, train_config = None, self.setup.config.train
        if not all(map(math.isfinite, metrics.values())):
            raise DivergedError(
                f"step {self.done} gave {metrics}; the last good checkpoint is that of step "
                f"{self.checkpoints.latest_step} in {self.setup.config.run_path}. Lower optim.lr_scale or set "
                "optim.max_grad_norm and start again from it."
            )
        if self.done == self.begun_at + 1:
            logger.info("first step done %.1f s after the start", time.time() - self.started)
        if self.done % train_config.log_every == 0 or self.done == train_config.num_steps:
            rates = self.meter.rates(self.done)
            self.writer.write(self.done, {**metrics, **rates, **memory()})
            note = f"loss {metrics['loss']:.3f}  " + "  ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
            progress.update(progress.task_ids[0], completed=self.done, note=note)
            if not self.console.is_terminal:
                self.console.print(f"step {self.done}/{train_config.num_steps}  {note}", highlight=False)

    def after_step(self, progress: Progress, *, is_last: bool, is_stopping: bool) -> None:
        """Evaluate, observe, sample and save, each where it is due.

        Every scheduled checkpoint is evaluated first (unless ``eval_every`` is 0), since only one with a ``val_loss``
        can be the best. Who sends a signal may not wait for long: then nothing comes before the checkpoint but what is
        due anyway.
        """
        config = self.setup.config.train
        is_due = lambda every: every > 0 and self.done % every == 0  # noqa: E731
        is_saved = is_due(config.checkpoint_every)
        should_evaluate = is_last or is_due(config.eval_every) or (config.eval_every > 0 and is_saved)
        should_observe = config.frontier_every > 0 and (is_last or is_due(config.frontier_every))
        should_sample = is_due(config.sample_every)
        should_save = is_last or is_stopping or is_saved
        if not (should_evaluate or should_observe or should_sample or should_save):
            return
        self.read_metrics(progress)  # no checkpoint before its metrics proved finite, and honest rates
        with self.meter.spending("pause"):
            params = self.setup.read(self.state)
            val_metrics = self.evaluate(params) if should_evaluate else {}
            if should_observe and self.setup.observe is not None:
                self.show(self.setup.observe(params, self.setup.held_out), "frontier/", "dim")
            if should_sample:
                self.console.print(self.setup.sample(params), style="dim", highlight=False, markup=False)
            if should_save:
                self.checkpoints.save(self.done, to_saved(self.state, params), self.setup.batches, val_metrics)
                self.record.update(self.done)

    def evaluate(self, params: Params) -> dict[str, float]:
        """The held-out metrics, recorded and printed."""
        val_metrics = self.setup.evaluate(params, self.setup.held_out, max(self.done - 1, 0))
        self.show(val_metrics)
        return val_metrics

    def show(self, metrics: dict[str, float], prefix: str = "", style: str | None = None) -> None:
        """Record metrics, and print those whose names begin with ``prefix``."""
        self.writer.write(self.done, metrics)
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith(prefix))
        self.console.print(f"step {self.done}  {text}", highlight=False, style=style)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[SimpleNamespace]:
    """``requested``, which SIGTERM or Ctrl-C sets; the loop saves and ends after its step.

    A second signal ends it at once, unless it follows within a second: launchers often send one twice.
    """
    stop = SimpleNamespace(requested=False)
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
