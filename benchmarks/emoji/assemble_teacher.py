"""The teacher as a diffusers folder: its UNet from `benchmarks/emoji/teacher`, all other parts from
the embedded student.

python benchmarks/emoji/assemble_teacher.py --out runs/teacher/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent
STUDENT = HERE.parents[1] / "sdlite" / "models" / "emoji"


def assemble(out: Path) -> Path:
    """Write the folder; `out` must not exist."""
    out.mkdir(parents=True)
    index = json.loads((STUDENT / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    for part in ("text_encoder", "tokenizer", "scheduler", "vae"):
        shutil.copytree(
            STUDENT / part, out / part, ignore=shutil.ignore_patterns("*.onnx", "*.data")
        )
    shutil.copytree(HERE / "teacher", out / "unet")
    return out


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--out", type=Path, required=True, help="new folder")
    args = ap.parse_args()
    print(assemble(args.out))


if __name__ == "__main__":
    main()
