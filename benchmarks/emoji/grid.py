"""A grid of 64 prompts to look at, the same for every model.

python benchmarks/emoji/grid.py runs/teacher/model --out teacher.png [--steps 25 --guidance 3]
[--real]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import numpy as np
from PIL import Image

import sdlite
from sdlite import images


def prompts(data: emoji.Emoji) -> list[tuple[int, int]]:
    """(picture, colour) of 64 captions, one a concept, without skin tones but for eight."""
    rng = np.random.default_rng(64)
    plain = [
        i for i in range(len(data)) if "skin tone" not in data.captions[i] and not data.heldout[i]
    ]
    toned = [i for i in range(len(data)) if "skin tone" in data.captions[i] and not data.heldout[i]]
    first = {data.concepts[i]: i for i in rng.permutation(plain)}
    chosen = [
        int(i) for i in [*rng.permutation(list(first.values()))[:56], *rng.permutation(toned)[:8]]
    ]
    return [(i, int(rng.integers(len(emoji.NAMES))) if k % 2 else 0) for k, i in enumerate(chosen)]


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("model", help="embedded name or folder")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--backend", default="auto")
    ap.add_argument("--precision")
    ap.add_argument("--steps", type=int)
    ap.add_argument("--guidance", type=float)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--real", action="store_true", help="put the real picture left of each")
    ap.add_argument("--threads", type=int, default=2)
    args = ap.parse_args()
    data = emoji.load()
    chosen = prompts(data)
    pipe = sdlite.Pipeline.from_pretrained(
        args.model, backend=args.backend, precision=args.precision, threads=args.threads
    )
    texts = [
        data.captions[i] + (f" on a {emoji.NAMES[c]} background" if c else "") for i, c in chosen
    ]
    out: list[Image.Image] = []
    for start in range(0, len(texts), 16):
        part = texts[start : start + 16]
        out += pipe(
            part,
            seed=args.seed + start,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
        ).images
    if args.real:
        import torch

        ids, colours = (torch.tensor(x) for x in zip(*chosen, strict=True))
        real = images.to_pil(images.to_uint8(data.composite(ids, colours).numpy()))
        out = [x for pair in zip(real, out, strict=True) for x in pair]
    grid = images.grid(out, 16 if args.real else 8)
    grid = (
        grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.NEAREST)
        if grid.width < 1024
        else grid
    )
    images.save(grid, args.out, {"model": args.model, "prompts": "; ".join(texts)})
    print(args.out, *(f"{k}: {t}" for k, t in enumerate(texts)), sep="\n")


if __name__ == "__main__":
    main()
