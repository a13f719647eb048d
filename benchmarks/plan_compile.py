"""Programs compiled for chips that are not here, and what their text and their compiler say of them."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.hlo import Program, read_program
from snlp_jax.cache import Past, RingPlan, plan_rings
from snlp_jax.config import Config
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.layout import Spread, abstract_weights
from snlp_jax.model import LanguageModel
from snlp_jax.model.block import Ring, Rings
from snlp_jax.parallel.sharding import BY_FEATURE, BY_LAYER, bytes_per_device, spec_of
from snlp_jax.parts import Weights
from snlp_jax.solver import Schedule
from snlp_jax.train.loss import Plan
from snlp_jax.train.step import abstract_state, make_step, optimizer_of
from snlp_jax.types import Batch

Kind = Literal["decode", "forward", "train"]


@dataclass(frozen=True)
class Work:
    """What a program has to do: tokens that follow on a cache of ``context``, or whole sequences of as many."""

    kind: Kind = "decode"
    batch_size: int = 1
    context: int = 2048
    """Tokens in the cache, or of a sequence."""
    new_tokens: int = 1

    @property
    def num_tokens(self) -> int:
        """Of one sequence that pass through the layers."""
        return self.new_tokens if self.kind == "decode" else self.context


@dataclass(frozen=True)
class Compiled:
    """A compiled program: its operations, and bytes of memory on one device."""

    program: Program
    arguments: int
    outputs: int
    temporary: int
    code: int

    @property
    def memory(self) -> int:
        return self.arguments + self.outputs + self.temporary + self.code


def compile_plan(
    config: Config, schedule: Schedule, mesh: Mesh, work: Work, *, backend: str, sequential: Spread = "tensor"
) -> Compiled:
    """Compile one program for the devices of ``mesh``.

    Raises:
        InputError: the program does not fit into a device's memory, or its number of iterations depends on data.
    """
    try:
        model = LanguageModel(config.model, config.machine, backend=backend)
        lowered = (
            _lower_training(model, config, mesh, work)
            if work.kind == "train"
            else _lower_forward(model, abstract_weights(model, schedule, mesh, sequential), mesh, work)
        )
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            line = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
            raise InputError(f"it does not fit into a device's memory: {line[:300]}") from error
        raise
    memory = compiled.memory_analysis()
    try:
        program = read_program(compiled.as_text())
    except ValueError as error:
        raise InputError(f"{error} Plan without tol=.") from error
    return Compiled(
        program,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )


def held_bytes(
    model: LanguageModel, config: Config, schedule: Schedule, mesh: Any, work: Work, sequential: Spread = "tensor"
) -> int:
    """What lies on one device between two steps: the weights, in training with the optimizer's state."""
    if work.kind == "train":
        return bytes_per_device(abstract_state(model, optimizer_of(model, config), config, mesh))
    weights = abstract_weights(model, schedule, mesh, sequential)
    return bytes_per_device(weights)


def abstract_past(model: LanguageModel, weights: Weights, mesh: Mesh, batch_size: int, num_tokens: int) -> Past:
    """The past of a text of ``num_tokens`` tokens as shapes with shardings: each segment's lies as its layers do."""
    config = model.config

    def one(plan: RingPlan | None, is_spread: bool) -> Rings | None:
        if plan is None:
            return None

        def group(size: int, members: tuple[int, ...]) -> Ring:
            shape = (len(members), batch_size, config.num_kv_heads, size, config.head_dim)
            spec = spec_of("cache", shape, config, mesh, BY_LAYER if is_spread else BY_FEATURE)
            leaf: Any = jax.ShapeDtypeStruct(shape, model.dtype, sharding=NamedSharding(mesh, spec))
            return Ring(leaf, leaf)

        return Rings(tuple(map(group, plan.sizes, plan.members)), plan.members)

    by_row = NamedSharding(mesh, PartitionSpec("data"))
    previous_B1: Any = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=by_row)
    length_B: Any = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=by_row)
    plans = plan_rings(model, weights, num_tokens, 1, mesh)
    rings = tuple(one(plan, part.is_spread) for plan, part in zip(plans, weights.parts, strict=True))
    return Past(previous_B1, length_B, rings)


def _lower_forward(model: LanguageModel, weights: Weights, mesh: Mesh, work: Work) -> Any:
    def run(weights: Weights, tokens_BT: jax.Array, past: Any) -> Any:
        output = forward(model, weights, tokens_BT, mesh=mesh, past=past)
        return output.logits_BTV

    past = abstract_past(model, weights, mesh, work.batch_size, work.context) if work.kind == "decode" else None
    return jax.jit(run).lower(weights, _abstract_tokens(mesh, work.batch_size, work.num_tokens), past)


def _lower_training(model: LanguageModel, config: Config, mesh: Mesh, work: Work) -> Any:
    optimizer = optimizer_of(model, config, mesh)
    plan = Plan(tuple((name, term.region_sizes) for name, term in config.loss.terms.items()))
    tokens = _abstract_tokens(mesh, work.batch_size, work.context + 1)
    step: Any = make_step(model, optimizer, config, mesh)
    return step.lower(abstract_state(model, optimizer, config, mesh), Batch(tokens), plan=plan)


def _abstract_tokens(mesh: Mesh, batch_size: int, num_tokens: int) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.ShapeDtypeStruct((batch_size, num_tokens), jnp.int32, sharding=sharding)
