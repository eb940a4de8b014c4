"""Smaller UNets out of a teacher: blocks removed, channels sliced, weights kept.

`StudentSpec` is the one table of what a student is; surgery, feature taps, checkpoints and tests
read it. There are two steps, each usable alone: `remove_blocks` (BK-SDM, arXiv:2305.15798: down
stages keep their first layer, up stages their first and last; transformers keep their first blocks)
and `slice_width` (equal count inside every norm group, whole attention heads, concatenated inputs
followed). What a UNet is told besides timestep and text is kept with both: the guidance embedding
of LCM, class labels, and SDXL's pooled text and sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from sdlite.errors import InputError
from sdlite.settings import At, check, settings

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel as UNet

Config = dict[str, Any]  # of a diffusers network
_Depth = Annotated[int, At(0, 256)]
ByStage = tuple[_Depth | tuple[_Depth, ...], ...]  # for each stage, or for each attention in it

# What `slice_width` can follow through a UNet: key of its config -> values; None is no such part.
SLICED: dict[str, tuple[object, ...]] = {
    "time_embedding_type": ("positional",),
    "class_embed_type": (None, "timestep", "projection", "simple_projection"),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "attention_type": ("default",),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
}
_EMBEDDINGS = ("time_embedding.", "class_embedding.", "add_embedding.")
_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


@settings
@dataclass(frozen=True)
class StudentSpec:
    """What is taken away from a teacher.

    `one_layer`: one resnet (and attention) per down stage, two per up stage. `drop_mid`: no middle
        block. `drop_inner`: the innermost stage goes too. `width`: share of channels and attention
        heads that stays. `weights`: "teacher" keeps what stays of its weights, "random" starts anew
        in that shape. `score`: which channels stay: "l1", those with the largest weights, or
        "taylor", those that the loss would miss most (Diff-Pruning, arXiv:2305.10924), which needs
        gradients. `drop_mid_attention`: the middle block is its first resnet alone.
        `transformer_layers_per_block`, `reverse_transformer_layers_per_block`: how many transformer
        blocks each attention keeps, its first ones; diffusers' keys, for the student's down stages
        from the outside and its up stages from the inside. A stage has one number, or one for each
        of its attentions, and then the second is needed too; without it the up stages mirror the
        down stages. Numbers of stages without attention mean nothing.
    """

    one_layer: bool = False
    drop_mid: bool = False
    drop_inner: bool = False
    width: Annotated[float, At(0.01, 1)] = 1.0
    weights: Literal["teacher", "random"] = "teacher"
    score: Literal["l1", "taylor"] = "l1"
    # not in the repr: earlier versions have none of them, and kept a run's recipe as its hash
    drop_mid_attention: bool = field(default=False, repr=False)
    transformer_layers_per_block: ByStage | None = field(default=None, repr=False)
    reverse_transformer_layers_per_block: ByStage | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check(self)


PRESETS: dict[str, StudentSpec] = {
    "bk-base": StudentSpec(one_layer=True),
    "bk-small": StudentSpec(one_layer=True, drop_mid=True),
    "bk-tiny": StudentSpec(one_layer=True, drop_mid=True, drop_inner=True),
    "w0.62": StudentSpec(width=0.625),  # 340M from SD-1.4
    "extreme-120m": StudentSpec(one_layer=True, drop_mid=True, width=0.5),  # 123M from SD-1.4
    "half": StudentSpec(
        one_layer=True, width=0.5
    ),  # the emoji student: BK-Base's blocks at half width
    # Students of SDXL, with the shapes and so the parameters of the published UNets: SSD-1B and
    # Segmind-Vega (arXiv:2401.02677), KOALA (arXiv:2312.04005). The shapes are those that ComfyUI
    # knows the checkpoints by (comfy/model_detection.py).
    "ssd-1b": StudentSpec(
        drop_mid_attention=True,
        transformer_layers_per_block=(1, 2, 4),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
    ),
    "vega": StudentSpec(drop_mid_attention=True, transformer_layers_per_block=(1, 1, 2)),
    "koala-1b": StudentSpec(one_layer=True, transformer_layers_per_block=(1, 2, 6)),
    "koala-700m": StudentSpec(
        one_layer=True, drop_mid=True, transformer_layers_per_block=(1, 2, 5)
    ),
}


def build(teacher: UNet, spec: StudentSpec, gradients: dict[str, Tensor] | None = None) -> UNet:
    """A student UNet2DConditionModel with the teacher's weights (or `spec.weights`); the teacher is
    not changed. `StudentSpec()` gives an equal copy.

    Args:
        gradients: of the teacher's loss by parameter name (`tasks.teacher_gradients`), for
            `spec.score` "taylor".

    Raises:
        InputError: the spec does not fit the teacher, or a Taylor score has no gradients.
    """
    if spec.score == "taylor" and spec.width != 1 and gradients is None:
        raise InputError(
            "score='taylor' needs the teacher's gradients; make them with"
            " sdlite.distill.tasks.student.teacher_gradients, or use score='l1'."
        )
    source = block_names(spec)
    fewer = remove_blocks(teacher, spec)
    of_student = (
        {k: gradients[source(k)] for k, _ in fewer.named_parameters()}
        if gradients and spec.score == "taylor"
        else None
    )
    student = slice_width(fewer, spec.width, of_student)
    return student if spec.weights == "teacher" else _from_config(student, dict(student.config))


# --- blocks


def remove_blocks(teacher: UNet, spec: StudentSpec) -> UNet:
    """Block removal with by-name copies: `up_blocks.i.*.1 <- .2`, and with `drop_inner` the up
    stages shift by one.

    Raises:
        InputError: the teacher does not have what would stay.
    """
    student = _from_config(teacher, _fewer_blocks(dict(teacher.config), spec))
    _all_there(student, teacher, spec)
    weights = teacher.state_dict()
    source = block_names(spec)
    student.load_state_dict({k: weights[source(k)] for k in student.state_dict()})
    return student


def shape(like: UNet, spec: StudentSpec) -> UNet:
    """A student of the teacher's class on the meta device: its size and its work, without memory or
    weights.

    Raises:
        InputError: as `build`.
    """
    with torch.device("meta"):
        config = _thinner(_fewer_blocks(dict(like.config), spec), spec.width)
        student = type(like)(**{k: v for k, v in config.items() if not k.startswith("_")})
    _all_there(student, like, spec)
    return student


def _all_there(student: UNet, teacher: UNet, spec: StudentSpec) -> None:
    source, known = block_names(spec), {k for k, _ in teacher.named_parameters()}
    lacking = [n for k, _ in student.named_parameters() if (n := source(k)) not in known]
    if lacking:
        raise InputError(
            f"this student would keep {lacking[0]}, which its teacher does not have"
            f" ({len(lacking)} such parameters); ask for fewer blocks, or take another teacher."
        )


def _fewer_blocks(config: Config, spec: StudentSpec) -> Config:
    layers = config["layers_per_block"]
    if spec.one_layer:
        if layers != 2:
            raise InputError(
                "one_layer removes the second of two layers; this teacher has"
                f" layers_per_block={layers}."
            )
        config["layers_per_block"] = 1
    if spec.drop_mid and spec.drop_mid_attention:
        raise InputError(
            "drop_mid removes the middle block that drop_mid_attention thins; say one of them."
        )
    if spec.drop_mid:
        config["mid_block_type"] = None
    if spec.drop_mid_attention:
        config["mid_block_type"] = "UNetMidBlock2D"
    if spec.drop_inner:
        _without_innermost(config, spec)
    return config | _transformers(config, spec)


def _without_innermost(config: Config, spec: StudentSpec) -> None:
    """In place."""
    channels = tuple(config["block_out_channels"])
    if len(channels) < 2 or not spec.drop_mid:
        raise InputError(
            "drop_inner needs at least two stages and drop_mid: the middle block belongs to the"
            " innermost stage."
        )
    if channels[-1] != channels[-2]:
        raise InputError(
            f"drop_inner needs two innermost stages of one width, not {list(channels[-2:])}; leave"
            " it out."
        )
    config["block_out_channels"] = channels[:-1]
    config["down_block_types"] = tuple(config["down_block_types"][:-1])
    config["up_block_types"] = tuple(config["up_block_types"][1:])
    heads = config["attention_head_dim"]
    if isinstance(heads, (tuple, list)):
        config["attention_head_dim"] = tuple(heads[:-1])


def _transformers(config: Config, spec: StudentSpec) -> Config:
    """The keys that say how many transformer blocks each attention has; `config` has the student's
    stages already, and still the teacher's transformers.
    """
    down, up = spec.transformer_layers_per_block, spec.reverse_transformer_layers_per_block
    if down is None and up is None:
        down, up = (config.get(k) for k in _TRANSFORMERS)
        stages = len(config["block_out_channels"])
        down = _of_kept(down, slice(0, stages), (0,), spec)
        up = _of_kept(up, slice(-stages, None), (0, 2), spec)
        return {k: v for k, v in zip(_TRANSFORMERS, (down, up), strict=True) if k in config}
    if down is None or (up is None and not all(isinstance(d, int) for d in down)):
        raise InputError(
            f"{_TRANSFORMERS[0]}={_listed(down)}, {_TRANSFORMERS[1]}={_listed(up)}; accepted: both,"
            " or the first alone with one number for each stage."
        )
    layers = config["layers_per_block"]
    for key, given, more in zip(_TRANSFORMERS, (down, up), (0, 1), strict=True):
        if given is not None:
            _fits(key, given, config["block_out_channels"], layers, more)
    return dict(zip(_TRANSFORMERS, (down, up), strict=True))


_TRANSFORMERS = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")


def _of_kept(depths: Any, stages: slice, layers: tuple[int, ...], spec: StudentSpec) -> Any:
    """A teacher's numbers of transformer blocks for those stages, and with `one_layer` those
    attentions, that stay; one number stands for all.
    """
    if not isinstance(depths, (tuple, list)):
        return depths
    return tuple(
        tuple(d[i] for i in layers) if spec.one_layer and isinstance(d, (tuple, list)) else d
        for d in depths[stages]
    )


def _fits(key: str, given: ByStage, channels: tuple[int, ...], layers: Any, more: int) -> None:
    """Whether there is a number for each of the student's stages, or for each attention in them."""
    by_stage = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    by_stage = by_stage[::-1] if more else by_stage
    counts = [n + more for n in by_stage]
    if len(given) != len(counts) or any(
        isinstance(d, tuple) and len(d) != n for d, n in zip(given, counts, strict=False)
    ):
        raise InputError(
            f"{key}={_listed(given)} does not fit; accepted: a list of {len(counts)} stages, each"
            f" one number or a list of as many as it has layers, here {counts}."
        )


