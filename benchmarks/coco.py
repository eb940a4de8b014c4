"""COCO-2014 zero-shot evaluation of a real checkpoint: FID and KID by clean-fid, CLIP score by
open_clip; 30,000 captions.

    pip install clean-fid open_clip_torch                    # not extras of ours: large, and used
                                                             here only; both fetch their weights
    # once:
    python -m benchmarks.coco real val2014 --out val2014-256
    python -m benchmarks.coco generate run/artefact \
        --captions annotations/captions_val2014.json --out coco-run
    python -m benchmarks.coco score coco-run --real val2014-256

One caption of each of 30,000 val2014 pictures, drawn once (seed 0); picture i from seed i at the
model's own size, steps, guidance and sampler, then 256 px (Lanczos); real pictures: all of val2014,
centre crop, 256 px. That is the field's "FID-30k" but for the feature code: clean-fid's resize is
antialiased, pytorch-fid's is not, so compare rows of this file with each other, and a student with
its own teacher. CLIP score: mean cosine of picture and caption, ViT-g-14 laion2b_s34b_b88k
(BK-SDM's). Figures of fewer than 2,048 pictures are refused: the covariance of 2,048 features would
be singular. One row goes to benchmarks/results/coco.jsonl; `generate` goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "coco.jsonl"
CLIP = ("ViT-g-14", "laion2b_s34b_b88k")
PACKAGES = {"cleanfid.fid": "clean-fid", "open_clip": "open_clip_torch"}
PX, LEAST = 256, 2048


def load(module: str) -> Any:
    """An evaluation package, imported late.

    Raises:
        SystemExit: it is not installed; names the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise SystemExit(
            f"the COCO evaluation needs {e.name!r}: pip install {PACKAGES[module]}"
        ) from e


