"""What a UNet is told of a caption, by frozen text encoders: one, as in Stable Diffusion, or
several that stand side by side, as in SDXL.

Shape letters: B batch, L tokens of all tokenizers together, l tokens of one, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sdlite import families
from sdlite.files import Files
from sdlite.spec import Arrays
from sdlite.tokenizer import ClipTokenizer
from sdlite.torch_networks import open_network, text_states

if TYPE_CHECKING:
    from transformers import CLIPTextModel

    from sdlite.artifact import Artifact

STATES = "encoder_hidden_states"


class Tokenizers:
    """Several tokenizers as one: prompts -> ids int64 (B, L), those of each side by side."""

    def __init__(self, tokenizers: Mapping[str, ClipTokenizer]):
        self.of = dict(tokenizers)  # by text encoder
        self.first = next(iter(self.of.values()))

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        return np.concatenate([t(prompts) for t in self.of.values()], axis=1)

    def digest(self) -> str:
        """What tells these tokenizers from others."""
        return "".join(t.digest() for t in self.of.values())


class TextEncoders(nn.Module):
    """The text encoders of a model that has several, as one network, with their tokenizers.

    What has tokens goes side by side into the hidden states; what has none (pooled text) is a
    condition of its own. Where the model's pipeline says so, an empty caption is zeros, as it is
    when an image is made without a negative prompt. To a family it is what makes conditions
    (`families.Family.conditions`).

    Attributes:
        conditions: names of what `forward` gives, hidden states first.
        index, unet_config: of the model, as its files say them.
        files: folder of each tokenizer -> its files.
    """

    def __init__(self, artifact: Artifact):
        super().__init__()
        self.family, self.index = artifact.family, artifact.index
        self.unet_config = artifact.config("unet")
        part = artifact.files.part
        folders = self.family.tokenizers
        self.networks = nn.ModuleDict({k: open_network(part(k)) for k in folders})
        self.files: dict[str, Files] = {t: part(t) for t in folders.values()}
        self.tokenizer = Tokenizers(
            {
                k: ClipTokenizer.from_pretrained(part(t), artifact.config(k))
                for k, t in folders.items()
            }
        )
        self.outputs = {k: artifact.spec(k).outputs for k in folders}
        every = [o for outputs in self.outputs.values() for o in outputs]
        self.conditions = (STATES, *(o.name for o in every if not _of_tokens(o.shape)))
        empty = self.tokenizer([""])
        self.windows = [t([""]).shape[1] for t in self.tokenizer.of.values()]
        self.zeros = self.family.empty_is_zeros(self.index)
        self.register_buffer("empty", torch.from_numpy(empty), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """D, of all hidden states side by side."""
        return sum(int(m.config.hidden_size) for m in self.networks.values())

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids int64 (B, L) -> `conditions`: hidden states (B, l, D), and pooled text (B, width)."""
        states, pooled = list[Tensor](), list[Tensor]()
        for (part, network), rows in zip(
            self.networks.items(), ids.split(self.windows, dim=1), strict=True
        ):
            outputs = self.outputs[part]
            made = text_states(network, rows, [o.name for o in outputs])
            for o, values in zip(outputs, made, strict=True):
                (states if _of_tokens(o.shape) else pooled).append(values)
        out = (torch.cat(states, dim=-1), *pooled)
        if not self.zeros:
            return out
        empty = (ids == self.empty).all(dim=1)
        return tuple(x.masked_fill(empty.view(-1, *[1] * (x.ndim - 1)), 0) for x in out)

    # --- as families see a pipeline

    def tokenize(self, prompts: Sequence[str], part: str = "text_encoder") -> np.ndarray:
        """prompts -> ids int64 (B, l) of one of the tokenizers."""
        return self.tokenizer.of[part](prompts)

    @torch.no_grad()
    def encode(self, part: str, ids: np.ndarray) -> Arrays:
        """ids int64 (B, l) -> what one of the text encoders gives, by name."""
        names = [o.name for o in self.outputs[part]]
        rows = torch.from_numpy(ids).to(self.empty.device)
        made = text_states(self.networks[part], rows, names)
        return {k: v.float().cpu().numpy() for k, v in zip(names, made, strict=True)}

    def called(
        self, prompts: Sequence[str], guidance_scale: float, size: tuple[int, int], guided: bool
    ) -> tuple[Arrays, Arrays | None]:
        """Conditions of prompts as a pipeline makes them for images of a size (height, width in
        pixels), and those without prompt where it is `guided` by a second row.
        """
        none = [None] * len(prompts) if guided else []
        call = families.Call(prompts, none, guidance_scale, *size)
        return self.family.conditions(self, call)


