"""Solver settings as text.

    seq                                 the sequential pass
    idn:n=8,k=2                         Identity on the last 8 layers, two iterations from h0
    sid:n=8,k=1,init=batch_forward,damp=0.1
    idn:4-8,k=1+sid:8-12,k=2            explicit regions (layers from 0, the end excluded); the others run in order
    hcn:n=8,k=2                         hyper-connections (models with residual streams)
    diag:n=8,k=2,probes=2,mode=vjp      Diagonal; mode jvp, vjp or fd; reuse=1 estimates once for all iterations
    idn:n=8,k=4,trust=0.5               trust region of a scalar Kalman filter (idn, sid, diag)
    idn:n=8,tol=0.01                    as many iterations as each sequence needs, k (default: all) at most
    cal:n=8,k=2,init=cal,fit=NAME       surrogates and initial trace of the calibration NAME
    idn:n=24,k=1,stage=12xF2            12 chunks of 2 fused layers; scales=mean|own, branches=sum|mean,
                                        mid=output|input|interpolated; stage=split shares one attention input
    12xF2 n24 K1                        the same in the paper's words; also n12 K2 batch_forward, HCN n16 K4
    skip:4-8, exit:6, pairs:n=8         controls: layers left out, the head after 6 layers, layers two by two

What drafts may also be ``mtp``: the model's multi-token-prediction heads, and no layer.

Corrections: jac, idn, sid, hcn, diag, cal, exact. Initial traces: h0, batch_forward, warm (an oracle here), cal,
preheat. ``k`` defaults to 1, ``init`` to h0, everything else to off.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from snlp_jax.errors import InputError
from snlp_jax.solver import (
    BatchForward,
    Calibrated,
    CalibratedInit,
    Chunkwise,
    Correction,
    Diagonal,
    Exact,
    FusedSplit,
    HyperConnection,
    Identity,
    Init,
    Jacobi,
    ParallelSegment,
    PerLayer,
    PrefixState,
    Preheat,
    ScaledIdentity,
    Schedule,
    SkippedSegment,
    Stage,
    TrustRegion,
    Warm,
)

T = TypeVar("T")
Drafter = Schedule | Literal["mtp", "ngram"]
"""What drafts in speculative decoding: layers, the model's heads that look further ahead, or the text itself."""

CORRECTIONS: dict[str, type[Correction]] = {
    "jac": Jacobi,
    "idn": Identity,
    "sid": ScaledIdentity,
    "hcn": HyperConnection,
    "diag": Diagonal,
    "cal": Calibrated,
    "exact": Exact,
}
BUILTIN = frozenset(CORRECTIONS)
INITS: dict[str, type[Init]] = {
    "h0": PrefixState,
    "batch_forward": BatchForward,
    "warm": Warm,
    "cal": CalibratedInit,
    "preheat": Preheat,
}
TRUSTED = ("idn", "sid", "diag")
"""Corrections of scalars and diagonals, which a trust region can hold back."""
DIAGONAL_MODES = {"jvp": "jvp", "vjp": "vjp", "fd": "finite_difference"}

CONTROLS = ("seq", "skip", "exit", "pairs", "mtp", "ngram")
"""Settings that are no corrections."""


def register_correction(name: str, correction: type[Correction]) -> None:
    """Make a correction of your own known by a name, wherever solver settings are read: commands, losses, searches.

    Its fields that :data:`CORRECTION_FIELDS` names can be set in a setting, such as ``mine:n=8,k=2,damp=0.1``.

    Raises:
        InputError: the name is taken, or cannot be written in a setting.
    """
    taken = (*CORRECTIONS, *CONTROLS)
    if name in taken and CORRECTIONS.get(name) is not correction:
        raise InputError(f"the name {name!r} is taken; choose another than {', '.join(taken)}.")
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise InputError(f"a correction's name is lower-case letters, digits and _, unlike {name!r}.")
    CORRECTIONS[name] = correction


def registered() -> tuple[str, ...]:
    """Names of the corrections that :func:`register_correction` added, for searches."""
    return tuple(name for name in CORRECTIONS if name not in BUILTIN)


