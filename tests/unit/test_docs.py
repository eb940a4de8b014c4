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
# Commands that are run, the last but in README; of others the arguments are read.
RUN = ("generate", "info", "verify", "models", "quantize")
LISTED = ["export", "--list"]
JAVASCRIPT = ("sdlite.js", "Pipeline.load")
FILES = ("sdlite.h", "sdlite.json")


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / document).read_text(), re.S | re.M)


def spans(document: str) -> list[str]:
    """Every `inline code` outside blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", text)


def options(words: list[str]) -> set[str]:
    """Option names of a command of sdlite; a command alone has those of its subcommands too."""
    parser, words = cli.parser(), list(words)
    out = {o for a in parser._actions for o in a.option_strings}
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


def run_shell(text: str, run: tuple[str, ...]) -> None:
    for command, *arguments in shell(text):
        if Path(command).name == "sdlite":
            args = cli.read(arguments)
            if args.command in run or arguments == LISTED:
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
    for model in ("my-model", "run/artefact"):
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
            run_shell(text, RUN[:-1] if document == "README.md" else RUN)
        elif language == "toml":
            from sdlite.distill.recipe import Recipe

            (desk / "recipe.toml").write_text(text)
            assert Recipe.load(desk / "recipe.toml").stages
        else:
            pytest.fail(f"{document}: a block of language {language!r} is not run by this test")
    if document == "README.md":
        assert (desk / "apple.png").stat().st_size > 500
    if document == "docs/use.md":
        assert len(names["out"].images) == 4


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_text_exist(document):
    for span in spans(document):
        words = span.split()
        given = {w.split("=")[0] for w in words if w.startswith("--")}
        if words[0] == "sdlite" and len(words) > 1:
            assert words[1] in ["COMMAND", *(c.name for c in cli.COMMANDS)], span
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


# British spellings, and words for which the glossary has another (CONTRIBUTING.md)
AVOIDED = re.compile(
    r"\b(pictures?|artefacts?|licences?|colours?|behaviours?|neighbours?"
    r"|(?:re)?quantis\w+|distil|distils|optimis\w+|recognis\w+|honour\w*|catalogue)\b",
    re.I,
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_keep_to_the_glossary(document):
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.S | re.M)
    text = re.sub(r"`[^`\n]+`|\]\([^)]*\)", "", text)
    assert [m[0] for m in AVOIDED.finditer(text)] == []


def test_help_keeps_to_the_glossary():
    def every(parser):
        yield parser.format_help()
        for action in parser._actions:
            if isinstance(action.choices, dict):
                for inner in action.choices.values():
                    yield from every(inner)

    assert [m[0] for text in every(cli.parser()) for m in AVOIDED.finditer(text)] == []


def test_each_devices_command_is_read_by_the_parser():
    from sdlite import backends
    from sdlite.exporters import profile

    rows = re.findall(r"^\| .* \| `(sdlite .*)` \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 10
    for row in rows:
        args = cli.read(shlex.split(row)[1:])
        if args.command == "export":
            assert args.target in profile.builtin(), row
        if args.command == "generate":
            assert args.backend in ("auto", *backends.names()), row


def test_every_benchmark_is_in_the_list_of_benchmarks():
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    files = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*/__main__.py")]
    modules = {
        (p.parent if p.stem == "__main__" else p).stem
        for p in files
        if 'if __name__ == "__main__"' in p.read_text() or p.stem == "__main__"
    }
    assert len(modules) > 15
    unlisted = {m for m in modules if f"benchmarks.{m}" not in listed}
    assert unlisted <= {"published_models", "shapes"}  # they write models for the others


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


def test_what_is_generated_from_the_committed_results_is_up_to_date():
    assert report.stale() == [], "run python -m benchmarks.report"
    assert {p.relative_to(ROOT).as_posix() for p in report.files()} == {
        "README.md",
        "models.md",
        "docs/benchmarks.md",
        "export/README.md",
    }


def test_readme_is_short_and_its_first_screen_is_what_a_newcomer_wants():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1000
    first = text.split("## Which command")[0]
    assert "![" in first
    assert {language for language, _ in blocks("README.md")} == {"bash", "python"}
    assert "python -m benchmarks." in first
    assert (ROOT / "docs" / "grid.webp").stat().st_size < 200_000


def anchor(heading: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert heading in map(anchor, headings), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_in_the_text_exist(document):
    """Every span that is a path of a folder of the repository, or a document."""
    tops = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(HIDDEN)}
    for span in spans(document):
        path = span.split("::")[0].rstrip("/")
        known = "/" in path and path.split("/")[0] in tops - {"runs"}
        if re.fullmatch(r"[\w./-]+", path) and (known or path.endswith(".md")):
            places = (ROOT / path, (ROOT / document).parent / path)
            assert any(p.exists() for p in places), span


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


def test_documents_name_whatever_the_registries_hold():
    pytest.importorskip("torch", reason="needs the distill extra")
    from sdlite import backends
    from sdlite.distill.students import PRESETS
    from sdlite.distill.tasks import KINDS
    from sdlite.exporters import targets
    from sdlite.sampling import SAMPLERS

    use, install = ((ROOT / "docs" / n).read_text() for n in ("use.md", "install.md"))
    assert all(f"`{s}`" in use for s in SAMPLERS)
    assert all(name in use for name in backends.names())
    distill_md = (ROOT / "docs" / "distill.md").read_text()
    assert all(f"`{name}`" in distill_md for name in KINDS)
    assert all(name in distill_md for name in PRESETS)
    assert all(name in install for name in targets.names())
    extras = re.search(
        r"\[project\.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S
    )[1]
    for extra in re.findall(r"^([\w-]+) = ", extras, re.M):
        assert f"`{extra}`" in install, extra
