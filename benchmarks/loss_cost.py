"""What each auxiliary loss costs: time and FLOPs of a training step beside a plain step of the same model.

    python benchmarks/loss_cost.py
    python benchmarks/loss_cost.py --config configs/d32s_idn.py --repeats 20      # on an accelerator

Every step is compiled and donated as in training; all are timed in one process, in a new order every round. FLOPs are
those of the matrix products in the traced step, loops counted as often as they run and rematerialised work included.
Prints a table and writes benchmarks/results/loss_cost_DATE.json.
"""

import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from snlp_jax.cli.entry import run_entry
from snlp_jax.config import Config, HiddenNormConfig, LayerSkipConfig, LossConfig, SolverCEConfig, load_config
from snlp_jax.io.files import atomic_write
from snlp_jax.io.provenance import git_commit
from snlp_jax.model import LanguageModel
from snlp_jax.train.flops import matmul_flops
from snlp_jax.train.loss import make_plan
from snlp_jax.train.optim import make_optimizer
from snlp_jax.train.step import init_state, make_step
from snlp_jax.types import Batch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Args:
    config: Path = ROOT / "configs" / "demo.py"
    """Its model and batch."""
    streams: int = 4
    """Residual streams of the second model, which HyperConnection is for; 0 leaves it out."""
    region_size: int = 8
    repeats: int = 10
    out: Path = Path("")
    """Empty: benchmarks/results/loss_cost_DATE.json."""


def losses(n: int, with_streams: bool) -> dict[str, LossConfig]:
    """Name -> loss; every term at full weight from the first step."""
    own = "hcn" if with_streams else "idn"
    term: dict[str, Any] = {"weight": 0.5, "region_sizes": (n,), "ramp_fraction": 0.0}
    norm: Callable[..., LossConfig] = lambda **kw: LossConfig(hidden_norm=HiddenNormConfig(**term, **kw))  # noqa: E731
    entropy: Callable[..., LossConfig] = lambda **kw: LossConfig(solver_ce=SolverCEConfig(**term, **kw))  # noqa: E731
    table = {
        "plain": LossConfig(),
        f"hidden_norm, {own}": norm(correction=own),
        f"hidden_norm, {own}, detached": norm(correction=own, detach_target=True),
        f"solver_ce, {own}, k=1": entropy(correction=own),
        f"solver_ce, {own}, k=2": entropy(correction=own, num_iters=2),
    }
    if with_streams:
        return table
    return table | {
        "hidden_norm, jac (contraction)": norm(correction="jac"),
        "hidden_norm, diag by vjp": norm(correction="diag", diagonal_mode="vjp"),
        "hidden_norm, diag by jvp": norm(correction="diag", diagonal_mode="jvp"),
        "hidden_norm, diag by differences": norm(correction="diag", diagonal_mode="finite_difference"),
        "hidden_norm and solver_ce, idn": LossConfig(
            hidden_norm=HiddenNormConfig(**term), solver_ce=SolverCEConfig(**term)
        ),
        "layer_skip": LossConfig(layer_skip=LayerSkipConfig(**term)),
    }


class Step:
    """A compiled training step and its state."""

    def __init__(self, config: Config) -> None:
        model = LanguageModel(config.model)
        optimizer = make_optimizer(config.optim, model.abstract_params(), config.train.num_steps, 1)
        self.state = jax.jit(lambda: init_state(model, optimizer, config))()
        shape = (config.train.batch_size, config.model.seq_len + 1)
        tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
        self.batch = Batch(jax.device_put(tokens))
        plan = make_plan(config.loss, 0, config.train.num_steps, 0)
        started = time.perf_counter()
        traced = make_step(model, optimizer, config).trace(self.state, self.batch, plan=plan)
        self.flops = matmul_flops(traced.jaxpr.jaxpr)
        self.compiled = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - started

    def __call__(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.state, _ = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - started


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    base = load_config(args.config)
    models = {"one stream": base}
    if args.streams:
        model = dataclasses.replace(base.model, num_streams=args.streams, use_x0_resid=False)
        models[f"{args.streams} streams"] = dataclasses.replace(base, model=model)
    steps = {
        (name, loss): Step(dataclasses.replace(config, loss=its_loss))
        for name, config in models.items()
        for loss, its_loss in losses(args.region_size, config.model.num_streams > 0).items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    rng, keys = np.random.default_rng(0), list(steps)
    for repeat in range(args.repeats + 1):
        for index in rng.permutation(len(keys)):
            seconds = steps[keys[index]]()
            if repeat:  # the first touches memory for the first time
                times[keys[index]].append(seconds)
    rows = []
    result = Table("model", "loss", "step, s", "time", "FLOPs", "compilation, s", title=f"{base.name}: cost of a step")
    for (name, loss), step in steps.items():
        plain, median = statistics.median(times[name, "plain"]), statistics.median(times[name, loss])
        flops = step.flops / steps[name, "plain"].flops
        rows.append(
            {"model": name, "loss": loss, "seconds": median, "time_ratio": median / plain, "flops_ratio": flops}
        )
        cells = f"{median:.3f}", f"{median / plain:.2f}x", f"{flops:.2f}x"
        result.add_row(name, loss, *cells, f"{step.compile_seconds:.1f}")
    Console(width=120).print(result)
    out = args.out if args.out.name else ROOT / "benchmarks/results" / f"loss_cost_{datetime.date.today()}.json"
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": git_commit()}
    about |= {"config": base.name, "region_size": args.region_size, "repeats": args.repeats}
    atomic_write(out, json.dumps(about | {"rows": rows}, indent=2) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    run_entry(main)
