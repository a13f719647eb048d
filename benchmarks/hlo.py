"""What a compiled program does, read off its HLO text: operations, collectives, bytes of memory and FLOPs a device.

Operations inside loops count once a trip, which XLA's own ``cost_analysis`` does not do, and of a conditional all
branches count, an upper bound. Bytes are those of HBM: XLA marks with ``S(1)`` what a TPU holds on the chip. FLOPs are
those of matrix products, also where XLA turned a product with one row into a multiply and a sum; elementwise
arithmetic and the inside of hand-written kernels are left out.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.hlo_text import COLLECTIVES, Instruction, Module, parse_module

FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all")
)
"""Opcodes that move nothing."""

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


@dataclass(frozen=True)
class Op:
    """One operation of the program, executed ``count`` times; the other figures are those of one execution."""

    kind: str
    """The opcode, or the kind of a collective."""
    count: int
    flops: float = 0.0
    bytes_read: int = 0
    """From HBM."""
    bytes_written: int = 0
    payload: int = 0
    """Of a collective: the bytes of its result on a device, of a reduce-scatter those of its operand."""
    group: int = 1
    """Devices that take part in a collective."""
    launches: int = 1
    """Kernels: none for a copy that runs beside others, or for arithmetic with single numbers."""
    name: str = ""
    """In the program's text."""

    @property
    def is_collective(self) -> bool:
        return self.kind in COLLECTIVES


@dataclass(frozen=True)
class Program:
    """The operations of a compiled program."""

    ops: tuple[Op, ...]

    @property
    def collectives(self) -> Counter:
        return _total(self.ops, lambda op: op.count if op.is_collective else 0)

    @property
    def payload(self) -> Counter:
        """Bytes of collectives by kind."""
        return _total(self.ops, lambda op: op.count * op.payload)

    @property
    def num_kernels(self) -> int:
        """Launches of anything but a collective."""
        return sum(op.count * op.launches for op in self.ops if not op.is_collective)

    @property
    def flops(self) -> float:
        return sum(op.count * op.flops for op in self.ops)

    def moves(self, at_least: int) -> tuple[Op, ...]:
        """Operations without a matrix product that write ``at_least`` bytes to memory: copies and transposes, slices
        of a stack, products that are not summed at once. An array that is updated in place counts by its update."""
        return tuple(
            op for op in self.ops if not op.is_collective and op.flops == 0 and op.bytes_written >= max(at_least, 1)
        )

    @property
    def bytes_read(self) -> int:
        return sum(op.count * op.bytes_read for op in self.ops)

    @property
    def bytes_written(self) -> int:
        return sum(op.count * op.bytes_written for op in self.ops)


def count_collectives(text: str) -> Counter:
    """Executed collectives by kind. Loops whose number of trips depends on data may hold none.

    Raises:
        ValueError: see :func:`read_program`.
    """
    reader = _Reader(parse_module(text))
    return Program(
        tuple(op for op in reader.execute(reader.module.entry, 1, strict=False) if op.is_collective)
    ).collectives


def read_program(text: str, unknown_trips: int | None = None) -> Program:
    """The operations that the optimised HLO ``text`` executes on one device.

    Args:
        unknown_trips: of loops whose number of trips depends on data; 1 gives one step of a decoding loop.

    Raises:
        ValueError: such a loop where ``unknown_trips`` does not say, or the text has no entry computation.
    """
    reader = _Reader(parse_module(text), unknown_trips)
    return Program(tuple(reader.execute(reader.module.entry, 1)))


