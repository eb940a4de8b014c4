"""`sdlite-device.txt`: all that a program in C++ needs beside the networks, from the prompt on. The
exports whose runtimes have a sample in `export/samples` hold it; `sdlite.h` there reads it.

Lines of words with a space between them. `name` and what follows it:

    sdlite-device 2        format
    latents C h w
    guidance g             above 1: two calls of the UNet a step
    more n                 then n lines, further inputs of the UNet: name, its numbers
    decoder scaling shift  the decoder takes latents / scaling + shift
    start s                latents are s times unit normal noise
    steps n                then n lines: timestep, k, a, b, c, draws. The UNet is given k x; its
                           output v gives a x + b v + c z, z new noise where draws is 1
    tokens length bos eos pad unk      unk: -1 for none
    added n                then n lines: id, 1 where it is matched in normalized text, text
    vocab n                then n lines: id, token
    merges n               then n lines: the two parts of a merge, in the order of their ranks
    classes n              then n lines: kind, first, last code point. Kinds: letter, number, space,
                           compose (what NFC would change or might join to the character before)
    lower n                then n lines: code point, those of its lower case
"""

from __future__ import annotations

import itertools
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdlite.artifact import Artifact
from sdlite.errors import InputError
from sdlite.families import inpaints, vae_config
from sdlite.families.sd import guidance_embedding
from sdlite.sampling import Noise, Schedule, get_sampler
from sdlite.tokenizer import ClipTokenizer
from sdlite.tokenizer_files import END, START, WORDS

FILE = "sdlite-device.txt"
_CLOSE = 1e-3  # of the largest latent: a sampler that remembers nothing is reproduced to 1e-5


def write(out: Path, artifact: Artifact, latent_shape: Sequence[int]) -> Path:
    """Write the file into an export.

    Args:
        latent_shape: (B, C, h, w).

    Raises:
        InputError: the C++ code has not the model's sampler or tokenizer, or does not feed its
            UNet; the message says which.
    """
    lines = [
        "sdlite-device 2",
        _words("latents", *latent_shape[1:]),
        *_guidance(artifact),
        *_decoder(artifact),
        *_steps(artifact),
        *_tokenizer(artifact),
        *_unicode(),
    ]
    path = out / FILE
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return path


def _words(*given: object) -> str:
    return " ".join(f"{x:.9g}" if isinstance(x, float) else str(x) for x in given)


def unfed(artifact: Artifact) -> str:
    """What of a model a program that runs one text encoder, and feeds a UNet its guidance besides
    latents, timestep and text, does not have; "" where it has all.
    """
    if inpaints(artifact.config("unet"), artifact.config("vae")):
        return "its UNet reads an image and a mask besides latents, timestep and text"
    named = [t.name for t in artifact.family.unet_inputs(artifact.config("unet"))]
    encoders = list(artifact.family.tokenizers)
    if encoders == ["text_encoder"] and not {*named} - {"timestep_cond"}:
        return ""
    return (
        f"it has {' and '.join(encoders)}, and its UNet is given {', '.join(named) or 'text alone'}"
        " besides latents and timestep"
    )


def _guidance(artifact: Artifact) -> Iterator[str]:
    """A UNet that takes its guidance has one call a step, and is given the model's own."""
    unet, own = artifact.config("unet"), artifact.sampler_defaults.guidance_scale
    if why := unfed(artifact):
        raise InputError(
            f"{why}; the C++ samples run one text encoder and feed timestep_cond alone: run the"
            " networks by the Python code above, or by your own program."
        )
    named = [t.name for t in artifact.family.unet_inputs(unet)]
    yield _words("guidance", 1.0 if named else own)
    yield _words("more", len(named))
    for name in named:
        yield _words(name, *guidance_embedding(own, unet["time_cond_proj_dim"])[0].tolist())


def _decoder(artifact: Artifact) -> Iterator[str]:
    vae = vae_config(artifact.config("vae"))
    yield _words("decoder", float(vae["scaling_factor"]), float(vae.get("shift_factor") or 0))


# --- the schedule


@dataclass(frozen=True)
class Step:
    """The UNet is given `scale` x at `time`; its output v gives a x + b v + c z."""

    time: float
    scale: float
    a: float
    b: float
    c: float
    draws: bool


class _Constant:
    """Noise of one value, which counts its draws."""

    def __init__(self, value: float):
        self.value, self.drawn = value, 0

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        self.drawn += 1
        return np.full(shape, self.value, np.float32)


def steps(name: str, schedule: Schedule, n: int) -> tuple[float, list[Step]]:
    """A sampler as numbers: the scale of the first noise, and its steps.

    Raises:
        InputError: a step of this sampler depends on the steps before it.
    """
    solver = get_sampler(name, schedule, n)
    try:
        out = [_step(name, schedule, n, i) for i in range(len(solver))]
        same = _same_loop(name, schedule, n, out)
    except Exception:  # asked for a later step alone, each such sampler fails in a way of its own
        same = False
    if not same:
        raise InputError(
            f"sampler {name!r} remembers earlier steps, and {FILE} has samplers that do not:"
            " export the model with one of them, such as sampler='ddim' (--sampler ddim)."
        )
    return float(solver.init_noise_sigma), out