def _listed(given: object) -> str:
    """As TOML has it."""
    return "not given" if given is None else json.dumps(given)


def block_names(spec: StudentSpec) -> Callable[[str], str]:
    """student parameter name -> teacher parameter name."""

    def rename(name: str) -> str:
        if m := re.match(r"up_blocks\.(\d+)\.(.*)", name):
            stage, rest = int(m[1]) + int(spec.drop_inner), m[2]
            if spec.one_layer:
                rest = re.sub(r"^(resnets|attentions)\.1\.", r"\1.2.", rest)
            return f"up_blocks.{stage}.{rest}"
        return name

    return rename


def _from_config(like: UNet, config: Config) -> UNet:
    settings = {k: v for k, v in config.items() if not k.startswith("_")}
    student = type(like)(**settings)
    one = next(like.parameters())
    for p in student.parameters():
        p.data = p.data.to(device=one.device, dtype=one.dtype)
    return student


# --- width


def slice_width(unet: UNet, width: float, gradients: dict[str, Tensor] | None = None) -> UNet:
    """Keep a share of every residual stream's channels, of the attention heads and of the
    feed-forward units.

    One index set per stage, by the L1 norm of the weights that produce a channel (with `gradients`,
    by |weight x gradient|): the same count in every norm group where that divides, else whole norm
    groups (the student then has fewer of them).

    Raises:
        InputError: a stage's channels, heads or norm groups do not divide at this width, or the
            UNet has parts of another kind than `SLICED`.
    """
    config = dict(unet.config)
    student = _from_config(unet, _thinner(config, width))
    if width == 1:
        student.load_state_dict(unet.state_dict())
        return student
    channels, heads, groups = _streams(config)
    plan = _Plan(unet, channels, heads, groups, width, gradients)
    with torch.no_grad():
        source = unet.state_dict()
        student.load_state_dict(
            {k: plan.take(k, source[k], tuple(v.shape)) for k, v in student.state_dict().items()}
        )
    return student


