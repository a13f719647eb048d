"""Kill a real run again and again, and see that it ends as if nothing had happened.

Command:   python benchmarks/kills.py [--kills 20] [--seed 0]
Hardware:  two CPU cores; a few minutes.

One run is left alone; its twin, with caches of its own, is ended --kills times, by SIGKILL and SIGTERM in turn, and
resumed each time. When is drawn from the seed within each phase: while the corpus is read or tokenized (SIGKILL ends
the process alone, whose workers live on for a while beside the resumed run; SIGTERM ends all), between the start and
the first step, during steps, during an evaluation, while a checkpoint is written, and right after it got its name. The
process is halted (SIGSTOP) and looked at before, so that the phase is what it says.
Then every array of the last checkpoints, optimizer included, all tokens and all metrics but rates must be equal.
Prints a row for each kill and writes benchmarks/results/kills_PLATFORM_DATE.json. Exit code 1 if anything differs.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from snlp_jax.cli.entry import run_entry
from snlp_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SolverCEConfig,
    TrainConfig,
    to_json,
)
from snlp_jax.errors import InputError
from snlp_jax.io.checkpoint import CHECKPOINT_NAME, Checkpointer
from snlp_jax.io.files import atomic_write
from snlp_jax.io.metrics import FILE_NAME, read_metrics
from snlp_jax.io.provenance import circumstances
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.train.report import RATES, REPORT_NAME
from snlp_jax.train.step import abstract_saved, abstract_state, optimizer_of

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("tokenization", "evaluation", "checkpoint", "steps", "rename", "start")
"""Kill i falls into phase i modulo their number."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
MAX_WAIT = 900.0
"""Seconds until a phase must have come."""
TRAIN = """
import runpy, sys
from snlp_jax.data import corpus
corpus.SHARD_BYTES = int(sys.argv.pop(1))
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
"""The entry script, with smaller shards than the files of a small corpus would fill."""


@dataclass(frozen=True)
class Args:
    kills: int = 20
    seed: int = 0
    """Of the moments."""
    steps: int = 300
    layers: int = 6
    width: int = 64
    source: str = "builtin"
    """Text."""
    shard_bytes: int = 400_000
    vocab_size: int = 1024
    """Of the BPE that is trained."""
    out: Path = Path("")
    """Empty: benchmarks/results/kills_PLATFORM_DATE.json."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        record = run(args, Path(folder))
    name = f"kills_{record['platform']}_{datetime.date.today()}.json"
    out = args.out if args.out.name else ROOT / "benchmarks/results" / name
    atomic_write(out, json.dumps(record, indent=2) + "\n")
    print(f"wrote {out}")
    if record["differences"]:
        sys.exit(1)


def run(args: Args, folder: Path) -> dict[str, Any]:
    """All of it, below ``folder``; the record, whose ``differences`` is empty if all is well."""
    unbroken, killed = Run(args, folder / "unbroken"), Run(args, folder / "killed")
    print(f"{args.steps} steps unbroken ...", flush=True)
    with unbroken.started() as process:
        unbroken.must_finish(process)
    num_shards = unbroken.num_shards()
    rows = []
    print(f"{'phase':>14} {'signal':>8} {'began at':>8} {'ended at':>8}  what there was", flush=True)
    for moment in draw_moments(args, num_shards):
        rows.append(killed.end_at(moment))
        row = rows[-1]
        print(f"{row['phase']:>14} {row['signal']:>8} {row['from']:>8} {row['step']:>8}  {row['state']}", flush=True)
    with killed.started() as process:
        killed.must_finish(process)
    print(f"the last process went on from step {killed.resumed_from}")
    differences = compare(unbroken, killed)
    print("\n".join(differences) or f"{len(rows)} kills, and the end is equal bit for bit")
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name != "out"}
    return circumstances() | settings | {"num_shards": num_shards, "rows": rows, "differences": differences}


# -- When --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    phase: str
    signal: signal.Signals
    place: int
    """Not before so many steps, or shards."""
    delay: float = 0.0
    """Seconds after the phase has begun."""


