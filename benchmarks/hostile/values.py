"""JSON files and texts with values that no model has: name -> change, for each file of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from benchmarks.hostile.folder import (
    MANIFEST,
    MODEL,
    Change,
    both,
    edit_json,
    edit_text,
    gone,
    keys,
    put,
    text,
)

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
VOCAB, MERGES = "tokenizer/vocab.json", "tokenizer/merges.txt"
TOKENIZER, SPECIAL = "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
GRAPH = "unet/model.onnx"
NAN, INF = float("nan"), float("inf")
ESCAPES = "\x1b[2J\x1b[31mEVIL\x07\n\rsdlite: ok"


def deep(times: int, opened: str = '{"a":', closed: str = "}", inside: str = "1") -> str:
    """JSON of objects or lists in one another."""
    return opened * times + inside + closed * times


def _row(**row: Any) -> Change:
    """The manifest's row of the UNet's graph."""
    return edit_json(MANIFEST, lambda m: m["files"][GRAPH].update(row))


def _listed(path: str) -> Change:
    """One more file in the manifest."""
    return edit_json(
        MANIFEST, lambda m: m["files"].update({path: {"sha256": "a" * 64, "bytes": 1}})
    )


def _entries(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Each network's row in each variant."""

    def every(m: dict[str, Any]) -> None:
        for parts in m["variants"].values():
            for entry in parts.values():
                edit(entry)

    return edit_json(MANIFEST, every)


