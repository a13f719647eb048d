"""Knobs of optimisation and of the training run."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

from snlp_jax.config.check import Checked, require


@dataclass(frozen=True)
class OptimConfig(Checked, section="optim"):
    """Muon on matrices, AdamW elsewhere; the published rates of each group (docs/math.md, section 6)."""

    matrix_lr: float = 0.02
    embed_lr: float = 0.3
    value_embed_lr: float = 0.15
    head_lr: float = 0.008
    resid_scale_lr: float = 0.005
    x0_scale_lr: float = 0.5
    scalar_lr: float = 0.2
    """Of the smear scalar and gate and the mid-layer scalar."""
    hyper_lr: float = 0.01
    """Of the maps between residual streams."""
    vector_lr: float = 0.002
    """Of biases and of the weights of norms."""
    matrix_weight_decay: float = 0.28
    lr_scale: float = 1.0
    """Multiplies every learning rate."""
    batch_reference: int = 0
    """Tokens per step at which the rates hold; others scale with the square root. 0 switches the scaling off."""
    warmup_steps: int = 40
    warmdown_fraction: float = 0.65
    """The last part of training, in which the rates fall linearly to ``final_lr_fraction``."""
    final_lr_fraction: float = 0.05
    max_grad_norm: float = 0.0
    """Clip the global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "warmup_steps")
        require(0 <= self.warmdown_fraction <= 1, f"optim.warmdown_fraction is {self.warmdown_fraction}; give 0 to 1.")
        require(0 <= self.final_lr_fraction <= 1, f"optim.final_lr_fraction is {self.final_lr_fraction}; give 0 to 1.")
        require(0 < self.lr_scale < math.inf, f"optim.lr_scale is {self.lr_scale}; it must be positive.")
        rates = [f.name for f in dataclasses.fields(self) if f.name.endswith("_lr")]
        self.at_least(0, *rates, "matrix_weight_decay", "batch_reference", "max_grad_norm")


@dataclass(frozen=True)
class TrainConfig(Checked, section="train"):
    num_steps: int = 500
    batch_size: int = 16
    """Sequences per step, over all processes."""
    num_microbatches: int = 1
    """Split each batch and add up the gradients: less memory, same result."""
    seed: int = 0
    """Of the parameters and of the sampled region sizes: 0 to 2**32 - 1."""
    init_from: str = ""
    """Directory of a run whose parameters and tokenizer this one starts from, whatever ``data.tokenizer`` says; its
    optimizer starts afresh."""
    init_checkpoint: Literal["best", "last"] = "best"
    """Of that run: the one of the lowest validation loss, or the newest."""
    trainable: str = ""
    """Train only the parameters whose whole path matches this regular expression, such as 'blocks/linear_.*' (the maps
    of a linearised model); empty trains all."""
    ema_decay: float = 0.0
    """Average the parameters exponentially over the steps; evaluations, samples and readers of the checkpoint then get
    the average. Step t, from 0, decays by (1 + t) / (10 + t) at most. 0 switches it off."""
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    """Save every so many steps, and at the end. Unless ``eval_every`` is 0 each is evaluated first, so that the best
    of all is known and kept; one that a signal asks for is not."""
    keep_last: int = 2
    """Checkpoints kept besides the best one."""
    sample_every: int = 0
    """Print a text sample every so many steps; 0 switches it off."""
    sample_tokens: int = 64
    tensorboard: bool = False
    wandb_project: str = ""
    """Log to this project of wandb as well; empty switches it off."""
    frontier_every: int = 0
    """Every so many steps, and at the end, evaluate the settings of eval.solvers (a short list where it is empty) on a
    few held-out batches, and the residual of every layer; 0 switches it off."""
    profile_start: int = 10
    """First step, counted from 1, of the profile."""
    profile_steps: int = 0
    """Steps to profile into RUN/profile; 0 switches it off. `--profile FIRST:COUNT` sets both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_steps", "batch_size", "num_microbatches", "log_every", "keep_last", "eval_batches")
        require(0 <= self.seed < 2**32, f"train.seed is {self.seed}; give 0 to {2**32 - 1}.")
        require(self.profile_start >= 1, f"train.profile_start is {self.profile_start}; steps count from 1.")
        counts = ("eval_every", "checkpoint_every", "sample_every", "sample_tokens", "frontier_every", "profile_steps")
        self.at_least(0, *counts)
        try:
            re.compile(self.trainable)
        except re.error as error:
            require(False, f"train.trainable {self.trainable!r} is no regular expression ({error}).")
        require(0 <= self.ema_decay < 1, f"train.ema_decay is {self.ema_decay}; give 0, or less than 1.")
        require(
            self.batch_size % self.num_microbatches == 0,
            f"train.batch_size {self.batch_size} is not a multiple of train.num_microbatches {self.num_microbatches}.",
        )
