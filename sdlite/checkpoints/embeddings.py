"""Textual inversions -> wider text encoders and tokenizers, by diffusers' own loader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdlite import arguments, headers
from sdlite.errors import ArtifactError, InputError

_UNNAMED = ("emb_params", "clip_l")  # keys that are no word: the file's name is the word then
_BOTH = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # keys of one for SDXL


@dataclass(frozen=True)
class Embedding:
    """A file, and the word that stands for it in prompts; "" takes the file's own."""

    path: Path
    token: str = ""

    @classmethod
    def given(cls, value: object) -> Embedding:
        """ "word.safetensors" or "word.safetensors:<word>".

        Raises:
            InputError: something else.
        """
        path = str(arguments.path("embedding", value))
        found = re.fullmatch(r"(.+\.\w+):([^:/\\]+)", path)
        out = cls(Path(found[1]), found[2]) if found else cls(Path(path))
        if out.path.suffix.lower() != ".safetensors":
            raise InputError(
                f"embedding={path!r}; accepted: a .safetensors file, FILE or FILE:WORD."
            )
        return out


@dataclass(frozen=True)
class Word:
    """An embedding that was read: text encoder's folder -> its vectors, n x width."""

    path: Path
    token: str
    vectors: dict[str, Tensor]

    @property
    def note(self) -> str:
        """What is said of it."""
        return f"{self.path.name} is {self.token!r}"


def read(embedding: Embedding, parts: Sequence[str]) -> Word:
    """The word of a file.

    Args:
        parts: the model's networks.

    Raises:
        ArtifactError: not a textual inversion, or one for another number of text encoders.
    """
    from safetensors.torch import load_file

    path = embedding.path
    headers.read(path)
    tensors = load_file(path)
    encoders = [p for p in parts if p in _BOTH]
    keys = {p: _BOTH[p] for p in encoders} if len(encoders) > 1 else {}
    if not keys and set(tensors) == set(_BOTH.values()):
        raise ArtifactError(
            f"{path} is an embedding for SDXL's two text encoders (clip_l, clip_g); this model has"
            " one. Take an embedding of this model."
        )
    if keys and set(tensors) != set(keys.values()):
        raise ArtifactError(
            f"{path} holds {', '.join(sorted(tensors)[:3])}; accepted for this model: a textual"
            " inversion for both its text encoders, clip_l and clip_g."
        )
    if not keys and len(tensors) != 1:
        raise ArtifactError(
            f"{path} holds {len(tensors)} tensors; a textual inversion has one"
            f" ({', '.join(sorted(tensors)[:3])})."
        )
    keys = keys or {encoders[0]: next(iter(tensors))}
    vectors = {p: _vectors(path, name, tensors[name]) for p, name in keys.items()}
    if len({len(v) for v in vectors.values()}) > 1:
        raise ArtifactError(f"{path} holds another number of vectors for each text encoder.")
    own = next(iter(tensors))
    own = path.stem if len(keys) > 1 or own in _UNNAMED else own
    return Word(path, embedding.token or own, vectors)


def _vectors(path: Path, name: str, value: Tensor) -> Tensor:
    if value.ndim > 2 or not value.is_floating_point():
        raise ArtifactError(
            f"{path} holds {name} of shape {tuple(value.shape)}, which is no textual inversion."
        )
    return value.reshape(-1, value.shape[-1])


def add(part: str, network: nn.Module, tokenizer: Any, word: Word) -> None:
    """Put a word's vectors behind a text encoder's rows and the word into its tokenizer, in place.
    Several vectors are the tokens word, word_1, word_2, as diffusers names them.

    Args:
        part: "text_encoder" or "text_encoder_2".
        network: transformers' CLIP text encoder; tokenizer: its CLIPTokenizer.

    Raises:
        ArtifactError: vectors of another width. InputError: the tokenizer has the word already.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    token, vectors = word.token, word.vectors[part]
    encoder: Any = network
    width = encoder.get_input_embeddings().weight.shape[-1]
    if vectors.shape[-1] != width:
        raise ArtifactError(
            f"{word.path} is an embedding of width {vectors.shape[-1]}, this model's"
            f" {part.replace('_', ' ')} has {width}: it was made for another family."
        )
    if token in tokenizer.get_vocab():
        raise InputError(f"the tokenizer has the word {token!r} already; give another: FILE:WORD.")

    # what the loader asks of a pipeline
    host: Any = type("Host", (TextualInversionLoaderMixin,), {"components": {}})()
    host.hf_device_map = None
    host.text_encoder, host.tokenizer = encoder, tokenizer
    host.load_textual_inversion({token: vectors.float()}, token=token)
