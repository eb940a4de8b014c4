"""One new environment for each extra, with nothing in it but `.[extra]`, and the extra's job there.

    python tests/extras.py                  # all that this machine can run; minutes each
    python tests/extras.py cpu distill      # some
    python tests/extras.py --lane newest distill

An environment is kept in --cache under a name of the extra, the lane, pyproject.toml's hash and the
Python, so that the next run installs sdlite alone; --remove deletes it after its job. A job has
--minutes; the last line says how many passed, failed and were skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
# The embedded model on onnxruntime in float32: "a red apple", seed 1, 4 steps.
APPLE = TESTS / "assets" / "apple.png"

RECIPE = """
name = "two-steps"
[student]
width = 0.5
[train]
batch_size = 2
sample_every = 0
[[stage]]
kind = "output"
images = 4
[preview]
prompts = ["a fox"]
num_inference_steps = 2
"""


# --- jobs: run by the environment's own Python, in an empty folder


def psnr(image) -> float:
    """dB of an image against the shipped one of the same prompt and seed."""
    import numpy as np
    from PIL import Image

    error = np.asarray(image, np.float64) - np.asarray(Image.open(APPLE), np.float64)
    return float(10 * np.log10(255**2 / max(np.mean(error**2), 1e-9)))


def generate(model: str | Path = "emoji", least: float = 50.0, **how) -> str:
    """An image, and its dB against the shipped one; fails under `least`."""
    import sdlite

    pipe = sdlite.Pipeline.from_pretrained(model, **how)
    own = {"num_inference_steps": 4, "guidance_scale": 1.0}  # a plain folder does not hold them
    db = psnr(pipe("a red apple", seed=1, **own).images[0])
    if db < least:
        sys.exit(f"{pipe.report.engine}: {db:.1f} dB, wanted {least}")
    return f"{pipe.report.engine} {pipe.report.precision}: {db:.1f} dB"


def plain() -> Path:
    """The embedded student as a plain diffusers folder."""
    from sdlite import hub

    out = Path("plain")
    shutil.copytree(
        hub.resolve("emoji"),
        out,
        ignore=shutil.ignore_patterns("*.onnx", "*.data", "sdlite.json", "vae_decoder"),
    )
    return out


def core() -> str:
    from sdlite.errors import MissingExtraError

    command("info", "emoji")
    command("verify", "emoji")
    try:
        generate()
    except MissingExtraError as e:
        return str(e)
    sys.exit("an image without an engine")


def command(*words: str) -> str:
    """`sdlite WORDS` as installed; its output."""
    program = Path(sys.executable).parent / "sdlite"
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"sdlite {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def cpu() -> str:
    command("generate", "a red apple", "--seed", "1", "--steps", "4", "--out", "apple.png")
    from PIL import Image

    if (db := psnr(Image.open("apple.png"))) < 50:
        sys.exit(f"{db:.1f} dB")
    return generate()


def openvino() -> str:
    return generate(backend="openvino")


def torch() -> str:
    return generate(plain())


def torchao() -> str:
    return generate(plain(), least=15.0, precision="int8-dynamic")


def quantize() -> str:
    Path("prompts.txt").write_text("a red apple\na green tree\na cat\na blue house\n")
    told = ["--precision", "int8-static", "--prompts", "prompts.txt", "--samples", "4"]
    short = ["--steps", "4", "--gate-prompts", "2", "--out", "int8"]
    out = command("quantize", "emoji", *told, *short)
    return f"{out.splitlines()[-1]}; {generate('int8', 15.0, precision='int8-static')}"


def convert() -> str:
    command("convert", plain(), "--out", "converted")
    command("verify", "converted")
    return generate("converted")


def distill() -> str:
    Path("recipe.toml").write_text(RECIPE)
    Path("prompts.txt").write_text("a red apple\na green tree\n")
    told = ["recipe.toml", "--teacher", plain(), "--data", "prompts.txt"]
    command("distill", "doctor", *told)
    command("distill", "run", *told, "--out", "run")
    command("verify", "run/artefact")
    generate("run/artefact", -100.0)
    return "doctor, two steps, graphs, opened again"


def export(*profiles: str):
    def job() -> str:
        said = []
        for name in profiles:
            lines = command("export", "emoji", "--target", name, "--out", name).splitlines()
            shown = ("text_encoder", "unet", "vae_decoder", "not run")
            kept = [x.strip() for x in lines if x.strip().startswith(shown)]
            said.append(f"{name}: {'; '.join(kept)}")
        return "\n".join(said)

    return job


def optimum() -> str:
    import numpy as np
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    from sdlite import hub

    pipe = ORTStableDiffusionPipeline.from_pretrained(hub.resolve("emoji"))
    image = pipe("a red apple", num_inference_steps=2, output_type="np").images[0]
    return f"optimum: image of deviation {np.std(image):.2f}"


def in_repository(*words: str):
    """A command of the repository's own, in its root."""

    def job() -> str:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return (done.stdout.strip().splitlines() or [""])[-1]

    return job


