"""pyproject.toml against the code: errors name extras that bring what is missing, bounds were
run.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from sdlite import _LAZY, backends, errors
from sdlite.errors import CONVERT_NEEDS
from sdlite.exporters import targets
from sdlite.exporters.profile import Profile
from sdlite.exporters.targets import base

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {  # package -> the module that it brings, where the two names differ
    "pillow": "PIL",
    "optimum-onnx": "optimum",
    "onnxruntime-gpu": "onnxruntime",
    "cuda-python": "cuda",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
    "mnn": "MNN",
}


def asked(lines):
    """(package, lower bound or None) of requirement lines; own extras are followed."""
    for line in lines:
        if line.startswith("sdlite["):
            for extra in line[len("sdlite[") : line.index("]")].split(","):
                yield from asked(EXTRAS[extra])
        else:
            name, bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(?:[>=]=([\w.]+))?", line).groups()
            yield name.lower().replace("_", "-"), bound


def modules(extras):
    """Top-level modules that `pip install 'sdlite[extras]'` asks for by name."""
    lines = [
        *PROJECT["dependencies"],
        *(line for e in extras.split(",") if e for line in EXTRAS[e]),
    ]
    return {MODULES.get(p, p.replace("-", "_")) for p, _ in asked(lines)}


def named():
    """(file, the extras that an error there names)."""
    for path in sorted((ROOT / "sdlite").rglob("*.py")):
        for extras in re.findall(r"sdlite\[([\w,-]+)\]", path.read_text()):
            yield path.name, extras


def source(module):
    base = ROOT / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def imports(path, seen=None):
    """Ours that importing one of ours brings in -> the modules from elsewhere that each imports."""
    seen = {} if seen is None else seen
    if path in seen:
        return seen
    seen[path] = set()
    for node in top_level(ast.parse(source(path).read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sdlite"):
            names += [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            if name.split(".")[0] != "sdlite":
                seen[path].add(name.split(".")[0])
            elif source(name).exists():
                imports(name, seen)
    return seen


def top_level(tree):
    """Import statements that run when the module is imported."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.Try):
            yield from (n for n in node.body if isinstance(n, (ast.Import, ast.ImportFrom)))


def foreign(path):
    return set().union(*imports(path).values()) - set(sys.stdlib_module_names)


def test_every_extra_that_an_error_names_exists():
    found = list(named())
    assert len(found) > 10
    assert [(f, e) for f, e in found if not set(e.split(",")) <= set(EXTRAS)] == []


@pytest.mark.parametrize("name", [n for n, (_, extra) in _LAZY.items() if extra])
def test_extra_brings_what_a_public_function_imports(name):
    module, extra = _LAZY[name]
    assert foreign(module) <= modules(extra)


ENGINES = {"onnxruntime": "ort", "openvino": "openvino_network", "torch": "torch_module"}


@pytest.mark.parametrize("name", backends.names())
def test_extra_brings_what_a_backend_imports(name):
    backend = backends.get_backend(name)
    module = f"sdlite.backends.{ENGINES.get(name, name)}"
    assert foreign(type(backend).__module__) <= modules("")
    assert foreign(module) | {backend.package} <= modules(backend.extra)


@pytest.mark.parametrize("name", targets.names())
def test_extra_brings_what_a_target_imports_and_asks_for(name):
    target = targets.get(name)
    wanted = {MODULES.get(p.lower(), p.replace("-", "_")) for p in target.packages}
    wanted |= {"onnxruntime"}  # which judges each
    wanted |= foreign(target.__module__) | foreign("sdlite.exporters.export") | {"pydantic"}
    if target.from_torch:
        wanted |= foreign("sdlite.tracing")
    assert wanted <= modules(target.extra)


@pytest.mark.parametrize("name", targets.names())
def test_an_export_names_an_extra_that_brings_what_is_missing(name, monkeypatch):
    """One package after the other, as the error of the missing one says it."""
    target = targets.get(name)
    made_for = target(Profile("p", name, precision=target.precisions[0]))
    every = {p.lower().replace("_", "-") for p in (*target.packages, "onnx", "onnxruntime")}
    for package in sorted(every):
        monkeypatch.setattr(
            base, "version", lambda p, gone=package: None if p.lower() == gone else "1"
        )
        with pytest.raises(errors.MissingExtraError, match=f"(?i){package}") as refused:
            made_for.need_packages()
        extras = re.search(r"sdlite\[(.*)\]", str(refused.value))[1].split(",")
        assert package in {p for p, _ in asked(x for e in extras for x in EXTRAS[e])}


def test_distill_brings_its_last_step():
    training = foreign("sdlite.distill.run") | foreign("sdlite.distill.doctor")
    assert {*CONVERT_NEEDS, "accelerate", "matplotlib"} | training <= modules("distill")
    assert {*CONVERT_NEEDS} | foreign("sdlite.converter") | foreign("sdlite.tracing") <= modules(
        "export"
    )


