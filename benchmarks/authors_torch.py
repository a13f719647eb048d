"""Forward passes of the authors' PyTorch code and of this library, the same shape, in the same minutes.

    git clone https://github.com/phymhan/nanochat-snlp
    python benchmarks/authors_torch.py nanochat-snlp --python PYTHON_WITH_TORCH

Their code is not a dependency: it runs eagerly, as published, in a process of another Python that has torch and what
else it imports. Both draw random weights of one shape, with value embeddings, in float32; the passes run round robin,
one at a time, after a warm-up, and the process that waits sleeps. ``seq`` is their ``GPT.forward`` against our fastest
sequential form; ``idn`` is their ``forward_idn_batched`` (which leaves out windows) against our own region.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import ShapeArgs, header, made_up, out_path, random_params
from benchmarks.speed_cells import Cell, Form, Setup, forward_jobs
from benchmarks.timing import round_robin
from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.io.files import atomic_write
from snlp_jax.model import LanguageModel

WORKER = """
import json, os, sys, time, unittest.mock
os.environ["NANOCHAT_DTYPE"] = "float32"
checkout, shape = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, checkout)
import torch
answers, sys.stdout = sys.stdout, sys.stderr
for name in ("rustbpe", "tiktoken", "tokenizers"):  # tokenizers, which are imported but not used here
    try:
        __import__(name)
    except ImportError:
        sys.modules[name] = unittest.mock.MagicMock()
torch.set_num_threads(os.cpu_count())
from nanochat.gpt import GPT, GPTConfig
from snlp.inference_idn import PrecomputedWeights, forward_idn_batched, forward_sequential

model = GPT(GPTConfig(**shape["config"]))
model.init_weights()
model.eval()
for parameter in model.parameters():
    if parameter.ndim == 2 and not parameter.any():
        torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
tokens = torch.randint(0, shape["config"]["vocab_size"], (shape["batch"], shape["length"]))
depth, layers = shape["config"]["n_layer"], shape["region"]
stacked = PrecomputedWeights(model, list(range(depth - layers, depth)))
passes = {"seq": lambda: forward_sequential(model, tokens)}
for k in shape["iterations"]:
    passes[f"idn:n={layers},k={k}"] = lambda k=k: forward_idn_batched(model, tokens, depth - layers, stacked, K=k)
print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), file=answers, flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    with torch.inference_mode():
        out = passes[line.strip()]()
    print(json.dumps({"seconds": time.perf_counter() - began, "finite": bool(out.isfinite().all())}), file=answers,
          flush=True)
"""


@dataclass(frozen=True)
class Args(ShapeArgs):
    """Time the authors' PyTorch forward beside ours."""

    checkout: tyro.conf.Positional[Path] = Path("nanochat-snlp")
    """Of their repository."""
    python: str = sys.executable
    """A Python with torch, filelock and rich."""
    batch: int = 1
    length: int = 128
    region: int = 24
    """Layers of the solver's region."""
    iterations: tuple[int, ...] = (1, 2)
    repeats: int = 31
    out: str = ""
    """Empty: benchmarks/results/authors_torch_DEVICE_DATE.json."""


class Authors:
    """Their passes, in a process of their own."""

    def __init__(self, args: Args, config: ModelConfig):
        if not (args.checkout / "nanochat" / "gpt.py").is_file():
            raise InputError(f"{args.checkout} holds no nanochat/gpt.py; clone github.com/phymhan/nanochat-snlp there.")
        names = {"sequence_len": "seq_len", "n_layer": "num_layers", "n_head": "num_heads", "n_embd": "embed_dim"}
        names |= {"n_kv_head": "num_kv_heads", "vocab_size": "vocab_size", "window_pattern": "window_pattern"}
        shape: dict[str, Any] = {"config": {theirs: getattr(config, ours) for theirs, ours in names.items()}}
        shape |= {name: getattr(args, name) for name in ("batch", "length", "region", "iterations")}
        command = [args.python, "-c", WORKER, str(args.checkout.resolve()), json.dumps(shape)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def seconds(self, setting: str) -> float:
        assert self.process.stdin is not None
        print(setting, file=self.process.stdin, flush=True)
        answer = self._answer()
        assert answer["finite"], setting
        return answer["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"the authors' code ended with {self.process.wait()}; what it said stands above.")
        return json.loads(line)


def main(args: Args) -> dict[str, Any]:
    """Measure and return what the JSON file holds."""
    if args.shape == "auto":
        args = dataclasses.replace(args, shape="d256")
    config = made_up(args)
    settings = tuple(f"idn:n={args.region},k={k}" for k in args.iterations)
    authors = Authors(args, config)
    report = header(config, dataclasses.asdict(args) | {"checkout": "", "python": ""}) | {"theirs": authors.facts}
    model = LanguageModel(config, MachineConfig(compute_dtype="float32"))
    setup = Setup(model, random_params(model), settings)
    forms = {"seq": [Form("stack"), Form("list")]} | {name: [Form("stack"), Form("list")] for name in settings}
    cell = Cell("forward", args.shape, "float32", args.batch, args.length)
    runs: dict[tuple[str, str], Callable[[], float]] = {}
    for job in forward_jobs(setup, cell, forms):
        run = job.make(job)
        runs[job.name["setting"], job.name["layout"]] = lambda run=run: _timed(run)  # type: ignore[misc]
    for name in ("seq", *settings):
        runs[name, "authors"] = lambda name=name: authors.seconds(name)  # type: ignore[misc]
    for run in (*runs.values(), *runs.values()):
        run()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    round_robin(list(runs), args.repeats, float("inf"), lambda key, _: seconds[key].append(runs[key]()))
    table = Table(
        "setting", *(Column(name, justify="right") for name in ("theirs ms", "ours ms", "ratio", "quartiles"))
    )
    for name in ("seq", *settings):
        theirs = seconds[name, "authors"]
        layout = min(("stack", "list"), key=lambda each: float(np.median(seconds[name, each])))
        ours = seconds[name, layout]
        low, ratio, high = (float(q) for q in np.quantile(np.divide(theirs, ours), (0.25, 0.5, 0.75)))
        row = {"setting": name, "layout": layout, "theirs_ms": 1e3 * float(np.median(theirs))}
        row |= {"ours_ms": 1e3 * float(np.median(ours)), "ratio": ratio, "ratio_quartiles": (low, high)}
        row |= {"theirs_min_ms": 1e3 * min(theirs), "ours_min_ms": 1e3 * min(ours)}
        report["cells"].append(row)
        cells = (f"{row['theirs_ms']:.1f}", f"{row['ours_ms']:.1f}", f"{ratio:.2f}", f"{low:.2f}-{high:.2f}")
        table.add_row(name, *cells)
    out = out_path(args.out, "authors_torch", report)
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    Console().print(table, f"wrote {out}")
    return report


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
