"""CLIP's byte-pair tokenizer without transformers: prompts -> ids int64 (B, L).

Owns padding and truncation. Reads every layout of CLIP's files (`tokenizer_files`) and gives the
ids that `transformers.CLIPTokenizerFast` gives; tokens of several vectors are spelled out as in
diffusers' pipelines. Sources of the rules: transformers `convert_slow_tokenizer.py`,
CLIPConverter; diffusers `TextualInversionLoaderMixin.maybe_convert_prompt`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from sdlite import tokenizer_files
from sdlite.errors import ArtifactError, InputError, SdliteWarning, printable
from sdlite.files import Files
from sdlite.schema import Json, shown
from sdlite.tokenizer_files import WORDS, TokenizerFiles

WINDOW, ROWS = 77, 49408  # of CLIPTextConfig: positions and embeddings
PADDED = 64  # an embedding table that was made longer for speed ends at a multiple of it


class TruncationWarning(SdliteWarning):
    """A prompt was longer than the text encoder's window; the message shows what was dropped."""


class TokenWarning(SdliteWarning):
    """The text encoder has embeddings that no token of the tokenizer stands for."""


def rules(bpe: Any, words: str = WORDS) -> Any:
    """`tokenizers.Tokenizer` around a BPE model with CLIP's normalization and word splitting."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer(bpe)
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    return tokenizer


class ClipTokenizer:
    """See the module docstring. `max_length` (L) counts start and end; ids are < `vocab_size`."""

    def __init__(self, files: TokenizerFiles, folder: Path, max_length: int):
        self._files, self._folder, self.max_length = files, folder, max_length
        try:
            self._bpe = self._backend()
        except ArtifactError:
            raise
        except Exception as e:  # tokenizers has no type of its own
            said = printable(e, 200)
            raise ArtifactError(
                f"{folder} is refused by tokenizers ({said}); fetch the model again."
            ) from e
        self.bos, self.eos, self.pad = map(self._named, ("bos_token", "eos_token", "pad_token"))
        self._added = {i: t.content for i, t in self._bpe.get_added_tokens_decoder().items()}
        self.vocab_size = max(*files.vocab.values(), *self._added) + 1
        ids = {*files.vocab.values(), *self._added}
        if len(ids) < self.vocab_size:
            raise ArtifactError(
                f"{folder} has no token with id {next(i for i in count() if i not in ids)}, "
                f"and {self.vocab_size - 1} is its last; fetch or save the model again."
            )
        self._vectors = self._spelled_out(set(self._added.values()))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path | Files, text_encoder: Json | None = None
    ) -> ClipTokenizer:
        """Read a tokenizer's folder.

        Args:
            folder: of an opened model `artifact.files.part("tokenizer")`, whose files are verified.
            text_encoder: config of the network that reads the ids: its window bounds `max_length`,
                and its embeddings are counted. None: CLIP's window, 77, and no count.

        Raises:
            ArtifactError: files are missing, damaged or of another kind of tokenizer, or the text
                encoder has no embeddings for some tokens.
        """
        found = Files.of(folder)
        files, folder, config = tokenizer_files.read(found), found.folder, text_encoder or {}
        window = config.get("max_position_embeddings", WINDOW)
        rows = config.get("vocab_size", ROWS)
        if not (type(window) is int and window >= 2 and type(rows) is int):
            raise ArtifactError(
                f"the text encoder's config.json beside {folder} has max_position_embeddings "
                f"{window!r} and vocab_size {rows!r}; both are counts. Fetch the model again."
            )
        out = cls(files, folder, min(files.max_length or window, window))
        if text_encoder is not None:
            out._check_rows(rows)
        return out

    def _backend(self) -> Any:
        from tokenizers import AddedToken
        from tokenizers.models import BPE

        files = self._files
        bpe = BPE(
            vocab=files.vocab,
            merges=files.merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=files.named.get("unk_token"),
        )
        backend = rules(bpe, files.words)
        backend.add_tokens([AddedToken(**dataclasses.asdict(t)) for t in files.added])
        backend.encode_special_tokens = files.split_special_tokens
        for token, i in files.ids.items():
            if (got := backend.token_to_id(token)) != i:
                raise ArtifactError(
                    f"{self._folder} gives {shown(token)} the id {i}, where the next free one is"
                    f" {got}: versions of transformers do not agree on it. Save tokenizer and text"
                    " encoder again, with no id left out."
                )
        return backend

    def _named(self, key: str) -> int:
        token = self._files.named.get(key)
        out: int | None = None if token is None else self._bpe.token_to_id(token)
        if out is None:
            why = f"has no id for its {key}, {shown(token)}; fetch or save the model again."
            raise ArtifactError(f"{self._folder} {why}")
        return out

    def _check_rows(self, rows: int) -> None:
        """Every token has an embedding, and learned embeddings have tokens."""
        if self.vocab_size > rows:
            token = self._bpe.id_to_token(self.vocab_size - 1)
            raise ArtifactError(
                f"{self._folder} has {shown(token)} with id {self.vocab_size - 1}, but the text"
                f" encoder has {rows} embeddings (vocab_size of its config.json): learned words are"
                " lost. Save tokenizer and text encoder together."
            )
        if rows > self.vocab_size and rows % PADDED:
            warnings.warn(
                f"the text encoder has {rows} embeddings and {self._folder} {self.vocab_size} "
                "tokens: what else the model learned has no name, so no prompt can use it. Save "
                "tokenizer and text encoder together.",
                TokenWarning,
                stacklevel=4,
            )

    @staticmethod
    def _spelled_out(added: set[str]) -> dict[str, str]:
        """token -> "token token_1 token_2 ...", for tokens of several vectors."""
        out = {}
        for token in sorted(added):
            vectors = [token]
            while (following := f"{token}_{len(vectors)}") in added:
                vectors.append(following)
            if len(vectors) > 1:
                out[token] = " ".join(vectors)
        return out

    def _encode(self, prompt: Any) -> tuple[str, Any]:
        """The prompt with its vectors spelled out, and its `tokenizers.Encoding`."""
        if not isinstance(prompt, str):
            raise InputError(f"a prompt is a str, not {type(prompt).__name__}: {prompt!r}.")
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            raise InputError(
                f"the prompt {prompt!r} holds {prompt[e.start]!r}, which is no character: it came "
                "in another encoding than UTF-8. Save it as UTF-8, or set the terminal to UTF-8."
            ) from None
        encoding = self._bpe.encode(prompt, add_special_tokens=False)
        if not self._vectors:
            return prompt, encoding
        found = dict.fromkeys(self._added.get(i) for i in encoding.ids)
        for token in (t for t in found if t in self._vectors):
            prompt = prompt.replace(token, self._vectors[token])
        return prompt, self._bpe.encode(prompt, add_special_tokens=False)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, however many: without start, end and padding.

        Raises:
            InputError: not a string, or one that is no valid Unicode.
        """
        return list(self._encode(text)[1].ids)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """ids int64 (B, L): start, tokens, end, padding.

        Warns once per call, showing the words that did not fit.

        Raises:
            InputError: not a list of strings, or a string that is no valid Unicode.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InputError(f"prompts are a list of str, not {type(prompts).__name__}.")
        out = np.full((len(prompts), self.max_length), self.pad, np.int64)
        dropped = []
        for row, given in zip(out, prompts, strict=True):
            prompt, encoding = self._encode(given)
            ids = encoding.ids[: self.max_length - 2]
            if len(ids) < len(encoding.ids):
                dropped.append(repr(prompt[encoding.offsets[len(ids)][0] :].strip()))
            row[: len(ids) + 2] = [self.bos, *ids, self.eos]
        if dropped:
            more = f" and {len(dropped) - 3} more" if len(dropped) > 3 else ""
            message = f"the text encoder reads {self.max_length - 2} tokens; dropped: "
            message += "; ".join(dropped[:3]) + more
            warnings.warn(message, TruncationWarning, stacklevel=3)
        return out

    def to_json(self) -> Json:
        """All that decides the ids, in one form for every layout; export/web/tokenizer.js reads it.

        `added` have the text that is matched, in lower case where normalized; `vectors` are (id,
        token, what it is spelled out to).
        """
        files, ids = self._files, {content: i for i, content in self._added.items()}
        added = []
        for i, t in self._bpe.get_added_tokens_decoder().items():
            text = self._bpe.normalizer.normalize_str(t.content) if t.normalized else t.content
            flags = {k: getattr(t, k) for k in ("lstrip", "rstrip", "single_word", "normalized")}
            if not (t.special and files.split_special_tokens):
                added.append({"text": text, "id": i, **flags})
        return {
            "vocab": files.vocab,
            "merges": [" ".join(pair) for pair in files.merges],
            "words": files.words,
            "added": added,
            "vectors": [[ids[token], token, spelled] for token, spelled in self._vectors.items()],
            "bos": self.bos,
            "eos": self.eos,
            "pad": self.pad,
            "unk": files.vocab.get(files.named.get("unk_token", "")),
            "max_length": self.max_length,
        }

    def digest(self) -> str:
        """SHA-256 of all that decides the ids."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
