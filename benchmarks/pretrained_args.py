"""The flags of benchmarks/pretrained.py."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from snlp_jax.config import LinearizeConfig, ModelConfig
from snlp_jax.errors import InputError
from snlp_jax.layout import Layout
from snlp_jax.run import BATCH_SIZE

AUTO = (-1,)
"""A few sizes that go with the depth."""


@dataclass(frozen=True)
class Args:
    """Compare methods on a trained model."""

    run_dir: tyro.conf.Positional[Path]
    checkpoint: Literal["best", "last"] = "best"
    attention: tuple[int, ...] = AUTO
    """Numbers of replaced attentions."""
    mlp: tuple[int, ...] = ()
    """Numbers of replaced MLPs."""
    blocks: tuple[int, ...] = AUTO
    """Numbers of replaced layers."""
    regions: tuple[int, ...] = AUTO
    """Numbers of layers at the end that are solved at once."""
    iterations: tuple[int, ...] = (1, 2)
    int8: bool = False
    """Also the sequential pass with kernels of eight bits."""
    rank_by: Literal["heldout", "nmse_residual", "nmse", "cca"] = "heldout"
    skip_first: int = 0
    """Tokens of each window that no map is fitted to."""
    fit_tokens: int = 524_288
    """Of training text, for the maps."""
    rankings: bool = True
    """Also one number of attentions chosen by other measures, by chance and one by one."""
    calibration_tokens: int = 65_536
    """Of training text; 0 leaves calibrated solvers out."""
    tune_steps: int = 200
    """Of the tuned calibrations."""
    num_windows: int = 256
    batch_size: int = 16
    tasks: tuple[str, ...] = ()
    """Files of multiple choice, see snlp_jax/eval/task_data.py."""
    num_examples: int = 200
    tasks_up_to: float = math.inf
    """Change of perplexity past which a method is asked no tasks, 0.5 for +50 %: questions take longer than text."""
    distances: tuple[int, ...] = AUTO
    """Tokens between a planted key and the question for it; none asks for no keys."""
    num_keys: int = 64
    prefill_len: int = 512
    context: int = 512
    new_tokens: int = 64
    layouts: tuple[Layout, ...] = ("stack", "list")
    repeats: int = 9
    num_bootstrap: int = 2000
    quick: bool = False
    """A few methods at small sizes, for tests."""
    out: str = ""
    """Empty: benchmarks/results/pretrained_NAME_DEVICE_DATE.json."""
    plot: str = "docs/linearize.png"
    """Empty draws none."""

    def __post_init__(self) -> None:
        for name in ("fit_tokens", "num_windows", "batch_size", "num_keys", "prefill_len", "context", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1.")
        if self.new_tokens < 2:
            raise InputError(
                f"--new-tokens is {self.new_tokens}; it must be at least 2, as the prefill makes the first."
            )

    def sized(self, model: ModelConfig) -> "Args":
        """With numbers in place of AUTO, and small ones with ``quick``."""
        L, T, changes = model.num_layers, model.seq_len, {}
        if self.attention == AUTO:
            changes["attention"] = distinct(L // 8, L // 4, 3 * L // 8, L // 2)
        if self.blocks == AUTO:
            changes["blocks"] = distinct(L // 16, L // 8, L // 4)
        if self.regions == AUTO:
            changes["regions"] = distinct(L // 2)
        if self.distances == AUTO:
            reach = model.max_context - 128  # the other tokens are a key, its question and what stands before it
            changes["distances"] = distinct(*(min(d, reach) for d in (T // 8, T // 4, T // 2, T - 64, 2 * T)))
        sized = dataclasses.replace(self, **changes)
        if not self.quick:
            return sized
        return dataclasses.replace(
            sized,
            attention=sized.attention[-1:],
            blocks=sized.blocks[-1:],
            distances=sized.distances[:1],
            fit_tokens=min(self.fit_tokens, 4096),
            calibration_tokens=min(self.calibration_tokens, BATCH_SIZE * T),
            tune_steps=min(self.tune_steps, 1),
            num_windows=min(self.num_windows, 8),
            num_keys=min(self.num_keys, 4),
            prefill_len=min(self.prefill_len, 16),
            context=min(self.context, 8),
            new_tokens=min(self.new_tokens, 4),
            layouts=self.layouts[:1],
            repeats=1,
            num_bootstrap=20,
        )


def options_of(args: Args, **fields: int) -> LinearizeConfig:
    chosen = {"attention": max(args.attention, default=0), "blocks": max(args.blocks, default=0), **fields}
    return LinearizeConfig(**chosen, rank_by=args.rank_by, tokens=args.fit_tokens, skip_first=args.skip_first)


def distinct(*sizes: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(size for size in sizes if size > 0))
