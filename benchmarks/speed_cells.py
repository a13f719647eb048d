"""What benchmarks/speed.py times: the compiled programs of a cell, as jobs that run round robin.

forward   tokens to logits, without a cache.
cached    tokens that follow on a cache: at one token the engine's own loop over steps, from one token to the next; at
          more of them one pass and the writing of the cache.
region    the layers of the largest region alone: one sweep and its correction, against the same layers in order; with a
          cache if there is one, which is read and written. At one token also a sum over as many bytes as the layers
          must read: about what reading alone takes.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout

from benchmarks.hlo import read_program
from benchmarks.machine import Dtype, work
from snlp_jax.cache import Past, RingPlan, append, plan_rings
from snlp_jax.chains import chains_of
from snlp_jax.config import MachineConfig, ModelConfig
from snlp_jax.eval.weights import prepare_all
from snlp_jax.forward import CacheUpdate, Keep, forward, kv_by_layer
from snlp_jax.infer.programs import Programs, State
from snlp_jax.infer.sampling import Sampling, rows_of
from snlp_jax.layout import in_order
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import Ring, Rings
from snlp_jax.notation import parse_schedule
from snlp_jax.parts import Weights
from snlp_jax.solver import ParallelSegment, PerLayer, Schedule, SequentialSegment, sequential, solve

Kind = Literal["forward", "cached", "region", "product", "parts", "train"]
Layout = Literal["stack", "list", "mixed"]
FOREVER = 2**30
"""Tokens that a text may have: the loop never comes to an end by itself."""


@dataclass(frozen=True)
class Cell:
    """What the jobs have in common."""

    kind: Kind
    shape: str
    dtype: Dtype
    batch: int = 1
    length: int = 1
    """Tokens a sequence that pass through the layers."""
    context: int = 0
    """Tokens before them, in the cache; 0: these are the first."""
    decode_attention: Literal["xla", "pallas"] = "xla"
    """To a cache, of all the cell's programs."""


def machine_of(cell: Cell) -> MachineConfig:
    """The cell's precision and kernels; cuDNN attention takes no float32."""
    attention: Literal["xla", "auto"] = "xla" if cell.dtype == "float32" else "auto"
    return MachineConfig(compute_dtype=cell.dtype, attention=attention, decode_attention=cell.decode_attention)


