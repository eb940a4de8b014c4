"""What people have -> a diffusers folder that `sdlite.convert` reads: one file in the original key
layout, LoRAs, textual inversions, pickles.

    source  folder | model.safetensors | model.ckpt (from_pickle)     [vae= where it holds none]
    extras  lora=["style.safetensors:0.8"]  embedding=["word.safetensors"]

`sources.prepared` does all of it; nothing is fetched, and no pickle is read unless it is asked for.
"""

from __future__ import annotations

from pathlib import Path

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
ENDINGS = (".safetensors", *PICKLED)


def is_file(source: object) -> bool:
    """Whether a source is meant as one file of weights: its name ends as one's, and it is no
    folder.
    """
    path = Path(str(source))
    return path.suffix.lower() in ENDINGS and not path.is_dir()