CORRECTION_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "damp": ("damping", lambda text: parse_number(float, text, "damp")),
    "probes": ("num_probes", lambda text: parse_number(int, text, "probes")),
    "mode": ("mode", lambda text: look_up(DIAGONAL_MODES, text, "mode")),
    "reuse": ("reuse", lambda text: bool(parse_number(int, text, "reuse"))),
}
"""Key -> field of the correction, and how its value is read."""
STAGE_FIELDS = ("scales", "branches", "mid")
KEYS = ("n", "k", "init", "tol", "fit", "stage", "trust", *CORRECTION_FIELDS, *STAGE_FIELDS)
"""What a region may be given."""
PAPER = re.compile(
    r"(?:(?P<name>IDN|HCN) )?(?:(?P<C>\d+)xF(?P<M>\d+) )?n(?P<n>\d+) K(?P<k>\d+)(?P<init> batch_forward)?"
)


def parse_schedule(text: str, num_layers: int) -> Schedule:
    """The schedule that ``text`` describes, for a model of ``num_layers`` layers.

    Raises:
        InputError: one sentence that names the setting and what is wrong with it.
    """
    words = " ".join(text.split())
    try:
        if match := PAPER.fullmatch(words):
            return Schedule.of(num_layers, _parse_region(_translate(match), num_layers))
        parts = words.replace(" ", "").split("+")
        if parts == ["seq"]:
            return Schedule.of(num_layers)
        return Schedule.of(num_layers, *(region for part in parts for region in _parse_part(part, num_layers)))
    except ValueError as error:
        raise InputError(f"solver setting {text.strip()!r}: {error}") from error


def parse_drafter(text: str, num_layers: int) -> Drafter:
    """``mtp``, ``ngram``, or the schedule that ``text`` describes.

    Raises:
        InputError: see :func:`parse_schedule`.
    """
    name = text.strip()
    return "mtp" if name == "mtp" else "ngram" if name == "ngram" else parse_schedule(text, num_layers)


def _translate(paper: re.Match[str]) -> str:
    """The paper's ``CxFM nN KK`` in our notation."""
    text = f"{(paper['name'] or 'idn').lower()}:n={paper['n']},k={paper['k']}"
    if paper["C"]:
        text += f",stage={paper['C']}xF{paper['M']}"
    return text + (",init=batch_forward" if paper["init"] else "")


def _parse_part(part: str, num_layers: int) -> list[ParallelSegment | SkippedSegment]:
    """The regions of one part between plus signs: one, or many for pairs."""
    name, _, rest = part.partition(":")
    if name == "exit":
        return [SkippedSegment(parse_number(int, rest, "exit:"), num_layers)]
    if name == "skip":
        start, stop = parse_span(parse_fields(rest, ("n",)), num_layers, end=num_layers - 1)
        return [SkippedSegment(start, stop)]
    if name == "pairs":
        start, stop = parse_span(parse_fields(rest, ("n",)), num_layers)
        return [ParallelSegment(first, first + 2, 1, Identity()) for first in range(start, stop - 1, 2)]
    return [_parse_region(part, num_layers)]


def _parse_region(part: str, num_layers: int) -> ParallelSegment:
    name, _, rest = part.partition(":")
    if name not in CORRECTIONS:
        known = ", ".join([*CORRECTIONS, "skip", "exit", "pairs"])
        raise ValueError(f"unknown correction {name!r}; choose one of {known}.")
    fields = parse_fields(rest, KEYS)
    start, stop = parse_span(fields, num_layers)
    stage = parse_stage(fields, stop - start)
    tolerance = parse_number(float, fields.get("tol", "0"), "tol")
    all_iters = stage.num_nodes(stop - start) if tolerance else 1
    init = look_up(INITS, fields.get("init", "h0"), "init")()
    reads_fit = name == "cal" or isinstance(init, CalibratedInit | Preheat)
    if reads_fit != ("fit" in fields):
        verb = "needs" if reads_fit else "has no use for"
        raise ValueError(f"{name} with init={fields.get('init', 'h0')} {verb} fit=, the name of a calibration.")
    return ParallelSegment(
        start,
        stop,
        num_iters=parse_number(int, fields.get("k", str(max(all_iters, 1))), "k"),
        correction=_parse_correction(name, fields),
        init=init,
        stage=stage,
        tolerance=tolerance,
        fit=fields.get("fit", ""),
    )