@dataclass
class _Reader:
    module: Module
    unknown_trips: int | None = None
    _flops: dict[str, float] = field(default_factory=dict)

    @property
    def computations(self) -> dict[str, dict[str, Instruction]]:
        return self.module.computations

    def execute(self, name: str, times: int, strict: bool = True) -> Iterator[Op]:
        computation = self.computations[name]
        # What is fetched for the next call at the end of this one is not fetched at its beginning.
        again = Counter(op.operands[0] for op in computation.values() if op.opcode == "copy-start")
        for op in computation.values():
            if "cross_program_prefetch_index" in op.attributes and again[op.operands[0]] > 1:
                continue
            if op.collective:
                yield self._exchange(op, computation, times)
            elif op.opcode == "while":
                trips, body = self._trips(op, computation), _BODY.findall(op.attributes)[0]
                trips = self.unknown_trips if trips is None else trips
                if trips is None and (strict or any(each.is_collective for each in self.execute(body, 1, strict))):
                    raise ValueError(f"the number of trips of loop {op.name!r} depends on data: its work has no count.")
                yield from self.execute(body, times * (1 if trips is None else trips), strict)
            elif op.opcode in ("call", "conditional", "async-start"):
                for callee in op.called:
                    yield from self.execute(callee, times, strict)
            elif op.opcode not in FREE and not op.opcode.endswith(("-done", "-update")):
                inside = [c for callee in op.called if callee in self.computations for c in self._inside(callee)]
                yield from (self._exchange(other, computation, times) for computation, other in inside)
                yield Op(
                    op.opcode,
                    times,
                    flops=self._flops_of(op, computation),
                    bytes_read=sum(self._read(op, index, computation) for index in range(len(op.operands))),
                    bytes_written=self._written(op, computation),
                    launches=int(not (op.opcode.endswith("-start") or (not op.called and op.is_scalar))),
                    name=op.name,
                )

    def _inside(self, name: str) -> Iterator[tuple[dict[str, Instruction], Instruction]]:
        """Collectives that XLA fused with other work."""
        for op in self.computations[name].values():
            if op.collective:
                yield self.computations[name], op
            elif op.opcode == "fusion":
                for callee in op.called:
                    yield from self._inside(callee)

    def _exchange(self, op: Instruction, computation: dict[str, Instruction], times: int) -> Op:
        sent = sum(shape.num_bytes for name in op.operands for shape in computation[name].shapes)
        result = sum(shape.num_bytes for shape in op.shapes)
        if op.opcode.endswith("-start") and len(op.shapes) > 1 and op.collective != "all-reduce":
            result -= sent  # the pair (operand, result), perhaps with a few words of context
        return Op(
            op.collective or "",
            times,
            payload=max(sent, result),
            group=_group_size(op.attributes, self.module.num_devices),
        )

    def _trips(self, op: Instruction, computation: dict[str, Instruction]) -> int | None:
        """None where data decide."""
        if known := _TRIPS.search(op.attributes):
            return int(known[1])
        # A TPU's text does not say, but compares a counter, which goes up by one, with a constant.
        condition = self.computations[_CONDITION.findall(op.attributes)[0]]
        root = next(each for each in condition.values() if each.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (condition[name] for name in root.operands)
        place = re.search(r"index=(\d+)", counter.attributes)
        if counter.opcode != "get-tuple-element" or not limit.number or place is None:
            return None
        carried = computation[op.operands[0]]
        if carried.opcode != "tuple":
            return None
        start = computation[carried.operands[int(place[1])]]
        while start.opcode in ("copy", "bitcast"):
            start = computation[start.operands[0]]
        return int(limit.number) - int(start.number) if start.opcode == "constant" and start.number else None

    def _flops_of(self, op: Instruction, computation: dict[str, Instruction]) -> float:
        if op.opcode in ("fusion", "call", "while"):
            return sum(self._flops_in(callee) for callee in op.called)
        if op.opcode == "dot":
            return 2.0 * op.shapes[0].size * _contracted(op, computation, "lhs_contracting_dims={([0-9,]*)}")
        if op.opcode == "convolution":
            return _convolution_flops(op, computation)
        if op.opcode == "reduce" and _is_product(op.operands[0], computation):
            return 2.0 * computation[op.operands[0]].shapes[0].size
        if op.opcode == "custom-call" and '"dot_dimension_numbers"' in op.attributes:
            pattern = r'"lhs_contracting_dimensions":\[([0-9",]*)\]'
            return 2.0 * op.shapes[0].size * _contracted(op, computation, pattern)  # the rest is workspace
        return 0.0

    def _flops_in(self, name: str) -> float:
        if name not in self._flops:
            computation = self.computations[name]
            self._flops[name] = sum(self._flops_of(op, computation) for op in computation.values())
        return self._flops[name]

    def _read(self, op: Instruction, index: int, computation: dict[str, Instruction]) -> int:
        """Bytes of operand ``index`` that are read from HBM: of an array that is only sliced, the slices."""
        source = computation.get(op.operands[index])
        if source is None or not any(shape.in_hbm for shape in source.shapes):
            return 0
        if source.opcode == "constant" and not source.shapes[0].dims:
            return 0
        whole = sum(shape.num_bytes for shape in source.shapes if shape.in_hbm)
        return min(whole, self._touched(op, index, whole))

    def _touched(self, op: Instruction, index: int, whole: int) -> int:
        if op.opcode in ("dynamic-slice", "slice", "gather") and index == 0:
            return op.shapes[0].num_bytes
        if op.opcode == "slice-start":
            return op.shapes[1].num_bytes
        if op.opcode in ("dynamic-update-slice", "scatter") and index == 0:
            return 0  # in place
        if op.opcode != "fusion":
            return whole
        inner = self.computations[op.called[0]]
        parameters = {each.number: each.name for each in inner.values() if each.opcode == "parameter"}
        return self._touched_through(inner, parameters[str(index)], whole)

    def _touched_through(self, computation: dict[str, Instruction], name: str, whole: int) -> int:
        total = 0
        for user in computation.values():
            for index in (i for i, operand in enumerate(user.operands) if operand == name):
                if user.opcode in ("bitcast", "reshape"):
                    total += self._touched_through(computation, user.name, whole)
                else:
                    total += self._touched(user, index, whole)
        return total

    def _written(self, op: Instruction, computation: dict[str, Instruction]) -> int:
        """Bytes of results in HBM; of an array that is updated in place, the update."""
        if op.opcode.endswith("-start"):  # (destination, source, context), but (source, destination, ..) of a slice
            result = op.shapes[int(op.opcode == "slice-start")]
            return result.num_bytes if result.in_hbm else 0
        if op.opcode == "custom-call" and "__cublas" in op.attributes:  # (result, workspace)
            return op.shapes[0].num_bytes
        update = _update_of(op, computation)
        if op.opcode == "fusion":
            inner = self.computations[op.called[0]]
            root = next(each for each in inner.values() if each.is_root)
            while root.opcode == "bitcast":
                root = inner[root.operands[0]]
            update = _update_of(root, inner)
        if update is not None:
            return update if op.shapes[0].in_hbm else 0
        return sum(shape.num_bytes for shape in op.shapes if shape.in_hbm)


def _group_size(attributes: str, num_devices: int) -> int:
    """Devices that take part, in any of the ways in which XLA writes them."""
    if pairs := _PAIRS.search(attributes):
        return pairs[1].count("{") + 1
    if named := _MESH_GROUPS.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        taken = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in taken)
    groups = _GROUPS.search(attributes)
    return num_devices if groups is None else int(groups[3]) if groups[3] else groups[1].count(",") + 1


