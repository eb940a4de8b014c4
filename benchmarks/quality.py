"""Quality of emoji models: identity, background colour, KID, FID, held-out composition,
memorisation; 3 seeds.

    python -m benchmarks.quality emoji runs/teacher/model --label student --label teacher

One protocol for every model: `--prompts` captions drawn once (one per concept, without skin tones),
each on one of ten backgrounds, the model's own steps and guidance unless given. Features:
EfficientNet-Lite0 (ImageNet), pooled, at 128 px. Definitions, each per seed:

identity@1   share of pictures whose nearest real emoji (on the same background, by cosine) is the
             prompted concept
exact@1      the same, and the very picture (gender and skin tone too)
colour       share of pictures whose mean border colour is nearest to the prompted background's
kid, fid     against all real train pictures of the same concepts on the same backgrounds; FID is
             biased at this N, KID is not
heldout@1    exact@1 on captions of skin-tone pictures that were never trained on; the gallery holds
             them
memorised    share of pictures with cosine > 0.99 to a training picture: near copies. Expected to be
             high: a caption has one picture

Every row goes to benchmarks/results/quality.jsonl with raw per-seed values.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "emoji"))
RESULTS = HERE / "results" / "quality.jsonl"
PX = 128


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the cubic polynomial kernel (Binkowski et al. 2018,
    arXiv:1801.01401), x1000.
    """
    d = x.shape[1]
    k = [((a @ b.T) / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    m, n = len(x), len(y)
    within = (k[0].sum() - np.trace(k[0])) / (m * (m - 1)) + (k[1].sum() - np.trace(k[1])) / (
        n * (n - 1)
    )
    return float(1000 * (within - 2 * k[2].mean()))


def fid(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500); trace of the root
    by singular values.
    """
    mx, my = x.mean(0), y.mean(0)
    # C = R'R
    a, b = (np.linalg.qr((v - m) / np.sqrt(len(v) - 1), mode="r") for v, m in ((x, mx), (y, my)))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()  # trace((Cx Cy)^1/2)
    return float(((mx - my) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root)


class Protocol:
    """Prompts, galleries and features, made once and shared by all models."""

    def __init__(self, prompts: int, heldout: int):
        import emoji
        import torch
        from features import LiteFeatures

        from sdlite.io import sha256

        self.torch, self.names, self.colours = torch, emoji.NAMES, emoji.COLOURS
        self.data = emoji.load()
        self.features = LiteFeatures()
        rng = np.random.default_rng(0)
        bare = [
            i
            for i in range(len(self.data))
            if "skin tone" not in self.data.captions[i] and not self.data.heldout[i]
        ]
        seen: dict[str, int] = {}
        for i in rng.permutation(bare):
            seen.setdefault(self.data.concepts[i], int(i))
        self.prompts = sorted(seen.values(), key=lambda i: rng.random())[:prompts]
        held = [i for i in range(len(self.data)) if self.data.heldout[i]]
        self.heldout = [int(i) for i in rng.permutation(held)[:heldout]]
        self.background = {
            i: int(rng.integers(len(self.names))) for i in [*self.prompts, *self.heldout]
        }
        self._gallery: dict[int, np.ndarray] = {}
        key = sha256(emoji.SHARD)[:12]
        self.cache = (
            Path(os.environ.get("SDLITE_CACHE", Path.home() / ".cache" / "sdlite"))
            / f"emoji-features-{key}-{PX}px"
        )

    def text(self, i: int) -> str:
        c = self.background[i]
        return (
            self.data.captions[i]
            if c == 0
            else f"{self.data.captions[i]} on a {self.names[c]} background"
        )

    def embed(self, x: Any) -> np.ndarray:
        out = [self.features.embed(x[i : i + 64], PX) for i in range(0, len(x), 64)]
        return self.torch.cat(out).numpy()

    def gallery(self, colour: int) -> np.ndarray:
        """Features of every real emoji on one background, (N, 1280)."""
        if colour not in self._gallery:
            path = self.cache / f"{self.names[colour]}.npy"
            if not path.exists():
                ids = self.torch.arange(len(self.data))
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(
                    path, self.embed(self.data.composite(ids, self.torch.full((len(ids),), colour)))
                )
            self._gallery[colour] = np.load(path)
        return self._gallery[colour]

    def score(self, indices: list[int], images: np.ndarray) -> dict[str, Any]:
        """Metrics of pictures uint8 (N, 64, 64, 3) made from the captions `indices`."""
        x = self.torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        f = self.embed(x)
        identity, exact, copies = [], [], []
        for row, i in zip(f, indices, strict=True):
            g = self.gallery(self.background[i])
            cosine = g @ row / (np.linalg.norm(g, axis=1) * np.linalg.norm(row))
            best = int(cosine.argmax())
            identity.append(self.data.concepts[best] == self.data.concepts[i])
            exact.append(best == i)
            copies.append(float(np.where(self.data.heldout.numpy(), -1, cosine).max()) > 0.99)
        border = np.concatenate(
            [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1
        ).astype(float)
        table = np.array(list(self.colours.values()), float)
        nearest = np.abs(np.median(border, axis=1)[:, None] - table).sum(-1).argmin(1)
        colour = nearest == np.array([self.background[i] for i in indices])
        return {
            "features": f,
            "identity@1": np.mean(identity),
            "exact@1": np.mean(exact),
            "colour": np.mean(colour),
            "memorised": np.mean(copies),
        }

    def real(self, indices: list[int]) -> np.ndarray:
        return np.stack([self.gallery(self.background[i])[i] for i in indices])


def generate(
    pipe: Any,
    protocol: Protocol,
    indices: list[int],
    seed: int,
    steps: int | None,
    guidance: float | None,
    batch: int = 32,
) -> np.ndarray:
    out = []
    for start in range(0, len(indices), batch):
        part = indices[start : start + batch]
        seeds = [seed * 100_000 + i for i in part]
        made = pipe(
            [protocol.text(i) for i in part],
            seed=seeds,
            num_inference_steps=steps,
            guidance_scale=guidance,
        )
        out += [np.asarray(i) for i in made.images]
    return np.stack(out)


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("models", nargs="+", help="embedded names or folders")
    ap.add_argument(
        "--label", action="append", help="row name for each model; default: the model argument"
    )
    ap.add_argument("--precision")
    ap.add_argument("--backend", default="auto")
    ap.add_argument("--steps", type=int, help="default: each model's own")
    ap.add_argument("--guidance", type=float, help="default: each model's own")
    ap.add_argument("--prompts", type=int, default=256)
    ap.add_argument("--heldout", type=int, default=64)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()

    import torch

    import sdlite
    from benchmarks.env import environment

    torch.set_num_threads(args.threads)
    protocol = Protocol(args.prompts, args.heldout)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for k, model in enumerate(args.models):
        pipe = sdlite.Pipeline.from_pretrained(
            model, precision=args.precision, backend=args.backend, threads=args.threads
        )
        seeds: list[dict[str, float]] = []
        begin = time.time()
        for seed in range(args.seeds):
            scored = protocol.score(
                protocol.prompts,
                generate(pipe, protocol, protocol.prompts, seed, args.steps, args.guidance),
            )
            f, r = scored.pop("features"), protocol.real(protocol.prompts)
            held = protocol.score(
                protocol.heldout,
                generate(pipe, protocol, protocol.heldout, seed, args.steps, args.guidance),
            )
            row = {
                **scored,
                "kid": kid(f, r),
                "fid": fid(f, r),
                "heldout@1": held["exact@1"],
                "heldout_identity@1": held["identity@1"],
            }
            seeds.append({n: float(v) for n, v in row.items()})
        mean = {n: float(np.mean([s[n] for s in seeds])) for n in seeds[0]}
        spread = {
            n: float(np.std([s[n] for s in seeds], ddof=1)) if len(seeds) > 1 else 0.0
            for n in seeds[0]
        }
        result = {
            "model": args.label[k] if args.label else model,
            "steps": args.steps or pipe.defaults.num_inference_steps,
            "guidance": pipe.defaults.guidance_scale if args.guidance is None else args.guidance,
            "sampler": pipe.default_sampler,
            "precision": pipe.report.precision,
            "backend": pipe.report.backend,
            "engine": pipe.report.engine,
            "prompts": len(protocol.prompts),
            "heldout": len(protocol.heldout),
            "mean": mean,
            "std": spread,
            "seeds": seeds,
            "seconds": time.time() - begin,
            "command": "python -m benchmarks.quality " + " ".join(sys.argv[1:]),
            **environment(),
        }
        with open(args.out, "a") as out:
            out.write(json.dumps(result) + "\n")
        print(result["model"], json.dumps({n: f"{mean[n]:.4g} +- {spread[n]:.2g}" for n in mean}))


if __name__ == "__main__":
    main()