def _step(name: str, schedule: Schedule, n: int, i: int) -> Step:
    one, zero = np.ones((1, 1, 4, 4), np.float32), np.zeros((1, 1, 4, 4), np.float32)
    drawn = 0

    def at(x: np.ndarray, output: np.ndarray, noise: float) -> float:
        nonlocal drawn
        source = _Constant(noise)
        solver = get_sampler(name, schedule, n)
        made = solver.step(i, output, x, [source])
        drawn = source.drawn
        return float(made[0, 0, 0, 0])

    solver = get_sampler(name, schedule, n)
    scale = float(solver.scale_model_input(i, one)[0, 0, 0, 0])
    a, b, c = at(one, zero, 0), at(zero, one, 0), at(zero, zero, 1)
    if drawn > 1:
        raise ValueError(f"{drawn} draws in a step")
    return Step(float(solver.timesteps[i]), scale, a, b, c, bool(drawn))


def _same_loop(name: str, schedule: Schedule, n: int, found: Sequence[Step]) -> bool:
    """Whether the numbers sample as the sampler itself does, with a network that is none."""
    solver, shape = get_sampler(name, schedule, n), (1, 4, 4, 4)
    ours, theirs = Noise(1), Noise(1)
    x = y = solver.init_noise_sigma * Noise(0).normal(shape[1:])[None]
    for i, s in enumerate(found):
        given = solver.scale_model_input(i, x)
        x = solver.step(i, _network(given, s.time), x, [theirs])
        z = ours.normal(shape[1:])[None] if s.draws else 0
        y = s.a * y + s.b * _network(s.scale * y, s.time) + s.c * z
        if not np.abs(x - y).max() <= _CLOSE * np.abs(x).max():
            return False
    return True


def _network(x: np.ndarray, t: float) -> np.ndarray:
    return np.sin(x + np.float32(t / 400)).astype(np.float32) * np.float32(0.7)


def _steps(artifact: Artifact) -> Iterator[str]:
    schedule = Schedule.from_config(artifact.config("scheduler"))
    n = artifact.sampler_defaults.num_inference_steps
    start, found = steps(artifact.sampler_name, schedule, n)
    yield _words("start", start)
    yield _words("steps", len(found))
    for s in found:
        yield _words(s.time, s.scale, s.a, s.b, s.c, int(s.draws))


# --- the tokenizer


def _tokenizer(artifact: Artifact) -> Iterator[str]:
    config = artifact.config("text_encoder")
    files = artifact.files.part("tokenizer")
    what = ClipTokenizer.from_pretrained(files, config).to_json()
    if why := _lacking(what):
        raise InputError(f"the tokenizer {why}, which the C++ samples do not have.")
    unk = what["unk"]
    ends = (what["max_length"], what["bos"], what["eos"], what["pad"], -1 if unk is None else unk)
    yield _words("tokens", *ends)
    yield _words("added", len(what["added"]))
    for t in what["added"]:
        yield _words(t["id"], int(t["normalized"]), t["text"])
    yield _words("vocab", len(what["vocab"]))
    for token, i in what["vocab"].items():
        yield _words(i, token)
    yield _words("merges", len(what["merges"]))
    yield from what["merges"]


def _lacking(what: dict[str, Any]) -> str:
    """What of a tokenizer the C++ code does not have, in words; "" where it has all."""
    if what["words"] != WORDS and not {START, END} <= {t["text"] for t in what["added"]}:
        return f"splits text by {what['words']!r}"
    if what["vectors"]:
        return f"spells out {what['vectors'][0][1]!r} (textual inversion)"
    for t in what["added"]:
        if t["lstrip"] or t["rstrip"] or t["single_word"] or "\n" in t["text"]:
            return f"matches {t['text']!r} with the spaces or words around it"
    if odd := [t for t in what["vocab"] if len(t.split()) != 1 or t.strip() != t]:
        return f"has spaces in {odd[0]!r}"
    return ""


def _unicode() -> Iterator[str]:
    """Unicode's letters, numbers and spaces, what is not composed, and lower case."""
    composed = _second_of_pairs()
    kinds: dict[str, Callable[[str], bool]] = {
        "letter": lambda c: unicodedata.category(c)[0] == "L",
        "number": lambda c: unicodedata.category(c)[0] == "N",
        "space": lambda c: c.isspace() and not "\x1c" <= c <= "\x1f",
        "compose": lambda c: (
            c in composed or bool(unicodedata.combining(c)) or not _is_composed(c)
        ),
    }
    every = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    found = [(kind, *r) for kind, holds in kinds.items() for r in _ranges(every, holds)]
    yield _words("classes", len(found))
    for row in found:
        yield _words(*row)
    lower = {c: c.lower() for c in every if c.lower() != c}
    yield _words("lower", len(lower))
    for c, small in lower.items():
        yield _words(ord(c), *map(ord, small))


def _is_composed(c: str) -> bool:
    return unicodedata.is_normalized("NFC", c)


def _second_of_pairs() -> set[str]:
    """Characters that NFC may join to the one before: vowels of Hangul, and all that stand second
    in a canonical decomposition.
    """
    out = {chr(i) for i in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    for i in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(i)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            out.add(chr(int(parts[1], 16)))
    return out


def _ranges(every: Sequence[str], holds: Callable[[str], bool]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of code points."""
    for inside, run in itertools.groupby(every, holds):
        if inside:
            codes = [ord(c) for c in run]
            yield codes[0], codes[-1]