def captions(path: Path, count: int) -> list[tuple[int, str]]:
    """(image id, caption) of `count` different pictures of a COCO captions file, the same ones for
    everybody.

    Raises:
        SystemExit: the file is not one, or has fewer pictures.
    """
    try:
        rows = sorted(
            (a["image_id"], a["id"], " ".join(a["caption"].split()))
            for a in json.loads(path.read_text())["annotations"]
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(
            f"{path} is not a COCO captions file ({type(e).__name__}: {e}); give"
            " annotations/captions_val2014.json."
        ) from e
    rng = np.random.default_rng(0)
    chosen: dict[int, str] = {}
    for i in rng.permutation(len(rows)):
        chosen.setdefault(rows[i][0], rows[i][2])
    if len(chosen) < count:
        raise SystemExit(
            f"{path} has captions of {len(chosen)} pictures, {count} are asked for; lower --count."
        )
    return list(chosen.items())[:count]


def _save(image: Any, path: Path) -> None:
    tmp = path.with_name(path.name + ".tmp")
    image.save(tmp, format="PNG")
    os.replace(tmp, path)


def _shrunk(image: Any) -> Any:
    from PIL import Image

    return image if image.size == (PX, PX) else image.resize((PX, PX), Image.Resampling.LANCZOS)


def real(folder: Path, out: Path) -> int:
    """Every picture of a folder, centre crop, 256 px, PNG. Returns how many."""
    from PIL import Image

    from sdlite.distill.latent_cache import to_square

    out.mkdir(parents=True, exist_ok=True)
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for path in found:
        if not (out / f"{path.stem}.png").exists():
            pixels = (to_square(Image.open(path), PX).transpose(1, 2, 0) + 1) * 127.5
            _save(Image.fromarray(pixels.round().astype(np.uint8)), out / f"{path.stem}.png")
    return len(found)


def generate(pipe: Any, chosen: list[tuple[int, str]], out: Path, batch: int = 1) -> None:
    """`out/<image id>.png` for every caption that has none yet, and `out/about.json`."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "model": pipe.artifact.name,
        "captions": [c for _, c in chosen],
        "ids": [i for i, _ in chosen],
        "precision": pipe.report.precision,
        "backend": pipe.report.backend,
        "engine": pipe.report.engine,
        "sampler": pipe.default_sampler,
        "steps": pipe.defaults.num_inference_steps,
        "guidance": pipe.defaults.guidance_scale,
    }
    path = out / "about.json"
    if path.exists() and json.loads(path.read_text()) != about:
        raise SystemExit(
            f"{out} holds pictures of another model, setting or caption set; choose another folder."
        )
    path.write_text(json.dumps(about))
    todo = [(n, i, c) for n, (i, c) in enumerate(chosen) if not (out / f"{i:012d}.png").exists()]
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        made = pipe([c for _, _, c in part], seed=[n for n, _, _ in part])
        for (_, i, _), image in zip(part, made.images, strict=True):
            _save(_shrunk(image), out / f"{i:012d}.png")
        print(
            f"{len(chosen) - len(todo) + start + len(part)} of {len(chosen)}",
            end="\r",
            file=sys.stderr,
        )


def clip_score(paths: Sequence[Path], texts: Sequence[str], device: str, batch: int = 16) -> float:
    """Mean cosine of each picture and its caption, times nothing."""
    import torch
    from PIL import Image

    open_clip = load("open_clip")
    model, _, preprocess = open_clip.create_model_and_transforms(CLIP[0], pretrained=CLIP[1])
    model, tokenize, total = model.eval().to(device), open_clip.get_tokenizer(CLIP[0]), 0.0
    with torch.no_grad():
        for i in range(0, len(paths), batch):
            x = torch.stack(
                [preprocess(Image.open(p).convert("RGB")) for p in paths[i : i + batch]]
            ).to(device)
            a, b = (
                model.encode_image(x),
                model.encode_text(tokenize(list(texts[i : i + batch])).to(device)),
            )
            total += float(torch.nn.functional.cosine_similarity(a.float(), b.float()).sum())
    return total / len(paths)


def score(made: Path, real_folder: Path, device: str = "cpu", least: int = LEAST) -> dict[str, Any]:
    """The row without its environment.

    Raises:
        SystemExit: pictures are missing or too few; a package is not installed.
    """
    import torch

    fid = load("cleanfid.fid")
    load("open_clip")
    if not (made / "about.json").exists():
        raise SystemExit(
            f"{made} has no about.json; make the pictures with `python -m benchmarks.coco"
            " generate`."
        )
    about = json.loads((made / "about.json").read_text())
    paths = [made / f"{i:012d}.png" for i in about["ids"]]
    if missing := [p.name for p in paths if not p.exists()]:
        raise SystemExit(
            f"{len(missing)} of {len(paths)} pictures are missing in {made} (first: {missing[0]});"
            " go on with `generate`."
        )
    truth = len(list(real_folder.glob("*.png")))
    if min(len(paths), truth) < least:
        raise SystemExit(
            f"{len(paths)} made and {truth} real pictures; FID needs at least {least} of each"
            " (30,000 and all of val2014)."
        )
    settings = {
        "mode": "clean",
        "num_workers": 0,
        "device": torch.device(device),
        "use_dataparallel": False,
        "verbose": False,
    }
    return {
        "benchmark": "coco",
        **{k: v for k, v in about.items() if k not in ("captions", "ids")},
        "pictures": len(paths),
        "real_pictures": truth,
        "px": PX,
        "fid": float(fid.compute_fid(str(made), str(real_folder), **settings)),
        "kid_x1000": 1000 * float(fid.compute_kid(str(made), str(real_folder), **settings)),
        "clip_score": clip_score(paths, about["captions"], device),
        "clip_model": " ".join(CLIP),
        "tools": _versions(),
    }


def _versions() -> dict[str, str]:
    out = {}
    for package in PACKAGES.values():
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "unknown"
    return out


def main(argv: Sequence[str] | None = None) -> int:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sub = ap.add_subparsers(dest="command", required=True)
    r = sub.add_parser("real", help="prepare the real pictures")
    r.add_argument("folder", type=Path, help="val2014")
    r.add_argument("--out", type=Path, required=True)
    g = sub.add_parser("generate", help="make the pictures")
    g.add_argument("model", help="embedded name, folder, or hub id")
    g.add_argument("--captions", type=Path, required=True, help="captions_val2014.json")
    g.add_argument("--out", type=Path, required=True)
    g.add_argument("--count", type=int, default=30_000)
    g.add_argument("--batch", type=int, default=1)
    g.add_argument("--precision")
    g.add_argument("--backend", default="auto")
    g.add_argument("--device", default="cpu")
    g.add_argument("--threads", type=int)
    s = sub.add_parser("score", help="compare them")
    s.add_argument("made", type=Path)
    s.add_argument("--real", type=Path, required=True, help="folder that `real` wrote")
    s.add_argument("--device", default="cpu")
    s.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args(argv)
    if args.command == "real":
        print(f"{real(args.folder, args.out)} pictures in {args.out}")
        return 0
    if args.command == "generate":
        import sdlite

        pipe = sdlite.Pipeline.from_pretrained(
            args.model,
            precision=args.precision,
            backend=args.backend,
            device=args.device,
            threads=args.threads,
        )
        generate(pipe, captions(args.captions, args.count), args.out, args.batch)
        return 0
    from benchmarks.env import environment

    row = {
        **score(args.made, args.real, args.device),
        "command": "python -m benchmarks.coco " + " ".join(argv or sys.argv[1:]),
        **environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as f:
        f.write(json.dumps(row) + "\n")
    print(
        f"{row['model']}: FID {row['fid']:.2f}, KID x1000 {row['kid_x1000']:.2f}, CLIP"
        f" {row['clip_score']:.4f} ({row['pictures']} pictures)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
