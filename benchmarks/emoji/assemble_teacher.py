"""The teacher as a diffusers folder: its UNet, and all other parts from the embedded student.

    python benchmarks/emoji/assemble_teacher.py --out runs/teacher/model [--teacher FOLDER]

The UNet is not in the repository: it is the folder that `--teacher` names (config.json and
safetensors), or the released asset `emoji-teacher` (`sdlite.hub.asset`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from sdlite import hub
from sdlite.errors import SdliteError

STUDENT = Path(__file__).parents[2] / "sdlite" / "models" / "emoji"


def assemble(out: Path, teacher: Path | None = None) -> Path:
    """Write the folder; `out` must not exist.

    Args:
        teacher: the UNet's folder; default: the released asset.

    Raises:
        HubError: the asset is neither here nor published; the message says what to do.
    """
    unet = teacher or hub.asset("emoji-teacher")
    out.mkdir(parents=True)
    index = json.loads((STUDENT / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    for part in ("text_encoder", "tokenizer", "scheduler", "vae"):
        shutil.copytree(
            STUDENT / part, out / part, ignore=shutil.ignore_patterns("*.onnx", "*.data")
        )
    shutil.copytree(unet, out / "unet")
    return out


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--out", type=Path, required=True, help="new folder")
    ap.add_argument("--teacher", type=Path, help="folder of the UNet; default: the released asset")
    args = ap.parse_args()
    try:
        print(assemble(args.out, args.teacher))
    except SdliteError as e:
        raise SystemExit(str(e)) from e


if __name__ == "__main__":
    main()
