"""The figures of the house: how large the code is, and how much of it breaks the rules of CONTRIBUTING.md.

    python benchmarks/house.py            # a page of text
    python benchmarks/house.py --json     # the same as one JSON object

Reads the source of ``snlp_jax/`` alone, with the standard library: nothing is imported. A line of code is one that is
neither empty, a comment nor part of a docstring. A function's length counts all lines from ``def`` to its end.
"""

import argparse
import ast
import io
import json
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS = 400, 60, 8
PRONOUN = re.compile(r"its_\w+|own|here|told|mine|ours")
FORMS = {"list", "Groups", "Stack"}
NO_WEIGHTS = ("config", "data", "io", "cli", "eval", "train")
"""Folders that hold no weights in several forms; their tests for a list are about other values."""
BLANK = {getattr(tokenize, name) for name in ["COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"]}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One module: its name below the package, its text and its tree."""

    name: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first-level package or module that it belongs to."""
        return self.name.split("/")[0].removesuffix(".py")

    @property
    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def read(package: Path) -> list[Source]:
    paths = sorted(package.rglob("*.py"))
    texts = [(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    return [Source(name, text, ast.parse(text)) for name, text in texts]


def code_lines(source: Source) -> int:
    docs: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in BLANK:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def num_arguments(function: Function) -> int:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + len(arguments.kwonlyargs)


def scope(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function without those of the functions inside it."""
    waiting: list[ast.AST] = [function.args, *function.body]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function):
            waiting += ast.iter_child_nodes(node)


def settings_of(function: Function) -> list[str]:
    """Local ``dict[str, Any]`` variables that are splatted into a call."""
    annotated = {
        node.target.id: ast.unparse(node.annotation)
        for node in scope(function)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    splats = {
        keyword.value.id
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg is None and isinstance(keyword.value, ast.Name)
    }
    return sorted(name for name in splats if annotated.get(name) == "dict[str, Any]")


def pronouns_of(function: Function) -> list[str]:
    nodes = list(scope(function))
    names = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    return sorted({name for name in names if PRONOUN.fullmatch(name)})


def tests_of_form(source: Source) -> int:
    """``isinstance(x, list | Groups)``: what form the weights of layers have."""
    if source.room in NO_WEIGHTS or "/convert/" in source.name:
        return 0
    calls = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))
    tests = (call for call in calls if ast.unparse(call.func) == "isinstance" and len(call.args) == 2)
    return sum(bool(FORMS & set(re.findall(r"\w+", ast.unparse(call.args[1])))) for call in tests)


def imports_of(source: Source, rooms: set[str], package: str) -> set[str]:
    """Rooms that a module imports, but for what a type checker alone reads and what runs where it is the command."""
    hidden = {
        id(inner)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.If) and re.search("TYPE_CHECKING|__name__", ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    names: list[str] = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import) and id(node) not in hidden:
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and id(node) not in hidden:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    found = {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
    return found & rooms - {source.room}


def cycles_of(sources: list[Source], package: str) -> list[list[str]]:
    """Rooms that reach each other, a list for each knot."""
    sources = [source for source in sources if not source.name.endswith("__main__.py") and source.room != "__init__"]
    rooms = {source.room for source in sources}
    reached: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        reached[source.room] |= imports_of(source, rooms, package)
    for middle in rooms:  # Warshall's closure
        for room in rooms:
            if middle in reached[room]:
                reached[room] |= reached[middle]
    knots = {
        tuple(sorted(other for other in rooms if room in reached[other] and other in reached[room])) for room in rooms
    }
    return sorted(list(knot) for knot in knots if knot)


def figures(package: Path) -> dict[str, object]:
    sources = read(package)
    lines: Counter[str] = Counter()
    for source in sources:
        lines[source.room if "/" in source.name else "."] += code_lines(source)
    functions = [(source, function) for source in sources for function in source.functions]
    named = [(f"{source.name}:{function.lineno} {function.name}", function) for source, function in functions]
    lengths = {name: (each.end_lineno or 0) - each.lineno + 1 for name, each in named}
    arguments = {name: num_arguments(each) for name, each in named}
    sizes = {source.name: source.text.count("\n") for source in sources}
    past = lambda table, most: dict(sorted(((k, v) for k, v in table.items() if v > most), key=lambda kv: -kv[1]))  # noqa: E731
    return {
        "code_lines": sum(lines.values()),
        "code_lines_by_folder": dict(sorted(lines.items())),
        "long_files": past(sizes, MAX_FILE),
        "long_functions": past(lengths, MAX_FUNCTION),
        "many_arguments": past(arguments, MAX_ARGUMENTS),
        "settings_dicts": {name: found for name, each in named if (found := settings_of(each))},
        "dict_str_any": sum(source.text.count("dict[str, Any]") for source in sources),
        "tests_of_form": {source.name: count for source in sources if (count := tests_of_form(source))},
        "folder_cycles": cycles_of(sources, package.name),
        "pronouns": {name: found for name, each in named if (found := pronouns_of(each))},
    }


def page(found: dict) -> str:
    rows = [f"code lines      {found['code_lines']:,}"]
    rows += [f"  {folder:<14}{count:,}" for folder, count in found["code_lines_by_folder"].items()]
    titles = {
        "long_files": f"files past {MAX_FILE} lines",
        "long_functions": f"functions past {MAX_FUNCTION} lines",
        "many_arguments": f"functions of more than {MAX_ARGUMENTS} arguments",
        "settings_dicts": "settings dictionaries splatted into calls",
        "tests_of_form": "tests of the form of weights",
        "pronouns": "functions with pronouns for names",
    }
    for key, title in titles.items():
        table = found[key]
        count = sum(table.values()) if key == "tests_of_form" else len(table)
        rows.append(f"{title}: {count}")
        rows += [
            f"  {', '.join(value) if isinstance(value, list) else value:<6} {name}" for name, value in table.items()
        ]
    rows.append(f"annotations dict[str, Any]: {found['dict_str_any']}")
    rows.append(f"folder cycles: {len(found['folder_cycles'])}")
    rows += [f"  {' <-> '.join(knot)}" for knot in found["folder_cycles"]]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--package", type=Path, default=ROOT / "snlp_jax")
    args = parser.parse_args()
    found = figures(args.package)
    print(json.dumps(found, indent=2) if args.json else page(found))


if __name__ == "__main__":
    main()