def _of_tokens(shape: tuple[str, ...]) -> bool:
    return "L" in shape


def text_width(text_encoder: CLIPTextModel | TextEncoders) -> int:
    """Width of the hidden states that a UNet is given."""
    if isinstance(text_encoder, TextEncoders):
        return text_encoder.width
    width: int = text_encoder.config.hidden_size
    return width


class CachedEncoder:
    """A frozen text encoder that remembers its output: (B, L) token ids -> (B, L, D).

    New captions are encoded `GROUP` at a time, filled up to that number: a matrix product may round
    differently in another batch size, and a resumed run must see the same numbers. At most
    `capacity` captions are kept (L D floats each), and `MOST_BYTES`; later ones are encoded every
    time.
    """

    GROUP = 8
    MOST_BYTES = 100_000 * 77 * 1024 * 4  # that many captions of SD-2.1; 49,500 of SDXL

    def __init__(self, text_encoder: CLIPTextModel | TextEncoders, capacity: int = 100_000):
        self.text_encoder, self.capacity = text_encoder.eval().requires_grad_(False), capacity
        several = isinstance(text_encoder, TextEncoders)
        self.names = text_encoder.conditions if several else (STATES,)
        self._seen: dict[bytes, tuple[Tensor, ...]] = {}

    def to(self, device: torch.device) -> None:
        """In place: the encoder and its kept output go to `device`."""
        self.text_encoder.to(device)
        self._seen = {k: tuple(x.to(device) for x in v) for k, v in self._seen.items()}

    def settings(self) -> dict[str, object]:
        """What its output depends on, besides weights and ids."""
        own = self.text_encoder
        return {"empty_is_zeros": own.zeros} if isinstance(own, TextEncoders) else {}

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.conditions(input_ids)[STATES]

    @torch.no_grad()
    def conditions(self, input_ids: Tensor) -> dict[str, Tensor]:
        """All that a UNet is told of the captions with ids (B, L): hidden states (B, l, D), and
        what else the text encoders give.
        """
        keys = [row.numpy().tobytes() for row in input_ids.cpu()]
        rows = dict(zip(keys, input_ids, strict=True))
        known = {k: self._seen[k] for k in rows if k in self._seen}
        new = [k for k in rows if k not in known]
        for start in range(0, len(new), self.GROUP):
            part = new[start : start + self.GROUP]
            full = part + part[:1] * (self.GROUP - len(part))
            encoded = self.text_encoder(torch.stack([rows[k] for k in full]))
            outputs = [encoded[i].detach() for i in range(len(self.names))]
            known |= zip(part, zip(*outputs, strict=True), strict=False)
        room = min(self.capacity, self._most(known)) - len(self._seen)
        for k in new[: max(0, room)]:
            self._seen[k] = tuple(x.clone() for x in known[k])
        return {name: torch.stack([known[k][i] for k in keys]) for i, name in enumerate(self.names)}

    def _most(self, known: Mapping[bytes, tuple[Tensor, ...]]) -> int:
        """Captions that `MOST_BYTES` hold."""
        row = next(iter(known.values()), ())
        size: int = sum(x.numel() * x.element_size() for x in row)
        return self.MOST_BYTES // max(1, size)
