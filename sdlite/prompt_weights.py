"""Weights in prompts, and prompts longer than the text encoder's window, as AUTOMATIC1111's web UI
reads them.

`(word)` is 1.1, `(word:1.3)` 1.3, `[word]` 1 / 1.1, nested ones multiply, `\\(` is a bracket of the
text, and `BREAK` ends a chunk. Tokens go to the text encoder in chunks of its window; each hidden
state is multiplied by its token's weight, and each chunk brought back to its mean.

Own code, for compel (2.5) and sd_embed run the encoder as a torch module of transformers. Source of
the rules: stable-diffusion-webui 1.10, modules/prompt_parser.py, sd_hijack_clip.py, sd_emphasis.py
("Original"). Two differ: BREAK holds inside brackets too, where the web UI reads it as a word, and
prompt and negative prompt are filled up to the same number of chunks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Never

import numpy as np

from sdlite.errors import InputError
from sdlite.families import Encoders
from sdlite.schema import Config
from sdlite.spec import Arrays
from sdlite.tokenizer import ClipTokenizer

STYLES = ("a1111",)
UP, DOWN = 1.1, 1 / 1.1
WEIGHTS = (-100.0, 100.0)
CHUNKS = 32  # of one prompt; 2,400 tokens of CLIP
MOST_SCALE = 100.0  # of what brings the mean back; more is a mean of rounding errors
COMMA = 20  # tokens at a chunk's end, at most, that go to the next one with what follows a comma

Run = tuple[str, float] | None  # text and its weight; None ends a chunk
Token = tuple[int, float] | None
_MARKS = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:(?P<weight>[+-]?[\d.]+)\)"
    r"|(?P<mark>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_BREAK = re.compile(r"\bBREAK\b")
_WHEN = re.compile(r":\s*[\d.]+\s*$")
_OTHERS = {  # of the web UI; read as text they would make another image in silence
    r"\bAND\b": "prompts joined by AND",
    r"<(lora|lyco|hypernet):": "networks named in a prompt (fuse a LoRA: convert --lora)",
}


def parse(prompt: str) -> list[Run]:
    """A prompt as runs of text of one weight, in order; neighbors of equal weight are one run.

    Raises:
        InputError: a weight that is no number or out of range, or what the web UI reads otherwise:
            `[from:to:when]`, `[one|other]`, AND, `<lora:...>`.
    """
    for pattern, what in _OTHERS.items():
        if found := re.search(pattern, prompt):
            _refuse(prompt, found[0], f"{what} are not supported; leave them out")
    parser = _Parser(prompt)
    for found in _MARKS.finditer(prompt):
        parser.take(found)
    return parser.end()


def _refuse(prompt: str, where: str, why: str) -> Never:
    shown = prompt if len(prompt) < 60 else f"{prompt[:57]}..."
    raise InputError(f"prompt_weighting='a1111': {where!r} in the prompt {shown!r}: {why}.")


class _Parser:
    """Runs so far, and where brackets were opened in them."""

    def __init__(self, prompt: str):
        self.prompt = prompt
        self.texts: list[str | None] = []
        self.weights: list[float] = []
        self.open: dict[str, list[int]] = {"(": [], "[": []}

    def take(self, found: re.Match[str]) -> None:
        """The next mark or text."""
        mark, weight, whole = found["mark"], found["weight"], found[0]
        if whole.startswith("\\"):
            self._add(found["escaped"])
        elif mark in self.open:
            self.open[mark].append(len(self.texts))
        elif weight is not None and self.open["("]:
            self._close("(", self._number(weight))
        elif mark == ")" and self.open["("]:
            self._close("(", UP)
        elif mark == "]" and self.open["["]:
            self._refuse_editing()
            self._close("[", DOWN)
        else:
            self._text(_BREAK.split(whole))

    def end(self) -> list[Run]:
        """All runs. A bracket that was not closed holds to the end."""
        for bracket, factor in (("(", UP), ("[", DOWN)):
            while self.open[bracket]:
                self._close(bracket, factor)
        out: list[Run] = []
        for text, weight in zip(self.texts, self.weights, strict=True):
            last = out[-1] if out else None
            if text is None:
                out.append(None)
            elif last is not None and last[1] == weight:
                out[-1] = (last[0] + text, weight)
            else:
                self._check(text, weight)
                out.append((text, weight))
        return out or [("", 1.0)]

    def _text(self, parts: Sequence[str]) -> None:
        """Text, with a break between its parts."""
        for i, part in enumerate(parts):
            if i > 0:
                self._add(None)
                part = part.lstrip()
            self._add(part if i == len(parts) - 1 else part.rstrip())

    def _add(self, text: str | None) -> None:
        self.texts.append(text)
        self.weights.append(1.0)

    def _close(self, bracket: str, factor: float) -> None:
        for i in range(self.open[bracket].pop(), len(self.weights)):
            self.weights[i] *= factor

    def _number(self, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            _refuse(self.prompt, f":{text})", "accepted is a number, such as (word:1.3)")

    def _check(self, text: str, weight: float) -> None:
        low, high = WEIGHTS
        if not low <= weight <= high:
            _refuse(self.prompt, text, f"its weight is {weight:g}; accepted: {low:g} to {high:g}")

    def _refuse_editing(self) -> None:
        """What changes with the steps in the web UI."""
        inside = "".join(t or "" for t in self.texts[self.open["["][-1] :])
        if "|" in inside or _WHEN.search(inside):
            why = "prompts that change with the steps are not supported; accepted: [word]"
            _refuse(self.prompt, f"[{inside}]", why)


def chunks(tokens: Iterable[Token], size: int, comma: int | None) -> list[list[tuple[int, float]]]:
    """Tokens in chunks of at most `size`. Where a chunk is full, what follows a comma among its
    last `COMMA` tokens goes into the next one. `comma`: its id.
    """
    done: list[list[tuple[int, float]]] = []
    now: list[tuple[int, float]] = []
    after = 0  # the last comma of this chunk; 0: none
    for token in tokens:
        if token is None:
            done, now, after = [*done, now], [], 0
            continue
        full = len(now) == size
        if full:
            cut = after if after and size - after < COMMA and token[0] != comma else size
            done, now, after = [*done, now[:cut]], now[cut:], 0
        now.append(token)
        if token[0] == comma and not full:
            after = len(now)
    return [*done, now] if now or not done else done


class Weighted:
    """Text encoders of a pipeline that read weights and long prompts. Stands for `Encoders`: hidden
    states come back as (B, chunks x L, D), pooled embeddings are the first chunk's.

    Args:
        inner: the pipeline's.
        tokenizers: text encoder -> its tokenizer.
        texts: of each image all prompts that are encoded for it.

    Attributes:
        count: chunks of every prompt of the call; shorter ones are filled up with empty chunks.

    Raises:
        InputError: see `parse`; a prompt of more than `CHUNKS` chunks; or images that differ in
            theirs, for an image of a batch is the image that it is alone.
    """

    def __init__(
        self,
        inner: Encoders,
        tokenizers: Mapping[str, ClipTokenizer],
        texts: Sequence[Sequence[str]],
    ):
        self.inner, self.tokenizers = inner, tokenizers
        self._weights: list[tuple[np.ndarray, np.ndarray]] = []  # ids and theirs
        every = [
            max(len(self._chunks(t, part)) for part in tokenizers for t in set(image))
            for image in texts
        ]
        self.count = max(every)
        if len(set(every)) > 1:
            raise InputError(
                f"the prompts of one call are {min(every)} to {max(every)} chunks long, and all"
                " images of a call read as many; call once for each length."
            )

    @property
    def index(self) -> Config:
        """Content of model_index.json."""
        return self.inner.index

    @property
    def unet_config(self) -> Config:
        """Content of unet/config.json."""
        return self.inner.unet_config

    def tokenize(self, prompts: Sequence[str], part: str = "text_encoder") -> np.ndarray:
        """prompts -> ids int64 (B x chunks, L), a prompt's chunks one after the other."""
        tokenizer = self.tokenizers[part]
        ids = np.full((len(prompts), self.count, tokenizer.max_length), tokenizer.pad, np.int64)
        weights = np.ones(ids.shape, np.float32)
        ids[..., 0], ids[..., 1] = tokenizer.bos, tokenizer.eos
        for i, prompt in enumerate(prompts):
            for k, chunk in enumerate(self._chunks(prompt, part)):
                row = [t for t, _ in chunk]
                ids[i, k, 1 : len(row) + 2] = [*row, tokenizer.eos]
                weights[i, k, 1 : len(row) + 1] = [w for _, w in chunk]
        rows = ids.reshape(-1, ids.shape[-1])
        self._weights.append((rows, weights.reshape(rows.shape)))
        return rows

    def encode(self, part: str, ids: np.ndarray) -> Arrays:
        """What `tokenize` gave -> the encoder's outputs, one row for each prompt."""
        weights = next(w for known, w in self._weights if known is ids)
        made = self.inner.encode(part, ids)
        return {name: self._joined(x, weights) for name, x in made.items()}

    def _joined(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(B x chunks, L, D) -> (B, chunks x L, D) with weights; (B x chunks, D) -> (B, D)."""
        if x.ndim == 2:
            return np.ascontiguousarray(x[:: self.count])
        x = emphasize(x, weights)
        return x.reshape(len(x) // self.count, -1, x.shape[-1])

    def _chunks(self, prompt: str, part: str) -> list[list[tuple[int, float]]]:
        tokenizer, tokens = self.tokenizers[part], list[Token]()
        for run in parse(prompt):
            tokens += [None] if run is None else [(t, run[1]) for t in tokenizer.ids(run[0])]
        comma = tokenizer.ids(",")
        out = chunks(tokens, tokenizer.max_length - 2, comma[0] if len(comma) == 1 else None)
        if len(out) > CHUNKS:
            _refuse(prompt, prompt[-20:], f"it is {len(out)} chunks long; accepted: up to {CHUNKS}")
        return out


def emphasize(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Hidden states times their tokens' weights, each row brought back to its mean.

    Args:
        x: float32 (B, L, D). weights: float32 (B, L).

    Raises:
        InputError: the weights of a row leave no mean to bring back.
    """
    out: np.ndarray = x * weights[..., None]
    changed = (weights != 1).any(axis=1)
    before, after = (a[changed].mean(axis=(1, 2), dtype=np.float64) for a in (x, out))
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = before / after
    if not ((scale >= 1 / MOST_SCALE) & (scale <= MOST_SCALE)).all():
        raise InputError(
            "prompt_weighting='a1111' brings an embedding back to its mean, and these weights leave"
            " next to none of it; use weights nearer to 1, all above 0."
        )
    out[changed] *= scale.astype(np.float32)[:, None, None]
    return out
