"""What the compiled decoding loop does on this backend: no weight is copied, and a region costs as many kernels however
many layers it holds. The same for accelerators that are not here: tests/test_aot.py."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import pytest

from benchmarks.hlo import read_program
from benchmarks.speed_cells import decoding
from snlp_jax.cache import FEW_WRITES
from snlp_jax.config import ModelConfig
from snlp_jax.layout import prepare
from snlp_jax.model import LanguageModel
from snlp_jax.notation import parse_schedule

CONFIG = ModelConfig(embed_dim=64, num_heads=2, num_kv_heads=2, vocab_size=64, seq_len=256, short_window=16)
CONTEXT = 24


@functools.cache
def decode_program(num_layers: int, setting: str, pattern: str, batch: int = 1, layout: str = "auto"):
    """The engine's loop over plain steps with a cache, one step of it."""
    config = dataclasses.replace(CONFIG, num_layers=num_layers, window_pattern=pattern)
    model = LanguageModel(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    schedule = parse_schedule(setting, num_layers)
    weights = jax.eval_shape(lambda params: prepare(model, params, schedule, num_tokens=1, layout=layout), params)
    programs, state = decoding(model, weights, batch, CONTEXT)
    run = jax.jit(programs.decode, donate_argnums=1)
    lowered = run.lower(weights, state, jnp.int32(4))
    emitters = "xla_cpu_use_fusion_emitters"  # as outside of the suite
    program = lowered.compile({emitters: True} if emitters in os.environ["XLA_FLAGS"] else None)
    return read_program(program.as_text(), unknown_trips=1)


# A layer's smallest matrix, W_q: everything else that a step writes is smaller than it.
MATRIX = 4 * 64 * 64


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [("idn:n=4,k=1", "SL"), ("seq", "L")],
)
def test_a_decoding_step_copies_no_weight(setting, pattern):
    """Regions are stacks, layers in order are lists; rings are updated in place."""
    program = decode_program(4, setting, pattern)
    assert [(op.name, op.bytes_written) for op in program.moves(MATRIX)] == []
    # And every weight is read, once an evaluation.
    evals = parse_schedule(setting, 4).num_block_evals
    assert program.bytes_read >= evals * 12 * MATRIX


def test_a_step_of_many_rows_copies_no_ring():
    """More rows than are written one by one; the smallest array of rings holds two layers' 16 slots."""
    batch = 2 * FEW_WRITES
    program = decode_program(4, "idn:n=4,k=1", "SL", batch)
    ring = 2 * batch * 2 * 16 * 32 * 4
    assert [(op.name, op.bytes_written) for op in program.moves(ring)] == []


def test_what_a_scan_on_a_cpu_copies_is_found():
    """The control: a scan slices every layer out of the stack, 12 D^2 numbers a layer."""
    copied = decode_program(8, "seq", "L", layout="stack").moves(MATRIX)
    assert sum(op.count * op.bytes_written for op in copied) >= 8 * 12 * MATRIX


def test_a_region_costs_equally_many_kernels_at_any_size():
    """But for the prefix sum of the correction, which takes log2 of the layers. A step is one iteration over all layers
    and the ends; in order every layer costs its own."""
    of_region = {n: decode_program(n, f"idn:n={n},k=1", "L") for n in (4, 8)}
    products = {n: sum(op.flops > 0 for op in program.ops) for n, program in of_region.items()}
    assert products[4] == products[8]
    kernels = {n: program.num_kernels for n, program in of_region.items()}
    assert kernels[8] - kernels[4] <= 8  # one more step: a sum, and its even and odd rows put together, fused or not
    in_order = [decode_program(n, "seq", "L").num_kernels for n in (2, 4)]
    assert in_order[1] - in_order[0] >= 2 * 6  # at least a layer's six products
