"""Which model one file of weights is: read from its header, before any weights.

A file in the original layout (CompVis' `ldm`, Stability's `sgm`) has no configuration. Its names
tell the family and the blocks, its shapes the widths; what neither tells (heads, norms, sampler) is
as the models were published.

Sources: diffusers 0.39 `loaders/single_file_utils.py`; ComfyUI `comfy/supported_models.py` for the
markers of SDXL's fine-tunes.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path

from sdlite.checkpoints import originals
from sdlite.checkpoints.originals import Config
from sdlite.checkpoints.unet_shape import PREFIX as UNET
from sdlite.checkpoints.unet_shape import Shapes, UnknownShapeError, unet_shape
from sdlite.errors import ArtifactError, InputError
from sdlite.families import inpaints

VAE = "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
CLIP_XL = "conditioner.embedders.0.transformer.text_model."
OPEN_CLIP_XL = "conditioner.embedders.1.model."
REFINER = "conditioner.embedders.0.model."
PREDICTIONS = ("epsilon", "v_prediction")
_NO_FAMILY = "which is not a family that sdlite knows"
# Names that only files of other kinds have -> what the file is, and what to do with it.
OTHERS = (
    (("joint_blocks.",), f"Stable Diffusion 3's, {_NO_FAMILY}"),
    (("double_blocks.", "transformer.single_"), f"FLUX's, {_NO_FAMILY}"),
    (("lora_unet_", "lora_te", ".lora_", ".lora."), "a LoRA: give it as lora="),
    (
        ("emb_params", "string_to_param", "clip_l", "clip_g"),
        "a textual inversion: give it as embedding=",
    ),
    (("control_model.", "controlnet_cond_embedding."), "a ControlNet, which sdlite does not run"),
    (("down_blocks.",), "one network of a diffusers folder: give the folder"),
)
# What is SDXL but for a marker in it, by ComfyUI's names.
_XL_OTHERS = (
    (REFINER, "SDXL's refiner, which goes on with another model's latents; give the base model"),
    ("edm_mean", "Playground 2.5's, whose EDM sampling sdlite does not have"),
    ("edm_vpred.sigma_max", "an SDXL of EDM v-prediction, whose sampling sdlite does not have"),
)


@dataclass(frozen=True)
class Layout:
    """A recognized file.

    Attributes:
        version: "1", "2" or "xl", of Stable Diffusion.
        has_vae: whether the file holds the autoencoder.
        configs: network ("unet", "vae", "text_encoder", of SDXL also "text_encoder_2") -> content
            of its config.json.
        scheduler: content of scheduler_config.json.
    """

    version: str
    has_vae: bool
    configs: dict[str, Config]
    scheduler: Config

    @property
    def name(self) -> str:
        """What errors and reports call it."""
        return "SDXL" if self.version == "xl" else f"Stable Diffusion {self.version}.x"

    @property
    def tokenizers(self) -> dict[str, str]:
        """Folder -> the token that it fills prompts up with."""
        end = "<|endoftext|>"
        if self.version == "xl":
            return {"tokenizer": end, "tokenizer_2": "!"}
        return {"tokenizer": "!" if self.version == "2" else end}

    @property
    def index(self) -> Config:
        """Content of model_index.json."""
        out: Config = {
            "scheduler": ["diffusers", self.scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            **{t: ["transformers", "CLIPTokenizer"] for t in self.tokenizers},
        }
        for part in self.text_encoders:
            out[part] = ["transformers", *self.configs[part]["architectures"]]
        kind = (
            "InpaintPipeline" if inpaints(self.configs["unet"], self.configs["vae"]) else "Pipeline"
        )
        if self.version == "xl":
            own = {"_class_name": f"StableDiffusionXL{kind}", "force_zeros_for_empty_prompt": True}
            return {**own, **out}
        return {
            "_class_name": f"StableDiffusion{kind}",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            **out,
        }

    @property
    def text_encoders(self) -> list[str]:
        """Those of `configs`."""
        return [p for p in self.configs if p.startswith("text_encoder")]

    def changed(self, unet: Config, scheduler: Config, predicts: str | None) -> Layout:
        """With other keys in two of its configurations. `predicts`: the prediction type that was
        asked for, which stays.
        """
        configs = {**self.configs, "unet": self.configs["unet"] | unet}
        asked = {"prediction_type": predicts} if predicts else {}
        return replace(self, configs=configs, scheduler=self.scheduler | scheduler | asked)

    def config(self, part: str) -> Config:
        """Content of a network's config.json."""
        return self.configs[part]

    def write(self, folder: Path) -> None:
        """A diffusers folder without weights: configs, scheduler, tokenizers."""
        files = {"model_index.json": self.index, "scheduler/scheduler_config.json": self.scheduler}
        files |= {f"{p}/config.json": c for p, c in self.configs.items()}
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, pad in self.tokenizers.items():
            write_tokenizer(folder / name, pad)


