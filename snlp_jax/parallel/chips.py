"""Data-sheet figures of accelerators, and what a kernel and an exchange cost on a slice of them.

A kernel takes ``launch + max(bytes / HBM bandwidth, FLOPs / peak)``, an exchange over n chips
``launch + steps * hop + bytes / link bandwidth``; nothing overlaps. Steps are hops along the axes of a torus (half an
axis where its ends are joined), n - 1 behind a switch. An all-reduce is the faster of two: all partial sums gathered
at once and added locally, or reduce-scatter and all-gather, at twice the steps.
"""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from snlp_jax.errors import InputError
from snlp_jax.parallel.hlo import Op

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator. Bandwidths are bytes per second, latencies seconds."""

    name: str
    kinds: tuple[str, ...]
    """How ``jax.Device.device_kind`` begins."""
    bf16_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    """One way, of one link of a torus, or of all links to a switch."""
    torus_axes: int
    """0: a switch."""
    ring_length: int
    """An axis whose length is a multiple has its ends joined; of a switch, the most chips behind it."""
    hop: float
    on_chip_bytes: float
    """What a program can keep of its weights beside the memory, from one sweep over them to the next."""
    exchange_launch: float
    kernel_launch: float
    """What every exchange and every kernel takes besides."""
    source: str

    @property
    def backend(self) -> str:
        return "tpu" if self.torus_axes else "gpu"


_TPU: dict[str, Any] = {"hop": 1e-6, "exchange_launch": 1e-6, "kernel_launch": 1e-6}
"""Hop: about 1 us ('How to Scale Your Model', 2025, the chapter on sharded matrices). Launches are assumptions: the TPU
compiler's own cost model gives its smallest operations about 1800 cycles, 1.2 us at the 1.5 GHz of a v5e."""
_VMEM = 0.85 * 64 * 2**20
"""Of each TensorCore, or twice as much of a v5e or v6e; the compiled programs of docs/scaling.md keep about so much."""
_NVIDIA: dict[str, Any] = {
    "torus_axes": 0,
    "ring_length": 8,
    "hop": 0.6e-6,
    "on_chip_bytes": 0,
    "exchange_launch": 6.6e-6,
    "kernel_launch": 2e-6,
}
"""Exchanges: the constants of NCCL's own tuner for a ring over NVLink, protocol LL: 6.6 us a call and 0.6 us a step.
Kernels: an assumption for small ones inside a CUDA graph."""

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            ("TPU v4",),
            275e12,
            32 * GIB,
            1200e9,
            50e9,
            torus_axes=3,
            ring_length=4,
            on_chip_bytes=0,
            source="Cloud TPU documentation, TPU v4; links: Jouppi et al., 'TPU v4', 2023",
            **_TPU,
        ),
        Chip(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            197e12,
            16 * GIB,
            819e9,
            50e9,
            torus_axes=2,
            ring_length=16,
            on_chip_bytes=2 * _VMEM,
            source="Cloud TPU documentation, TPU v5e: 400 GB/s both ways over 4 ports",
            **_TPU,
        ),
        Chip(
            "v5p",
            ("TPU v5p", "TPU v5"),
            459e12,
            95 * GIB,
            2765e9,
            100e9,
            torus_axes=3,
            ring_length=4,
            on_chip_bytes=_VMEM,
            source="Cloud TPU documentation, TPU v5p: 1200 GB/s both ways over 6 ports",
            **_TPU,
        ),
        Chip(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            918e12,
            32 * GIB,
            1638e9,
            100e9,
            torus_axes=2,
            ring_length=16,
            on_chip_bytes=2 * _VMEM,
            source="Cloud TPU documentation, TPU v6e: 800 GB/s both ways over 4 ports",
            **_TPU,
        ),
        Chip("a100", ("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, source="NVIDIA A100 80GB data sheet", **_NVIDIA),
        Chip("h100", ("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, source="NVIDIA H100 SXM data sheet", **_NVIDIA),
        Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, source="NVIDIA H200 data sheet", **_NVIDIA),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose devices call themselves so, None where it is not known."""
    found = [(len(kind), chip) for chip in CHIPS.values() for kind in chip.kinds if device_kind.startswith(kind)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


@dataclass(frozen=True)
class Slice:
    """Chips that are wired together: ``v5e:4x4``, ``v5p:2x2x4``, ``h100:8``."""

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Raises InputError where there is no such slice."""
        name, _, sizes = text.strip().partition(":")
        if name not in CHIPS:
            raise InputError(f"topology {text!r}: unknown chip {name!r}; choose one of {', '.join(CHIPS)}.")
        chip = CHIPS[name]
        num_axes = max(chip.torus_axes, 1)
        example = f"{name}:8" if num_axes == 1 else f"{name}:{'x'.join(['2', '4', '4'][:num_axes])}"
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
            raise InputError(f"topology {text!r}: {sizes!r} is no shape; write {example}.")
        shape = tuple(map(int, sizes.split("x")))
        if len(shape) != num_axes:
            raise InputError(f"topology {text!r}: {name} has {num_axes} axes; write {example}.")
        if not chip.torus_axes and shape[0] > chip.ring_length:
            raise InputError(f"topology {text!r}: a switch joins {chip.ring_length} {name}; give at most as many.")
        return cls(chip, shape)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def steps(self, group: int) -> int:
        """Hops between the two most distant of ``group`` chips, in the most compact box that holds them."""
        if not self.chip.torus_axes:
            return group - 1
        return min((self._box_steps(box) for box in self._boxes(group)), default=group - 1)

    def bandwidth(self, group: int) -> float:
        """Bytes a second at which each of ``group`` chips receives what the others send."""
        if not self.chip.torus_axes:
            return self.chip.link_bandwidth
        box = min(self._boxes(group), key=self._box_steps, default=(1,))
        links = [2 if self._is_ring(axis, size) else 1 for axis, size in enumerate(box) if size > 1]
        return self.chip.link_bandwidth * max(sum(links), 1)

    def exchange_seconds(self, kind: str, payload: float, group: int) -> float:
        """Of one collective with a result of ``payload`` bytes a chip (of a reduce-scatter: an operand)."""
        if group < 2:
            return 0.0
        chip, steps, bandwidth = self.chip, self.steps(group), self.bandwidth(group)
        launch = chip.exchange_launch
        if kind == "collective-permute":
            return launch + chip.hop + payload / chip.link_bandwidth
        if kind == "all-reduce":
            at_once = steps * chip.hop + (group - 1) * payload / bandwidth
            in_two = 2 * steps * chip.hop + 2 * payload * (group - 1) / group / bandwidth
            return launch + min(at_once, in_two)
        return launch + steps * chip.hop + payload * (group - 1) / group / bandwidth

    def seconds(self, op: Op, kernel_launch: float | None = None) -> float:
        """Of all executions of an operation of a program; ``kernel_launch`` replaces the chip's."""
        if op.is_collective:
            return op.count * self.exchange_seconds(op.kind, op.payload, op.group)
        chip = self.chip
        roofline = max((op.bytes_read + op.bytes_written) / chip.hbm_bandwidth, op.flops / chip.bf16_flops)
        launch = chip.kernel_launch if kernel_launch is None else kernel_launch
        return op.count * (op.launches * launch + roofline)

    def _boxes(self, group: int) -> list[tuple[int, ...]]:
        fitting = [[size for size in range(1, axis + 1) if axis % size == 0] for axis in self.shape]
        return [box for box in itertools.product(*fitting) if math.prod(box) == group]

    def _is_ring(self, axis: int, size: int) -> bool:
        """Only a whole axis closes."""
        return size == self.shape[axis] and size % self.chip.ring_length == 0

    def _box_steps(self, box: tuple[int, ...]) -> int:
        return sum(size // 2 if self._is_ring(axis, size) else size - 1 for axis, size in enumerate(box))
