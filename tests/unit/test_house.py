"""The bars of the code, and that the counting finds what it should."""

from __future__ import annotations

import ast
import re

from benchmarks import house

PRAGMA = re.compile(r"# (noqa|type: ignore)")
TREES = house.sources(house.ROOT, "sdlite")


def test_no_line_is_wider_than_100_columns_and_none_escapes_the_formatter():
    lines = house.code_lines(house.ROOT, "sdlite", "benchmarks", "tests", "export")
    assert len(lines) > 40_000
    wide = [
        f"{p}:{i}" for p, i, line in lines if len(line) > house.WIDTH and not PRAGMA.search(line)
    ]
    assert not wide
    assert not [f"{p}:{i}" for p, i, line in lines if "# fmt: " + "skip" in line]


def test_functions_are_short():
    lengths = sorted((n, f"{m}.{f}") for m, tree in TREES.items() for f, n in house.bodies(tree))
    assert len(lengths) > 1_000
    assert lengths[len(lengths) * 9 // 10][0] <= 25
    assert not [row for row in lengths if row[0] > 60]


def test_any_is_rare():
    lines = house.code_lines(house.ROOT, "sdlite")
    written = sum(bool(line.strip()) for _, _, line in lines)
    assert sum(map(house.anys, TREES.values())) <= 10 * written / 1000


# Floors, from the ground up. A room imports its own floor and those below, late imports included.
FLOORS = (
    "_version errors cpu offline",
    "io schema running arguments memory",
    "downloads files headers graphs habits image_input images published settings spec",
    "tokenizer_files families sampling manifest",
    "weights tokenizer embeddings editing preview",
    "prompt_weights controlling",
    "exported",
    "artifact disk",
    "backends torch_networks tiling hub",
    "checkpoints tryout unread",
    "tracing",
    "converter",
    "pipeline",
    "onnx_graph metrics",
    "bench instrument",
    "quant",
    "exporters",
    "distill",
    "cli",
    "__main__",
)


def room(module: str) -> str:
    """sdlite.distill.train -> distill."""
    return module.split(".")[1]


def test_no_import_points_up_and_none_goes_in_a_circle():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
    rooms = {m for m in TREES if m != "sdlite"}
    assert {room(m) for m in rooms} == set(floor)  # every room has its floor
    graph = house.imports(TREES)
    assert sum(map(len, graph.values())) > 300
    up = [
        f"{m} -> {target}"
        for m in rooms
        for target in graph[m]
        if target != "sdlite" and floor[room(target)] > floor[room(m)]
    ]
    assert not up
    assert not house.circles(graph)


def test_a_circle_of_late_imports_is_found():
    trees = {
        m: ast.parse(code)
        for m, code in {
            "a.b": "def f():\n    from a import c\n",
            "a.c": "from a.d import _secret\n",
            "a.d": "if TYPE_CHECKING:\n    import a.c\nimport a.b\n",
            "a.e": "from a.d import x\n",
        }.items()
    }
    assert house.circles(house.imports(trees)) == [["a.b", "a.c", "a.d"]]
    assert house.private_names(trees) == ["a.c: from a.d import _secret"]


def test_no_private_name_crosses_a_border():
    assert not house.private_names(TREES)
