"""Chips that are not here: their devices for the compiler, and a mesh of them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from snlp_jax.config import Config, MeshConfig
from snlp_jax.errors import InputError
from snlp_jax.parallel.chips import Chip, Slice
from snlp_jax.parallel.mesh import make_mesh

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
"""What libtpu would otherwise ask a TPU VM for."""


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
