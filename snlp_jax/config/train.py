"""Knobs of optimisation and of the training run."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from snlp_jax.config.check import Checked, Count, NonNegative, Positive, Rule, Share, Size
from snlp_jax.errors import InputError


@dataclass(frozen=True)
class OptimConfig(Checked, section="optim"):
    """Muon on matrices, AdamW elsewhere; the published rates of each group (docs/math.md, section 6)."""

    matrix_lr: NonNegative = 0.02
    embed_lr: NonNegative = 0.3
    value_embed_lr: NonNegative = 0.15
    head_lr: NonNegative = 0.008
    resid_scale_lr: NonNegative = 0.005
    x0_scale_lr: NonNegative = 0.5
    scalar_lr: NonNegative = 0.2
    """Of the smear scalar and gate and the mid-layer scalar."""
    hyper_lr: NonNegative = 0.01
    """Of the maps between residual streams."""
    vector_lr: NonNegative = 0.002
    """Of biases and of the weights of norms."""
    matrix_weight_decay: NonNegative = 0.28
    lr_scale: Positive = 1.0
    """Multiplies every learning rate."""
    batch_reference: Count = 0
    """Tokens per step at which the rates hold; others scale with the square root. 0 switches the scaling off."""
    warmup_steps: Count = 40
    warmdown_fraction: Share = 0.65
    """The last part of training, in which the rates fall linearly to ``final_lr_fraction``."""
    final_lr_fraction: Share = 0.05
    max_grad_norm: NonNegative = 0.0
    """Clip the global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class TrainConfig(Checked, section="train"):
    num_steps: Size = 500
    batch_size: Size = 16
    """Sequences per step, over all processes."""
    num_microbatches: Size = 1
    """Split each batch and add up the gradients: less memory, same result."""
    seed: int = 0
    """Of the parameters and of the sampled region sizes."""
    init_from: str = ""
    """Directory of a run whose parameters and tokenizer this one starts from, whatever ``data.tokenizer`` says; its
    optimizer starts afresh."""
    init_checkpoint: Literal["best", "last"] = "best"
    """Of that run: the one of the lowest validation loss, or the newest."""
    trainable: str = ""
    """Train only the parameters whose whole path matches this regular expression, such as 'blocks/linear_.*' (the maps
    of a linearised model); empty trains all."""
    ema_decay: Annotated[float, Rule(lambda value: 0 <= value < 1, "give 0, or less than 1")] = 0.0
    """Average the parameters exponentially over the steps; evaluations, samples and readers of the checkpoint then get
    the average. Step t, from 0, decays by (1 + t) / (10 + t) at most. 0 switches it off."""
    log_every: Size = 10
    eval_every: Count = 100
    eval_batches: Size = 8
    checkpoint_every: Count = 100
    """Save every so many steps, and at the end. Unless ``eval_every`` is 0 each is evaluated first, so that the best
    of all is known and kept; one that a signal asks for is not."""
    keep_last: Size = 2
    """Checkpoints kept besides the best one."""
    sample_every: Count = 0
    """Print a text sample every so many steps; 0 switches it off."""
    sample_tokens: Count = 64
    tensorboard: bool = False
    wandb_project: str = ""
    """Log to this project of wandb as well; empty switches it off."""
    frontier_every: Count = 0
    """Every so many steps, and at the end, evaluate the settings of eval.solvers (a short list where it is empty) on a
    few held-out batches, and the residual of every layer; 0 switches it off."""
    profile_start: Size = 10
    """First step, counted from 1, of the profile."""
    profile_steps: Count = 0
    """Steps to profile into RUN/profile; 0 switches it off. `--profile FIRST:COUNT` sets both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise InputError(f"train.trainable {self.trainable!r} is no regular expression ({error}).") from error
        batch, parts = self.batch_size, self.num_microbatches
        if batch % parts:
            raise InputError(f"train.batch_size {batch} is not a multiple of train.num_microbatches {parts}.")
