"""Textual inversions -> a wider text encoder and tokenizer, by diffusers' own loader."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdlite import arguments, headers
from sdlite.errors import ArtifactError, InputError

_UNNAMED = ("emb_params", "clip_l")  # keys that are no word: the file's name is the word then


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


def add(network: nn.Module, tokenizer: Any, embedding: Embedding) -> str:
    """Put an embedding's vectors behind the text encoder's rows and its word into the tokenizer, in
    place. Several vectors are the tokens word, word_1, word_2, as diffusers names them.

    Args:
        network: transformers' CLIP text encoder; tokenizer: its CLIPTokenizer.

    Returns:
        The word.

    Raises:
        ArtifactError: not a textual inversion, or one of another width. InputError: the tokenizer
            has the word already.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    token, vectors = _read(embedding)
    text: Any = network
    width = text.get_input_embeddings().weight.shape[-1]
    if vectors.shape[-1] != width:
        raise ArtifactError(
            f"{embedding.path} is an embedding of width {vectors.shape[-1]}, this model's text"
            f" encoder has {width}: it was made for another family."
        )
    if token in tokenizer.get_vocab():
        raise InputError(f"the tokenizer has the word {token!r} already; give another: FILE:WORD.")

    # what the loader asks of a pipeline
    host: Any = type("Host", (TextualInversionLoaderMixin,), {"components": {}})()
    host.hf_device_map = None
    host.text_encoder, host.tokenizer = text, tokenizer
    host.load_textual_inversion({token: vectors.float()}, token=token)
    return token


def _read(embedding: Embedding) -> tuple[str, Tensor]:
    """(word, vectors of n x width)."""
    from safetensors.torch import load_file

    path = embedding.path
    headers.read(path)
    tensors = load_file(path)
    if len(tensors) != 1:
        raise ArtifactError(
            f"{path} holds {len(tensors)} tensors; a textual inversion has one"
            f" ({', '.join(sorted(tensors)[:3])})."
        )
    [(name, value)] = tensors.items()
    if value.ndim > 2 or not value.is_floating_point():
        raise ArtifactError(
            f"{path} holds {name} of shape {tuple(value.shape)}, which is no textual inversion."
        )
    own = path.stem if name in _UNNAMED else name
    return embedding.token or own, value.reshape(-1, value.shape[-1])
