"""Damage done to files, and what reads them: an answer or an InputError of one line is right, anything else is not."""

import json
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snlp_jax.errors import InputError

VALUES = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**70,
    1e308,
    0.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    [None],
    {},
    {"a": 1},
    [[1], "a"],
)
"""What a value of a JSON file becomes."""


def damages(content: bytes, draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """What was done, and the content after it."""
    for _ in range(count):
        place, size = draw.randrange(len(content) + 1), min(draw.choice((1, 2, 8, 99)), len(content) // 2 + 1)
        how = draw.choice(("cut", "flip", "overwrite", "remove", "repeat", "swap") if content else ("overwrite",))
        if how == "swap":
            swapped = with_another_value(content, draw)
            if swapped is not None:
                yield swapped
                continue
            how = "flip"
        end, changed = place + size, bytearray(content)
        if how == "cut":
            del changed[place:]
        elif how == "flip":
            changed[place % len(content)] ^= 1 << draw.randrange(8)
        elif how == "overwrite":
            changed[place:end] = draw.choice((b"\0", b"\xff", b"{", b'"', b"9", b"\n")) * size
        else:
            changed[place:end] = content[place:end] * (2 if how == "repeat" else 0)
        yield f"{how} {size} at {place} of {len(content)}", bytes(changed)


def with_another_value(content: bytes, draw: random.Random) -> tuple[str, bytes] | None:
    """A JSON file in which one value is another; None where it is no JSON."""
    try:
        tree = json.loads(content)
    except ValueError:
        return None
    places: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))[:3]
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys]
    if not places:
        return None
    node, key = draw.choice(places)
    if draw.random() < 0.2:
        del node[key]
        return f"no {key!r}", json.dumps(tree).encode()
    node[key] = draw.choice(VALUES)
    return f"{key!r} is {node[key]!r}", json.dumps(tree).encode()


def attack(folder: Path, read: Callable[[], Any], *, seed: int, count: int, is_checked: bool = False) -> list[str]:
    """Damage each file of a folder ``count`` times; what ``read`` does wrong, one entry each.

    Args:
        is_checked: what is read must be what was read before, since checksums tell.
    """
    right = read()
    wrong: list[str] = []
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        content, draw = path.read_bytes(), random.Random(f"{seed} {path.name}")
        for how, changed in damages(content, draw, count):
            path.write_bytes(changed)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = read()
            except InputError as error:
                if "\n" in str(error) or len(str(error)) > 2000:
                    wrong.append(f"{path.name}: {how}: not one line: {error}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                last = traceback.extract_tb(error.__traceback__)[-3:]
                where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(last))
                wrong.append(f"{path.name}: {how}: {type(error).__name__}: {str(error)[:120]} ({where})")
            else:
                if is_checked and found != right:
                    wrong.append(f"{path.name}: {how}: {str(found)[:60]} instead of {str(right)[:60]}")
        path.write_bytes(content)
    return wrong
