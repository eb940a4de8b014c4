"""The shape of a UNet in the original layout: its blocks, widths and depths, from the names and
shapes of its tensors. Compressed students differ in these from the model that they came from.

    input_blocks.0             first convolution
    input_blocks.N.0, .1       a residual layer, and its transformer where it has one
    input_blocks.N.0.op        halves the size: a block ends
    middle_block.0, .1, .2     residual, transformer, residual; the first alone (SSD-1B, Vega), none
    output_blocks.N.0, .1      as input_blocks, a layer more for each block
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape
PREFIX = "model.diffusion_model."
_NO_ATTENTION = 1  # what a block without transformers has for its depth in published configs


class UnknownShapeError(Exception):
    """A UNet that no configuration of diffusers describes. The text ends a sentence."""


def unet_shape(shapes: Shapes) -> dict[str, Any]:
    """Keys of a `UNet2DConditionModel`'s config.json.

    Raises:
        KeyError: a tensor is not there; its name.
        UnknownShapeError: layers that a UNet of diffusers cannot have.
    """
    widths, down = _inputs(shapes)
    layers = len(down[0])
    if any(len(block) != layers for block in down):
        raise UnknownShapeError(
            f"its blocks have {[len(b) for b in down]} layers, not all the same"
        )
    up = _outputs(shapes, len(down), layers + 1)
    cross = _first(shapes, "attn2.to_k.weight")
    return {
        "block_out_channels": widths,
        "cross_attention_dim": shapes[cross][1],
        "down_block_types": [f"{_kind(b)}DownBlock2D" for b in down],
        "in_channels": shapes[f"{PREFIX}input_blocks.0.0.weight"][1],
        "layers_per_block": layers,
        "out_channels": shapes[f"{PREFIX}out.2.weight"][0],
        "up_block_types": [f"{_kind(b)}UpBlock2D" for b in up],
        **_middle(shapes, down),
        **_depths(down, up),
        "use_linear_projection": len(shapes[_first(shapes, "proj_in.weight")]) == 2,
    }


def _inputs(shapes: Shapes) -> tuple[list[int], list[list[int]]]:
    """Of each block its width, and its layers' depths: transformers in a row, 0 for none."""
    widths: list[int] = []
    blocks: list[list[int]] = []
    ended = True
    for i in range(1, _count(shapes, "input_blocks")):
        if f"{PREFIX}input_blocks.{i}.0.op.weight" in shapes:
            ended = True
            continue
        width = shapes[f"{PREFIX}input_blocks.{i}.0.out_layers.3.weight"][0]
        if ended:
            widths.append(width)
            blocks.append([])
        ended = False
        blocks[-1].append(_depth(shapes, f"{PREFIX}input_blocks.{i}.1"))
    if not blocks:
        raise KeyError(f"{PREFIX}input_blocks.1.0.out_layers.3.weight")
    return widths, blocks


def _outputs(shapes: Shapes, blocks: int, layers: int) -> list[list[int]]:
    depths = []
    for i in range(blocks * layers):
        _ = shapes[f"{PREFIX}output_blocks.{i}.0.out_layers.3.weight"]
        depths.append(_depth(shapes, f"{PREFIX}output_blocks.{i}.1"))
    return [depths[i * layers : (i + 1) * layers] for i in range(blocks)]


def _middle(shapes: Shapes, down: list[list[int]]) -> dict[str, Any]:
    if not any(k.startswith(f"{PREFIX}middle_block.") for k in shapes):
        return {"mid_block_type": None}
    depth = _depth(shapes, f"{PREFIX}middle_block.1")
    if depth == 0:
        return {"mid_block_type": "UNetMidBlock2D"}
    last = _even(down[-1])
    if depth != last:  # diffusers takes the last block's depth for it
        raise UnknownShapeError(f"its middle block is {depth} transformers deep, the last {last}")
    return {"mid_block_type": "UNetMidBlock2DCrossAttn"}


def _depths(down: list[list[int]], up: list[list[int]]) -> dict[str, Any]:
    """`transformer_layers_per_block` as published configs have it: nothing where all are 1, one
    number for each block, or for each layer, with the way up on its own (SSD-1B).
    """
    deep = [_even(b) for b in down]
    back = [_even(b) for b in up]
    mirrored = all(isinstance(d, int) for d in (*deep, *back)) and back == deep[::-1]
    if mirrored:
        return {} if set(deep) == {1} else {"transformer_layers_per_block": deep}
    rows = [d if isinstance(d, int) else [*d] for d in deep]
    return {"transformer_layers_per_block": rows, "reverse_transformer_layers_per_block": back}


def _even(layers: list[int]) -> int | list[int]:
    """One number where all layers have it."""
    if len(set(layers)) == 1:
        return layers[0] or _NO_ATTENTION
    if 0 in layers:
        raise UnknownShapeError(
            f"a block has layers with and without transformers ({layers}), so some may be missing"
        )
    return layers


def _kind(layers: list[int]) -> str:
    return "CrossAttn" if any(layers) else ""


def _depth(shapes: Shapes, place: str) -> int:
    """Transformers at a place; they are numbered from 0."""
    found = _numbers(shapes, f"{place}.transformer_blocks.")
    for i in range(len(found)):
        _ = shapes[f"{place}.transformer_blocks.{i}.attn1.to_q.weight"]
    return len(found)


def _count(shapes: Shapes, blocks: str) -> int:
    """One more than the highest number of a block."""
    return max(_numbers(shapes, f"{PREFIX}{blocks}."), default=-1) + 1


def _numbers(shapes: Iterable[str], before: str) -> set[int]:
    pattern = re.compile(re.escape(before) + r"(\d+)\.")
    return {int(m[1]) for k in shapes if (m := pattern.match(k))}


def _first(shapes: Shapes, ending: str) -> str:
    """The UNet's first tensor whose name ends so.

    Raises:
        KeyError: there is none.
    """
    found = (k for k in shapes if k.startswith(PREFIX) and k.endswith(f".{ending}"))
    name = min(found, default="")
    if not name:
        raise KeyError(f"{PREFIX}input_blocks.1.1.transformer_blocks.0.{ending}")
    return name
