"""HLO text as computations of instructions."""

import math
import re
from dataclasses import dataclass

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"^(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Shape:
    """One array of a device; ``in_hbm`` is False where it lives on the chip."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        bits = _BITS.search(self.dtype)
        return self.size * (int(bits[0]) if bits else 8) // 8  # pred: one byte; token: no entry of its own


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Leaves of the result."""
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    number: str = ""
    """Of a parameter or a scalar constant."""

    @property
    def called(self) -> list[str]:
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [branch.strip().lstrip("%") for branch in branches.split(",")]
        return names

    @property
    def is_scalar(self) -> bool:
        return all(shape.size <= 1 for shape in self.shapes)

    @property
    def collective(self) -> str | None:
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None


@dataclass(frozen=True)
class Module:
    """The computations of a program, each a dict of its instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_devices: int


def parse_module(text: str) -> Module:
    """Raises ValueError where the text has no entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in map(str.strip, re.sub(r"/\*.*?\*/", "", text).splitlines()):
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line == "}":  # a kernel's settings may close a brace at the start of a line too
            current = None
        elif current is not None and (instruction := _parse_instruction(line)):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; is it HLO?")
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _parse_instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if name is None:
        return None
    start = name.end()
    stop = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, stop)
    if opcode is None:
        return None
    end = _closing(line, opcode.end() - 1)
    inside, attributes = line[opcode.end() : end], line[end + 1 :]
    is_literal = opcode[1] in ("parameter", "constant")
    operands = () if is_literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size), "S(" not in layout)
        for dtype, dims, layout in _SHAPE.findall(line[start:stop])
    )
    number = inside if is_literal and len(inside) < 20 else ""
    return Instruction(name[2], opcode[1], shapes, operands, attributes, bool(name[1]), number)


def _closing(line: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(line)
