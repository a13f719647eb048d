"""A whole run of seconds, for the tests of training and evaluation."""

import base64
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from problems import random_params

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
from snlp_jax.data.tokenizer import ByteTokenizer
from snlp_jax.io.checkpoint import Checkpointer
from snlp_jax.model import LanguageModel

ROOT = Path(__file__).parent.parent
FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""Of processes with one device; what conftest.py has for the suite's own."""
MODEL = ModelConfig(num_layers=4, embed_dim=32, num_heads=2, num_kv_heads=1, seq_len=16, short_window=3)


def tiny(run_dir: Path, **train_fields) -> Config:
    """A run of seconds on a small text file beside the run directory."""
    text = run_dir.parent / "text.txt"
    if not text.exists():
        rng = np.random.default_rng(0)
        words = ["layer", "parallel", "newton", "trace", "scan", "depth", "token", "state"]
        text.write_text("\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(400)))
    fields = {"num_steps": 12, "batch_size": 4, "log_every": 1, "eval_every": 6, "checkpoint_every": 3}
    return Config(
        name="tiny",
        run_dir=str(run_dir),
        model=MODEL,
        data=DataConfig(source=str(text), cache_dir=str(run_dir.parent / "cache")),
        optim=OptimConfig(warmup_steps=2),
        loss=LossConfig(solver_ce=SolverCEConfig(weight=1.0, region_sizes=(3,), start_fraction=0.5)),
        train=TrainConfig(**{"eval_batches": 2, **fields, **train_fields}),
    )


def two_layers(config: Config) -> Config:
    """The same run of half the depth, for tests that ask nothing of it: less to compile."""
    term = dataclasses.replace(config.loss.solver_ce, region_sizes=(2,))
    loss = dataclasses.replace(config.loss, solver_ce=term)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2), loss=loss)


def random_run(path: Path) -> Path:
    """What training leaves behind, of random weights."""
    config = tiny(path)
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    (path / "tokenizer.json").write_text(ByteTokenizer().to_json())
    with Checkpointer(path / "checkpoints", config_json=to_json(config)) as checkpointer:
        checkpointer.save(3, {"params": random_params(LanguageModel(MODEL))}, None, {"val_loss": 1.0})
    return path


def write_config(config: Config, folder: Path) -> Path:
    """A file for the entry script."""
    file = folder / "config_file.py"
    text = json.dumps(dataclasses.asdict(config))
    file.write_text(f"from snlp_jax.config import from_json\nconfig = from_json({text!r})\n")
    return file


def start(config: Config, folder: Path, *flags: str) -> subprocess.Popen:
    """The real entry script in a process of its own, on one device."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "xdg"), "XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "train.py"), str(write_config(config, folder)), *flags]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_self_contained(page: str) -> None:
    """Nothing in the page, nor in the drawings inside of it, makes a browser ask for another file."""
    images = re.findall(r'src="([^"]*)"', page)
    assert all(image.startswith("data:image/svg+xml;base64,") for image in images)
    drawings = [base64.b64decode(image.partition("base64,")[2]).decode() for image in images]
    assert all(drawing.rstrip().endswith("</svg>") for drawing in drawings)
    for text in (page, *drawings):
        assert not re.search(r"<script|<link|<iframe|@import|url\((?!#)|(?:src|href)=\"(?!#|data:)", text)
