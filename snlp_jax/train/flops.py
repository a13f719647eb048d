"""Floating-point operations of training: by formula, for model FLOP utilisation, and counted in a traced step."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from snlp_jax.config import Config, ModelConfig
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.chips import chip_of
from snlp_jax.train.loss import Plan, make_plan
from snlp_jax.train.step import abstract_state, make_step, optimizer_of
from snlp_jax.types import Batch


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device by its data sheet, None where it is not known."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.bf16_flops


def train_flops_per_token(config: ModelConfig) -> float:
    """Forward and backward of the sequential pass: 6 per matrix weight, 12 per visible key, head channel and layer with
    attention, and with R residual streams 6 per channel and entry of the maps between them.

    Auxiliary loss terms and recomputation are not counted: utilisation is that of plain training.
    """
    D, H = config.embed_dim, config.head_dim
    matrices = config.block_weights + D * config.padded_vocab_size
    if R := config.num_streams:
        entries = R * R + 2 * R
        matrices += 2 * config.num_layers * D * entries * (1 + R * (config.hyper_maps == "dynamic"))
    visible = sum(min(config.windows[layer], config.seq_len) for layer in config.attention_layers)
    return 6.0 * matrices + 12.0 * config.num_heads * H * visible


def matmul_flops(jaxpr: Any) -> float:
    """Multiplications and additions of all matrix products of a jaxpr; a loop's body as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * matmul_flops(inner)
    return total


def step_flops(config: Config, plan: Plan) -> float:
    """:func:`matmul_flops` of one training step: forward, backward, recomputation, auxiliary terms and optimizer.

    Traced on shapes alone, nothing is compiled. Attention is counted in its XLA form, whose products are visible.
    """
    # What changes neither shapes nor terms is set alike, so that runs share one trace.
    same = dataclasses.replace(config.train, seed=0, num_steps=2)
    blank = Config()
    config = dataclasses.replace(config, name="", run_dir="", train=same, data=blank.data, eval=blank.eval)
    return _step_flops(config, plan)


@functools.cache
def _step_flops(config: Config, plan: Plan) -> float:
    model = LanguageModel(config.model, dataclasses.replace(config.machine, attention="xla"))
    optimizer = optimizer_of(model, config)
    shape = (config.train.batch_size, config.model.seq_len + 1)
    batch = Batch(jax.ShapeDtypeStruct(shape, np.int32))  # type: ignore[arg-type]
    step: Any = make_step(model, optimizer, config)
    traced = step.trace(abstract_state(model, optimizer, config), batch, plan=plan)
    return matmul_flops(traced.jaxpr.jaxpr)


def run_flops(config: Config) -> float:
    """The sum of :func:`step_flops` over all steps of a run, each with the terms and sizes of its plan."""
    train = config.train
    plans = (make_plan(config.loss, step, train.num_steps, train.seed) for step in range(train.num_steps))
    return sum(step_flops(config, plan) for plan in plans)
