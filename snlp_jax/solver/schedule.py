"""A schedule: which layers run in order and which form parallel regions."""

from dataclasses import dataclass, field

from snlp_jax.solver.corrections import Correction
from snlp_jax.solver.init import Init, PrefixState


@dataclass(frozen=True)
class SequentialSegment:
    """Layers ``start`` to ``stop - 1`` (from 0), one after another."""

    start: int
    stop: int

    @property
    def num_layers(self) -> int:
        return self.stop - self.start

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def num_block_evals(self) -> int:
        return self.num_layers


@dataclass(frozen=True)
class ParallelSegment:
    """Layers ``start`` to ``stop - 1`` solved together by ``num_iters`` iterations."""

    start: int
    stop: int
    num_iters: int
    correction: Correction
    init: Init = field(default_factory=PrefixState)

    def __post_init__(self) -> None:
        if self.num_iters < 1:
            raise ValueError(f"k={self.num_iters}: a parallel region needs at least one iteration.")

    @property
    def num_layers(self) -> int:
        return self.stop - self.start

    @property
    def depth(self) -> int:
        """Dependent block evaluations on the critical path."""
        return self.init.num_evals + self.num_iters * (1 + self.correction.serial_evals(self.num_layers))

    @property
    def num_block_evals(self) -> int:
        """Block evaluations in all (a JVP counted as one)."""
        per_iter = self.num_layers + self.correction.serial_evals(self.num_layers)
        return self.init.num_evals * self.num_layers + self.num_iters * per_iter


Segment = SequentialSegment | ParallelSegment


@dataclass(frozen=True)
class Schedule:
    """Segments that cover layers 0 to ``num_layers - 1`` in order. Build it with :meth:`of`.

    Regions may stand anywhere and there may be several; the paper's "last n layers" is one region at the end.
    """

    num_layers: int
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, num_layers: int, *regions: ParallelSegment) -> "Schedule":
        """Fill the gaps around ``regions`` with sequential segments; no region gives the sequential pass.

        Raises:
            ValueError: a region is empty, outside the model, or overlaps another.
        """
        segments: list[Segment] = []
        position = 0
        for region in sorted(regions, key=lambda region: region.start):
            name = f"region {region.start}-{region.stop}"
            if not 0 <= region.start < region.stop <= num_layers:
                raise ValueError(f"{name} is empty or outside the model, whose layers are 0-{num_layers}.")
            if region.start < position:
                raise ValueError(f"{name} overlaps the region before it, which ends at layer {position}.")
            if region.start > position:
                segments.append(SequentialSegment(position, region.start))
            segments.append(region)
            position = region.stop
        if position < num_layers:
            segments.append(SequentialSegment(position, num_layers))
        return cls(num_layers, tuple(segments))

    @property
    def depth(self) -> int:
        """Dependent block evaluations on the critical path."""
        return sum(segment.depth for segment in self.segments)

    @property
    def num_block_evals(self) -> int:
        return sum(segment.num_block_evals for segment in self.segments)

    @property
    def is_sequential(self) -> bool:
        return all(isinstance(segment, SequentialSegment) for segment in self.segments)
