"""Configs to JSON and back, and from config files."""

import dataclasses
import json
import runpy
import typing
from pathlib import Path
from typing import Any

from snlp_jax.config.check import require
from snlp_jax.config.dial import Dial
from snlp_jax.config.experiment import Config
from snlp_jax.config.machine import MachineConfig
from snlp_jax.errors import InputError


def to_json(config: Any) -> str:
    """The config as indented JSON; ``from_json(to_json(c)) == c``."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, cls: type = Config) -> Any:
    """Inverse of ``to_json``. Raises InputError for unknown fields and wrong types."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the saved config is not valid JSON ({error}).") from error
    return _build(cls, upgraded(values) if cls is Config else values, cls.__name__.lower())


def upgraded(values: Any) -> Any:
    """What an older version saved, as this one saves it: precision and kernels were fields of the model."""
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        return values
    if not isinstance(values.get("machine", {}), dict):
        return values
    model, machine = dict(values["model"]), dict(values.get("machine", {}))
    for name in (field.name for field in dataclasses.fields(MachineConfig) if field.name in model):
        machine[name] = model.pop(name)
    return values | {"model": model} | ({"machine": machine} if machine else {})


def load_config(path: str | Path) -> Config:
    """Run a config file and return its ``config``."""
    return load_binding(path, "config", Config)


def load_dial(path: str | Path) -> Dial:
    """Run a config file and return its ``dial``, which has a config for every depth."""
    return load_binding(path, "dial", Dial)


def load_binding(path: str | Path, name: str, cls: type) -> Any:
    """Run a config file and return what it binds to ``name``.

    Raises:
        InputError: there is no such file, it is not valid Python, or it binds nothing of that class.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config file {str(path)!r} does not exist.")
    try:
        value = runpy.run_path(str(path)).get(name)
    except SyntaxError as error:
        raise InputError(
            f"config file {str(path)!r} is not valid Python (line {error.lineno}: {error.msg})."
        ) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(f"config file {str(path)!r}: {error}.") from error
    if not isinstance(value, cls):
        raise InputError(f"config file {str(path)!r} does not bind `{name} = {cls.__name__}(...)`.")
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as the dataclass, tuple or float that the annotation asks for; what else is wrong with it the
    dataclass itself refuses."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), f"{where} must be an object, not {value!r}.")
        hints = typing.get_type_hints(kind)
        for name in value:
            require(name in hints, f"{where} has no field {name!r}.")
        return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_build(typing.get_args(kind)[0], item, where) for item in value)
    return float(value) if kind is float and type(value) is int else value
