"""Few-step models and LoRAs by the names that they are shared under -> what their model cards call
them with. Their tensors do not tell them from what they were made of.

Sources: the cards of latent-consistency/lcm-lora-*, ByteDance/Hyper-SD, h1t/TCD-*-LoRA,
ByteDance/SDXL-Lightning; the folders of stabilityai/sdxl-turbo and stabilityai/sd-turbo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Config = dict[str, Any]  # content of a config.json


@dataclass(frozen=True)
class FewStep:
    """How a model is called.

    Attributes:
        sampler: {name, num_inference_steps, guidance_scale}; guidance 1 is none.
        scheduler: keys of scheduler_config.json that differ from the base model's.
        unet: keys of the UNet's config.json that do.
    """

    sampler: Config
    scheduler: Config = field(default_factory=dict)
    unet: Config = field(default_factory=dict)

    @property
    def words(self) -> str:
        """For a note."""
        steps = self.sampler["num_inference_steps"]
        return (
            f"sampler {self.sampler['name']}, {steps} step{'s' if steps > 1 else ''}, no guidance"
        )


Rows = Sequence[tuple[str, FewStep]]


def _row(name: str, steps: int) -> Config:
    return {"name": name, "num_inference_steps": steps, "guidance_scale": 1.0}


_TRAILING: Config = {"timestep_spacing": "trailing"}
_EULER: Config = {"_class_name": "EulerDiscreteScheduler", **_TRAILING}
_ANCESTRAL: Config = {"_class_name": "EulerAncestralDiscreteScheduler", **_TRAILING}
_SIZE_512: Config = {"sample_size": 64}
_SD_TURBO: Config = {**_EULER, "prediction_type": "epsilon"}
_SD_TURBO_UNET: Config = {**_SIZE_512, "upcast_attention": None}
LIGHTNING: Rows = [
    (rf"sdxl[-_]?lightning.*[-_]{n}[-_]?steps?", FewStep(_row("euler", n), _EULER))
    for n in (2, 4, 8)
]
LORAS: Rows = [
    (r"lcm[-_]?lora", FewStep(_row("lcm", 4))),
    (r"tcd", FewStep(_row("tcd", 4))),
    *(
        (rf"hyper-?sd.*{n}[-_]?step{'' if n == 1 else 's'}", FewStep(_row("tcd", n)))
        for n in (1, 2, 4, 8)
    ),
    *LIGHTNING,
]
FILES: dict[str, Rows] = {  # by the version of `layouts.Layout`
    "xl": [
        (r"sd[-_]?xl[-_]?turbo", FewStep(_row("euler-ancestral", 1), _ANCESTRAL, _SIZE_512)),
        *LIGHTNING,
    ],
    "2": [(r"sd[-_]?turbo", FewStep(_row("euler", 1), _SD_TURBO, _SD_TURBO_UNET))],
    "1": [],
}


def by_name(path: Path, rows: Rows) -> FewStep | None:
    """What a file's name, or its folder's, says that it is made for; None where they say
    nothing.
    """
    for name in (path.name.lower(), path.parent.name.lower()):
        if found := next((f for pattern, f in rows if re.search(pattern, name)), None):
            return found
    return None