def _total(ops: tuple[Op, ...], figure) -> Counter:
    total: Counter = Counter()
    for op in ops:
        if op.is_collective:
            total[op.kind] += figure(op)
    return total


def _contracted(op: Instruction, computation: dict[str, Instruction], pattern: str) -> int:
    found = re.search(pattern, op.attributes)
    dims = computation[op.operands[0]].shapes[0].dims
    return math.prod(dims[int(axis)] for axis in re.findall(r"\d+", found[1])) if found else 1


def _is_product(name: str, computation: dict[str, Instruction]) -> bool:
    """Whether an array is an elementwise product of two others, so that its sum is a matrix product."""
    op = computation[name]
    while op.opcode in ("bitcast", "convert", "copy", "reshape", "transpose"):
        op = computation[op.operands[0]]
    return op.opcode == "multiply" and op.operands[0] != op.operands[1]


def _update_of(op: Instruction, computation: dict[str, Instruction]) -> int | None:
    if op.opcode == "dynamic-update-slice":
        return computation[op.operands[1]].shapes[0].num_bytes
    return computation[op.operands[2]].shapes[0].num_bytes if op.opcode == "scatter" else None


def _convolution_flops(op: Instruction, computation: dict[str, Instruction]) -> float:
    """2 x results x input features of the kernel x kernel positions that meet an entry: TPUs write every product so,
    batch axes as windows that are mostly padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels is None:
        return 0.0
    lhs, rhs = (computation[name].shapes[0].dims for name in op.operands[:2])
    windows = re.findall(r"window={(.*?)}", op.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", windows[0] if windows else ""))
    flops = 2.0 * op.shapes[0].size * rhs[labels[2].index("i")]
    for axis in range(len(labels[3]) - 2):
        get = lambda key, default: window.get(key, "x".join([default] * 9)).split("x")[axis]  # noqa: B023, E731
        out = op.shapes[0].dims[labels[3].index(str(axis))]
        size, source = int(get("size", "1")), lhs[labels[1].index(str(axis))]
        low = int(get("pad", "0_0").split("_")[0])
        at = np.arange(out)[:, None] * int(get("stride", "1")) + np.arange(size) * int(get("rhs_dilate", "1")) - low
        dilation = int(get("lhs_dilate", "1"))
        hits = (at >= 0) & (at <= (source - 1) * dilation) & (at % dilation == 0)
        flops *= hits.sum() / out
    return flops
