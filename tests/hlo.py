"""Counts the collectives that a compiled program executes, from its HLO text: loop bodies count once a trip."""

import re
from collections import Counter

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
_OPCODE = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (?:\([^=]*?\)|\S+) ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count_collectives(text: str) -> Counter:
    """Executed collectives by kind. Of a conditional all branches count, an upper bound.

    Raises:
        ValueError: a loop that holds a collective has no known trip count, or the text has no entry computation.
    """
    computations: dict[str, list[str]] = {}
    entry, current = None, None
    for line in map(str.strip, re.sub(r"/\*.*?\*/", "", text).splitlines()):
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None:
            current.append(line)
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; is it HLO?")

    def count(name: str) -> Counter:
        total: Counter = Counter()
        for line in computations[name]:
            opcode = (match := _OPCODE.match(line)) and match[1].removesuffix("-start")
            if opcode in COLLECTIVES:
                total[opcode] += 1
                continue  # what it applies is arithmetic
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            inside: Counter = sum((count(callee) for callee in called if callee in computations), Counter())
            if opcode == "while" and inside:
                trips = _TRIPS.search(line)
                if trips is None:
                    raise ValueError(f"no known trip count: {line[:200]}")
                inside = Counter({kind: number * int(trips[1]) for kind, number in inside.items()})
            total += inside
        return total

    return count(entry)
