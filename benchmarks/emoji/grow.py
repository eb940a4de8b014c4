"""A wider and deeper UNet that computes what a small one does: the way back from `students.build`.

A small network learns more pictures an hour; grown, it is a teacher that starts where the small one
ended (Net2Net, Chen, Goodfellow and Shlens 2016, arXiv:1511.05641). Every channel and attention
head is copied `factor` times inside its norm group and what reads it is divided by `factor`; layers
that the small network lacks start as the identity.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from sdlite.distill.students import StudentSpec, block_names
from sdlite.errors import InputError


@torch.no_grad()
def grow(
    unet: Any,
    config: dict[str, Any],
    *,
    one_layer: bool = False,
    noise: float = 0.05,
    seed: int = 0,
) -> Any:
    """A `UNet2DConditionModel` of `config` that gives `unet`'s output (to rounding) for every
    input.

    Args:
        unet: the small network.
        config: the large network's: the same stages, widths and heads all an equal whole number of
            times the small one's.
        one_layer: the small network has one layer per stage where the large one has two
            (`StudentSpec.one_layer`).
        noise: copies of a weight are split unequally by this share of its spread, so that they can
            learn different things; their sum, and with it the output, stays. 0 leaves them equal,
            and they would then stay equal for ever.

    Raises:
        InputError: the widths are not one whole multiple, or the stages differ.
    """
    small = dict(unet.config)
    wide, narrow = tuple(config["block_out_channels"]), tuple(small["block_out_channels"])
    factors = {a / b for a, b in zip(wide, narrow, strict=False)}
    factor = int(min(factors))
    if (
        len(wide) != len(narrow)
        or factors != {factor}
        or factor < 1
        or config["norm_num_groups"] != small["norm_num_groups"]
    ):
        raise InputError(
            f"cannot grow block_out_channels {narrow} with {small['norm_num_groups']} norm groups"
            f" to {wide} with {config['norm_num_groups']}; every width must be the same whole"
            " multiple, in as many groups."
        )
    large = type(unet)(**{k: v for k, v in config.items() if not k.startswith("_")})
    generator = torch.Generator().manual_seed(seed)
    spread = _Spread(factor, narrow, small["attention_head_dim"], noise, generator)
    names = block_names(StudentSpec(one_layer=one_layer))
    given = {names(k): v for k, v in unet.state_dict().items()}
    state = large.state_dict()
    for name, target in state.items():
        if name in given:
            state[name] = spread(name, given[name], tuple(target.shape))
        elif name.endswith(
            ("conv2.weight", "conv2.bias", "proj_out.weight", "proj_out.bias", "conv_shortcut.bias")
        ):
            state[name] = torch.zeros_like(target)  # a residual branch that is still silent
        elif name.endswith("conv_shortcut.weight"):  # the stream passes, the skip is not heard yet
            state[name] = torch.eye(target.shape[0], target.shape[1]).view(*target.shape[:2], 1, 1)
    large.load_state_dict(state)
    return large


class _Spread:
    """One small parameter to its large one."""

    def __init__(
        self,
        factor: int,
        narrow: tuple[int, ...],
        heads: Any,
        noise: float,
        generator: torch.Generator,
    ):
        heads = (heads,) * len(narrow) if isinstance(heads, int) else tuple(heads)
        self.factor, self.noise, self.generator = factor, noise, generator
        self.head_size = [c // h for c, h in zip(narrow, heads, strict=True)]

    def __call__(self, name: str, w: Tensor, shape: tuple[int, ...]) -> Tensor:
        if w.shape[0] != shape[0]:
            unit = self._head(name) if re.search(r"to_[qkv]\.", name) else 1
            w = self._repeat(w, 0, unit)
        if w.ndim >= 2 and w.shape[1] != shape[1]:
            if name.startswith(
                "time_embedding.linear_1"
            ):  # the frequencies of the narrow embedding are every second one of the wide
                out = torch.zeros(shape)
                out[:, :: self.factor] = w
                return out
            w = self._split(w, self._head(name) if "to_out" in name else 1)
        if tuple(w.shape) != shape:
            raise InputError(
                f"cannot grow {name} from {tuple(w.shape)} to {shape}; the networks differ in more"
                " than width and depth."
            )
        return w

    def _head(self, name: str) -> int:
        last = len(self.head_size) - 1
        m = re.match(r"(down|up)_blocks\.(\d+)", name)
        stage = last if not m else int(m[2]) if m[1] == "down" else last - int(m[2])
        return self.head_size[stage]

    def _repeat(self, w: Tensor, dim: int, unit: int) -> Tensor:
        """Copies beside each other, `unit` entries at a time."""
        parts = w.unflatten(dim, (-1, unit))
        return parts.repeat_interleave(self.factor, dim).flatten(dim, dim + 1)

    def _split(self, w: Tensor, unit: int) -> Tensor:
        """(out, in, ...) -> (out, factor x in, ...), whose copies sum to w along the copies."""
        parts = w.unflatten(1, (-1, unit))
        shape = (*parts.shape[:2], self.factor, *parts.shape[2:])
        jitter = torch.randn(shape, generator=self.generator) * (self.noise * w.std() / self.factor)
        jitter -= jitter.mean(2, keepdim=True)
        return (parts.unsqueeze(2) / self.factor + jitter).flatten(1, 3)
