"""Programs compiled for chips that are not here, and what their text and their compiler say of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snlp_jax.cache import abstract_past
from snlp_jax.config import Config, MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.forward import forward
from snlp_jax.layout import Spread, abstract_weights
from snlp_jax.model import LanguageModel
from snlp_jax.parallel.chips import Chip, Slice
from snlp_jax.parallel.hlo import Program, read_program
from snlp_jax.parallel.mesh import make_mesh
from snlp_jax.parallel.sharding import bytes_per_device
from snlp_jax.parts import Weights
from snlp_jax.solver import Schedule
from snlp_jax.train.loss import Plan
from snlp_jax.train.step import abstract_state, make_step, optimizer_of
from snlp_jax.types import Batch

Kind = Literal["decode", "forward", "train"]

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
"""What libtpu would otherwise ask a TPU VM for."""


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


def prepare_environment() -> None:
    """Let jax run on the CPU and libtpu do without a TPU. Call it before the first device is asked for."""
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def described_devices(chips: Slice) -> Sequence[Any]:
    """Devices of a slice to compile for.

    Raises:
        InputError: the compiler for them is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    is_tpu = chips.chip.torus_axes > 0
    needs = "libtpu (pip install 'jax[tpu]')" if is_tpu else "jax-cuda13-plugin and jax-cuda13-pjrt"
    try:
        if is_tpu:
            cores = {"chip_config_name": "megacore"} if chips.chip.name == "v4" else {}  # one device a chip
            return topologies.get_topology_desc(platform="tpu", topology_name=str(chips), **cores).devices
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=chips.chip.name,
            target_config=_gpu_target(chips.chip),
            topology=f"1x1x{chips.num_chips}",
        ).devices
    except Exception as error:  # the plugins raise what they like
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot compile for {chips}, which needs {needs} beside this jax: {reason}") from error


def plan_mesh(config: MeshConfig, chips: Slice) -> Mesh:
    """A mesh of the chips of a slice, all of them.

    Raises:
        InputError: see :func:`described_devices`; or the mesh leaves chips over.
    """
    mesh = make_mesh(config, devices=described_devices(chips))
    if mesh.size != chips.num_chips:
        raise InputError(f"a mesh of {mesh.size} devices leaves chips of {chips} idle; choose another --topology.")
    return mesh


def plain_kernels(config: Config) -> Config:
    """The config with XLA's attention: the hand-written kernels show neither their FLOPs nor their bytes, and do not
    compile without their libraries."""
    return replace(config, machine=replace(config.machine, attention="xla", decode_attention="xla"))


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
        return bytes_per_device(abstract_state(model, optimizer_of(model, config), mesh, config))
    weights = abstract_weights(model, schedule, mesh, sequential)
    return bytes_per_device(weights)


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
    return step.lower(abstract_state(model, optimizer, mesh, config), Batch(tokens), plan=plan)


def _abstract_tokens(mesh: Mesh, batch_size: int, num_tokens: int) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.ShapeDtypeStruct((batch_size, num_tokens), jnp.int32, sharding=sharding)


def _gpu_target(chip: Chip) -> str:
    """What XLA wants to know of a Hopper GPU: the limits of compute capability 9.0, memory from the data sheet."""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(chip.hbm_bandwidth)} device_memory_size: {int(chip.hbm_bytes)}
          cuda_compute_capability {{ major: 9 }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 7 }}
        runtime_version {{ major: 13 minor: 0 }}
        device_description_str: "{chip.kinds[0]} 80GB HBM3"
    """