def draw_moments(args: Args, num_shards: int) -> list[Moment]:
    """In the order in which they come: tokenization first, the others at random, one in each part of the steps."""
    rng = random.Random(args.seed)
    kinds = [(PHASES[i % len(PHASES)], SIGNALS[(i + i // len(PHASES)) % 2]) for i in range(args.kills)]
    first = [kind for kind in kinds if kind[0] == PHASES[0]]
    rest = [kind for kind in kinds if kind[0] != PHASES[0]]
    rng.shuffle(rest)
    part = num_shards * 3 // 4 // max(len(first), 1)
    moments = [Moment(*kind, int(part * (i + rng.random()))) for i, kind in enumerate(first)]
    part = (args.steps - 2 * EVERY["checkpoint_every"]) // max(len(rest), 1)
    for i, kind in enumerate(rest):
        moments.append(Moment(*kind, 1 + int(part * (i + rng.random())), rng.uniform(0, 0.5)))
    return moments


EVERY = {"log_every": 1, "eval_every": 5, "checkpoint_every": 7, "sample_every": 50}


def config_of(args: Args, folder: Path) -> Config:
    """Like the demo, smaller, with sampled region sizes and averaged parameters: more that has to come back."""
    sizes: dict[str, Any] = {"num_layers": args.layers, "embed_dim": args.width, "seq_len": 64}
    text: dict[str, Any] = {"source": args.source, "tokenizer": "bpe", "bpe_vocab_size": args.vocab_size}
    steps: dict[str, Any] = {"num_steps": args.steps, "batch_size": 4, "eval_batches": 4, "sample_tokens": 8, **EVERY}
    term = SolverCEConfig(
        weight=1.0, region_sizes=tuple(range(1, min(args.layers, 3) + 1)), sample_region=True, start_fraction=0.3
    )
    return Config(
        name="kills",
        run_dir=str(folder / "run"),
        model=ModelConfig(vocab_size=args.vocab_size, num_heads=4, num_kv_heads=4, remat=True, **sizes),
        data=DataConfig(**text, cache_dir=str(folder / "cache"), num_workers=2),
        optim=OptimConfig(warmup_steps=10),
        loss=LossConfig(solver_ce=term),
        train=TrainConfig(**steps, ema_decay=0.99, tensorboard=True),
    )


# -- A run and its end -------------------------------------------------------------------------------------------------


class Run:
    """A folder with a run, its caches, and what its processes have said."""

    def __init__(self, args: Args, folder: Path) -> None:
        self._args, self._folder = args, folder
        self.config = config_of(args, folder)
        self.cache, self.path = Path(self.config.data.cache_dir), self.config.run_path
        self.checkpoints = self.path / CHECKPOINT_NAME
        folder.mkdir(parents=True)
        text = to_json(self.config)
        (folder / "config.py").write_text(f"from snlp_jax.config import from_json\nconfig = from_json({text!r})\n")
        self._metrics, self._old_metrics = self.path / FILE_NAME, 0
        self._log = folder / "log.txt"

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen]:
        """The next process of the run. Nothing of it is left at the end."""
        self._old_metrics = self._metrics.stat().st_ino if self._metrics.exists() else 0
        env = {**os.environ, "XDG_CACHE_HOME": str(self._folder.parent / "xdg")}
        command = [sys.executable, "-c", TRAIN, str(self._args.shard_bytes), f"{self._folder}/config.py", "--resume"]
        with self._log.open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def resumed_from(self) -> int:
        """Step of the checkpoint from which the last process went on; 0 if there was none or it came not so far."""
        found = re.search(r"resumed from the checkpoint of step (\d+)", self.log)
        return int(found[1]) if found else 0

    def must_finish(self, process: subprocess.Popen) -> None:
        if process.wait() != 0:
            raise InputError(f"the run failed with exit code {process.returncode}: {self.log[-2000:]}")

    def saved_steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.checkpoints.glob("*") if path.name.isdecimal())

    def end_at(self, moment: Moment) -> dict[str, Any]:
        """Start a process and end it at that moment; what was found then."""
        with self.started() as process:
            deadline = time.monotonic() + MAX_WAIT
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise InputError(f"{moment} did not come (exit code {process.returncode}): {self.log[-2000:]}")
                if self._is_now(moment):
                    _halt(process)
                    if self._is_now(moment):
                        break
                    process.send_signal(signal.SIGCONT)
                time.sleep(0.001)
            row: dict[str, Any] = {"phase": moment.phase, "signal": moment.signal.name}
            row |= {"step": self._record().get("step", 0), "state": self._state()}
            if moment.signal is signal.SIGTERM and moment.phase == "tokenization":
                os.killpg(process.pid, moment.signal)
            else:
                process.send_signal(moment.signal)
            process.send_signal(signal.SIGCONT)
            row |= {"exit_code": process.wait(), "from": self.resumed_from}
        # Only a process that is at its steps can say goodbye.
        polite = {"tokenization": (-moment.signal,), "start": (0, -moment.signal)}.get(moment.phase, (0,))
        expected = polite if moment.signal is signal.SIGTERM else (-moment.signal,)
        if row["exit_code"] not in expected:
            raise InputError(f"{moment} ended the run with exit code {row['exit_code']}: {self.log[-2000:]}")
        return row

    def _is_now(self, moment: Moment) -> bool:
        """Whether the process is in the phase, and far enough."""
        if moment.phase == "tokenization":
            is_whole, is_writing = (any(self.cache.glob(f"tokens/*/{name}")) for name in ("meta.json", ".writing-*"))
            return is_writing and not is_whole and self.num_shards() >= moment.place
        record = self._record()
        if moment.phase == "start":
            is_built = "M parameters" in self.log
            return is_built and not record and time.time() > self._log.stat().st_mtime + moment.delay
        if not record or record["step"] < moment.place:
            return False
        if moment.phase == "evaluation":
            is_due = record["step"] % EVERY["eval_every"] == 0
            return is_due and "loss" in record and "val_sequential_ce" not in record
        if moment.phase == "checkpoint":
            return any(self.checkpoints.glob("*tmp*"))
        if moment.phase == "rename":
            return max(self.saved_steps(), default=0) > max(self.resumed_from, moment.place)
        return True

    def _record(self) -> dict[str, float]:
        """The newest that this process has written; it begins with a new file that holds the old ones."""
        with contextlib.suppress(FileNotFoundError), self._metrics.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._old_metrics:
                file.seek(max(0, status.st_size - 8192))
                record = json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2] or b"{}")
                return record if record.get("step", 0) > self.resumed_from else {}
        return {}

    def num_shards(self) -> int:
        return len(list(self.cache.glob("tokens/*/*.train")))

    def _state(self) -> str:
        """What a kill leaves: checkpoints, those in the making, finished and begun shards."""
        begun = [path.name.split(".")[0] for path in self.checkpoints.glob("*tmp*")]
        text = f"saved {self.saved_steps()}" + (f", writing {begun}" if begun else "")
        is_whole = any(self.cache.glob("tokens/*/meta.json"))
        return (
            text
            if is_whole
            else f"{self.num_shards()} shards done, {len(list(self.cache.glob('*/*/.writing-*')))} begun"
        )


