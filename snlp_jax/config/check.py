"""How a config refuses a value."""

import dataclasses
import functools
import math
import numbers
import types
import typing
from typing import Any, ClassVar, Literal

from snlp_jax.errors import InputError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


class Checked:
    """Base of the config dataclasses. When one is made, each field's value must be of the annotated type."""

    section: ClassVar[str] = ""
    """What stands before a field's name in a message, such as ``model``; empty where fields are flags of their own."""

    def __init_subclass__(cls, section: str = "") -> None:
        cls.section = section

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: names the first field whose value does not fit, and the choices or the type.
        """
        cls: Any = type(self)
        for name, kind in annotations_of(cls).items():
            check_value(kind, getattr(self, name), self.path_of(name))

    def path_of(self, name: str) -> str:
        """A field as messages and flags name it."""
        return f"{self.section}.{name}" if self.section else name

    def at_least(self, bound: int, *names: str) -> None:
        """
        Raises:
            InputError: a field of these names is less, infinite or no number.
        """
        rule = "it must be 0 or more" if bound == 0 else f"it must be at least {bound}"
        for name in names:
            value = getattr(self, name)
            require(bound <= value < math.inf, f"{self.path_of(name)} is {value}; {rule}.")


@functools.cache
def annotations_of(cls: type) -> dict[str, Any]:
    """Resolved annotations of a dataclass's fields."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_value(kind: Any, value: Any, where: str) -> None:
    """Refuse a value that is not of a type: a class, a Literal, a tuple of one, or either of them or None.

    Raises:
        InputError: names ``where``, the value, and the choices or the type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
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