@dataclass
class Job:
    """One program. ``make`` compiles it and gives the function that issues one run."""

    name: dict[str, Any]
    make: Callable[["Job"], Callable[[], Any]]
    num_bytes: int
    """That a unit must move."""
    flops: float
    units: int = 1
    """Tokens in a row, or iterations, that a run makes: times are those of one."""
    run: Callable[[], Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    dispatch: list[float] = field(default_factory=list)

    @property
    def is_sequential(self) -> bool:
        return self.name["setting"] == "seq"


@dataclass(frozen=True)
class Form:
    """How a program holds its weights."""

    layout: Layout
    """mixed: a list for the layers in order, a stack for the region."""
    is_chosen: bool = False
    """Whether XLA chose how each array lies in memory, which a GPU's products with one row ask for."""

    @property
    def name(self) -> dict[str, Any]:
        return {"layout": self.layout, "memory": "chosen" if self.is_chosen else "default"}


class Setup:
    """One model's weights in every form, equal parts held once."""

    def __init__(self, model: LanguageModel, params: Any, settings: tuple[str, ...]):
        self.model, self.params, self.settings = model, params, settings
        self.schedules = {name: parse_schedule(name, model.config.num_layers) for name in ("seq", *settings)}

    @functools.cached_property
    def stacks(self) -> dict[str, Weights]:
        return self._lay_out("stack")

    @functools.cached_property
    def lists(self) -> dict[str, Weights]:
        return self._lay_out("list")

    def weights(self, setting: str, layout: Layout) -> Weights:
        """Laid out; embedding and head are the same arrays everywhere."""
        stacks = self.stacks[setting]
        if layout == "stack":
            return stacks
        lists = self.lists[setting]
        if layout == "list":
            return dataclasses.replace(lists, embed_head=stacks.embed_head)
        pairs = zip(stacks.parts, lists.parts, strict=True)
        parts = tuple(one if isinstance(stack.segment, SequentialSegment) else stack for stack, one in pairs)
        return dataclasses.replace(stacks, parts=parts)

    def _lay_out(self, layout: Literal["stack", "list"]) -> dict[str, Weights]:
        laid_out = prepare_all(self.model, self.params, list(self.schedules.values()), num_tokens=1, layout=layout)
        return dict(zip(self.schedules, laid_out, strict=True))


def forward_jobs(setup: Setup, cell: Cell, forms: dict[str, list[Form]]) -> list[Job]:
    """Whole forward passes; ``forms`` of every setting, those of "seq" first."""
    model, tokens = setup.model, random_tokens(setup.model.config, cell)

    def make(setting: str, form: Form) -> Callable[[Job], Callable[[], Any]]:
        def compile(job: Job) -> Callable[[], Any]:
            program = lambda weights, tokens: forward(model, weights, tokens).logits_BTV  # noqa: E731
            run, weights = compiled(job, program, setup.weights(setting, form.layout), (tokens,), form)
            return lambda: run(weights, tokens)

        return compile

    return _jobs(setup, cell, forms, make)


def cached_jobs(setup: Setup, cell: Cell, forms: dict[str, list[Form]], steps: int) -> list[Job]:
    """Passes over tokens that follow on a cache of ``cell.context``; ``steps`` tokens in a row where it is one."""
    model, tokens = setup.model, random_tokens(setup.model.config, cell)

    def make(setting: str, form: Form) -> Callable[[Job], Callable[[], Any]]:
        def compile(job: Job) -> Callable[[], Any]:
            weights = setup.weights(setting, form.layout)
            programs, like = decoding(model, weights, cell.batch, cell.context, cell.length)
            state = random_state(like, cell.context)
            if cell.length == 1:
                run, weights = compiled(job, programs.decode, weights, (state, jnp.int32(steps)), form, donate=1)
                return _carrying(lambda state: run(weights, state, jnp.int32(steps)), state)

            def program(weights: Weights, rings: Any, tokens_BT: jax.Array, length_B: jax.Array) -> Any:
                past = Past(tokens_BT[:, :1], length_B, rings)
                output = forward(model, weights, tokens_BT, past=past, keep=Keep(programs.rule))
                after_B = length_B + jnp.minimum(output.logits_BTV[:, -1].argmax(-1), 0)  # written after all is read
                pairs = zip(rings, output.updates, strict=True)
                after = tuple(_append_all(part_rings, update, after_B) for part_rings, update in pairs)
                return after, output.logits_BTV[:, -1]

            rest = (state.rings, tokens, state.length_B)
            run, weights = compiled(job, program, weights, rest, form, donate=1)
            return _carrying(lambda rings: run(weights, rings, *rest[1:])[0], state.rings)

        return compile

    return _jobs(setup, cell, forms, make, steps if cell.length == 1 else 1)


def region_jobs(setup: Setup, cell: Cell, setting: str, forms: dict[str, list[Form]], steps: int) -> list[Job]:
    """One iteration of the region of ``setting`` against the same layers in order, ``steps`` times in a row."""
    model, config = setup.model, setup.model.config
    region = setup.schedules[setting].regions[-1]
    tokens = random_tokens(config, cell)
    x0_BTD = jax.jit(model.embed)(setup.params, tokens)
    length_B = jnp.full((cell.batch,), cell.context, jnp.int32)

    def make(kind: str, form: Form) -> Callable[[Job], Callable[[], Any]]:
        layout = "list" if form.layout == "list" else "stack"
        is_region = kind != "seq"

        def compile(job: Job) -> Callable[[], Any]:
            whole = setup.weights(setting, layout)
            whole = whole if is_region else in_order(whole)
            weights = dataclasses.replace(whole, parts=whole.parts[-1:])
            rings = random_rings(model, weights, cell) if cell.context else None
            program = functools.partial(iterate, model)
            rest = (rings, x0_BTD, tokens, length_B, jnp.int32(steps))
            run, weights = compiled(job, program, weights, rest, form, donate=1)
            return _carrying(lambda rings: run(weights, rings, *rest[1:]), rings)

        return compile

    once = Schedule(region.num_layers, (dataclasses.replace(region, start=0, stop=region.num_layers, num_iters=1),))
    alone = dataclasses.replace(config, num_layers=region.num_layers, window_pattern=config.letters[region.start :])
    num_bytes, flops = cell_work(alone, once, cell)
    head = config.embed_dim * config.padded_vocab_size
    rows = cell.batch * cell.length * config.embed_dim
    num_bytes -= jnp.dtype(cell.dtype).itemsize * (head + rows)
    flops -= 2 * cell.batch * cell.length * head
    names = {"seq": "seq", setting: f"one iteration of {region.num_layers}"}
    jobs = [
        Job({"setting": names[kind]} | form.name, make(kind, form), num_bytes, flops, steps)
        for kind, forms_of_kind in forms.items()
        for form in forms_of_kind
    ]
    return jobs + [reading_job(cell, num_bytes, steps)] * (cell.length == 1)


def reading_job(cell: Cell, num_bytes: int, steps: int) -> Job:
    """A sum over one array of ``num_bytes``, ``steps`` times in a row."""

    def program(array: jax.Array, steps: jax.Array) -> jax.Array:
        def again(_: jax.Array, total: jax.Array) -> jax.Array:
            array_now, _ = jax.lax.optimization_barrier((array, total))  # or it would be summed once for all steps
            return total + jnp.sum(array_now, dtype=jnp.float32)

        return jax.lax.fori_loop(0, steps, again, jnp.float32(0))

    def compile(job: Job) -> Callable[[], Any]:
        rest = (jnp.zeros(num_bytes // jnp.dtype(cell.dtype).itemsize, cell.dtype), jnp.int32(steps))
        began = time.perf_counter()
        run = jax.jit(program).lower(*rest).compile()
        job.facts["compile_s"] = round(time.perf_counter() - began, 2)
        return lambda: run(*rest)

    name = {"setting": f"reading {num_bytes / 1e6:.0f} MB"} | Form("stack").name
    return Job(name, compile, num_bytes, 0.0, steps)


def iterate(
    model: LanguageModel,
    weights: Weights,
    rings: Rings | None,
    x0_BTD: jax.Array,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    steps: jax.Array,
) -> Rings | jax.Array:
    """The one part that ``weights`` hold, ``steps`` times, a region with one iteration; each time on a state that hangs
    on the one before. Gives what it leaves behind."""
    (part,) = weights.parts
    segment = part.segment
    shared = model.shared(x0_BTD, None if rings is None else length_B)
    start = model.expand(x0_BTD)

    def one(_: jax.Array, carry: tuple) -> tuple:
        h, rings = carry
        (chain,) = chains_of(model, weights.embed_head, part, tokens_BT, shared, h, rings)
        if isinstance(segment, ParallelSegment):
            solution = solve(chain, segment.correction, segment.init, num_iters=1)
        else:
            solution = sequential(chain, with_aux=rings is not None)
        if rings is not None:
            # Not known before the layers are evaluated, so that the ring is written in place, after it was read.
            is_huge_B = solution.value.reshape(len(length_B), -1)[:, -1] > 1e30
            rings = append(rings, kv_by_layer(solution.aux), length_B + is_huge_B)
        return start + 1e-6 * solution.value, rings

    h, rings = jax.lax.fori_loop(0, steps, one, (start, rings))
    return h if rings is None else rings


def compiled(job: Job, program: Any, weights: Any, rest: tuple, form: Form, donate: int | None = None) -> Any:
    """``(executable, weights)``, and what is to be known of it in ``job.facts``."""
    began, donated = time.perf_counter(), () if donate is None else (donate,)
    if form.is_chosen:
        as_liked = jax.tree.map(lambda leaf: Format(MemoryLayout.AUTO, leaf.sharding), weights)
        like = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
        lowered = jax.jit(program, in_shardings=(as_liked, *[None] * len(rest)), donate_argnums=donated).lower(
            like(weights), *like(rest)
        )
        run = lowered.compile()
        weights = jax.device_put(weights, run.input_formats[0][0])
    else:
        run = jax.jit(program, donate_argnums=donated).lower(weights, *rest).compile()
    job.facts["compile_s"] = round(time.perf_counter() - began, 2)
    memory = run.memory_analysis()
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    peak = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    job.facts |= {"peak_bytes": peak, "temp_bytes": sizes["temp"]}
    counted = read_program(run.as_text(), unknown_trips=1)  # of loops one step
    blocks = [
        leaf
        for leaf in jax.tree.leaves([part.blocks for part in weights.parts])
        if leaf.ndim > 1 and min(leaf.shape[-2:]) > 16
    ]
    smallest = min(leaf.shape[-1] * leaf.shape[-2] * leaf.dtype.itemsize for leaf in blocks)
    moved = sum(op.count * op.bytes_written for op in counted.moves(smallest)) if job.units > 1 else None
    job.facts |= {"kernels": counted.num_kernels, "weight_sized_bytes_written": moved}
    return run, weights


def decoding(
    model: LanguageModel, weights: Weights, batch: int, context: int, length: int = 1
) -> tuple[Programs, State]:
    """The engine's programs and the state, as shapes, of texts with ``context`` tokens in the cache.

    Fused layers keep a cache for every evaluation, as the engine asks of them.
    """
    rows, features = rows_of([Sampling()] * batch)
    is_fused = any(isinstance(s, ParallelSegment) and not isinstance(s.stage, PerLayer) for s in weights.segments)
    evaluation: Literal["last", "every"] = "every" if is_fused else "last"
    plans = plan_rings(model, weights, context, length)
    programs = Programs(model, features, plans, evaluation, mesh=None, num_slots=16 + length)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    prompt = (ints(batch, 16), ints(batch), ints(batch), ints(batch, 1))
    return programs, jax.eval_shape(programs.prefill, weights if is_fused else in_order(weights), *prompt, rows)


def random_state(like: State, context: int) -> State:
    """Random keys and values; rows that have ``context`` tokens and never end."""
    batch = like.length_B.shape[0]
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like._replace(rings=()))
    return state._replace(
        rings=jax.tree.map(_random, like.rings),
        length_B=jnp.full((batch,), context, jnp.int32),
        target_B=jnp.full((batch,), FOREVER, jnp.int32),
        is_active_B=jnp.ones((batch,), bool),
        stop_BX=jnp.full(like.stop_BX.shape, -1, jnp.int32),
    )


def random_rings(model: LanguageModel, weights: Weights, cell: Cell) -> Rings:
    """Of the one segment that ``weights`` hold."""
    plan: RingPlan | None = plan_rings(model, weights, cell.context, cell.length)[0]
    assert plan is not None
    config = model.config

    def group(size: int, members: tuple[int, ...]) -> Ring:
        shape = (len(members), cell.batch, config.num_kv_heads, size, config.head_dim)
        return Ring(*(_random(jax.ShapeDtypeStruct(shape, model.dtype)) for _ in range(2)))

    return Rings(tuple(map(group, plan.sizes, plan.members)), plan.members)


def random_tokens(config: ModelConfig, cell: Cell) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (cell.batch, cell.length)))


