"""What a device or the machine has of memory, how many rows it takes at once, and a refusal of what cannot fit."""

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from snlp_jax.config import ModelConfig
from snlp_jax.errors import InputError

GIB = 2**30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CGROUP_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
CGROUP_STAT = ("/sys/fs/cgroup/memory.stat", "/sys/fs/cgroup/memory/memory.stat")
MEMINFO = "/proc/meminfo"
TRACE_BYTES = {"cpu": 2**28, "gpu": 2**30, "tpu": 2**30}
"""Most bytes of a float32 trace, the states after all layers, that an evaluation or a fit makes at once on a device. A
solver holds several; the budget is the same whatever is free, so that numbers are the same to the last bit."""


def host_bytes() -> int:
    """Memory of this machine, or of the container that the process lives in."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *filter(None, map(_number, CGROUP_LIMITS))])


def free_host_bytes() -> int:
    """What a process could still take of it: memory that is free or holds files that can be read again."""
    free = [host_bytes()]
    if available := _fields(MEMINFO).get("MemAvailable:"):
        free.append(1024 * available)
    for limit, used, stat in zip(CGROUP_LIMITS, CGROUP_USED, CGROUP_STAT, strict=True):
        if (most := _number(limit)) and (now := _number(used)):
            free.append(most - now + _fields(stat).get("inactive_file", 0))
    return max(min(free), 0)


def free_bytes() -> int | None:
    """What can still be taken of the first device's memory, or of the host's on a CPU; None where none tells."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if limit := int(stats.get("bytes_limit", 0)):
        return limit - int(stats.get("bytes_in_use", 0))
    return free_host_bytes() if device.platform == "cpu" else None


def capacity_of(mesh: Mesh) -> int | None:
    """Bytes that one device of a mesh may hold; devices of a CPU share the host's memory. None where none tells."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    limits = [int((device.memory_stats() or {}).get("bytes_limit", 0)) for device in local]
    if all(limits):
        return min(limits)
    return host_bytes() // len(local) if local[0].platform == "cpu" else None


def free_of(mesh: Mesh) -> int | None:
    """Bytes that can still be taken on each device of a mesh; devices of a CPU share what the host has. None where none
    tells."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in local]
    if all(each.get("bytes_limit", 0) for each in stats):
        return min(int(each["bytes_limit"]) - int(each.get("bytes_in_use", 0)) for each in stats)
    return free_host_bytes() // len(local) if local[0].platform == "cpu" else None


def program_bytes(compiled: Any) -> int | None:
    """What running a compiled program takes on one device besides its arguments, as XLA counts it; None where the
    backend does not tell."""
    try:
        stats = compiled.memory_analysis()
        made = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return made + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None


def check_room(what: str, needed: int | None, remedy: str, *, on_host: bool = False) -> None:
    """Refuse what takes more than is free, before the system kills the process for it.

    Args:
        what: the subject of the sentence.
        needed: bytes; None where it is not known.
        remedy: what the user can do, as the end of the sentence.
        on_host: in the host's memory, not in the first device's.

    Raises:
        InputError: one sentence that says what needs how much of how much.
    """
    free = free_host_bytes() if on_host else free_bytes()
    if needed is not None and free is not None and needed > free:
        raise InputError(f"{what} would take {needed / GIB:.3g} GiB, but {free / GIB:.3g} GiB are free; {remedy}.")


def rows_at_once(
    config: ModelConfig, num_tokens: int, num_rows: int, *, backend: str = "cpu", multiple: int = 1
) -> int:
    """Rows of a batch that are evaluated at once: all, or the largest equal parts of it whose trace fits into
    ``TRACE_BYTES``, of ``multiple`` rows or more.

    Args:
        num_tokens: of a row.
        multiple: devices over which rows are spread; it divides ``num_rows``, and parts of it.
    """
    row_bytes = 4 * num_tokens * config.num_layers * config.embed_dim * max(config.num_streams, 1)
    most = multiple * max(TRACE_BYTES.get(backend, 2**30) // row_bytes, 1)
    parts = (rows for rows in range(min(num_rows, most), 0, -1) if num_rows % rows == 0 and rows % multiple == 0)
    return next(parts, num_rows)


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _fields(path: str) -> dict[str, int]:
    """Name and number of every line."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
