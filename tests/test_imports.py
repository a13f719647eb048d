"""The import direction of the house, and what `import snlp_jax` alone brings."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STDLIB = ("__future__", "abc", "collections.abc", "dataclasses", "enum", "functools", "math", "typing")
ROOMS = (
    *("types", "errors", "seeds", "config", "memory", "solver", "model", "parallel", "pieces"),
    *("checks", "parts", "layout", "chains", "cache", "forward", "notation", "quantize"),
    *("io", "data", "run", "pretrained", "linearize", "infer", "eval", "train", "planner", "cli"),
)
"""Packages and modules of the first level, from the ground to the roof: each imports those before it alone."""
ALLOWED = {
    "solver": ("jax", "chex", "snlp_jax.solver", "snlp_jax.types", "snlp_jax.errors", *STDLIB),
    "types": ("jax", *STDLIB),
    "errors": ("contextlib", "errno", "os", "sys", "types", *STDLIB),
}
FORBIDDEN = {
    "model": ("snlp_jax.solver",),  # a model knows no solver
    "io": ("snlp_jax.solver", "snlp_jax.model"),
    "data": ("jax", "flax", "snlp_jax.solver", "snlp_jax.model", "snlp_jax.parallel"),  # a worker starts without jax
}
SCRIPTS = ("train", "eval", "configs", "tests", "benchmarks")


def _is_skipped(node: ast.AST) -> bool:
    """What a type checker alone reads, and what runs where a module is the command."""
    return isinstance(node, ast.If) and any(text in ast.unparse(node.test) for text in ("TYPE_CHECKING", "__name__"))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not _is_skipped(child):
            yield from _walk(child)


def _imports_of(path: Path) -> list[str]:
    """Full dotted names, wherever in the file they are imported: `from a import b` and relative forms give a.b."""
    names, package = [], path.relative_to(ROOT).parent.parts
    for node in _walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*above, *filter(None, [node.module])))
            names += [f"{origin}.{alias.name}" for alias in node.names]
    return names


def _imports(room: str) -> list[tuple[str, str]]:
    """Pairs (file, imported name). A ``__main__.py``, which nothing imports, is part of the roof."""
    base = ROOT / "snlp_jax" / room
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    files = [path for path in files if path.name != "__main__.py"]
    return [(str(path.relative_to(ROOT)), name) for path in files for name in _imports_of(path)]


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def test_every_room_has_its_floor():
    found = {
        path.stem for path in (ROOT / "snlp_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    """So there is no cycle among rooms, imports within functions counted."""
    below = tuple(f"snlp_jax.{name}" for name in ROOMS[: ROOMS.index(room) + 1])
    for file, name in _imports(room):
        message = f"{file} imports {name}"
        assert not _within(name, SCRIPTS), message
        assert not _within(name, ("snlp_jax",)) or _within(name, below), message
        assert not _within(name, FORBIDDEN.get(room, ())), message
        assert room not in ALLOWED or _within(name, ALLOWED[room]), message
        assert not (name.startswith("snlp_jax") and "__main__" in name), message


def test_every_package_has_an_init():
    """A folder without one would be importable here and behave differently once installed."""
    folders = {path.parent for path in (ROOT / "snlp_jax").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_the_package_alone_imports_no_jax():
    code = """
import sys, time
start = time.perf_counter()
import snlp_jax
assert time.perf_counter() - start < 3
assert not {"jax", "flax", "numpy"} & set(sys.modules), "a heavy import"
import snlp_jax.config
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_package_offers():
    """Every name is there, and none is hidden by the module of the same name once that is imported."""
    import snlp_jax.eval.fidelity  # which imports the module snlp_jax.forward

    assert {"Engine", "Identity", "forward", "load_run", "solve", "train_run"} <= set(snlp_jax.__all__)
    for name in snlp_jax.__all__:
        assert callable(getattr(snlp_jax, name)) and name in dir(snlp_jax)
