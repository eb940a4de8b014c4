"""What the documents say is what the repository holds, and every snippet in them runs."""

from __future__ import annotations

import pkgutil
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from benchmarks import report
from sdlite import cli
from sdlite.cli import distill
from tests.conftest import EMOJI

ROOT = Path(__file__).parent.parent.parent
HIDDEN = (".", "node_modules", "runs")
DOCUMENTS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in ROOT.rglob("*.md")
    if not any(part.startswith(HIDDEN) for part in p.relative_to(ROOT).parts)
)
# What a snippet says -> what the test runs: less of what takes long. Conversion has tests of its
# own (tests/parity).
SUBSTITUTIONS = {
    "sdlite.convert(": "__import__('inspect').signature(sdlite.convert).bind(",
    "Calibration(prompts=[...])": (
        "Calibration(prompts=['a fox', 'a red apple', 'pizza', 'a ghost'], samples=4)"
    ),
    "Gate(psnr_mean=36)": "Gate(psnr_mean=36, num_prompts=2, engines=['onnxruntime'])",
    'out="my-int8"': 'out="my-int8-too"',
    "--precision int8-static --prompts": (
        "--samples 4 --gate-prompts 2 --engine onnxruntime --precision int8-static --prompts"
    ),
}
RUN = (
    "generate",
    "quantize",
    "info",
    "verify",
    "models",
)  # commands that are run; of others the arguments are read
LISTED = ["export", "--list"]
JAVASCRIPT = ("sdlite.js", "Pipeline.load")
FILES = ("sdlite.json",)


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / document).read_text(), re.S | re.M)


