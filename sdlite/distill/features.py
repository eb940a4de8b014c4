"""Feature taps: named block outputs, recorded while the block `with Taps(...)` lasts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdlite.errors import InputError
from sdlite.families import unet_arguments
from sdlite.families.sdxl import TIME_IDS
from sdlite.spec import latent_size

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch.utils.hooks import RemovableHandle


def block_taps(unet: UNet2DConditionModel) -> dict[str, str]:
    """tap name -> module name: the outputs of every down, middle and up block, counted from the
    outside so that students match.
    """
    down, up = len(unet.down_blocks), len(unet.up_blocks)
    taps = {f"down{i}": f"down_blocks.{i}" for i in range(down)}
    if unet.mid_block is not None:
        taps["mid"] = "mid_block"
    return taps | {f"up{up - 1 - i}": f"up_blocks.{i}" for i in range(up)}


def matched_taps(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel
) -> tuple[dict[str, str], dict[str, str]]:
    """The taps that both have, student's and teacher's modules. Where the student's down block is
    its last, and so does not halve the image as the teacher's does (bk-tiny: the inner stage is
    gone), both are tapped before the halving, as BK-SDM does (Kim et al. 2023, arXiv:2305.15798;
    `down_blocks.2.attentions` in its training script).
    """
    mine, theirs = block_taps(student), block_taps(teacher)
    both = [k for k in mine if k in theirs]
    for i, (a, b) in enumerate(zip(student.down_blocks, teacher.down_blocks, strict=False)):
        if (a.downsamplers is None) != (b.downsamplers is None):
            for taps, block in ((mine, a), (theirs, b)):
                kind = "attentions" if getattr(block, "attentions", None) else "resnets"
                taps[f"down{i}"] += f".{kind}.{len(getattr(block, kind)) - 1}"
    return {k: mine[k] for k in both}, {k: theirs[k] for k in both}


@torch.no_grad()
def probe(unet: UNet2DConditionModel) -> None:
    """One forward of zeros at the network's own size, where it is: for what hooks want to see."""
    c, device = unet.config, next(unet.parameters()).device
    unet(
        torch.zeros(1, c.in_channels, *latent_size(c), device=device),
        0,
        **unet_arguments(blank(unet, 2)),
    )


def blank(unet: UNet2DConditionModel, tokens: int) -> dict[str, Tensor]:
    """Zeros for what a UNet is given besides latents and timestep, one row, where it is."""
    c, device = unet.config, next(unet.parameters()).device
    out = {"encoder_hidden_states": torch.zeros(1, tokens, c.cross_attention_dim, device=device)}
    if c.addition_embed_type == "text_time":
        width = unet.add_embedding.linear_1.in_features - TIME_IDS * c.addition_time_embed_dim
        out |= {"text_embeds": torch.zeros(1, width, device=device)}
        out |= {"time_ids": torch.zeros(1, TIME_IDS, device=device)}
    return out


@torch.no_grad()
def tap_channels(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    mine: dict[str, str],
    theirs: dict[str, str],
) -> dict[str, tuple[int, int]]:
    """tap -> (student channels, teacher channels), found by one forward of each."""
    shapes = []
    for network, taps in ((student, mine), (teacher, theirs)):
        with Taps(network, taps) as tapped:
            probe(network)
        shapes.append({k: f.shape for k, f in tapped.features.items()})
    if bad := [k for k in mine if shapes[0][k][2:] != shapes[1][k][2:]]:
        raise InputError(
            f"feature taps {bad} have different resolutions in student and teacher; choose other"
            " taps."
        )
    return {k: (shapes[0][k][1], shapes[1][k][1]) for k in mine}


class _Keep:
    """Forward hook that keeps a module's output. An object, not a closure: a deep copy of the
    network keeps features of its own.
    """

    def __init__(self, features: dict[str, Tensor], tap: str):
        self.features, self.tap = features, tap

    def __call__(
        self, module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]
    ) -> None:
        self.features[self.tap] = output[0] if isinstance(output, tuple) else output


class Taps:
    """Hooks on `modules` (tap name -> module name) of a network; `features` holds the last
    forward's outputs, (B, C, h, w) each.

    They last as long as the block `with Taps(...)`, or, after `attach`, as this object. A network
    that is to be compiled needs `attach` before its first forward: hooks that come and go would
    make every step compile again.
    """

    def __init__(self, network: nn.Module, modules: dict[str, str]):
        self._handles: list[RemovableHandle] = []
        known = dict(network.named_modules())
        if missing := [m for m in modules.values() if m not in known]:
            raise InputError(f"no module {missing} to tap; taps must name modules of the network.")
        self.modules = {tap: known[name] for tap, name in modules.items()}
        self.features: dict[str, Tensor] = {}

    def attach(self) -> Taps:
        self._handles += [
            module.register_forward_hook(_Keep(self.features, tap))
            for tap, module in self.modules.items()
        ]
        return self

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    __enter__ = attach

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __del__(self) -> None:
        self.detach()