def cell_work(config: ModelConfig, schedule: Schedule, cell: Cell) -> tuple[int, float]:
    """Bytes that a pass must read, weights and cache, and its FLOPs."""
    num_bytes, flops = work(config, schedule, cell.batch, cell.length, cell.dtype)
    pair = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(cell.dtype).itemsize
    for segment in schedule.segments:
        evals = segment.num_block_evals // segment.num_layers
        seen = sum(min(window, cell.context) for window in config.windows[segment.start : segment.stop])
        num_bytes += evals * cell.batch * pair * seen
        flops += 4 * evals * cell.batch * cell.length * config.embed_dim * seen
    return num_bytes, flops


def _jobs(setup: Setup, cell: Cell, forms: dict[str, list[Form]], make: Any, units: int = 1) -> list[Job]:
    jobs = []
    for setting, forms_of_setting in forms.items():
        schedule = setup.schedules[setting]
        num_bytes, flops = cell_work(setup.model.config, schedule, cell)
        depth = {"depth": schedule.depth, "num_block_evals": schedule.num_block_evals}
        for form in forms_of_setting:
            name = {"setting": setting} | form.name
            jobs.append(Job(name, make(setting, form), num_bytes, flops, units, facts=dict(depth)))
    return jobs


def _carrying(step: Callable[[Any], Any], carry: Any) -> Callable[[], Any]:
    """A run that takes what the last one left: its argument is donated."""

    def run() -> Any:
        nonlocal carry
        left = step(carry)
        carry = left if carry is not None else None
        return left

    return run


def _append_all(rings: Any, update: CacheUpdate | None, length_B: jax.Array) -> Any:
    if rings is None or update is None:
        return rings
    if isinstance(rings, Rings):
        return append(rings, update.kv, length_B)
    return tuple(append(one, kv, length_B) for one, kv in zip(rings, update.kv, strict=True))


def _random(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.normal(jax.random.key(like.size), like.shape).astype(like.dtype)