def recognized(path: Path, shapes: Shapes, prediction_type: str | None = None) -> Layout:
    """The layout of a file of weights.

    SDXL-Turbo and SDXL-Lightning have SDXL's names and shapes: they are taken for SDXL, with its
    sampler; `few_step` knows some by their files' names.

    Args:
        path: what errors call it.
        prediction_type: of a 2.x model; None takes what 2.1 at 768 px has, "v_prediction", as
            diffusers does: names and shapes do not tell it from 2.1-base; one for inpainting is
            "epsilon". So are 1.x and SDXL, unless it is given, or an SDXL file has the marker
            `v_pred`.

    Raises:
        ArtifactError: another kind of file, or one that holds not all of a model.
        InputError: no such prediction type.
    """
    if prediction_type not in (None, *PREDICTIONS):
        accepted = " or ".join(PREDICTIONS)
        raise InputError(f"prediction_type={prediction_type!r} is not known; accepted: {accepted}.")
    _refuse_others(path, shapes)
    version = _version(path, shapes)
    try:
        configs = {"xl": _xl, "2": _two, "1": _one}[version](shapes)
        configs["unet"] |= unet_shape(shapes)
        has_vae = f"{VAE}decoder.conv_in.weight" in shapes
        configs["vae"] |= _vae_widths(shapes, VAE) if has_vae else _PUBLISHED_WIDTHS
    except KeyError as e:
        raise ArtifactError(
            f"{path} is a Stable Diffusion checkpoint without the tensor {e.args[0]}; fetch the"
            " file again, from a source that has all of it."
        ) from None
    except UnknownShapeError as e:
        raise ArtifactError(
            f"{path} holds a UNet that no UNet2DConditionModel is: {e}. Fetch the file again, or"
            " give a diffusers folder, whose config.json says what it is."
        ) from None
    if version == "2" and inpaints(configs["unet"], configs["vae"]):  # published at 512 px alone
        prediction_type = prediction_type or "epsilon"
    scheduler = _scheduler(version, shapes, prediction_type)
    if version == "2" and scheduler["prediction_type"] == "epsilon":
        configs["unet"] |= originals.BASE_2
    heads = configs["unet"]["attention_head_dim"]
    if isinstance(heads, list):  # of a student that has fewer blocks
        configs["unet"]["attention_head_dim"] = heads[: len(configs["unet"]["down_block_types"])]
    return Layout(version, has_vae, configs, scheduler)


def _version(path: Path, shapes: Shapes) -> str:
    for marker, what in _XL_OTHERS:
        if any(k.startswith(marker) for k in shapes):
            raise ArtifactError(f"{path} is {what}.")
    texts = (("xl", OPEN_CLIP_XL), ("2", OPEN_CLIP), ("1", CLIP))
    found = next((v for v, prefix in texts if any(k.startswith(prefix) for k in shapes)), "")
    if not found:
        raise ArtifactError(
            f"{path} holds a UNet and no text encoder, so it is not a whole model; give a file with"
            " all parts, or put the UNet into a diffusers folder."
        )
    return found


def _scheduler(version: str, shapes: Shapes, given: str | None) -> Config:
    """What 1.5, 2.1 and SDXL were published with. `v_pred` and `ztsnr` are the names by which
    fine-tunes of SDXL (NoobAI) say how they were trained.
    """
    marked = version == "xl" and "v_pred" in shapes
    predicts = given or ("v_prediction" if version == "2" or marked else "epsilon")
    if version != "xl":
        return originals.PNDM | {"prediction_type": predicts}
    zero = {"rescale_betas_zero_snr": True} if marked and "ztsnr" in shapes else {}
    return originals.EULER | {"prediction_type": predicts} | zero


def _one(shapes: Shapes) -> dict[str, Config]:
    return {
        "text_encoder": originals.TEXT_1 | _clip_widths(shapes, CLIP),
        "unet": {**originals.UNET_1},
        "vae": {**originals.VAE},
    }