def _unets(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Each variant's parts."""
    return edit_json(MANIFEST, lambda m: [edit(parts) for parts in m["variants"].values()])


def _sampler(**values: Any) -> Change:
    own = {"name": "ddim", "num_inference_steps": 4, "guidance_scale": 1.0}
    return keys(MANIFEST, sampler={**own, **values})


def _manifest(old: str, new: str) -> Change:
    return edit_text(MANIFEST, lambda t: t.replace(old, new, 1))


def _size(value: str) -> Change:
    return _manifest('"size_multiple": 64', f'"size_multiple": {value}')


def _null_byte(m: dict[str, Any]) -> None:
    m["files"][GRAPH + "\0"] = m["files"][GRAPH]
    for parts in m["variants"].values():
        parts["unet"]["file"] = GRAPH + "\0"


OWN = (MODEL / MANIFEST).read_text()
SHA = json.loads(OWN)["files"][GRAPH]["sha256"]
BYTES = json.loads(OWN)["files"][GRAPH]["bytes"]
MANIFESTS: dict[str, Change] = {
    "format-2": keys(MANIFEST, format="2.0"),
    "format-missing": keys(MANIFEST, format=...),
    "format-int": keys(MANIFEST, format=1),
    "format-list": keys(MANIFEST, format=["1.0"]),
    "format-float": keys(MANIFEST, format=1.0),
    "format-null": keys(MANIFEST, format=None),
    "format-1.x.y": keys(MANIFEST, format="1.evil"),
    "no-files": keys(MANIFEST, files=...),
    "no-variants": keys(MANIFEST, variants=...),
    "no-name": keys(MANIFEST, name=...),
    "no-sampler": keys(MANIFEST, sampler=...),
    "no-student": keys(MANIFEST, student=...),
    "name-int": keys(MANIFEST, name=5),
    "name-list": keys(MANIFEST, name=["a"]),
    "name-path": keys(MANIFEST, name="../../evil"),
    "name-escape": keys(MANIFEST, name=ESCAPES),
    "name-huge": keys(MANIFEST, name="A" * 10_000_000),
    "student-list": keys(MANIFEST, student=[1]),
    "student-str": keys(MANIFEST, student="x"),
    "student-null": keys(MANIFEST, student=None),
    "sampler-list": keys(MANIFEST, sampler=[1]),
    "sampler-null": keys(MANIFEST, sampler=None),
    "sampler-str": keys(MANIFEST, sampler="ddim"),
    "sampler-steps-str": _sampler(num_inference_steps="4"),
    "sampler-steps-huge": _sampler(num_inference_steps=10**9),
    "sampler-steps-neg": _sampler(num_inference_steps=-4),
    "sampler-steps-null": _sampler(num_inference_steps=None),
    "sampler-steps-float": _sampler(num_inference_steps=4.5),
    "sampler-guidance-str": _sampler(guidance_scale="big"),
    "sampler-guidance-list": _sampler(guidance_scale=[1]),
    "sampler-name-int": _sampler(name=3),
    "sampler-name-list": _sampler(name=["ddim"]),
    "sampler-name-unknown": _sampler(name="evil"),
    "variants-list": keys(MANIFEST, variants=[1]),
    "variants-null": keys(MANIFEST, variants=None),
    "variants-empty": keys(MANIFEST, variants={}),
    "variants-str": keys(MANIFEST, variants="fp16"),
    "variant-parts-list": keys(MANIFEST, variants={"fp16": ["unet"]}),
    "variant-parts-null": keys(MANIFEST, variants={"fp16": None}),
    "variant-entry-str": keys(MANIFEST, variants={"fp16": {"unet": "x"}}),
    "variant-unknown-part": _unets(lambda parts: parts.update(evil=parts["unet"])),
    "variant-missing-part": _unets(lambda parts: parts.pop("unet")),
    "entry-no-file": _entries(lambda e: e.pop("file")),
    "entry-no-weights": _entries(lambda e: e.pop("weights")),
    "entry-no-storage": _entries(lambda e: e.pop("storage")),
    "entry-no-arithmetic": _entries(lambda e: e.pop("arithmetic")),
    "entry-storage-int": _entries(lambda e: e.update(storage=3)),
    "entry-arithmetic-null": _entries(lambda e: e.update(arithmetic=None)),
    "entry-file-int": _entries(lambda e: e.update(file=3)),
    "entry-file-null": _entries(lambda e: e.update(file=None)),
    "entry-weights-str": _entries(lambda e: e.update(weights="abc")),
    "entry-weights-empty": _entries(lambda e: e.update(weights=[])),
    "entry-weights-int": _entries(lambda e: e.update(weights=3)),
    "entry-weights-dict": _entries(lambda e: e.update(weights={e["weights"][0]: 1})),
    "entry-wrong-part": _unets(lambda p: p["unet"].update(file="vae_decoder/model.onnx")),
    "entry-file-is-json": _unets(lambda p: p["unet"].update(file=INDEX)),
    "files-null": keys(MANIFEST, files=None),
    "files-entry-null": edit_json(MANIFEST, lambda m: m["files"].update({GRAPH: None})),
    "files-entry-list": edit_json(MANIFEST, lambda m: m["files"].update({GRAPH: [1]})),
    "file-sha-int": _row(sha256=5),
    "file-sha-null": _row(sha256=None),
    "file-sha-empty": _row(sha256=""),
    "file-sha-upper": _row(sha256=SHA.upper()),
    "file-bytes-str": _row(bytes=str(BYTES)),
    "file-bytes-float": _row(bytes=float(BYTES)),
    "file-bytes-neg": _row(bytes=-1),
    "file-bytes-null": _row(bytes=None),
    "file-bytes-list": _row(bytes=[1]),
    "file-bytes-huge": _row(bytes=10**400),
    "file-bytes-true": _row(bytes=True),
    "file-bytes-nan": _row(bytes=NAN),
    "file-bytes-inf": _row(bytes=INF),
    "path-parent": _listed("../outside/x"),
    "path-abs": _listed("/etc/passwd"),
    "path-nul": _listed("unet/a\0b.json"),
    "path-nul-used": edit_json(MANIFEST, _null_byte),
    "path-newline": _listed("unet/a\nb.json"),
    "path-dot": _listed("."),
    "path-empty": _listed(""),
    "path-surrogate": _listed("unet/\ud800.json"),
    "path-long": _listed("a" * 5000),
    "path-dir": _listed("unet"),
    "path-dotdot-mid": _listed("unet/../../x"),
    "path-pickle": _listed("unet/w.bin"),
    "path-pickle-upper": _listed("unet/w.PT"),
    "path-pickle-dot": _listed("unet/w.pt."),
    "path-double-slash": _listed("//etc/passwd"),
    "path-dotslash": edit_json(
        MANIFEST, lambda m: m["files"].update({f"./{GRAPH}": m["files"][GRAPH]})
    ),
    "extra-key": keys(MANIFEST, evil=1),
    "self-listed": _listed(MANIFEST),
    "deep": text(MANIFEST, '{"format":' + deep(100_000, "[", "]", "") + "}"),
    "deep-obj": text(MANIFEST, deep(200_000)),
    "deep-student": _manifest(
        '"student": {', '"student": {"x":' + deep(50_000, "[", "]", "") + ","
    ),
    "nan": _size("NaN"),
    "inf": _size("Infinity"),
    "dup-keys": text(MANIFEST, OWN.rstrip()[:-1] + ', "name": "other"}'),
    "huge-int": _size("1" + "0" * 5000),
    "huge-float": _size("1e999"),
    "size-0": keys(MANIFEST, size_multiple=0),
    "size-neg": keys(MANIFEST, size_multiple=-64),
    "size-str": keys(MANIFEST, size_multiple="64"),
    "size-null": keys(MANIFEST, size_multiple=None),
    "size-list": keys(MANIFEST, size_multiple=[64]),
    "size-1": keys(MANIFEST, size_multiple=1),
    "size-63": keys(MANIFEST, size_multiple=63),
    "size-float": keys(MANIFEST, size_multiple=64.5),
    "calibration-list": keys(MANIFEST, calibration=[1]),
    "calibration-str": keys(MANIFEST, calibration="x"),
    "quality-str": keys(MANIFEST, quality="great"),
    "bom": text(MANIFEST, "\ufeff" + OWN),
    "utf16": text(MANIFEST, OWN.encode("utf-16")),
    "latin1": text(MANIFEST, b'{"format": "1.0", "name": "\xe9"}'),
    "nul-bytes": text(MANIFEST, b"\0" * 5000),
    "list": text(MANIFEST, "[]"),
    "null": text(MANIFEST, "null"),
    "string": text(MANIFEST, '"x"'),
    "number": text(MANIFEST, "1"),
    "empty-object": text(MANIFEST, "{}"),
    "trailing": text(MANIFEST, OWN + "garbage"),
    "comment": text(MANIFEST, "// c\n" + OWN),
    "100mb": text(MANIFEST, b'{"format": "1.0", "name": "' + b"A" * 100_000_000 + b'"}'),
}
OTHER_MODEL = {"no-sampler"}  # it samples as diffusers' pipeline does

INDEXES: dict[str, Change] = {
    "other-class": keys(INDEX, _class_name="EvilPipeline"),
    "sdxl": keys(INDEX, _class_name="StableDiffusionXLPipeline"),
    "flux": keys(
        INDEX, _class_name="FluxPipeline", transformer=["diffusers", "FluxTransformer2DModel"]
    ),
    "unet-other": keys(INDEX, unet=["os", "system"]),
    "custom-code": keys(INDEX, _class_name=["pipeline", "Evil"], unet=["evil_module", "Evil"]),
    "remote": keys(INDEX, unet=["https://127.0.0.1/x.py", "X"]),
    "list": text(INDEX, "[]"),
    "null": text(INDEX, "null"),
    "empty": text(INDEX, ""),
    "deep": text(INDEX, deep(100_000, "[", "]", "")),
    "no-unet": keys(INDEX, unet=...),
    "html": text(INDEX, "<html>404</html>"),
    "lfs-pointer": text(
        INDEX, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    ),
}
INDEX_TORCH = {"custom-code", "unet-other", "sdxl"}

SCHEDULERS: dict[str, Change] = {
    "T0": keys(SCHEDULER, num_train_timesteps=0),
    "T-1": keys(SCHEDULER, num_train_timesteps=-1),
    "T1": keys(SCHEDULER, num_train_timesteps=1),
    "T1e9": keys(SCHEDULER, num_train_timesteps=10**9),
    "T1e12": keys(SCHEDULER, num_train_timesteps=10**12),
    "Tstr": keys(SCHEDULER, num_train_timesteps="1000"),
    "Tfloat": keys(SCHEDULER, num_train_timesteps=1000.5),
    "Tnull": keys(SCHEDULER, num_train_timesteps=None),
    "Tlist": keys(SCHEDULER, num_train_timesteps=[1000]),
    "Ttrue": keys(SCHEDULER, num_train_timesteps=True),
    "beta-neg": keys(SCHEDULER, beta_start=-1.0, beta_end=-2.0),
    "beta-big": keys(SCHEDULER, beta_start=5.0, beta_end=10.0),
    "beta-str": keys(SCHEDULER, beta_start="x"),
    "beta-null": keys(SCHEDULER, beta_start=None),
    "beta-nan": keys(SCHEDULER, beta_start=NAN),
    "beta-inf": keys(SCHEDULER, beta_end=INF),
    "beta-zero": keys(SCHEDULER, beta_start=0.0, beta_end=0.0),
    "beta-1": keys(SCHEDULER, beta_start=1.0, beta_end=1.0),
    "trained-short": keys(SCHEDULER, trained_betas=[0.1]),
    "trained-str": keys(SCHEDULER, trained_betas="abc"),
    "trained-strs": keys(SCHEDULER, trained_betas=["a", "b"]),
    "trained-empty": keys(SCHEDULER, trained_betas=[]),
    "trained-nan": keys(SCHEDULER, trained_betas=[NAN] * 1000),
    "trained-nested": keys(SCHEDULER, trained_betas=[[1]] * 1000),
    "trained-dict": keys(SCHEDULER, trained_betas={"a": 1}),
    "pred-unknown": keys(SCHEDULER, prediction_type="evil"),
    "pred-list": keys(SCHEDULER, prediction_type=["epsilon"]),
    "pred-null": keys(SCHEDULER, prediction_type=None),
    "schedule-unknown": keys(SCHEDULER, beta_schedule="evil"),
    "spacing-unknown": keys(SCHEDULER, timestep_spacing="evil"),
    "spacing-list": keys(SCHEDULER, timestep_spacing=[1]),
    "offset-huge": keys(SCHEDULER, steps_offset=10**9),
    "offset-neg": keys(SCHEDULER, steps_offset=-(10**9)),
    "offset-str": keys(SCHEDULER, steps_offset="a"),
    "offset-leading": keys(SCHEDULER, timestep_spacing="leading", steps_offset=5000),
    "offset-leading-neg": keys(SCHEDULER, timestep_spacing="leading", steps_offset=-500),
    "clip-str": keys(SCHEDULER, clip_sample=True, clip_sample_range="x"),
    "clip-nan": keys(SCHEDULER, clip_sample=True, clip_sample_range=NAN),
    "class-unknown": keys(SCHEDULER, _class_name="EvilScheduler"),
    "class-list": keys(SCHEDULER, _class_name=["a"]),
    "class-null": keys(SCHEDULER, _class_name=None),
    "threshold": keys(SCHEDULER, thresholding=True),
    "list": text(SCHEDULER, "[]"),
    "empty": text(SCHEDULER, ""),
    "missing": gone(SCHEDULER),
    "deep": text(SCHEDULER, deep(100_000)),
}
# what a file may say, and another model means by it
SCHEDULER_OTHER = {
    "T1",
    "class-unknown",
    "class-list",
    "class-null",
    "offset-leading",
    "offset-leading-neg",
}


def _ids(made: Callable[[int], Any]) -> Change:
    def edit(vocab: dict[str, Any]) -> None:
        vocab.update({token: made(i) for token, i in vocab.items()})

    return edit_json(VOCAB, edit)


def _eos(i: Any) -> Change:
    return keys(VOCAB, **{"<|endoftext|>": i})


def _long_token(vocab: dict[str, int]) -> None:
    del vocab[next(k for k in vocab if len(k) > 4 and not k.startswith("<|"))]


def _length(value: Any) -> Change:
    return keys(TOKENIZER, model_max_length=value)


TOKENIZERS: dict[str, Change] = {
    "no-eos": keys(VOCAB, **{"<|endoftext|>": ...}),
    "no-bos": keys(VOCAB, **{"<|startoftext|>": ...}),
    "empty": text(VOCAB, "{}"),
    "list": text(VOCAB, "[]"),
    "null": text(VOCAB, "null"),
    "deep": text(VOCAB, deep(100_000)),
    "missing-token": edit_json(VOCAB, _long_token),
    "str-ids": _ids(str),
    "float-ids": _ids(lambda i: i + 0.5),
    "neg-ids": _ids(lambda i: -i - 1),
    "huge-ids": _ids(lambda i: i + 2**40),
    "big-ids": _ids(lambda i: i + 10**6),
    "dup-ids": _ids(lambda i: 0),
    "null-ids": _ids(lambda i: None),
    "eos-huge": _eos(10**6),
    "eos-neg": _eos(-1),
    "eos-str": _eos("x"),
    "eos-2e70": _eos(2**70),
    "merges-empty": edit_text(MERGES, lambda t: ""),
    "merges-broken": edit_text(MERGES, lambda t: t.replace(" ", "", 5)),
    "merges-three": edit_text(MERGES, lambda t: t.replace("\n", " x\n", 5)),
    "merges-unknown": edit_text(MERGES, lambda t: t + "zz qq\n"),
    "merges-binary": lambda folder: put(folder, MERGES, os.urandom(5000)),
    "merges-missing": gone(MERGES),
    "vocab-missing": gone(VOCAB),
    "folder-missing": gone("tokenizer"),
    "len-0": _length(0),
    "len-1": _length(1),
    "len-neg": _length(-5),
    "len-1e9": _length(10**9),
    "len-1e30": _length(1000000000000000019884624838656),
    "len-str": _length("77"),
    "len-x": _length("x"),
    "len-null": _length(None),
    "len-78": _length(78),
    "len-2": _length(2),
    "len-list": _length([77]),
    "len-inf": _length(INF),
    "len-nan": _length(NAN),
    "pad-unknown": keys(TOKENIZER, pad_token="evil"),
    "pad-int": keys(TOKENIZER, pad_token=3),
    "pad-list": keys(TOKENIZER, pad_token=["a"]),
    "pad-dict": keys(TOKENIZER, pad_token={"a": 1}),
    "config-list": text(TOKENIZER, "[]"),
    "config-auto-map": keys(
        TOKENIZER, auto_map={"AutoTokenizer": ["evil.py", None]}, tokenizer_class="Evil"
    ),
    "special-list": both(keys(TOKENIZER, pad_token=None), text(SPECIAL, "[]")),
    "special-broken": both(keys(TOKENIZER, pad_token=None), text(SPECIAL, "{")),
}
# another window or another word: a model that says so is another model
TOKENIZER_OTHER = {"config-auto-map", "merges-empty", "len-2", "len-str", "missing-token", "len-78"}

CONFIGS: dict[str, Change] = {
    "unet-sample-0": keys(UNET, sample_size=0),
    "unet-sample-neg": keys(UNET, sample_size=-8),
    "unet-sample-1e6": keys(UNET, sample_size=10**6),
    "unet-sample-str": keys(UNET, sample_size="8"),
    "unet-sample-null": keys(UNET, sample_size=None),
    "unet-sample-3": keys(UNET, sample_size=[8, 8, 8]),
    "unet-sample-float": keys(UNET, sample_size=8.5),
    "unet-no-sample": keys(UNET, sample_size=...),
    "unet-channels-0": keys(UNET, in_channels=0),
    "unet-channels-neg": keys(UNET, in_channels=-1),
    "unet-channels-1e9": keys(UNET, in_channels=10**9),
    "unet-channels-str": keys(UNET, in_channels="4"),
    "unet-channels-5": keys(UNET, in_channels=5),
    "unet-no-channels": keys(UNET, in_channels=...),
    "unet-list": text(UNET, "[]"),
    "unet-missing": gone(UNET),
    "vae-blocks-empty": keys(VAE, block_out_channels=[]),
    "vae-blocks-1e5": keys(VAE, block_out_channels=[1] * 100_000),
    "vae-blocks-int": keys(VAE, block_out_channels=4),
    "vae-blocks-null": keys(VAE, block_out_channels=None),
    "vae-no-blocks": keys(VAE, block_out_channels=...),
    "vae-blocks-str": keys(VAE, block_out_channels="abcd"),
    "vae-scale-0": keys(VAE, scaling_factor=0),
    "vae-scale-nan": keys(VAE, scaling_factor=NAN),
    "vae-scale-str": keys(VAE, scaling_factor="x"),
    "vae-scale-null": keys(VAE, scaling_factor=None),
    "vae-scale-inf": keys(VAE, scaling_factor=INF),
    "vae-shift-str": keys(VAE, shift_factor="x"),
    "vae-shift-nan": keys(VAE, shift_factor=NAN),
    "vae-scale-list": keys(VAE, scaling_factor=[1, 2, 3]),
}
TABLES: dict[str, tuple[str, dict[str, Change], set[str]]] = {
    "sched": ("scheduler", SCHEDULERS, SCHEDULER_OTHER),
    "tok": ("tokenizer", TOKENIZERS, TOKENIZER_OTHER),
    "config": ("network config", CONFIGS, set()),
}


def swapped(vocab: dict[str, int]) -> None:
    """Red is blue."""
    vocab["red</w>"], vocab["blue</w>"] = vocab["blue</w>"], vocab["red</w>"]


VALID: dict[str, Change] = {  # values that a model may have, but not this one
    "valid-vocab-swap": edit_json(VOCAB, swapped),
    "valid-scheduler-beta": keys(SCHEDULER, beta_end=0.03),
    "valid-scaling-factor": keys(VAE, scaling_factor=5.0),
}