def _halt(process: subprocess.Popen) -> None:
    """Stop all its threads, and wait until they stand."""
    process.send_signal(signal.SIGSTOP)
    with contextlib.suppress(FileNotFoundError):
        for _ in range(1000):
            states = [
                path.read_text().rpartition(")")[2].split()[0]
                for path in Path(f"/proc/{process.pid}/task").glob("*/stat")
            ]
            if not set(states) - set("TtZX"):
                return
            time.sleep(0.001)


# -- The end -----------------------------------------------------------------------------------------------------------


def compare(unbroken: Run, killed: Run) -> list[str]:
    """What differs, in words."""
    first, second = last_state(unbroken), last_state(killed)
    differences = [name for name in first.keys() | second.keys() if not _is_same(first.get(name), second.get(name))]
    for name, content in (("metrics", metrics_of), ("tokens", tokens_of)):
        if content(unbroken) != content(killed):
            differences.append(name)
    if left := [str(path) for path in killed.cache.glob("**/.writing-*")] + list(
        map(str, killed.checkpoints.glob("*tmp*"))
    ):
        differences.append(f"left behind: {left}")
    if not (killed.path / REPORT_NAME).exists():
        differences.append("no report")
    return [f"differs: {text}" for text in sorted(differences)]


def last_state(run: Run) -> dict[str, np.ndarray]:
    """Every array of the checkpoint of the last step, by its path."""
    config = run.config
    mesh, model = make_mesh(config.mesh), LanguageModel(config.model)
    template = abstract_saved(abstract_state(model, optimizer_of(model, config, mesh), config, mesh), model, mesh)
    with Checkpointer(run.checkpoints, read_only=True) as checkpoints:
        found = checkpoints.restore(template, None)
    if found is None or found[0] != config.train.num_steps:
        raise InputError(f"{str(run.checkpoints)!r} does not hold the last step.")
    leaves, _ = jax.tree_util.tree_flatten_with_path(found[1])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _is_same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return False
    return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())


def metrics_of(run: Run) -> list[dict[str, float]]:
    """Records without what depends on the clock and the machine."""
    rates = RATES.keys() - {"grad_norm"}
    return [
        {name: record[name] for name in record if name not in rates} for record in read_metrics(run.path / FILE_NAME)
    ]


def tokens_of(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.cache.glob("tokens/*/*") if path.suffix != ".json"} | {
        "tokenizer": (run.path / "tokenizer.json").read_bytes()
    }


if __name__ == "__main__":
    run_entry(main)
