"""The parts of one iteration, each compiled by itself on the same weights, and the training step.

A part reads its inputs from memory and writes its results there, which the whole iteration does not always do: the sum
of the parts bounds it from above. Bytes are the weights, states and cache that a part must read and write once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed_cells import Cell, Form, Job, Setup, compiled, machine_of, random_rings, random_tokens
from snlp_jax.config import Config, HiddenNormConfig, LossConfig, ModelConfig, TrainConfig
from snlp_jax.model import LanguageModel
from snlp_jax.model.attention import Kernel, KeyValue, attend_by_window, choose_implementation
from snlp_jax.model.block import Rings
from snlp_jax.model.layers import project, rms_norm, rotate
from snlp_jax.model.nodes import attend_cached
from snlp_jax.parts import Weights
from snlp_jax.solver.linear import correct, layer
from snlp_jax.solver.maps import IdentityMap
from snlp_jax.train.flops import peak_flops, step_flops, train_flops_per_token
from snlp_jax.train.loss import Plan
from snlp_jax.train.step import make_init, make_step, optimizer_of
from snlp_jax.types import Batch


def part_jobs(setup: Setup, cell: Cell, setting: str, form: Form) -> list[Job]:
    """Projections, attention, MLP, norms and correction of the region of ``setting``, for the nanochat family."""
    model, config = setup.model, setup.model.config
    if config.num_streams:
        return []
    region = setup.schedules[setting].regions[-1]
    whole = setup.weights(setting, "stack")
    weights = dataclasses.replace(whole, parts=whole.parts[-1:])
    n, B, T, D, F = region.num_layers, cell.batch, cell.length, config.embed_dim, config.mlp_width
    N, K, H, item = config.num_heads, config.num_kv_heads, config.head_dim, model.dtype.itemsize
    windows = config.windows[region.start : region.stop]
    random = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    state_LBTD, x_LBTD = random(0, n, B, T, D), random(1, n, B, T, D).astype(model.dtype)
    q, kv = random(2, n, B, T, N, H).astype(model.dtype), KeyValue(*random(3, 2, n, B, T, K, H).astype(model.dtype))
    rings = random_rings(model, weights, cell) if cell.context else None
    length_B = jnp.full((B,), cell.context, jnp.int32)
    x0_BTD = jax.jit(model.embed)(setup.params, random_tokens(config, cell))
    rows, seen = n * B * T, B * T * sum(_visible(window, cell) for window in windows)
    states, pairs = rows * D, 2 * B * K * H * sum(min(window, cell.context) for window in windows)
    shared = lambda x0: model.shared(x0, length_B if cell.context else None)  # noqa: E731

    def attention(weights: Weights, q: Any, kv: Any, rings: Rings | None, x0: Any) -> Any:
        if rings is not None:
            return _attend_rings(q, kv, rings, windows, shared(x0))
        kernel = choose_implementation(
            model.machine.attention, backend=model.backend, dtype=model.dtype, seq_len=T, head_dim=H
        )
        return attend_by_window(q, kv, windows, Kernel(kernel))

    parts: dict[str, tuple[Any, tuple, float, float]] = {
        "nothing": (lambda weights, x: x[:1, :1, :1, :1] + 1, (state_LBTD,), 8, 0),
        "projections": (
            functools.partial(_projections, model),
            (x_LBTD, x_LBTD.reshape(n, B, T, D)),
            n * 2 * D * (N + K) * H * item + rows * (2 * D * item + 4 * (D + (N + 2 * K) * H)),
            2 * rows * 2 * D * (N + K) * H,
        ),
        "attention": (
            attention,
            (q, kv, rings, x0_BTD),
            item * (pairs + rows * 2 * (N + K) * H),
            4 * seen * N * H,
        ),
        "MLP": (
            functools.partial(_mlp, model),
            (x_LBTD,),
            n * 2 * D * F * item + states * (item + 4),
            2 * rows * 2 * D * F,
        ),
        "norms, mix and rotary": (
            functools.partial(_norms, config, shared),
            (state_LBTD, q, kv.key_BTKH, x0_BTD),
            states * (4 + 4 + 2 * item) + 2 * rows * (N + K) * H * item,
            0,
        ),
        "correction": (
            lambda weights, y, h: correct(IdentityMap(), y, h, h[0]).h_L,
            (state_LBTD, 0.5 * state_LBTD),
            3 * states * 4,
            0,
        ),
    }

    def make(program: Any, rest: tuple) -> Callable[[Job], Callable[[], Any]]:
        def compile(job: Job) -> Callable[[], Any]:
            run, laid_out = compiled(job, program, weights, rest, form)
            return lambda: run(laid_out, *rest)

        return compile

    return [
        Job({"setting": name} | form.name, make(program, rest), int(num_bytes), flops)
        for name, (program, rest, num_bytes, flops) in parts.items()
    ]


def product_jobs(setup: Setup, cell: Cell, setting: str, steps: int) -> list[Job]:
    """The MLPs of the region of ``setting`` alone, one after another and all at once, ``steps`` times in a row: what a
    wide grid makes of the same bytes. A region that fits a cache is read from it from the second time on."""
    model, config = setup.model, setup.model.config
    region = setup.schedules[setting].regions[-1]
    whole = setup.weights(setting, "stack")
    weights = dataclasses.replace(whole, parts=whole.parts[-1:])
    n, rows, item = region.num_layers, cell.batch * cell.length, model.dtype.itemsize
    x_BTD = jax.random.normal(jax.random.key(0), (cell.batch, cell.length, config.embed_dim))
    num_bytes = n * 2 * config.embed_dim * config.mlp_width * item
    flops = 2 * rows * n * 2 * config.embed_dim * config.mlp_width

    def once(weights: Weights, x_BTD: Any, is_at_once: bool) -> Any:
        mlp, one = _blocks_of(weights)["mlp"], functools.partial(_one_mlp, model)
        if is_at_once:
            return jax.vmap(one, in_axes=(None, 0))(x_BTD, mlp).mean(0)
        return jax.lax.scan(lambda x, layer: (x + 0.1 * one(x, layer), None), x_BTD, mlp)[0]

    def program(weights: Weights, x_BTD: Any, steps: Any, *, is_at_once: bool) -> Any:
        again = lambda _, x: x_BTD + 1e-6 * once(weights, x, is_at_once)  # noqa: E731
        return jax.lax.fori_loop(0, steps, again, x_BTD)

    def make(is_at_once: bool) -> Callable[[Job], Callable[[], Any]]:
        def compile(job: Job) -> Callable[[], Any]:
            rest = (x_BTD, jnp.int32(steps))
            run, laid_out = compiled(
                job, functools.partial(program, is_at_once=is_at_once), weights, rest, Form("stack")
            )
            return lambda: run(laid_out, *rest)

        return compile

    names = {False: "seq", True: f"{n} MLPs at once"}
    return [
        Job({"setting": name} | Form("stack").name, make(is_at_once), num_bytes, flops, steps)
        for is_at_once, name in names.items()
    ]


def train_jobs(config: ModelConfig, cell: Cell) -> list[Job]:
    """A training step, plain and with one solver iteration over three quarters of the layers compared."""
    config = dataclasses.replace(config, seq_len=min(config.seq_len, cell.length))
    size = max(1, round(0.75 * config.num_layers))
    regularizer = LossConfig(hidden_norm=HiddenNormConfig(weight=0.5, region_sizes=(size,)))
    model = LanguageModel(config, machine_of(cell))
    tokens = random_tokens(config, dataclasses.replace(cell, length=cell.length + 1))
    formula = train_flops_per_token(config) * cell.batch * cell.length

    def make(loss: LossConfig) -> Callable[[Job], Callable[[], Any]]:
        def compile(job: Job) -> Callable[[], Any]:
            whole = Config(model=config, machine=model.machine, loss=loss, train=TrainConfig(batch_size=cell.batch))
            plan = Plan(tuple((name, term.region_sizes) for name, term in loss.terms.items()))
            optimizer = optimizer_of(model, whole)
            state, step = make_init(model, optimizer, whole)(), make_step(model, optimizer, whole)
            batch = Batch(jnp.asarray(np.asarray(tokens)))
            job.facts["flops_counted"] = step_flops(whole, plan)
            peak = peak_flops(jax.devices()[0].device_kind)
            job.facts["peak_flops"] = peak if cell.dtype == "bfloat16" else None

            def run() -> Any:
                nonlocal state
                state, records = step(state, batch, plan=plan)
                return records

            return run

        return compile

    names = {"seq": LossConfig(), f"hidden_norm on {size}": regularizer}
    form = Form("stack")
    return [Job({"setting": name} | form.name, make(loss), 0, formula) for name, loss in names.items()]


def _blocks_of(weights: Weights) -> Any:
    """The stack of the one region that ``weights`` hold, of which their arrays may hold more layers."""
    (part,) = weights.parts
    first = part.segment.start - part.held[0]
    return layer(part.blocks, slice(first, first + part.segment.num_layers))


def _projections(model: LanguageModel, weights: Weights, x_LBTD: Any, attended_LBTX: Any) -> Any:
    attn = _blocks_of(weights)["attn"]

    def product(x_LBTX: Any, name: str) -> Any:
        return jax.vmap(lambda x, tree: _product(model, x, tree, name))(x_LBTX, attn)

    names = [name for name in ("qkv", "query", "key", "value") if {name, f"{name}_t"} & attn.keys()]  # joined on a GPU
    return [product(x_LBTD, name) for name in names] + [product(attended_LBTX, "out")]


def _mlp(model: LanguageModel, weights: Weights, x_LBTD: Any) -> Any:
    return jax.vmap(functools.partial(_one_mlp, model))(x_LBTD, _blocks_of(weights)["mlp"])


def _one_mlp(model: LanguageModel, x_BTD: Any, mlp: Any) -> Any:
    hidden_BTF = jnp.square(jax.nn.relu(_product(model, x_BTD, mlp, "up")))
    return _product(model, hidden_BTF, mlp, "down")


def _product(model: LanguageModel, x: Any, tree: Any, name: str) -> Any:
    """With a kernel that a wide model on a CPU keeps transposed."""
    is_transposed = f"{name}_t" in tree
    return project(x, tree[name + "_t" * is_transposed], model.dtype, is_transposed=is_transposed)


def _norms(config: ModelConfig, shared: Any, weights: Weights, h_LBTD: Any, q: Any, k: Any, x0_BTD: Any) -> Any:
    blocks, common = _blocks_of(weights), shared(x0_BTD)

    def one(blocks: Any, h_BTD: Any, q: Any, k: Any) -> Any:
        x_BTD = h_BTD
        if config.use_x0_resid:
            x_BTD = blocks["resid_scale"] * h_BTD + blocks["x0_scale"] * x0_BTD
        turned = [rms_norm(rotate(x, common.cos_TH, common.sin_TH)).astype(x.dtype) for x in (q, k)]
        normed = rms_norm(x_BTD).astype(q.dtype)
        return x_BTD, normed, rms_norm(x_BTD + normed).astype(q.dtype), turned

    return jax.vmap(one)(blocks, h_LBTD, q, k)


def _attend_rings(q: Any, kv: KeyValue, rings: Rings, windows: tuple[int, ...], shared: Any) -> Any:
    outs = []
    for ring, members in zip(rings.groups, rings.members, strict=True):
        rows = np.asarray(members)
        window_L = jnp.asarray([windows[index] for index in members])
        q_ring, kv_ring = (q, kv) if len(rows) == len(q) else jax.tree.map(lambda x, rows=rows: x[rows], (q, kv))
        outs.append(jax.vmap(attend_cached, in_axes=(0, 0, 0, 0, None))(q_ring, kv_ring, ring, window_L, shared))
    return outs


def _visible(window: int, cell: Cell) -> float:
    """Keys that a token sees in the mean."""
    if cell.context:
        return min(window, cell.context) + (cell.length + 1) / 2
    return float(np.minimum(np.arange(cell.length), window).mean()) + 1
