from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "onnx", "accelerate", "optimum")


def modules_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"], capture_output=True, text=True, check=True
    )
    return {m.split(".")[0] for m in out.stdout.split()}


def test_import_loads_no_engine_and_nothing_heavy():
    assert not {*HEAVY, "onnxruntime", "tokenizers", "huggingface_hub"} & modules_after("import sdlite")


def test_generating_on_onnxruntime_loads_no_torch():
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    code = "import sdlite; sdlite.Pipeline.from_pretrained('emoji', threads=1)('red apple', num_inference_steps=1, seed=0)"
    loaded = modules_after(code)
    assert "onnxruntime" in loaded
    assert not set(HEAVY) & loaded


def test_every_package_and_asset_is_in_the_wheel():
    """pyproject.toml lists packages by hand, because export/ is mapped into one of them."""
    root = Path(__file__).parents[2]
    config = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(root).parts) for p in (root / "sdlite").rglob("__init__.py")}
    assert set(config["packages"]) == found | {"sdlite.exporters.assets"}
    assert config["package-dir"] == {"sdlite.exporters.assets": "export"}
