"""CLIP's byte-pair tokenizer without transformers: prompts -> ids int64 (B, L).

Owns padding and truncation. Reads CLIP's own files (`vocab.json`, `merges.txt`, `tokenizer_config.json`) and gives the ids that
`transformers.CLIPTokenizerFast` gives. Source of the rules: transformers `convert_slow_tokenizer.py`, CLIPConverter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdlite.errors import ArtifactError, InputError, SdliteWarning

WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class TruncationWarning(SdliteWarning):
    """A prompt was longer than the text encoder's window; the message shows what was dropped."""


def rules(bpe: Any) -> Any:
    """`tokenizers.Tokenizer` around a BPE model with CLIP's normalisation and word splitting."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


class ClipTokenizer:
    """See the module docstring. `max_length` (L) counts the start and end tokens."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], *, max_length: int, pad: str = "<|endoftext|>"):
        from tokenizers.models import BPE

        for token in ("<|startoftext|>", "<|endoftext|>", pad):
            if token not in vocab:
                raise ArtifactError(f"tokenizer/vocab.json has no {token!r}; it is not a CLIP vocabulary.")
        self.max_length = max_length
        self.bos, self.eos, self.pad = vocab["<|startoftext|>"], vocab["<|endoftext|>"], vocab[pad]
        self.vocab_size = len(vocab)
        self._bpe = rules(
            BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>")
        )
        self._bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClipTokenizer:
        folder = Path(folder)
        try:
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except FileNotFoundError as e:
            raise ArtifactError(
                f"{e.filename} is missing; a CLIP tokenizer folder has vocab.json, merges.txt and tokenizer_config.json."
            ) from e
        except ValueError as e:
            raise ArtifactError(f"{folder} holds a damaged JSON file ({e}); fetch the model again.") from e
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        pad = config.get("pad_token")
        special = folder / "special_tokens_map.json"
        if pad is None and special.exists():
            pad = json.loads(special.read_text(encoding="utf-8")).get("pad_token")
        return cls(vocab, merges, max_length=int(config.get("model_max_length", 77)), pad=_content(pad or "<|endoftext|>"))  # type: ignore[arg-type]

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """ids int64 (B, L): start, tokens, end, padding. Warns once per call, showing the words that did not fit."""
        out = np.full((len(prompts), self.max_length), self.pad, np.int64)
        dropped = []
        for row, prompt in zip(out, prompts, strict=True):
            if not isinstance(prompt, str):
                raise InputError(f"a prompt is a str, not {type(prompt).__name__}: {prompt!r}.")
            encoding = self._bpe.encode(prompt, add_special_tokens=False)
            ids = encoding.ids[: self.max_length - 2]
            if len(ids) < len(encoding.ids):
                dropped.append(prompt[encoding.offsets[len(ids)][0] :].strip())
            row[: len(ids) + 2] = [self.bos, *ids, self.eos]
        if dropped:
            shown = "; ".join(repr(d) for d in dropped[:3]) + (f" and {len(dropped) - 3} more" if len(dropped) > 3 else "")
            warnings.warn(f"the text encoder reads {self.max_length - 2} tokens; dropped: {shown}", TruncationWarning, stacklevel=3)
        return out