def test_targets_are_all_but_those_that_need_a_package_index_of_their_own():
    (line,) = EXTRAS["targets"]
    every = {e for n in targets.names() for e in targets.get(n).extra.split(",")}
    assert set(line[len("sdlite[") : -1].split(",")) == every - {"tensorrt"}


@pytest.mark.parametrize(
    ("export", "missing"), [(True, "onnx_ir"), (True, "matplotlib"), (False, "accelerate")]
)
def test_distilling_says_what_is_missing_before_it_trains(export, missing, monkeypatch, tmp_path):
    pytest.importorskip("torch", reason="needs the distill extra")
    from sdlite.distill import doctor
    from sdlite.distill.recipe import Recipe
    from sdlite.distill.run import run

    found = importlib.util.find_spec

    def without(name, *package):
        return None if name == missing else found(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    read = Recipe.parse({"stage": [{"kind": "output", "images": 1}]})
    with pytest.raises(errors.MissingExtraError, match=rf"{missing}.*sdlite\[distill\]"):
        run(
            read,
            teacher=tmp_path / "none",
            data=tmp_path / "none",
            out=tmp_path / "out",
            export=export,
        )
    assert not (tmp_path / "out").exists()
    assert [f.level for f in doctor.installed(export)] == ["fail"]
    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert [f.level for f in doctor.installed(export)] == ["ok"]


def pins(name):
    lines = (ROOT / "tests" / f"constraints{name}.txt").read_text().splitlines()
    pairs = [x.split("==") for x in lines if x and not x.startswith("#")]
    return {k.lower().replace("_", "-"): v for k, v in pairs}


def test_lower_bounds_are_the_versions_that_the_oldest_lane_runs():
    oldest, run = (
        pins("-oldest"),
        {e for e in EXTRAS if e not in ("cuda", "tensorrt", "optimum", "peers", "bench", "dev")},
    )
    bounds = dict(asked([*PROJECT["dependencies"], *(line for e in run for line in EXTRAS[e])]))
    assert {p: (b, oldest.get(p)) for p, b in bounds.items() if b != oldest.get(p)} == {}


def test_newest_lane_is_nowhere_older_than_the_main_lane_and_has_no_optimum():
    def key(version):
        return [int(n) for n in re.findall(r"\d+", version)]

    main, newest = pins(""), pins("-newest")
    assert "optimum" not in newest
    assert {p: (main[p], v) for p, v in newest.items() if p in main and key(v) < key(main[p])} == {}


def test_metadata_tells_the_truth():
    said = {c.rsplit(" :: ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert PROJECT["requires-python"] == ">=3.11"
    assert said == {"3.11", "3.12", "3.13"}
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "sdlite" / "py.typed").exists()
    assert "urls" not in PROJECT  # there is no address yet; a made-up one is worse than none
    assert all((ROOT / f).exists() for f in PROJECT["license-files"])


def test_old_python_is_refused_in_one_line():
    """By setup.py, which an old pip runs before it looks for dependencies."""
    code = "import sys; sys.version_info = (3, 10, 13); exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("sdlite needs Python 3.11 or newer, and this is Python 3.10: ")


@pytest.mark.slow
def test_wheel_is_built_without_a_warning_and_holds_what_users_need(tmp_path):
    """With pip's newest setuptools, from the files that git knows. Of export/ the code reads
    profiles, calibration prompts and the page; samples are for a checkout.
    """
    git = ["git", "ls-files", "sdlite", "export", "*.toml", "*.py", "*.md", "LICENSE", "NOTICE"]
    files = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    source = tmp_path / "source"
    for f in files:
        (source / f).parent.mkdir(parents=True, exist_ok=True)
        (source / f).write_bytes((ROOT / f).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path)]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    assert not [x for x in said.splitlines() if re.search("would be ignored|deprecat", x, re.I)]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py311-none-any.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    used = re.compile("^export/(?=(calibration|profiles|web)/)")
    wanted = {used.sub("sdlite/exporters/assets/", f) for f in files}
    assert held == {f for f in wanted if f.startswith("sdlite/")}
    assert wheel.stat().st_size < 26e6


def test_no_file_that_git_knows_is_large_and_no_content_is_there_twice():
    listed = subprocess.run(["git", "ls-tree", "-rl", "HEAD"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    blobs = [line.split(None, 4) for line in listed.stdout.decode().splitlines()]
    assert sum(int(size) for *_, size, _ in blobs) < 42e6
    large = [sha for _, _, sha, size, _ in blobs if int(size) > 1e6]
    assert len(large) == len(set(large)) <= 6
