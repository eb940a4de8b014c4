"""A ControlNet's folder beside a pipeline's: one diffusers folder of both, made without reading
weights.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from sdlite import families
from sdlite.artifact import Artifact
from sdlite.errors import ArtifactError, InputError
from sdlite.files import Files
from sdlite.torch_networks import open_network
from sdlite.weights import index_name, stem, variant_of, weight_files

FOLDER = "controlnet"
PLAIN = "StableDiffusionPipeline"


def added(pipeline: Path, controlnet: Path, out: Path, half: bool | None) -> Path:
    """A pipeline with a ControlNet, in the new folder `out`: links to weights, copies of the rest.

    Args:
        half: whether the ControlNet is stored in float16; None: as it is.

    Raises:
        InputError: `controlnet` is no folder of one. ArtifactError: a folder cannot be used, or the
            ControlNet does not fit the pipeline's UNet.
    """
    if not (controlnet / "config.json").is_file():
        raise InputError(
            f"controlnet={str(controlnet)!r} has no config.json; give a ControlNet's folder, as"
            " diffusers' ControlNetModel.save_pretrained writes it."
        )
    files = Files.of(controlnet)
    kind = files.read_json("config.json").get("_class_name", "ControlNetModel")
    source = Artifact.open(pipeline)
    if FOLDER in source.family.networks:
        raise InputError(f"{pipeline} has a ControlNet already; leave controlnet out.")
    for part in source.folders:
        _gather(source.files.part(part), out / part, part in source.family.networks)
    _gather(files, out / FOLDER, True)
    index = families.own_index(source.index)
    if index.get("_class_name") == PLAIN:
        index["_class_name"] = "StableDiffusionControlNetPipeline"
    index[FOLDER] = ["diffusers", kind]
    (out / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    if why := Artifact.open(out, any_kind=True).refusal():
        raise ArtifactError(why.replace(str(out), f"{pipeline} with {controlnet}"))
    if half is not None:
        _stored(out / FOLDER, half)
    return out


def _gather(files: Files, out: Path, network: bool) -> None:
    """A folder's configurations copied, and its weights linked."""
    out.mkdir(parents=True)
    files.copy_configs(out)
    if not network:
        return
    weights, base = weight_files(files), stem(out.name)
    for path in weights:
        _link(files.file(path.name), out / path.name)
    index = index_name(base, variant_of(weights[0].name, base))
    if len(weights) > 1:
        files.copy(index, out / index)


def _link(file: Path, out: Path) -> None:
    try:
        os.symlink(file.resolve(), out)
    except OSError:  # a system without links
        shutil.copyfile(file, out)


def _stored(folder: Path, half: bool) -> None:
    """The ControlNet in `folder` in float16 or float32."""
    network = open_network(folder)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    network.to(torch.float16 if half else torch.float32).save_pretrained(folder)
