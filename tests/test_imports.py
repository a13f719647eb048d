"""The import direction of the house: the solver knows nothing of models, models nothing of solvers or loops."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = ("__future__", "abc", "collections.abc", "dataclasses", "functools", "math", "typing")
FLOORS_ABOVE = tuple(f"snlp_jax.{name}" for name in ("train", "infer", "eval", "linearize"))
GROUND = ("snlp_jax.types", "snlp_jax.errors")

ALLOWED = {"snlp_jax.solver": ("jax", "chex", "snlp_jax.solver", *GROUND, *STDLIB)}
FORBIDDEN = {
    "snlp_jax": ("train", "eval", "configs", "tests", "benchmarks"),  # the scripts on the roof and what surrounds them
    "snlp_jax.types": ("snlp_jax",),
    "snlp_jax.errors": ("snlp_jax",),
    "snlp_jax.config": tuple(f"snlp_jax.{name}" for name in ("solver", "model", "parallel", "data", "io"))
    + FLOORS_ABOVE,
    "snlp_jax.model": ("snlp_jax.solver", "snlp_jax.data", "snlp_jax.io", *FLOORS_ABOVE),
    "snlp_jax.parallel": ("snlp_jax.train",),
}
ROOFED = ("snlp_jax/parallel/plan_compile.py", "snlp_jax/model/convert/__main__.py")
"""Entry scripts that live with what they are about: the planner compiles training steps, the converter writes runs."""


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _imports_of(path: Path) -> list[str]:
    """Full dotted names, wherever in the file they are imported: `from a import b` and relative forms give a.b."""
    names, package = [], path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*above, *filter(None, [node.module])))
            names += [f"{origin}.{alias.name}" for alias in node.names]
    return names


def _imports_under(package: str) -> list[tuple[str, str]]:
    """Pairs (file, imported name) of a package or of a single module."""
    base = ROOT.joinpath(*package.split("."))
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    return [(str(path.relative_to(ROOT)), name) for path in files for name in _imports_of(path)]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_never_imports(package):
    found = [(file, name) for file, name in _imports_under(package) if file not in ROOFED]
    wrong = [f"{file} imports {name}" for file, name in found if _within(name, FORBIDDEN[package])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_only(package):
    wrong = [f"{file} imports {name}" for file, name in _imports_under(package) if not _within(name, ALLOWED[package])]
    assert not wrong, "\n".join(wrong)


def test_every_package_has_an_init():
    """A folder without one would be importable here and behave differently once installed."""
    missing = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "snlp_jax").rglob("*.py")} - {
        str(path.parent.relative_to(ROOT)) for path in (ROOT / "snlp_jax").rglob("__init__.py")
    }
    assert not missing, f"no __init__.py in {sorted(missing)}"
