"""How a config refuses a value: by the type of its field, and by the rule that stands in it."""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from snlp_jax.errors import InputError


class Rule(NamedTuple):
    """What a value must be besides its type: ``Annotated[float, Rule(...)]``."""

    fits: Callable[[Any], bool]
    text: str


Count = Annotated[int, Rule(lambda value: value >= 0, "it must be 0 or more")]
Size = Annotated[int, Rule(lambda value: value >= 1, "it must be at least 1")]
NonNegative = Annotated[float, Rule(lambda value: 0 <= value < math.inf, "it must be 0 or more")]
Positive = Annotated[float, Rule(lambda value: 0 < value < math.inf, "it must be positive")]
Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "give 0 to 1")]
Between = Annotated[float, Rule(lambda value: 0 < value < 1, "it must lie between 0 and 1")]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


class Checked:
    """Base of the config dataclasses. When one is made, each field's value must fit the annotation."""

    section: ClassVar[str] = ""
    """What stands before a field's name in a message, such as ``model``; empty where fields are flags of their own."""

    def __init_subclass__(cls, section: str = "") -> None:
        cls.section = section

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: names the first field whose value does not fit, and the choices, the type or the rule.
        """
        cls: Any = type(self)
        for name, kind in annotations_of(cls).items():
            check_value(kind, getattr(self, name), f"{self.section}.{name}" if self.section else name)


@functools.cache
def annotations_of(cls: Any) -> dict[str, Any]:
    """Resolved annotations of a dataclass's fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_value(kind: Any, value: Any, where: str) -> None:
    """Refuse a value that is not of a type: a class, a Literal, a tuple of one, either of them or None, or one with a
    rule.

    Raises:
        InputError: names ``where``, the value, and the choices, the type or the rule.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        check_value(arguments[0], value, where)
        require(arguments[1].fits(value), f"{where} is {value!r}; {arguments[1].text}.")
    elif origin is Literal:
        require(value in arguments, f"{where} is {value!r}; choose one of {', '.join(map(repr, arguments))}.")
    elif origin is tuple:
        require(isinstance(value, tuple), f"{where} is {value!r}; it must be a tuple.")
        for index, item in enumerate(value):
            check_value(arguments[0], item, f"{where}[{index}]")
    elif origin in (typing.Union, types.UnionType):
        if value is not None:
            check_value(next(each for each in arguments if each is not type(None)), value, where)
    else:
        accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        require(fits, f"{where} is {value!r}; it must be of type {kind.__name__}.")