ALL_TARGETS = (
    "onnx",
    "onnx-fixed",
    "openvino",
    "web",
    "mnn",
    "ncnn",
    "executorch",
    "coreml",
    "tensorrt-rtx",
    "qnn-fp16",
)
JOBS = {
    "core": core,
    "cpu": cpu,
    "cuda": cpu,
    "openvino": openvino,
    "quantize": quantize,
    "torch": torch,
    "mnn": export("mnn"),
    "ncnn": export("ncnn"),
    "executorch": export("executorch"),
    "coreml": export("coreml"),
    "tensorrt": export("tensorrt"),
    "tensorrt-rtx": export("tensorrt-rtx"),
    "qnn": export("qnn-fp16"),
    "targets": export(*ALL_TARGETS),
    "torchao": torchao,
    "optimum": optimum,
    "export": convert,
    "distill": distill,
    "bench": in_repository("-m", "benchmarks.run", "--help"),
    "peers": in_repository("-c", "import openvino_genai, nncf, stable_diffusion_cpp"),
    "dev": in_repository("-m", "pytest", "tests/unit/test_artifact.py", "tests/unit/test_quant.py"),
}
ELSEWHERE = {  # never run unless named
    "cuda": "an NVIDIA GPU",
    "tensorrt": "an NVIDIA GPU and its package index",
    "peers": "a C++ build of a quarter of an hour",
}


# --- the runner


def pinned(lane: str) -> Path:
    return TESTS / f"constraints-{lane}.txt"


def environment(extra: str, lane: str, cache: Path, until: float) -> Path:
    """Folder of the virtual environment with `.[extra]` alone; `until` is the time to be ready."""
    limits = pinned(lane).read_bytes() if lane else b""
    said = [(ROOT / "pyproject.toml").read_bytes(), limits, sys.version.encode()]
    key = hashlib.sha256(b"|".join(said)).hexdigest()[:12]
    folder = cache / f"{extra}-{lane or 'any'}-{key}"

    def pip(*words: str | Path) -> None:
        quiet = ("--quiet", "--disable-pip-version-check", "--no-compile")  # what is used is, later
        left = max(1.0, until - time.monotonic())
        python = folder / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", *quiet, *words], check=True, timeout=left)

    if (folder / "whole").exists():
        pip("--no-deps", "--force-reinstall", ROOT)
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if "torch" in closure(extra):  # one version, of which a CPU build may be at hand
        pip(torch_pin(lane))
    wanted = str(ROOT) if extra == "core" else f"{ROOT}[{extra}]"
    pip(*(["-c", pinned(lane)] if lane else []), wanted)
    (folder / "whole").touch()
    return folder


def torch_pin(lane: str) -> str:
    lines = (pinned(lane) if lane else TESTS / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def closure(extra: str) -> set[str]:
    """Names of packages that an extra asks for, its own extras' too."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    out: set[str] = set()
    for line in asked.get(extra, []):
        if line.startswith("sdlite["):
            own = line[len("sdlite[") : line.index("]")].split(",")
            out = out.union(*(closure(e) for e in own))
        else:
            out.add(line.split(">")[0].split("=")[0].split("[")[0])
    return out


def run(extra: str, lane: str, cache: Path, minutes: float, remove: bool) -> tuple[bool, str]:
    """(whether the job was done, what it said)."""
    begin = time.monotonic()
    try:
        folder = environment(extra, lane, cache, begin + 60 * minutes)
        took = time.monotonic() - begin
        done = work(extra, folder, max(1.0, 60 * minutes - took))
    except subprocess.TimeoutExpired:
        return False, f"not done in {minutes:g} minutes"
    except subprocess.CalledProcessError as e:
        return False, f"could not be installed: {e}"
    seconds = f"installed in {took:.0f} s, job {time.monotonic() - begin - took:.0f} s"
    if remove:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        return False, f"{seconds}\n{(done.stdout + done.stderr)[-3000:]}"
    return True, f"{seconds}: {done.stdout.strip()}"


def work(extra: str, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """The extra's job by the environment's Python, offline, in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="sdlite-extra-") as scratch:
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        offline["PYTHONDONTWRITEBYTECODE"] = ""
        return subprocess.run(
            [folder / "bin" / "python", __file__, "--job", extra],
            cwd=scratch,
            env={**os.environ, **offline, "PYTHONPATH": "", "SDLITE_CACHE": scratch},
            capture_output=True,
            text=True,
            timeout=seconds,
        )


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    ap.add_argument("extras", nargs="*", metavar="EXTRA", help=f"of {', '.join(JOBS)}")
    ap.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    ap.add_argument(
        "--lane",
        default="",
        choices=["", "newest", "oldest"],
        help="tests/constraints-LANE.txt; default: what pip chooses",
    )
    ap.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sdlite-extras")
    ap.add_argument("--minutes", type=float, default=15.0, help="of each extra, with installing")
    ap.add_argument("--remove", action="store_true", help="delete each environment after its job")
    args = ap.parse_args()
    if unknown := sorted(set(args.extras) - set(JOBS)):
        ap.error(f"{', '.join(unknown)} not known; choose of {', '.join(JOBS)}")
    if args.job:
        print(JOBS[args.job]())
        return 0
    counts = {True: 0, False: 0}
    skipped = {} if args.extras else ELSEWHERE
    for extra, why in skipped.items():
        print(f"skip {extra}: needs {why}", flush=True)
    for extra in args.extras or [e for e in JOBS if e not in ELSEWHERE]:
        done, said = run(extra, args.lane, args.cache, args.minutes, args.remove)
        counts[done] += 1
        print(f"{'ok  ' if done else 'FAIL'} {extra}: {said}", flush=True)
    print(f"{counts[True]} passed, {counts[False]} failed, {len(skipped)} skipped")
    return 1 if counts[False] else 0


if __name__ == "__main__":
    sys.exit(main())
