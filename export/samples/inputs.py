"""inputs.bin of ncnn.cpp and tensorrt.cpp: `python inputs.py DIR PROMPT inputs.bin [SEED [STEPS]]`.
Needs sdlite's core alone.

DIR is the exported folder: its tokenizer, its scheduler, and sampler defaults from student.json.
Layout, little-endian: int32 length, channels, height, width, steps; float32 guidance,
scaling_factor; int32 ids of the prompt and of the empty one; float32 latents; float32 timesteps;
float32 sqrt(alpha-bar) and sqrt(1 - alpha-bar) of each step; the same two of where each step goes.
Each of the five: (steps,).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from sdlite.sampling import Noise, Schedule, guided
from sdlite.sampling.solvers import DDIM
from sdlite.spec import latent_size
from sdlite.tokenizer import ClipTokenizer


def inputs(folder: Path, prompt: str, seed: int = 0, steps: int | None = None) -> bytes:
    """The bytes of inputs.bin.

    Raises:
        ValueError: another sampler than DDIM, another prediction than v, or a VAE that shifts
            latents: picture.h has none of it.
    """
    config, unet, vae = (
        json.loads((folder / f).read_text())
        for f in ("scheduler/scheduler_config.json", "unet/config.json", "vae/config.json")
    )
    given = {
        "prediction_type": config["prediction_type"],
        "shift_factor": vae.get("shift_factor") or 0,
    }
    if given != {"prediction_type": "v_prediction", "shift_factor": 0}:
        raise ValueError(
            f"{given}: picture.h is for v_prediction without shift; change its ddim()."
        )
    defaults = json.loads((folder / "student.json").read_text())["sampler"]
    if defaults["name"] != "ddim":
        raise ValueError(
            f"the model's sampler is {defaults['name']!r}, and picture.h has ddim alone; export it"
            " with --sampler ddim."
        )
    guided(defaults["guidance_scale"])  # says what is out of range
    schedule, n = Schedule.from_config(config), steps or defaults["num_inference_steps"]
    solver = DDIM(schedule, n)
    times, bar, stride = solver.timesteps, solver.alpha_bar, schedule.num_train_timesteps // n
    here = np.array([bar[int(t)] for t in times])
    to = np.array([bar[int(t) - stride] if t >= stride else solver.final for t in times])
    text_encoder = json.loads((folder / "text_encoder/config.json").read_text())
    ids = ClipTokenizer.from_pretrained(folder / "tokenizer", text_encoder)([prompt, ""])
    shape = (unet["in_channels"], *latent_size(unet))
    parts = [
        np.array([ids.shape[1], *shape, n], "<i4"),
        np.array([defaults["guidance_scale"], vae["scaling_factor"]], "<f4"),
        ids.astype("<i4"),
        Noise(seed).normal(shape).astype("<f4"),
        *(
            a.astype("<f4")
            for a in (times, np.sqrt(here), np.sqrt(1 - here), np.sqrt(to), np.sqrt(1 - to))
        ),
    ]
    return b"".join(p.tobytes() for p in parts)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: inputs.py DIR PROMPT inputs.bin [SEED [STEPS]]")
    folder, prompt, out, *rest = sys.argv[1:]
    Path(out).write_bytes(inputs(Path(folder), prompt, *map(int, rest)))
