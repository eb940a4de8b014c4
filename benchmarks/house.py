"""The measures of the code: widths, lengths, types, imports. `tests/unit/test_house.py` holds the
bars.

    python -m benchmarks.house [FOLDER]     a table of the figures, and what is over a bar

`FOLDER` is a checkout; default: this one. A body is a function's lines after its docstring.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 100
Imports = dict[str, set[str]]  # module -> the modules that it imports


def sources(root: Path, *folders: str) -> dict[str, ast.Module]:
    """Module name -> its tree, for every Python file below `folders` of `root`."""
    out = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            out[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return out


def bodies(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, lines of the body without its docstring) of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def imported(tree: ast.Module, modules: set[str]) -> Iterator[tuple[str, str]]:
    """(module, name or "") for every import of our own, late ones too, those for type checkers
    not.
    """
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for a in node.names:
                if (inner := f"{node.module}.{a.name}") in modules:
                    yield inner, ""
                elif node.module in modules:
                    yield node.module, a.name


def imports(trees: dict[str, ast.Module]) -> Imports:
    """Which of `trees` import which. A package that only hands names on is as good as nothing."""
    modules = set(trees)
    return {m: {t for t, _ in imported(tree, modules) if t != m} for m, tree in trees.items()}


def circles(graph: Imports) -> list[list[str]]:
    """Groups of modules that import each other (strongly connected, more than one)."""
    reach = {m: _reachable(graph, m) for m in graph}
    found = {frozenset(n for n in reach[m] if m in reach[n]) for m in graph}
    return sorted(sorted(c) for c in found if len(c) > 1)


def _reachable(graph: Imports, start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for n in graph.get(todo.pop(), ()):
            if n not in seen:
                seen.add(n)
                todo.append(n)
    return seen


def private_names(trees: dict[str, ast.Module]) -> list[str]:
    """ "module: from other import _name" for every private name that crosses a border."""
    modules = set(trees)
    return [
        f"{m}: from {target} import {name}"
        for m, tree in trees.items()
        for target, name in imported(tree, modules)
        if target != m and name.startswith("_") and not name.startswith("__")
    ]


def anys(tree: ast.Module) -> int:
    """How often the type `Any` is used."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def code_lines(root: Path, *folders: str) -> list[tuple[str, int, str]]:
    """(file, number, line) of every Python line below `folders`."""
    return [
        (str(path.relative_to(root)), i, line)
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]


def complex_functions(root: Path) -> int:
    """Functions of `sdlite` whose cyclomatic complexity is over 12, counted by ruff."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "C901", "--quiet"]
    command += ["--config", "lint.mccabe.max-complexity=12", "--output-format", "concise", "sdlite"]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.count("C901")


def measures(root: Path) -> dict[str, object]:
    """The table's rows for the package of a checkout."""
    trees = sources(root, "sdlite")
    lengths = sorted(n for tree in trees.values() for _, n in bodies(tree))
    lines = code_lines(root, "sdlite")
    everywhere = code_lines(root, "sdlite", "benchmarks", "tests", "export")
    written = sum(bool(line.strip()) for _, _, line in lines)
    return {
        "files": len(trees),
        "lines": len(lines),
        f"lines over {WIDTH} columns": sum(len(line) > WIDTH for _, _, line in lines),
        "`fmt: skip` (all folders)": sum("# fmt: " + "skip" in line for _, _, line in everywhere),
        "function body, median": lengths[len(lengths) // 2],
        "function body, p90": lengths[len(lengths) * 9 // 10],
        "function body, longest": lengths[-1],
        "functions over 60 lines": sum(n > 60 for n in lengths),
        "functions of complexity over 12": complex_functions(root),
        "`Any` per 1,000 lines": round(1000 * sum(map(anys, trees.values())) / written, 1),
        "circles of imports": len(circles(imports(trees))),
        "private names across modules": len(private_names(trees)),
    }


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    for name, value in measures(root).items():
        print(f"{name:40} {value}")
    trees = sources(root, "sdlite")
    for circle in circles(imports(trees)):
        print("circle:", *circle)
    for line in private_names(trees):
        print("private:", line)
    for module, tree in trees.items():
        for name, n in bodies(tree):
            if n > 60:
                print(f"long: {module}.{name} {n} lines")


if __name__ == "__main__":
    main()