def spans(document: str) -> list[str]:
    """Every `inline code` outside blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", text)


def options(words: list[str]) -> set[str]:
    """Option names of a command of sdlite; a command alone has those of its subcommands too."""
    parser, out, words = cli.parser(), set(), list(words)
    while choices := [a.choices for a in parser._actions if isinstance(a.choices, dict)]:
        if not words or words[0] not in choices[0]:
            break
        parser = choices[0][words.pop(0)]
        out |= {o for a in parser._actions for o in a.option_strings}
    return out


def shell(text: str) -> list[list[str]]:
    """Commands of a bash block, without comments; `[--option]` is read as given."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [c for line in lines for c in re.sub(r"\s#.*", "", line).split("&&")]
    return [shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", c)) for c in commands if c.strip()]


def run_shell(text: str) -> None:
    for command, *arguments in shell(text):
        if Path(command).name == "sdlite":
            args = cli.read(arguments)
            if args.command in RUN or arguments == LISTED:
                assert (
                    cli.main(
                        [
                            *arguments,
                            *(
                                ["--threads", "1"]
                                if args.command in ("generate", "quantize")
                                else []
                            ),
                        ]
                    )
                    == 0
                )
            elif args.command == "export":
                from sdlite.exporters import profile

                assert profile.load(args.target)
        elif Path(command).name == "bash":
            assert (ROOT / arguments[0]).is_file()
        else:
            assert Path(command).name in ("python3", "pip"), (
                f"{command}: neither run nor read by this test"
            )


def run_python(text: str, names: dict[str, object]) -> None:
    exec(compile(text, "snippet", "exec"), names)


@pytest.fixture
def desk(tmp_path, monkeypatch, plain):
    """A folder with what the documents speak of."""
    (tmp_path / "my-diffusers-folder").symlink_to(plain)
    (tmp_path / "run").mkdir()
    for model in ("my-artefact", "run/artefact"):
        (tmp_path / model).symlink_to(EMOJI)
    shutil.copy(ROOT / "export/calibration/emoji.txt", tmp_path / "prompts.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)])
def test_every_block_runs_in_the_documents_order(document, desk):
    for package in ("onnxruntime", "onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs the dev extra")
    names: dict[str, object] = {}
    for language, text in blocks(document):
        for said, done in SUBSTITUTIONS.items():
            text = text.replace(said, done)
        if language == "python":
            run_python(text, names)
        elif language == "bash":
            run_shell(text)
        elif language == "toml":
            from sdlite.distill.recipe import Recipe

            (desk / "recipe.toml").write_text(text)
            assert Recipe.load(desk / "recipe.toml").stages
        else:
            pytest.fail(f"{document}: a block of language {language!r} is not run by this test")
    if document == "README.md":
        assert (desk / "apple.png").stat().st_size > 500
        assert len(names["out"].images) == 4


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_text_exist(document):
    for span in spans(document):
        words = span.split()
        given = {w.split("=")[0] for w in words if w.startswith("--")}
        if words[0] == "sdlite" and len(words) > 1:
            assert words[1] in [c.name for c in cli.COMMANDS], span
            assert given <= options(words[1:]), span
        elif words[:2] == ["python", "-m"]:
            module = ROOT / words[2].replace(".", "/")
            file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
            assert file.is_file(), span
            assert all(f'"{o}"' in file.read_text() for o in given), span
        elif words[0] == "python" and words[1].endswith(".py"):
            file = ROOT / words[1]
            known = "".join(
                f.read_text() for f in file.parent.glob("*.py")
            )  # scripts of a folder share their parser
            assert file.is_file(), span
            assert all(f'"{o}"' in known for o in given), span


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_the_text_exist(document, emoji):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for span in spans(document):
        if (name := re.match(r"sdlite(\.\w+)+", span)) and name[0] not in (*JAVASCRIPT, *FILES):
            assert pkgutil.resolve_name(name[0]), span
        if (name := re.match(r"(?:pipe|Pipeline)\.(\w+)", span)) and name[0] not in JAVASCRIPT:
            assert hasattr(emoji, name[1]), span
    for given in re.findall(r"sdlite\[([\w,-]+)\]", (ROOT / document).read_text()):
        assert set(given.split(",")) <= set(extras), given


@pytest.mark.parametrize("command", [*cli.COMMANDS, *distill.SUBCOMMANDS], ids=lambda c: c.name)
def test_examples_of_the_help_are_read_by_the_parser(command):
    found = shell(command.examples)
    assert found
    for name, *arguments in found:
        assert name == "sdlite"
        assert callable(cli.read(arguments).run)


def test_models_md_is_generated_from_the_committed_results():
    assert (ROOT / "models.md").read_text() == report.models_md(), "run python -m benchmarks.report"


def test_every_test_that_holds_a_promise_exists():
    """SECURITY.md: `test_file.py`, `test_file.py::test_name`, and `::test_name` of the file named
    before.
    """
    text, file, named = (ROOT / "SECURITY.md").read_text(), "", 0
    for given, name in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
        file, named = given or file, named + bool(given or name)
        held = (ROOT / "tests/unit" / file).read_text() if given or name else ""
        assert not name or f"def {name}(" in held, f"{file} has no {name}"
    assert named > 30


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    assert "bash tests/run.sh" in readme
    assert "bash tests/run.sh" in (ROOT / ".ci/run").read_text()


def test_readme_names_every_sampler_and_extra():
    from sdlite.sampling import SAMPLERS

    readme = (ROOT / "README.md").read_text()
    assert all(f"`{s}`" in readme for s in SAMPLERS)
    extras = re.search(
        r"\[project\.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S
    )[1]
    for extra in re.findall(r"^(\w+) = ", extras, re.M):
        assert f"`{extra}`" in readme, extra


def test_export_matrix_is_generated_from_the_committed_results():
    assert (ROOT / "export" / "README.md").read_text() == report.export_md(), (
        "run python -m benchmarks.report"
    )


def test_readme_tables_are_generated_from_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert text == report.readme_md(), "run python -m benchmarks.report"
    assert text.count("<!-- generated: ") == text.count("<!-- end: ") >= 2


def test_plots_are_drawn_from_the_committed_results():
    assert report.speed.stale_plots() == [], "run python -m benchmarks.report"
