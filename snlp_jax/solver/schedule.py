"""A schedule: which layers run in order, which form parallel regions and which are left out."""

from dataclasses import dataclass, field

from snlp_jax.solver.corrections import Correction
from snlp_jax.solver.init import Init, PrefixState
from snlp_jax.solver.stages import Chunkwise, FusedSplit, PerLayer, Stage


@dataclass(frozen=True)
class _Span:
    """Layers ``start`` to ``stop - 1``, counted from 0."""

    start: int
    stop: int

    @property
    def num_layers(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SequentialSegment(_Span):
    """Layers ``start`` to ``stop - 1``, one after another."""

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def num_block_evals(self) -> int:
        return self.num_layers


@dataclass(frozen=True)
class SkippedSegment(_Span):
    """Layers ``start`` to ``stop - 1`` that are not run at all: the control that any solver setting has to beat."""

    @property
    def depth(self) -> int:
        return 0

    @property
    def num_block_evals(self) -> int:
        return 0


@dataclass(frozen=True)
class ParallelSegment(_Span):
    """Layers ``start`` to ``stop - 1`` solved together by ``num_iters`` iterations, at most where ``tolerance`` > 0."""

    num_iters: int
    correction: Correction
    init: Init = field(default_factory=PrefixState)
    stage: Stage = field(default_factory=PerLayer)
    tolerance: float = 0.0
    """A sequence stops as soon as its largest ||f_l(h_{l-1}) - h_l|| / ||h_l|| is below; 0 makes all iterations."""
    fit: str = ""
    """Name of the calibration that a ``Calibrated`` correction or initial trace reads."""

    def __post_init__(self) -> None:
        if self.num_iters < 1:
            raise ValueError(f"k={self.num_iters}: a parallel region needs at least one iteration.")
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"tol={self.tolerance}: a relative residual lies between 0 and 1.")
        if self.init.is_oracle and not isinstance(self.stage, PerLayer):
            raise ValueError("init=warm is a state of every layer: leave out stage=.")
        nodes = self.stage.num_nodes(self.num_layers)
        if isinstance(self.stage, Chunkwise):
            if self.num_layers % nodes:
                raise ValueError(f"{self.num_layers} layers do not make {nodes} equal chunks.")
            if nodes == 1 and self.num_iters > 1:
                raise ValueError(f"k={self.num_iters}: one fused chunk is solved by one iteration; use k=1.")
        if isinstance(self.stage, FusedSplit) and (self.num_iters > 1 or not isinstance(self.init, PrefixState)):
            raise ValueError("a split stage evaluates at the region's input only: use k=1 and init=h0.")

    @property
    def num_nodes(self) -> int:
        """States that the solver iterates on."""
        return self.stage.num_nodes(self.num_layers)

    @property
    def layers_per_node(self) -> int:
        return self.num_layers // self.num_nodes

    @property
    def depth(self) -> int:
        """Dependent block evaluations on the critical path (a fused chunk counts as one block)."""
        return self.init.num_evals + self.num_iters + self.correction.serial_evals(self.num_nodes, self.num_iters)

    @property
    def num_block_evals(self) -> int:
        """Evaluations of a layer in all (a JVP counted as one)."""
        extra = self.correction.extra_evals(self.num_layers, self.num_iters)
        return (self.init.num_evals + self.num_iters) * self.num_layers + extra


Segment = SequentialSegment | SkippedSegment | ParallelSegment


@dataclass(frozen=True)
class Schedule:
    """Segments that cover layers 0 to ``num_layers - 1`` in order. Build it with :meth:`of`.

    Regions may stand anywhere and there may be several; the paper's "last n layers" is one region at the end.
    """

    num_layers: int
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, num_layers: int, *regions: ParallelSegment | SkippedSegment) -> "Schedule":
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

    @property
    def regions(self) -> tuple[ParallelSegment, ...]:
        """The parallel segments."""
        return tuple(segment for segment in self.segments if isinstance(segment, ParallelSegment))

    @property
    def is_oracle(self) -> bool:
        """Whether an initial trace rests on what only a sequential pass can know."""
        return any(region.init.is_oracle for region in self.regions)
