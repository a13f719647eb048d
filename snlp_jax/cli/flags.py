"""Flags of the command lines. Those of lists add up: ``--stop a b --stop c`` is ``--stop a b c``. Another one that is
given twice must say the same both times."""

import dataclasses
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

import tyro

from snlp_jax.errors import InputError

T = TypeVar("T")
Kind = Literal["list", "switch"]
"""Of a flag that does not take one value."""

_FLAG = re.compile(r"--?[A-Za-z]")


def parse(
    cls: type[T],
    *,
    prog: str,
    description: str | None = None,
    default: T | None = None,
    args: Sequence[str] | None = None,
) -> T:
    """The command line as a dataclass, by tyro, which ends the process where it cannot be read.

    Args:
        default: what is not given.
        args: by default those of the process.

    Raises:
        InputError: a flag is given twice with different values.
    """
    given = gathered(sys.argv[1:] if args is None else args, kinds_of(cls))
    if default is None:
        return tyro.cli(cls, prog=prog, description=description, args=given)
    return tyro.cli(cls, prog=prog, description=description, args=given, default=default)


def kinds_of(cls: type, prefix: str = "") -> dict[str, Kind]:
    """Of the flags that tyro makes of a dataclass: those of tuples and truth values."""
    kinds: dict[str, Kind] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], field.name
        if typing.get_origin(kind) is Annotated:
            given = [each.name for each in kind.__metadata__ if getattr(each, "name", None) is not None]
            kind, name = typing.get_args(kind)[0], given[0] if given else name
        name = f"{prefix}{name}".replace("_", "-")
        if dataclasses.is_dataclass(kind):
            kinds |= kinds_of(typing.cast(type, kind), f"{name}." if name != prefix else prefix)
        elif typing.get_origin(kind) is tuple:
            kinds[f"--{name}"] = "list"
        elif kind is bool:
            kinds[f"--{name}"] = "switch"
    return kinds


def gathered(args: Sequence[str], kinds: Mapping[str, Kind]) -> list[str]:
    """The arguments, every flag once: the values of a list's where it stands last, in the order in which they came.

    Raises:
        InputError: a flag that takes no list is given twice with different values.
    """
    end = list(args).index("--") if "--" in args else len(args)
    groups: list[list[str]] = [[]]  # a flag and what follows it; the first has none
    for token in args[:end]:
        if _FLAG.match(token):
            groups.append([])
        groups[-1].append(token)
    by_name: dict[str, list[list[str]]] = {}
    for group in groups[1:]:
        by_name.setdefault(_name_of(group[0], kinds), []).append(group)
    for name, several in by_name.items():
        if len(several) > 1 and kinds.get(name) == "list":
            values = [value for group in several for value in _values_of(group)]
            several[-1][:] = [f"{name}={values[0]}", *values[1:]] if values else [name]
            for group in several[:-1]:
                group.clear()
        elif len(several) > 1:
            _check_same(name, several, kinds)
    return [token for group in groups for token in group] + list(args[end:])


def _name_of(token: str, kinds: Mapping[str, Kind]) -> str:
    """Of a flag, as it is listed: ``--a.no-b`` is the other end of the switch ``--a.b``."""
    name = token.partition("=")[0].replace("_", "-")
    positive = re.sub(r"(--|\.)no-([^.]*)$", r"\1\2", name)
    return positive if kinds.get(positive) == "switch" else name


def _values_of(group: Sequence[str]) -> list[str]:
    _, equals, value = group[0].partition("=")
    return [value, *group[1:]] if equals else list(group[1:])


def _check_same(name: str, several: Sequence[Sequence[str]], kinds: Mapping[str, Kind]) -> None:
    if kinds.get(name) == "switch":
        said = [group[0] for group in several]
        is_same = len({token.replace("_", "-") for token in said}) == 1
    else:
        said = [" ".join((name, *_values_of(group)[:1])) for group in several]
        is_same = len(set(said)) == 1
    if not is_same:
        raise InputError(f"{name} is given twice, as {said[0]!r} and as {said[-1]!r}; give it once.")