def _two(shapes: Shapes) -> dict[str, Config]:
    text = originals.TEXT_2 | _open_clip_widths(shapes, OPEN_CLIP)
    # it reads the last layer but one: where the file has all 24, the last is not used
    text["num_hidden_layers"] = min(23, text["num_hidden_layers"])
    return {"text_encoder": text, "unet": {**originals.UNET_2}, "vae": {**originals.VAE}}


def _xl(shapes: Shapes) -> dict[str, Config]:
    width = shapes[f"{UNET}label_emb.0.0.weight"][1]
    second = originals.TEXT_XL_2 | _open_clip_widths(shapes, OPEN_CLIP_XL)
    second["projection_dim"] = shapes[f"{OPEN_CLIP_XL}text_projection"][1]
    return {
        "text_encoder": originals.TEXT_1 | _clip_widths(shapes, CLIP_XL),
        "text_encoder_2": second,
        "unet": originals.UNET_XL | {"projection_class_embeddings_input_dim": width},
        "vae": {**originals.VAE_XL},
    }


def _refuse_others(path: Path, shapes: Shapes) -> None:
    """Raises ArtifactError where the names are not those of Stable Diffusion's original layout."""
    if any(k.startswith(UNET) for k in shapes) and not any(
        ".joint_blocks." in k or ".double_blocks." in k for k in shapes
    ):
        return
    if f"{VAE}decoder.conv_in.weight" in shapes or "decoder.conv_in.weight" in shapes:
        what = "an autoencoder alone: give it as vae="
    else:
        what = next(
            (w for marks, w in OTHERS if any(m in k for k in shapes for m in marks)),
            "of no layout that sdlite knows",
        )
    raise ArtifactError(
        f"{path} is not a Stable Diffusion 1.x, 2.x or XL checkpoint in the original layout; it is"
        f" {what}. Accepted: one file with the UNet under {UNET}, or a diffusers folder."
    )


_PUBLISHED_WIDTHS: Config = {"block_out_channels": [128, 256, 512, 512]}


def _vae_widths(shapes: Shapes, prefix: str) -> Config:
    blocks = [f"{prefix}encoder.down.{i}.block.0.conv1.weight" for i in range(4)]
    return {"block_out_channels": [shapes[b][0] for b in blocks]}


def vae_config(path: Path, shapes: Shapes, version: str = "1") -> Config:
    """The configuration of an autoencoder in a file of its own, with or without LDM's prefix.

    Args:
        version: of the model that it is for: its scaling is not in the file.

    Raises:
        ArtifactError: it is none.
    """
    prefix = VAE if any(k.startswith(VAE) for k in shapes) else ""
    published = originals.VAE_XL if version == "xl" else originals.VAE
    try:
        return published | _vae_widths(shapes, prefix)
    except KeyError as e:
        raise ArtifactError(
            f"{path} is no autoencoder in the original layout (it has no {e.args[0]}); accepted as"
            " vae: such a file, or the vae/ folder of a diffusers pipeline."
        ) from None


def _clip_widths(shapes: Shapes, prefix: str) -> Config:
    place = prefix.count(".") + 2
    layers = {k.split(".")[place] for k in shapes if k.startswith(f"{prefix}encoder.layers.")}
    first = f"{prefix}encoder.layers.0.mlp.fc1.weight"
    return {
        "hidden_size": shapes[first][1],
        "intermediate_size": shapes[first][0],
        "num_hidden_layers": len(layers),
        "vocab_size": shapes[f"{prefix}embeddings.token_embedding.weight"][0],
    }


def _open_clip_widths(shapes: Shapes, prefix: str) -> Config:
    place = prefix.count(".") + 2
    inner = f"{prefix}transformer.resblocks."
    first = f"{inner}0.mlp.c_fc.weight"
    return {
        "hidden_size": shapes[first][1],
        "intermediate_size": shapes[first][0],
        "num_hidden_layers": len({k.split(".")[place] for k in shapes if k.startswith(inner)}),
        "vocab_size": shapes[f"{prefix}token_embedding.weight"][0],
    }


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's tokenizer: its 49,408 tokens follow from its 48,894 merges (MIT, OpenAI)."""
    packed = Path(__file__).with_name("clip-merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").split("\n")
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {t: i for i, t in enumerate([*tokens, start, end])}
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    config = special | {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("vocab.json", vocabulary),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
