"""What may stand where a file of a model should: folders, pipes, devices, links; more files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.hostile.folder import MANIFEST, MODEL, Change, edit_json, keys, put, slug
from benchmarks.hostile.values import GRAPH, INDEX, SCHEDULER, TEXT, UNET, VOCAB

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
USED = (MANIFEST, INDEX, GRAPH, WEIGHTS, VOCAB, SCHEDULER, UNET, "vae_decoder/model.onnx.data")
PLACE = Path("../../outside")  # as a model's folder sees it


def _outside(path: Path, file: str) -> None:
    """A link to a copy that lies outside of the model."""
    folder = next(p for p in path.parents if p.parent.name == "made")
    copy = (folder / PLACE).resolve() / slug(file)
    shutil.copy(MODEL / file, copy)
    path.symlink_to(copy)


def _forbidden(path: Path, file: str) -> None:
    path.write_bytes((MODEL / file).read_bytes())
    path.chmod(0)


def _zero_device(path: Path, file: str) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))


INSTEAD: dict[str, Callable[[Path, str], None]] = {
    "dir": lambda path, _: path.mkdir(),
    "fifo": lambda path, _: os.mkfifo(path),
    "devzero": lambda path, _: path.symlink_to("/dev/zero"),
    "devnull": lambda path, _: path.symlink_to("/dev/null"),
    "dangling": lambda path, _: path.symlink_to("/nowhere/x"),
    "loop": lambda path, _: path.symlink_to(path.name),
    "missing": lambda *_: None,
    "outside": _outside,
    "perm": _forbidden,
    "mknod": _zero_device,
}
ROOT_ONLY = {"mknod"}  # a device node; `perm` is tried as another user where we are root


def replaced(file: str, kind: str) -> Change:
    """`kind` of `INSTEAD` where `file` stood."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        INSTEAD[kind](folder / file, file)

    return change


def _unet_is_file(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    put(folder, "unet", b"x")


def _unet_outside(folder: Path) -> None:
    away = (folder / PLACE).resolve() / "unet"
    shutil.copytree(folder / "unet", away, dirs_exist_ok=True)
    shutil.rmtree(folder / "unet")
    (folder / "unet").symlink_to(away)


FOLDERS: dict[str, Change] = {
    "fs-perm-folder": lambda folder: (folder / "unet").chmod(0),
    "fs-unet-is-file": _unet_is_file,
    "fs-unet-symlink-outside": _unet_outside,
}
# What harms nobody: the model is whole, and must run.
WHOLE: dict[str, Change] = {
    "fs-extra-newline-name": lambda f: put(f, "unet/evil\nname\x1b[31m.onnx", b"x"),
    "fs-extra-pickle": lambda f: put(f, "unet/diffusion_pytorch_model.bin", b"\x80\x04."),
    "fs-extra-code": lambda f: put(f, "pipeline.py", b'open("PWNED", "w")'),
    "fs-name\nwith-newline": lambda f: None,
    "fs-name-\x1b[31mred": lambda f: None,
}


def _lora(folder: Path) -> None:
    base = str((folder / PLACE).resolve() / "te")
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": 4,
        "target_modules": ["q_proj"],
        "task_type": "FEATURE_EXTRACTION",
    }
    put(folder, "text_encoder/adapter_config.json", json.dumps(about))
    put(folder, "text_encoder/adapter_model.bin", b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94.")


def _unet_adapter(folder: Path) -> None:
    put(folder, "unet/adapter_config.json", "{")
    put(folder, "unet/adapter_model.safetensors", b"x")


def _index(file: str) -> Change:
    listing = {"metadata": {}, "weight_map": {"x": "../../../outside/secret.bin"}}
    return lambda folder: put(folder, file, json.dumps(listing))


def _index_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model-00001-of-00001.safetensors")
    _index(f"{WEIGHTS}.index.json")(folder)


EXTRA: dict[str, Change] = {  # files that no manifest lists, which torch's libraries would take up
    "adapter-text-encoder": _lora,
    "adapter-lora-file": lambda f: put(f, "pytorch_lora_weights.safetensors", os.urandom(100)),
    "adapter-unet": _unet_adapter,
    "torch-index-traversal": _index("text_encoder/model.safetensors.index.json"),
    "torch-index-only": _index_only,
    "torch-unlisted-shard": lambda f: put(
        f, "unet/diffusion_pytorch_model-00001-of-00002.safetensors", b"x"
    ),
}
VOUCHED: dict[str, Change] = {  # configs that ask torch's libraries for more
    "torch-te-auto-map": edit_json(
        TEXT,
        lambda m: m.update(
            auto_map={"AutoModel": "evil.Evil"},
            _attn_implementation="evil-org/evil-kernel",
            attn_implementation="evil-org/evil-kernel",
        ),
    ),
    "torch-unet-class": keys(
        UNET,
        _class_name="EvilModel",
        _diffusers_version="9.9",
        quantization_config={"quant_method": "evil"},
    ),
    "torch-te-layers-1e6": keys(TEXT, num_hidden_layers=2_000_000),
    "torch-te-vocab-1e9": keys(TEXT, vocab_size=10**8),
}
