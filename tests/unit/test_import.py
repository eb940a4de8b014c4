from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "onnx", "accelerate", "optimum")


def modules_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {m.split(".")[0] for m in out.stdout.split()}


def test_import_loads_no_engine_and_nothing_heavy():
    assert not {*HEAVY, "onnxruntime", "tokenizers", "huggingface_hub"} & modules_after(
        "import sdlite"
    )


def test_generating_on_onnxruntime_loads_no_torch():
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    code = (
        "import sdlite; sdlite.Pipeline.from_pretrained('emoji', threads=1)('red apple',"
        " num_inference_steps=1, seed=0)"
    )
    loaded = modules_after(code)
    assert "onnxruntime" in loaded
    assert not set(HEAVY) & loaded


def test_every_package_and_asset_is_in_the_wheel():
    """pyproject.toml lists packages by hand, because export/ is mapped into one of them."""
    root = Path(__file__).parents[2]
    config = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(p.parent.relative_to(root).parts) for p in (root / "sdlite").rglob("__init__.py")
    }
    assert set(config["packages"]) == found | {"sdlite.exporters.assets"}
    assert config["package-dir"] == {"sdlite.exporters.assets": "export"}


def test_public_names_can_be_listed_and_a_misspelt_one_is_an_error():
    import sdlite

    assert set(sdlite.__all__) <= set(dir(sdlite))
    assert {"Pipeline", "PipelineOutput", "quantize", "export", "convert", "errors"} < set(
        sdlite.__all__
    )
    assert sdlite.PipelineOutput.__module__ == "sdlite.pipeline"
    assert issubclass(sdlite.errors.Cancelled, sdlite.errors.SdliteError)
    assert sdlite.errors.SdliteError.__module__ == "sdlite.errors"
    with pytest.raises(AttributeError, match="Pipelin"):
        sdlite.Pipelin  # noqa: B018


@pytest.mark.parametrize("name", ["quantize", "export", "convert"])
def test_public_function_is_there_or_names_its_extra(name):
    hidden = "import sys, sdlite\nfor m in ('onnx', 'torch'): sys.modules[m] = None\n"
    code = f"try: sdlite.{name}\nexcept ImportError as e: print(type(e).__name__, e)"
    out = subprocess.run(
        [sys.executable, "-c", hidden + code], capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith(f"MissingExtraError sdlite.{name} needs '")
    assert f"pip install 'sdlite[{'export' if name == 'convert' else 'quantize'}]'" in out
    pytest.importorskip("onnx", reason="needs the quantize extra")
    if name == "convert":
        pytest.importorskip("torch", reason="needs the export extra")
    subprocess.run(
        [sys.executable, "-c", f"import sdlite; assert callable(sdlite.{name})"], check=True
    )


RIGHT = """
import sdlite

def draw(prompt: str) -> sdlite.PipelineOutput:
    with sdlite.Pipeline.from_pretrained("emoji", precision="fp16") as pipe:
        out = pipe(prompt, seed=1)
    out.images[0].save("apple.png")
    return out

print(sdlite.__version__, sdlite.quantize("emoji", "int8-static", out="int8")["holds"])
sdlite.export(sdlite.convert("folder", "model"), "web", target="web-fp16")
try:
    draw("a red apple")
except sdlite.errors.Cancelled as e:
    print(e)
"""
WRONG = """
import sdlite
pipe = sdlite.Pipeline.from_pretrained("emoji")
sdlite.Pipelin
pipe("x", sede=1)
pipe.tokenise("x")
pipe("x").image
"""


def test_a_type_checker_knows_the_names_and_finds_misspelled_ones(tmp_path):
    pytest.importorskip("mypy", reason="needs the dev extra")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    root = Path(__file__).parents[2]
    options = ["--strict", "--config-file", str(root / "pyproject.toml")]
    options += ["--follow-imports", "silent", "--cache-dir", str(tmp_path)]
    files = [str(tmp_path / name) for name in ("right.py", "wrong.py")]
    command = [sys.executable, "-m", "mypy", *options, *files]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    errors = [line.rpartition("/")[2] for line in said.splitlines() if ": error: " in line]
    assert [e.split(": ")[0] for e in errors] == [f"wrong.py:{i}" for i in (4, 5, 6, 7)], said


def test_module_is_the_command():
    said = subprocess.run(
        [sys.executable, "-m", "sdlite", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("sdlite ")
