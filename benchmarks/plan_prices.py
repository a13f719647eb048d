"""What a kernel and an exchange cost on a slice of chips.

A kernel takes ``launch + max(bytes / HBM bandwidth, FLOPs / peak)``, an exchange over n chips
``launch + steps * hop + bytes / link bandwidth``; nothing overlaps. Steps are hops along the axes of a torus (half an
axis where its ends are joined), n - 1 behind a switch. An all-reduce is the faster of two: all partial sums gathered
at once and added locally, or reduce-scatter and all-gather, at twice the steps.
"""

import itertools
import math
from dataclasses import dataclass

from benchmarks.hlo import Op
from snlp_jax.parallel.chips import Slice


@dataclass(frozen=True)
class Latency:
    """Seconds."""

    hop: float
    exchange_launch: float
    kernel_launch: float
    """What every exchange and every kernel takes besides."""


LATENCIES = {"tpu": Latency(1e-6, 1e-6, 1e-6), "gpu": Latency(0.6e-6, 6.6e-6, 2e-6)}
"""TPU: a hop is about 1 us ('How to Scale Your Model', 2025, the chapter on sharded matrices). Launches are
assumptions: the TPU compiler's own cost model gives its smallest operations about 1800 cycles, 1.2 us at the 1.5 GHz of
a v5e. GPU: exchanges are the constants of NCCL's own tuner for a ring over NVLink, protocol LL, 6.6 us a call and
0.6 us a step; kernels an assumption for small ones inside a CUDA graph."""
VMEM = 0.85 * 64 * 2**20
"""Of each TensorCore, or twice as much of a v5e or v6e; the compiled programs of docs/scaling.md keep about so much."""
ON_CHIP_BYTES = {"v5e": 2 * VMEM, "v5p": VMEM, "v6e": 2 * VMEM}
"""What a program can keep of its weights beside the memory, from one sweep over them to the next; else nothing."""


class PricedSlice(Slice):
    """A slice that knows what its operations cost."""

    @property
    def latency(self) -> Latency:
        return LATENCIES[self.chip.backend]

    @property
    def on_chip_bytes(self) -> float:
        return ON_CHIP_BYTES.get(self.chip.name, 0.0)

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
        steps, bandwidth, hop = self.steps(group), self.bandwidth(group), self.latency.hop
        launch = self.latency.exchange_launch
        if kind == "collective-permute":
            return launch + hop + payload / self.chip.link_bandwidth
        if kind == "all-reduce":
            at_once = steps * hop + (group - 1) * payload / bandwidth
            in_two = 2 * steps * hop + 2 * payload * (group - 1) / group / bandwidth
            return launch + min(at_once, in_two)
        return launch + steps * hop + payload * (group - 1) / group / bandwidth

    def seconds(self, op: Op, kernel_launch: float | None = None) -> float:
        """Of all executions of an operation of a program; ``kernel_launch`` replaces the chip's."""
        if op.is_collective:
            return op.count * self.exchange_seconds(op.kind, op.payload, op.group)
        chip = self.chip
        roofline = max((op.bytes_read + op.bytes_written) / chip.hbm_bandwidth, op.flops / chip.bf16_flops)
        launch = self.latency.kernel_launch if kernel_launch is None else kernel_launch
        return op.count * (op.launches * launch + roofline)

    def _boxes(self, group: int) -> list[tuple[int, ...]]:
        fitting = [[size for size in range(1, axis + 1) if axis % size == 0] for axis in self.shape]
        return [box for box in itertools.product(*fitting) if math.prod(box) == group]

    def _is_ring(self, axis: int, size: int) -> bool:
        """Only a whole axis closes."""
        return size == self.shape[axis] and size % self.chip.ring_length == 0

    def _box_steps(self, box: tuple[int, ...]) -> int:
        return sum(size // 2 if self._is_ring(axis, size) else size - 1 for axis, size in enumerate(box))