def _streams(config: Config) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Channels and heads of each stage, and the number of norm groups."""
    channels, heads = tuple(config["block_out_channels"]), config["attention_head_dim"]
    return (
        channels,
        (heads,) * len(channels) if isinstance(heads, int) else tuple(heads),
        config["norm_num_groups"],
    )


def _thinner(config: Config, width: float) -> Config:
    if width == 1:
        return config
    config = dict(config)
    _sliceable(config, width)
    channels, heads, groups = _streams(config)
    whole_groups = any((c / groups * width) % 1 for c in channels)
    for c, h in zip(channels, heads, strict=True):
        if (whole_groups and (groups * width) % 1) or (h * width) % 1:
            raise InputError(
                f"width={width}: {c} channels in {groups} norm groups and {h} heads do not divide;"
                " choose a width that keeps them whole."
            )
    if whole_groups:
        config["norm_num_groups"] = int(groups * width)
    config["block_out_channels"] = tuple(int(c * width) for c in channels)
    config["attention_head_dim"] = tuple(int(h * width) for h in heads)
    if config.get("time_embedding_dim") is not None:
        config["time_embedding_dim"] = round(config["time_embedding_dim"] * width)
    return config


def _sliceable(config: Config, width: float) -> None:
    """Refuse a UNet with a part that `_Plan` has no rule for."""
    said = {k: config.get(k, accepted[0]) for k, accepted in SLICED.items()}
    other = next((k for k, v in said.items() if v not in SLICED[k]), None)
    if other is not None:
        known = ", ".join(repr(v) for v in SLICED[other])
        raise InputError(
            f"width={width} cannot slice a UNet with {other}={said[other]!r}; accepted: {known}."
            " Say width = 1 and remove blocks instead."
        )
    blocks = (*config["down_block_types"], *config["up_block_types"])
    if unknown := [b for b in blocks if b not in _BLOCKS]:
        raise InputError(
            f"width={width} cannot slice a UNet with blocks {unknown[0]}; accepted:"
            f" {', '.join(_BLOCKS)}. Say width = 1 and remove blocks instead."
        )


class _Plan:
    """Which indices of each parameter's input and output dimension stay."""

    def __init__(
        self,
        unet: UNet,
        channels: tuple[int, ...],
        heads: tuple[int, ...],
        groups: int,
        width: float,
        gradients: dict[str, Tensor] | None = None,
    ):
        self.gradients = gradients
        self.channels, self.heads, self.width = channels, heads, width
        self.layers = unet.config.layers_per_block
        self.class_embed_type = unet.config.class_embed_type
        self.state = unet.state_dict()
        self.time_embed = self.state["time_embedding.linear_1.weight"].shape[0]
        self.stream = [self._best(self._stream_score(s, c), groups) for s, c in enumerate(channels)]

    def _best(self, score: Tensor, groups: int) -> Tensor:
        per_group = score.view(groups, -1)
        if (per_group.shape[1] * self.width) % 1:  # whole groups
            kept = per_group.sum(1).topk(round(groups * self.width)).indices.sort().values
            return (
                kept[:, None] * per_group.shape[1]
                + torch.arange(per_group.shape[1], device=score.device)
            ).flatten()
        k = round(per_group.shape[1] * self.width)
        top = per_group.topk(k, dim=1).indices.sort(dim=1).values
        return (
            top + torch.arange(groups, device=score.device)[:, None] * per_group.shape[1]
        ).flatten()

    def _stream_score(self, stage: int, channels: int) -> Tensor:
        """L1 norm of every weight row that writes into the stage's residual stream, each weight
        times its gradient if there are any.
        """
        score = torch.zeros(channels)
        for name, w in self.state.items():
            if (
                w.ndim >= 2
                and w.shape[0] == channels
                and self._stage(name) == stage
                and re.search(r"conv2|conv_shortcut|proj_out|conv_in|samplers", name)
            ):
                if self.gradients is not None:
                    w = w * self.gradients[name].to(w)
                score += w.flatten(1).abs().sum(1).float().cpu()
        return score

    def _stage(self, name: str) -> int:
        last = len(self.channels) - 1
        if m := re.match(r"down_blocks\.(\d+)", name):
            return int(m[1])
        if m := re.match(r"up_blocks\.(\d+)", name):
            return last - int(m[1])
        return last if name.startswith("mid_block") else 0

    def take(self, name: str, w: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(w.shape) == shape:
            return w
        if name.startswith(_EMBEDDINGS):
            out = self._embedding(name, w)
        else:
            rows = self._rows(name, w)
            out = w if rows is None else w[rows.to(w.device)]
            out = self._columns(name, out) if out.ndim >= 2 else out
        assert tuple(out.shape) == shape, (name, tuple(w.shape), tuple(out.shape), shape)
        return out.contiguous()

    def _some(self, n: int) -> Tensor:
        """Evenly spaced indices, for dimensions with no stream of their own."""
        return torch.arange(round(n * self.width)) * n // round(n * self.width)

    def _of_heads(self, stage: int) -> Tensor:
        size = self.channels[stage] // self.heads[stage]
        return torch.arange(round(self.heads[stage] * self.width) * size)

    def _rows(self, name: str, w: Tensor) -> Tensor | None:
        stage = self._stage(name)
        if name.startswith("conv_out"):
            return None
        if re.search(r"to_[qkv]\.", name):
            return self._of_heads(stage)
        if "ff.net.0" in name:  # GEGLU: values, then gates
            half = self._some(w.shape[0] // 2)
            return torch.cat([half, half + w.shape[0] // 2])
        if name.startswith("conv_norm_out") or re.search(r"norm1\.(weight|bias)$", name):
            return self._inputs(name, w.shape[0])
        if "attentions" in name and re.search(r"\.norm\.(weight|bias)$", name):
            return self.stream[stage]
        return self.stream[stage]

    def _inputs(self, name: str, n: int) -> Tensor:
        """Kept channels of what flows into a resnet's first norm, first convolution and
        shortcut.
        """
        stage, last = self._stage(name), len(self.channels) - 1
        m = re.match(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", name)
        if m is None or "transformer_blocks" in name:
            return self.stream[stage]
        if m[1] == "down":
            return self.stream[max(stage - 1, 0)] if m[3] == "0" else self.stream[stage]
        hidden = min(stage + 1, last) if m[3] == "0" else stage
        skip = max(stage - 1, 0) if int(m[3]) == self.layers else stage
        return torch.cat([self.stream[hidden], self.stream[skip] + self.channels[hidden]])

    def _columns(self, name: str, w: Tensor) -> Tensor:
        stage, n = self._stage(name), w.shape[1]
        if name == "conv_in.weight":
            return w
        if "time_emb_proj" in name:  # with `class_embeddings_concat` the class comes after the time
            parts = range(0, n, self.time_embed)
            return w[:, torch.cat([self._some(self.time_embed) + k for k in parts])]
        if "attn2.to_k" in name or "attn2.to_v" in name:
            return w  # text width
        if "to_out" in name:
            return w[:, self._of_heads(stage)]
        if "ff.net.2" in name:
            return w[:, self._some(n)]
        if re.search(r"resnets\.\d+\.(conv1|conv_shortcut)\.", name):
            return w[:, self._inputs(name, n)]
        return w[:, self.stream[stage]]

    def _embedding(self, name: str, w: Tensor) -> Tensor:
        """The embeddings that are added to that of the timestep have its channels, evenly spaced;
        what they read (pooled text and sizes, class labels, the guidance) keeps its width.
        """
        some = self._some(self.time_embed)
        if name == "time_embedding.cond_proj.weight":  # is added to the sinusoids
            return self._sinusoid_rows(w)
        if name == "class_embedding.weight" and self.class_embed_type is None:  # a table
            return w[:, some]
        if name.endswith("linear_2.weight"):
            return w[some][:, some]
        of_sinusoids = name.startswith("time_embedding") or self.class_embed_type == "timestep"
        if name.endswith("linear_1.weight") and of_sinusoids and "add_embedding" not in name:
            return self._sinusoids(w[some])
        return w[some]

    def _sinusoids(self, w: Tensor) -> Tensor:
        """Half as many frequencies are every second one: each takes its neighbor's weight too,
        whose sinusoid is alike.
        """
        if self.width != 0.5:
            return w[:, self._some(w.shape[1])]
        cos, sin = w.chunk(2, dim=1)
        return torch.cat([part[:, 0::2] + part[:, 1::2] for part in (cos, sin)], dim=1)

    def _sinusoid_rows(self, w: Tensor) -> Tensor:
        """Rows of what is added to the sinusoids: as `_sinusoids` adds the weights of neighbors,
        each takes the mean of both.
        """
        if self.width != 0.5:
            return w[self._some(w.shape[0])]
        cos, sin = w.chunk(2)
        return torch.cat([(part[0::2] + part[1::2]) / 2 for part in (cos, sin)])


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
