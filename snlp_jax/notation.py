"""Solver settings as text.

    seq                          the sequential pass
    idn:n=8,k=2                  Identity on the last 8 layers, two iterations (init=h0)
    sid:n=8,k=1,init=batch_forward,damp=0.1
    idn:4-8,k=1+sid:8-12,k=2     explicit regions (layers from 0, the end excluded); the other layers run in order

Corrections: ``jac`` Jacobi, ``idn`` Identity, ``sid`` ScaledIdentity, ``exact`` Exact. ``k`` defaults to 1, ``init`` to
h0, ``damp`` to 0.
"""

import re
from collections.abc import Callable
from typing import TypeVar

from snlp_jax.errors import InputError
from snlp_jax.solver import (
    BatchForward,
    Correction,
    Exact,
    Identity,
    Init,
    Jacobi,
    ParallelSegment,
    PrefixState,
    ScaledIdentity,
    Schedule,
)

T = TypeVar("T")

CORRECTIONS: dict[str, type[Correction]] = {"jac": Jacobi, "idn": Identity, "sid": ScaledIdentity, "exact": Exact}
INITS: dict[str, type[Init]] = {"h0": PrefixState, "batch_forward": BatchForward}


def parse_schedule(text: str, num_layers: int) -> Schedule:
    """The schedule that ``text`` describes, for a model of ``num_layers`` layers.

    Raises:
        InputError: one sentence that names the setting and what is wrong with it.
    """
    text = text.strip()
    if text == "seq":
        return Schedule.of(num_layers)
    try:
        return Schedule.of(num_layers, *(_parse_region(part, num_layers) for part in text.split("+")))
    except ValueError as error:
        raise InputError(f"solver setting {text!r}: {error}") from error


def _parse_region(part: str, num_layers: int) -> ParallelSegment:
    name, _, rest = part.strip().partition(":")
    correction = _look_up(CORRECTIONS, name, "correction")
    fields: dict[str, str] = {}
    span: tuple[int, int] | None = None
    for item in filter(None, (item.strip() for item in rest.split(","))):
        if match := re.fullmatch(r"(\d+)-(\d+)", item):
            key, value = "span", item
            span = int(match[1]), int(match[2])
        else:
            key, _, value = item.partition("=")
            if key not in ("n", "k", "init", "damp") or not value:
                raise ValueError(f"cannot read {item!r}; write n=, k=, init=, damp= or a span such as 4-8.")
        if key in fields:
            raise ValueError(
                f"{fields[key]!r} and {value!r} are both given for {key}; give one, and join regions with +."
            )
        fields[key] = value
    if (span is None) == ("n" not in fields):
        raise ValueError("give either n= (the last n layers) or a span such as 4-8.")
    start, stop = span or (num_layers - _number(int, fields["n"], "n"), num_layers)
    if start < 0:
        raise ValueError(f"n={fields['n']} is outside the model, which has {num_layers} layers.")
    return ParallelSegment(
        start,
        stop,
        num_iters=_number(int, fields.get("k", "1"), "k"),
        correction=correction(damping=_number(float, fields.get("damp", "0"), "damp")),
        init=_look_up(INITS, fields.get("init", "h0"), "init")(),
    )


def _look_up(table: dict[str, T], name: str, what: str) -> T:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(table)}.")
    return table[name]


def _number(kind: Callable[[str], T], text: str, name: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text} is not a {'whole ' if kind is int else ''}number.") from None