def _parse_correction(name: str, fields: dict[str, str]) -> Correction:
    correction = CORRECTIONS[name]()
    for key, (field, read) in CORRECTION_FIELDS.items():
        if key in fields:
            if field not in {f.name for f in dataclasses.fields(correction)}:
                raise ValueError(f"{key}= means nothing to {name}.")
            correction = dataclasses.replace(correction, **{field: read(fields[key])})
    if "trust" not in fields:
        return correction
    if name not in TRUSTED:
        raise ValueError(f"trust= means nothing to {name}.")
    # Damping comes after the trust region, as it does after any surrogate.
    undamped = dataclasses.replace(correction, damping=0.0)
    return TrustRegion(correction.damping, undamped, parse_number(float, fields["trust"], "trust"))


def parse_fields(text: str, keys: tuple[str, ...]) -> dict[str, str]:
    """``a=1,b=2,4-8`` as a dict; the span under the key ``span``."""
    fields: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        if re.fullmatch(r"\d+-\d+", item):
            key, value = "span", item
        else:
            key, _, value = item.partition("=")
            if key not in keys or not value:
                known = ", ".join(f"{key}=" for key in keys)
                raise ValueError(f"cannot read {item!r}; write {known} or a span such as 4-8.")
        if key in fields:
            raise ValueError(
                f"{fields[key]!r} and {value!r} are both given for {key}; give one, and join regions with +."
            )
        fields[key] = value
    return fields


def parse_span(fields: dict[str, str], num_layers: int, end: int | None = None) -> tuple[int, int]:
    """First layer and end of a region: a span, or the ``n`` layers before ``end`` (the end of the model)."""
    if ("span" in fields) == ("n" in fields):
        raise ValueError("give either n= (the last n layers) or a span such as 4-8.")
    if "span" in fields:
        start, _, stop = fields["span"].partition("-")
        return int(start), int(stop)
    end = num_layers if end is None else end
    start_of_last = end - parse_number(int, fields["n"], "n")
    if start_of_last < 0:
        raise ValueError(f"n={fields['n']} is outside the model, which has {num_layers} layers.")
    return start_of_last, end


def parse_stage(fields: dict[str, str], num_layers: int) -> Stage:
    """The stage of a region of ``num_layers`` layers: ``stage=`` and, for chunks, its options."""
    text = fields.get("stage", "")
    options = {key: fields[key] for key in STAGE_FIELDS if key in fields}
    if match := re.fullmatch(r"(\d+)xF(\d+)", text):
        num_chunks, layers_per_chunk = map(int, match.groups())
        if num_chunks * layers_per_chunk != num_layers:
            raise ValueError(f"stage={text} has {num_chunks * layers_per_chunk} layers, but the region {num_layers}.")
        return Chunkwise(num_chunks, **options)  # type: ignore[arg-type]
    if options:
        raise ValueError(f"{', '.join(f'{key}=' for key in options)} belong to fused chunks: add stage= such as 4xF2.")
    if text == "split":
        return FusedSplit()
    if text:
        raise ValueError(f"stage={text} is neither chunks such as 4xF2 nor split.")
    return PerLayer()


def look_up(table: dict[str, T], name: str, what: str) -> T:
    """The entry of ``table`` that the key ``what`` names."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(table)}.")
    return table[name]


def parse_number(kind: Callable[[str], T], text: str, name: str) -> T:
    """``text`` as a number, for the key ``name``."""
    try:
        return kind(text)
    except ValueError:
        joint = "" if name.endswith(":") else "="
        raise ValueError(f"{name}{joint}{text} is not a {'whole ' if kind is int else ''}number.") from None
