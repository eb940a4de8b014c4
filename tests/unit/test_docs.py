"""What the documents say is what the repository holds."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parent.parent.parent


def test_models_md_is_generated_from_the_committed_results():
    assert (ROOT / "models.md").read_text() == report.models_md(), "run python -m benchmarks.report"


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    assert "bash tests/run.sh" in readme
    assert "bash tests/run.sh" in (ROOT / ".ci/run").read_text()


def test_readme_names_every_sampler_and_extra():
    from sdlite.sampling import SAMPLERS

    readme = (ROOT / "README.md").read_text()
    assert all(f"`{s}`" in readme for s in SAMPLERS)
    extras = re.search(r"\[project\.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    for extra in re.findall(r"^(\w+) = ", extras, re.M):
        assert f"`{extra}`" in readme, extra


def test_readme_example_runs(tmp_path, monkeypatch):
    import pytest

    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    code = re.search(r"```python\n(import sdlite.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "apple.png").stat().st_size > 500


def test_export_matrix_is_generated_from_the_committed_results():
    assert (ROOT / "export" / "README.md").read_text() == report.export_md(), "run python -m benchmarks.report"


def test_readme_tables_are_generated_from_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert text == report.readme_md(), "run python -m benchmarks.report"
    assert text.count("<!-- generated: ") == text.count("<!-- end: ") >= 2


def test_plots_are_drawn_from_the_committed_results():
    assert report.speed.stale_plots() == [], "run python -m benchmarks.report"
