"""Prompt to image: tokenize -> encode_text -> init_latents -> denoise -> decode.

Each stage is callable alone and takes exactly what the one before returns; `Pipeline.__call__`
reads as these five lines.
"""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, TypedDict, Unpack

import numpy as np

from sdlite import (
    arguments,
    backends,
    embeddings,
    families,
    habits,
    hub,
    images,
    memory,
    preview,
    prompt_weights,
    running,
    tiling,
)
from sdlite._version import __version__
from sdlite.artifact import Artifact, SamplerDefaults
from sdlite.checkpoints import is_file
from sdlite.controlling import ControlImage
from sdlite.editing import Edit, Start
from sdlite.errors import (
    CONVERT_NEEDS,
    InputError,
    MissingExtraError,
    SdliteWarning,
    ShapeError,
    need,
)
from sdlite.errors import Cancelled as Cancelled
from sdlite.families import Conditions
from sdlite.habits import Generators
from sdlite.io import writing
from sdlite.sampling import Control, Draws, Noise, Sampler, Schedule, denoise, get_sampler, guided
from sdlite.spec import Arrays, latent_size
from sdlite.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

# (step from 1, number of steps, latents (B, C, h, w)) -> False cancels
Callback = Callable[[int, int, np.ndarray], object]
# diffusers' (pipeline, step from 0, timestep, {"latents"}) -> {"latents"} or {}
StepEnd = Callable[["Pipeline", int, float, dict[str, np.ndarray]], Mapping[str, np.ndarray]]

# An image of this many times the trained area, or less than this share of it, is warned about.
FAMILIAR = (0.25, 2.5)
# What one call may make where neither it nor the model says, in pixels: 8 images of the model's own
# size, at least 12 of 512 px, at most 8 of 1024 px, whatever size a stranger's configuration names.
MAX_PIXELS = (3 << 20, 8 << 20)
OWN_IMAGES = 8


@dataclass
class PipelineOutput:
    """`images`, `seeds` and `metadata` have one entry per image; `timings` is seconds per stage of
    the whole call.

    With `output_type="np"` images is float32 (B, H, W, 3) in [0, 1], with "latent" float32 (B, C,
    h, w). `metadata` says how an image was made; PIL images have it in their `info`, and
    `sdlite.images.save` writes it into the file. `calls` is how many calls of the UNet made an
    image: fewer than there are steps where an image was edited.
    """

    images: list[Image]
    seeds: list[int]
    timings: dict[str, float]
    report: backends.Report
    metadata: list[dict[str, str]]
    calls: int = 0


def _with_graphs(artifact: Artifact, backend: str, precision: str) -> tuple[Artifact, str]:
    """The model, converted where it is a plain diffusers folder and the backend named runs graphs;
    and what there is to note.

    Raises:
        MissingExtraError: a package that converting needs is not installed.
    """
    plain = artifact.listing is None and precision in ("fp32", "fp16")
    named = backend in backends.names() and backends.get_backend(backend).graphs
    if not plain or not named:
        return artifact, ""
    try:
        from sdlite.converter import convert_cached
    except ModuleNotFoundError as e:
        raise MissingExtraError(
            f"{artifact.folder} has no ONNX graphs, and making them needs {e.name!r}: pip install"
            " 'sdlite[export]', or use backend='torch'."
        ) from e
    note = f"converted to ONNX from {artifact.folder}, once, into the cache"
    return convert_cached(artifact), note


def _opened(
    model: str | Path, revision: str | None, variant: str | None, clip_skip: int | None
) -> tuple[Artifact, str]:
    """The model, and what there is to note: one file of weights is converted once, and so is a
    folder whose text encoders are to do without layers.
    """
    note = f"converted from {model}, once, into the cache"
    if not is_file(model):
        artifact = Artifact.open(hub.resolve(model, revision, variant), variant=variant)
        if clip_skip is None:
            return artifact, ""
        if artifact.listing is not None:
            raise InputError(
                f"clip_skip={clip_skip!r} is for diffusers folders, hub repositories and files of"
                f" weights; {artifact.folder} is a model of sdlite. Convert what it was made of"
                f" again, with clip_skip={clip_skip!r} (`sdlite convert --clip-skip {clip_skip}`)."
            )
        need(f"clip_skip={clip_skip!r}", "export", *CONVERT_NEEDS)
        from sdlite.converter import convert_cached

        return convert_cached(artifact, clip_skip), note
    for name, given, whose in (
        ("revision", revision, "hub models"),
        ("variant", variant, "diffusers folders and hub models"),
    ):
        if given is not None:
            raise InputError(f"{name}={given!r} is for {whose}; {str(model)!r} is a file.")
    need(f"{model} is one file, and opening it", "export", *CONVERT_NEEDS)
    from sdlite.converter import convert_cached_file

    return convert_cached_file(Path(model), clip_skip), note


class _Call(running.Call):
    """With the tiling and the report that it begins with."""

    def __init__(self, chosen: tiling.Tiling | None, report: backends.Report):
        super().__init__()
        self.tiling, self.report = chosen, report


def _each(name: str, given: object, count: int, repeat: int) -> list[str]:
    """One text for each image, of one or of one for each prompt.

    Raises:
        InputError: another number of them, or no texts.
    """
    if isinstance(given, str):
        return [given] * count
    out = [n for n in arguments.texts(name, given) for _ in range(repeat)]
    if len(out) != count:
        raise InputError(
            f"{len(out) // repeat} {name.replace('_', ' ')}s for {count // repeat} prompts; give"
            " one, or one for each."
        )
    return out


def _with_notes(report: backends.Report, notes: Sequence[str]) -> backends.Report:
    """The report with these notes too: a new one where there is something new, for others may be
    reading it.
    """
    new = [n for n in notes if n not in report.notes]
    return replace(report, notes=[*report.notes, *new]) if new else report


def _check_loading(
    model: object, threads: object, backend: object, device: object, **texts: object
) -> None:
    """Types of what a pipeline is loaded with; names are checked by those who know them.

    Raises:
        InputError: a wrong type, or a number of threads that no machine has.
    """
    arguments.path("model", model, arguments.MODEL)
    arguments.text("backend", backend)
    arguments.text("device", device)
    for name, value in texts.items():
        arguments.optional(arguments.text, name, value)
    arguments.threads(threads)


class _Told(TypedDict, total=False):
    """What SDXL's family, or a model with a ControlNet, takes in a call besides."""

    prompt_2: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    pooled_prompt_embeds: object
    negative_pooled_prompt_embeds: object
    control_image: object
    controlnet_conditioning_scale: float | None
    control_guidance_start: float | None
    control_guidance_end: float | None
    guess_mode: bool | None


class _Class(type):
    """The class answers diffusers' habits too: `Pipeline.from_single_file`."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)
            raise habits.attribute(name, ["from_pretrained"])


class Pipeline(metaclass=_Class):
    """Text-to-image with one student on one backend. Build it with `from_pretrained`.

    Threads may share a pipeline: each call gives the image that it gives alone, bit by bit. In
    asyncio: `await asyncio.to_thread(pipe, prompt, seed=1)`. `cancel` stops the calls that run,
    `close` (or the end of a `with` block) frees the networks.
    """

    def __init__(self, artifact: Artifact, networks: backends.Networks):
        self.artifact, self.report = artifact, networks.report
        self._networks: backends.Networks | None = networks  # None: the pipeline is closed
        self.family, self.index = artifact.family, artifact.index
        self.tokenizers = {
            part: ClipTokenizer.from_pretrained(artifact.files.part(folder), artifact.config(part))
            for part, folder in self.family.tokenizers.items()
        }
        self.tokenizer = self.tokenizers["text_encoder"]
        self.scheduler_config = artifact.config("scheduler")
        self.schedule = Schedule.from_config(self.scheduler_config)
        self.unet_config, self.vae_config = (
            artifact.config("unet"),
            families.vae_config(artifact.config("vae")),
        )
        self.stride = families.vae_stride(self.vae_config)
        self.channels = families.latent_channels(self.vae_config)  # of the latents
        self.inpaints = families.inpaints(self.unet_config, self.vae_config)
        self.defaults = artifact.sampler_defaults
        self.tiling: tiling.Tiling | None = None
        self._map: np.ndarray | None = None  # of previews
        self.max_pixels: int | None = None  # no limit, for pipelines that are made of networks
        self._warned: set[str] = set()
        self._calls: set[running.Call] = set()
        # of what the threads share: tiling with report, calls, warnings
        self._lock = threading.Condition()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *positional: Never,
        precision: str | None = None,
        backend: str = "auto",
        device: str = "cpu",
        revision: str | None = None,
        variant: str | None = None,
        threads: int | None = None,
        arithmetic: str | None = None,
        max_pixels: int | None = None,
        clip_skip: int | None = None,
        **others: Never,
    ) -> Pipeline:
        """Load a model.

        Args:
            model: name of an embedded model ("emoji") or a published one ("bk-sdm-tiny"), a model
                folder, or a hub id "org/name".
            precision: "fp32", "fp16", "int8-dynamic" or "int8-static"; "bf16" for engines that were
                exported so (backend "tensorrt").
                None: the first one that the model holds, or what the folder was exported in,
                    else fp32.
            backend: "auto" (see `report`), "onnxruntime", "openvino", "tensorrt" or "torch". The
                first two convert a plain diffusers folder once, into the cache.
            device: "cpu", "cuda"; "gpu" or "npu" on "openvino".
            revision: branch, tag or commit, for hub ids and published names.
            variant: which weights of a diffusers folder or hub repository that has several, such as
                "fp16" or "non_ema"; a network without it is taken from its default weights.
            threads: CPU threads per network call, 1 to 4 for each CPU (64 on small machines); None
                is the engine's own choice.
            arithmetic: what float layers are computed in: "float32", "bfloat16" or "float16", on
                "openvino" and "torch". None: float32 for fp32; for fp16 and what int8 leaves in
                float, the engine's half precision where it has one. The report says which it is.
            max_pixels: height x width x images that one call may make; None is the model's own,
                else 8 images of the model's own size, at least 3 and at most 8 million. Memory and
                time of a call grow with them.
            clip_skip: how many layers the text encoders do without, as diffusers counts; converts a
                folder or file once, into the cache, on every backend. See `sdlite.convert`.
            positional, others: none; diffusers' keywords are answered with ours.

        Raises:
            UnknownNameError, PrecisionError, MissingExtraError, ArtifactError, HubError: see
                `sdlite.errors`; each names the next step.
        """
        habits.positional(
            positional, "the model", "Pipeline.from_pretrained(model, precision=..., backend=...)"
        )
        habits.keywords(others, habits.LOAD, cls.from_pretrained.__kwdefaults__ or ())
        optional = {"precision": precision, "revision": revision, "arithmetic": arithmetic}
        optional |= {"variant": variant}
        _check_loading(model, threads, backend, device, **optional)
        most = arguments.optional(arguments.integer, "max_pixels", max_pixels, 1)
        arguments.optional(arguments.integer, "clip_skip", clip_skip, 0)
        artifact, opened = _opened(model, revision, variant, clip_skip)
        precision = artifact.precision if precision is None else precision
        artifact, converted = _with_graphs(artifact, backend, precision)
        pipe = cls(
            artifact, backends.load(artifact, precision, backend, device, threads, arithmetic)
        )
        pipe.report.notes += [note for note in (opened, converted) if note]
        if row := hub.known(model):
            pipe.defaults = SamplerDefaults(row.steps, row.guidance)
        pipe.max_pixels = pipe._most() if most is None else most
        if artifact.failed:
            pipe.report.notes.append(f"failed its quality check: {'; '.join(artifact.failed)}")
            warnings.warn(
                f"{artifact.folder} {pipe.report.notes[-1]}; it is kept to be looked at.",
                SdliteWarning,
                stacklevel=2,
            )
        return pipe

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save the model in `folder` (new or empty), verified, all or nothing.

        Copied is what the manifest or the export's report lists; of a plain diffusers folder what
        sdlite runs: networks, tokenizer, scheduler, and the license beside them. Nothing else that
        lies there, and no pickle.

        Raises:
            InputError: `folder` is not empty, or cannot be written. ArtifactError: a file of the
                model is damaged.
        """
        out = Path(arguments.path("folder", folder))
        with writing(out) as tmp:
            self.artifact.save(tmp)
        return out

    def enable_vae_tiling(self, size_px: int | None = None, overlap: float = 0.25) -> None:
        """Decode images larger than a tile in overlapping, blended tiles, and encode those that are
        edited so: the autoencoder's memory no longer grows with the image.

        Args:
            size_px: side of a tile, at most; default as in diffusers: the size that the autoencoder
                was made for. 320 makes four tiles of a 512 px image, each a third of its area.
            overlap: share of a tile that its neighbor has too, at least.

        Raises:
            InputError: not a multiple of the VAE's stride, or an overlap outside 0 to 1.
        """
        side = (
            self.vae_config.get("sample_size") or 512
            if size_px is None
            else arguments.integer("tile size_px", size_px)
        )
        chosen = tiling.Tiling(side, arguments.number("tile overlap", overlap))
        chosen.check(self.stride)
        if self.networks.size is not None and max(self.networks.size) > side:
            raise InputError(
                f"tile size_px={side}: this export's decoder takes its {max(self.networks.size)}"
                " pixels at once alone."
            )
        self._set_tiling(chosen)

    def disable_vae_tiling(self) -> None:
        """Decode every image at once again."""
        self._set_tiling(None)

    def _set_tiling(self, chosen: tiling.Tiling | None) -> None:
        """With its note, for the calls that begin from now on."""
        with self._lock:
            notes = [n for n in self.report.notes if n != str(self.tiling)]
            self.report = replace(self.report, notes=[*notes, str(chosen)] if chosen else notes)
            self.tiling = chosen

    # --- running

    @property
    def networks(self) -> backends.Networks:
        """The networks that run.

        Raises:
            Cancelled: in a call that was cancelled. InputError: the pipeline is closed.
        """
        if self._networks is None:
            running.check()
            raise InputError(
                "the pipeline is closed and its networks are freed; load it again with"
                " Pipeline.from_pretrained."
            )
        return self._networks

    def cancel(self) -> None:
        """Stop the calls that run now, in whatever threads: each raises `Cancelled`. Later calls
        are not touched.

        onnxruntime and OpenVINO stop inside a step, within about a tenth of a second; torch and
        TensorRT after the network that they are in. To stop one call, return False from its
        callback.
        """
        with self._lock:
            for call in self._calls:
                call.cancelled = True

    def close(self) -> None:
        """Stop the calls that run, wait for them, and give the networks' memory back. A closed
        pipeline refuses calls.

        Pipelines that share networks are closed together.
        """
        networks = self._networks
        with self._lock:
            self._networks = None
            self.cancel()
            if not running.inside():  # a callback cannot wait for its own call
                self._lock.wait_for(lambda: not self._calls)
        if networks is not None:
            networks.close()
            del networks
            gc.collect()
            memory.trim()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @contextmanager
    def _call(self) -> Iterator[_Call]:
        """One call, from here to its end, which `cancel` sees. What its networks say is noted, and
        warned about once.
        """
        with self._lock:
            self.networks  # noqa: B018 a closed pipeline refuses the call
            call = _Call(self.tiling, self.report)
            self._calls.add(call)
        try:
            with running.entered(call):
                yield call
                running.check()
        finally:
            with self._lock:
                self._calls.discard(call)
                self._lock.notify_all()
                self.report = _with_notes(self.report, call.said)
            for text in call.said:
                self._warn(f"{self.report.model}: {text}.", stacklevel=5)

    # --- the five stages

    def tokenize(self, prompts: Sequence[str], part: str = "text_encoder") -> np.ndarray:
        """prompts -> ids int64 (B, L) for one of the model's text encoders; one warning shows what
        did not fit the window.
        """
        return self.tokenizers[part](arguments.texts("prompts", prompts))

    def encode_text(self, ids: np.ndarray) -> np.ndarray:
        """ids int64 (B, L) -> embeds float32 (B, L, D) of the model's first text encoder."""
        [out] = self.encode("text_encoder", ids).values()
        return out

    def encode(self, part: str, ids: np.ndarray) -> Arrays:
        """ids int64 (B, L) -> what one of the model's text encoders gives, by name, float32."""
        out = self.networks.parts[part](input_ids=ids)
        for name, values in out.items():
            images.finite(values, f"{name} of the {part.replace('_', ' ')}")
        return out

    def conditions(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        guidance_scale: float,
        height: int,
        width: int,
        prompt_weighting: str | None = None,
        **more: Any,
    ) -> tuple[Conditions, Conditions | None]:
        """What the UNet is given of prompts, guidance and size: name -> array with a row for each
        image; and the same of the negative prompts where guidance makes two rows of each image.
        `more`: of the family's own keywords, see `families.Call`.

        Raises:
            InputError: a prompt that `prompt_weights` refuses. ShapeError: a number of tokens that
                this UNet does not take.
        """
        twice = guided(guidance_scale) and not self.family.guides_itself(self.unet_config)
        negatives = negatives if twice else []
        call = families.Call(prompts, negatives, guidance_scale, height, width, more)
        cond, uncond = self.family.conditions(self._reader(call, prompt_weighting), call)
        shapes = [c["encoder_hidden_states"].shape for c in (cond, uncond) if c]
        if shapes[0] != shapes[-1]:
            raise ShapeError(
                f"prompt_embeds are {list(shapes[0])}, the negative ones {list(shapes[-1])}; give"
                " prompt_embeds= and negative_prompt_embeds= of one shape."
            )
        self._takes(shapes[0][1])
        return cond, uncond

    def _reader(self, call: families.Call, style: str | None) -> families.Encoders:
        """What reads the prompts of a call: plain text, or text with weights."""
        if style is None:
            return self
        texts = [call.prompts, call.negatives, *(call.more.get(k, ()) for k in self.family.texts)]
        each = [[t[i] or "" for t in texts if t] for i in range(len(call.prompts))]
        reader = prompt_weights.Weighted(self, self.tokenizers, each)
        self._takes(reader.count * self.tokenizer.max_length)
        return reader

    def _takes(self, tokens: int) -> None:
        """Refuse a number of hidden states that the UNet cannot be given.

        Raises:
            ShapeError: its graph was made for another.
        """
        held = backends.fixed_tokens(self.networks.unet)
        if held not in (None, tokens):
            raise ShapeError(
                f"the prompts make {tokens} hidden states, and this model's UNet was made for"
                f" {held}: shorten them, use backend='torch' on a model with weights, or convert"
                " the model again (sdlite convert), which makes a graph for any number."
            )

    def init_latents(self, noise: Sequence[Draws], height: int, width: int) -> np.ndarray:
        """One generator per image -> unit normal latents float32 (B, C, height/8, width/8)."""
        shape = (self.channels, height // self.stride, width // self.stride)
        return np.stack([n.normal(shape) for n in noise])

    def denoise(
        self,
        latents: np.ndarray,
        conditions: np.ndarray | Conditions,
        noise: Sequence[Draws],
        solver: Sampler,
        *,
        uncond: np.ndarray | Conditions | None = None,
        guidance_scale: float = 1.0,
        noised: bool = False,
        beside: np.ndarray | None = None,
        after: Callable[[int, np.ndarray], np.ndarray] | None = None,
        watch: Callable[[int, np.ndarray], None] | None = None,
        control: ControlImage | None = None,
    ) -> Iterator[np.ndarray]:
        """Unit normal latents (B, C, h, w) and conditions -> latents after each step of `solver`.

        Args:
            conditions: what the family makes of the prompts; an array alone is their embeds
                (B, L, D).
            uncond: the same of the negative prompts; None runs without guidance, one network row
                per image.
            noise: the images' generators, for samplers that draw again.
            noised, beside, after, watch: see `sampling.denoise`, for edits and previews.
            control: a control image of the latents' size in pixels.
        """
        return denoise(
            self._unet(control, len(solver) - solver.begin),
            latents,
            conditions,
            noise,
            solver,
            uncond=uncond,
            guidance_scale=guidance_scale,
            noised=noised,
            beside=beside,
            after=after,
            watch=watch,
        )

    def _unet(self, control: ControlImage | None, calls: int) -> Callable[..., np.ndarray]:
        """The UNet as the sampling loop calls it, `calls` times, with what a ControlNet adds."""
        unet, family, config = self.networks.unet, self.family, self.unet_config
        add: Callable[[Arrays], Arrays | None] = lambda inputs: None  # noqa: E731
        if control is not None:
            add = control.adding(self.network("controlnet"), config.get("out_channels", 4), calls)

        def call(**inputs: np.ndarray) -> np.ndarray:
            further = add(inputs) or family.uncontrolled(config, inputs["sample"])
            return unet(**inputs, **further)["out_sample"]

        return call

    def encode_image(self, pixels: np.ndarray, noise: Sequence[Draws]) -> np.ndarray:
        """pixels float32 (B, 3, H, W) in [-1, 1] -> latents float32 (B, C, h, w), drawn from each
        image's posterior by its generator.

        Raises:
            InputError: the model holds no encoder.
        """
        return self._encoded(pixels, noise, self.tiling)

    def _encoded(
        self, pixels: np.ndarray, noise: Sequence[Draws], tiles: tiling.Tiling | None
    ) -> np.ndarray:
        network, name = self.network("vae_encoder"), self.artifact.spec("vae_encoder").output.name

        def encoded(tile: np.ndarray) -> np.ndarray:
            return network(sample=tile)[name]

        z = tiling.encode(encoded, pixels, tiles, self.stride) if tiles else encoded(pixels)
        if name != "latent_sample":
            mean, log_variance = np.split(z, 2, axis=1)
            spread = np.exp(np.clip(log_variance, -30, 20) * np.float32(0.5))
            z = mean + spread * np.stack([n.normal(mean.shape[1:]) for n in noise])
        return families.LatentScale.of(self.vae_config).from_encoder(
            images.finite(z, "the latents of the VAE encoder")
        )

    def network(self, part: str) -> backends.Network:
        """One of the model's networks; one that edits or control images alone need is opened at its
        first call.

        Raises:
            InputError: the model does not hold it.
        """
        networks = self.networks
        with self._lock:
            if part not in networks.parts:
                if networks.opener is None or not self.holds(part):
                    use = "control images" if part == "controlnet" else "edits"
                    raise InputError(
                        f"{self.report.model} holds no {part}, which {use} need; convert the model"
                        " again (sdlite convert), or use backend='torch' on a model with weights."
                    )
                networks.parts[part], row = networks.opener(part)
                self.report = replace(self.report, networks=[*self.report.networks, row])
            return networks.parts[part]

    def holds(self, part: str) -> bool:
        """Whether the pipeline's backend finds a network in the model."""
        if part in self.networks.parts:
            return True
        if not backends.get_backend(self.report.backend).graphs:
            known = (*self.artifact.parts, *self.family.optional)
            return self.artifact.has_weights and part in known
        return part in self.artifact.held_parts(self.report.precision)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """latents (B, C, h, w) -> images uint8 (B, H, W, 3)."""
        with self._call() as call:
            return images.to_uint8(self._pixels(latents, call.tiling))

    def _pixels(self, latents: np.ndarray, tiles: tiling.Tiling | None) -> np.ndarray:
        """latents (B, C, h, w) -> the decoder's float32 (B, 3, H, W) in [-1, 1]."""
        z = families.LatentScale.of(self.vae_config).to_decoder(latents)
        if tiles is None:
            return self._decoded(z)
        return tiling.decode(self._decoded, z, tiles, self.stride)

    def _decoded(self, latents: np.ndarray) -> np.ndarray:
        return self.networks.vae_decoder(latent_sample=latents)["sample"]

    # --- the call

    def stream(
        self, prompt: str | Sequence[str] = (), **arguments: Any
    ) -> Iterator[preview.Preview | PipelineOutput]:
        """The same call, with a small image of what each step predicts, and at last the output.

        It runs in a thread of its own from the first `next` on. Closing the iterator, or leaving
        it, stops the call.

        Args:
            arguments: of a call; its callback is called too.

        Yields:
            Preview: of each step. PipelineOutput: what the call returns, last.

        Raises:
            What a call raises.
        """
        watch = preview.Watch(self._colors, arguments.pop("callback", None))
        yield from watch.run(lambda: self(prompt, callback=watch, **arguments))

    def _colors(self) -> np.ndarray:
        """The map of previews, the model's own or fitted once."""
        with self._lock:
            if self._map is None:
                own = self.artifact.manifest.preview if self.artifact.manifest else None
                self._map = None if own is None else np.array(own, np.float32)
        if self._map is None:
            fixed = [s // self.stride for s in self.networks.size or ()]
            side = (fixed[0], fixed[1]) if fixed else (preview.SIDE, preview.SIDE)
            scale = families.LatentScale.of(self.vae_config)
            self._map = preview.fitted(
                lambda z: self._decoded(scale.to_decoder(z)), self.channels, side
            )
        return self._map

    def __call__(
        self,
        prompt: str | Sequence[str] = (),
        *positional: Never,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        timesteps: Sequence[int] | Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        image: object = None,
        mask_image: object = None,
        strength: float | None = None,
        padding_mask_crop: int | None = None,
        prompt_weighting: str | None = None,
        prompt_embeds: object = None,
        negative_prompt_embeds: object = None,
        latents: np.ndarray | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        generator: Generators | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepEnd | None = None,
        max_pixels: int | None = None,
        **others: Unpack[_Told],
    ) -> PipelineOutput:
        """Generate images.

        Args:
            prompt: one or several; each makes `num_images_per_prompt` images, in order.
            negative_prompt: what guidance leads away from; default "". Needs guidance_scale above
                1.
            num_inference_steps, guidance_scale, sampler: default to the model's own. guidance g is
                u + g (c - u) above 1; 0 to 1 runs without guidance, one network row per image, as
                in diffusers.
            timesteps, sigmas: descending lists of the call's own steps, for the samplers whose
                scheduler takes them in diffusers (`sampling.Control`).
            eta: 0 to 1, noise drawn again in each step of ddim and tcd; default 0.
            image: what is edited, a PIL image, path or array, or one for each prompt
                (`image_input`). Without height and width the call has its size, rounded down.
            mask_image: white is painted anew, the rest stays bit by bit; of the image's size.
            strength: 0 to 1, the share of the steps that is made: 0 gives the image back through
                the autoencoder, 1 ignores it but for what a mask keeps. Default 0.8, with a mask 1.
            padding_mask_crop: pixels around the mask; that part of the image is worked on at the
                call's size and put back.
            prompt_weighting: "a1111" reads (word:1.3), [word] and BREAK in the prompts, and prompts
                longer than the window (`prompt_weights`). None: a prompt is text, as in diffusers.
            prompt_embeds, negative_prompt_embeds: float (B, L, D) of numpy or torch in place of
                the prompts; SDXL's family takes pooled_prompt_embeds and
                negative_pooled_prompt_embeds (B, D) with them.
            seed: image i uses seed + i, or seed[i], 0 to 2**64 - 1; None draws one. Equal to
                diffusers with one CPU generator per image.
            height, width: pixels; default to the size that the student was trained at.
            latents: unit normal float (B, C, height/8, width/8) instead of the draw.
            callback: called after each step with (step from 1, steps, latents); return False to
                cancel.
            progress: show a tqdm bar.
            generator: as in diffusers: one new torch CPU generator, or a list of one for each
                image, instead of seed.
            output_type: "pil", "np" or "latent", as in diffusers.
            callback_on_step_end: as in diffusers, with numpy latents: (pipe, step from 0, timestep,
                {"latents"}) -> dict.
            max_pixels: height x width x images that this call may make; default is
                `pipe.max_pixels`.
            others: of SDXL's family prompt_2, negative_prompt_2 (for its second text encoder),
                original_size, crops_coords_top_left, target_size and the same with negative_, as
                in diffusers. Of models with a ControlNet control_image, scaled to the call's size
                (beside an image as that is), controlnet_conditioning_scale,
                control_guidance_start, control_guidance_end and guess_mode, as in diffusers'
                StableDiffusionControlNetImg2ImgPipeline. Else none; diffusers' habits are answered
                with ours.
            positional: none.

        Raises:
            InputError, ShapeError, UnknownNameError: an argument is not accepted. Cancelled: by the
                callback, `cancel` or `close`.
        """
        habits.positional(
            positional, "the prompt", "pipe(prompt, height=..., num_inference_steps=...)"
        )
        told = self.family.keywords
        own: dict[str, object] = {k: v for k, v in others.items() if k in told}
        unknown = {k: v for k, v in others.items() if k not in told}
        habits.keywords(unknown, habits.CALL, type(self).__call__.__kwdefaults__ or ())
        arguments.one_of("output_type", output_type, habits.OUTPUTS)
        repeat = arguments.integer(
            "num_images_per_prompt", num_images_per_prompt, 1, arguments.MOST_IMAGES
        )
        own |= {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        embeds = self._embeds(own, repeat)
        prompts, negatives = self._prompts(prompt, negative_prompt, embeds, repeat)
        control = Control.of(timesteps, sigmas, eta)
        steps, scale = self._steps(num_inference_steps, control), self._guidance(guidance_scale)
        more = {**self._more(own, len(prompts), repeat), **embeds}
        self._refuse_negatives([*negatives, *more.get("negative_prompt_2", ())], embeds, scale)
        style = self._style(prompt_weighting, embeds)
        name = self.default_sampler if sampler is None else arguments.text("sampler", sampler)
        solver = get_sampler(name, self.schedule, steps, control)
        seeds, noise = self._noise(seed, generator, len(prompts))
        edit = Edit.of(image, mask_image, strength, padding_mask_crop, len(prompts))
        self._refuse_unmasked(edit)
        hint = ControlImage.of(own, edit, len(prompts))
        height, width = self._edit_size(edit or hint, height, width)
        height, width, start = self._size(height, width, latents, len(prompts))
        self._within(len(prompts), height, width, max_pixels)
        self._familiar(height, width)
        edit = self._scheduled(edit, solver, height, width)
        hint = hint.fitted(height, width, edit) if hint else None
        listen = self._listener(callback, callback_on_step_end, solver)
        said = {**control.said(), **({"prompt_weighting": style} if style else {})}
        said |= {"strength": f"{edit.strength:g}"} if edit else {}
        said |= hint.said() if hint else {}
        about = self._metadata(prompts, negatives, seeds, name, steps, scale, said)
        about = [{**row, **embeddings.said(embeds, i)} for i, row in enumerate(about)]
        with self._call() as call:
            begin = time.perf_counter()
            sizes = (height, width)
            cond, uncond = self.conditions(prompts, negatives, scale, *sizes, style, **more)
            encoded = time.perf_counter()
            first = self._start(edit, solver, noise, sizes, start, call.tiling)
            started = time.perf_counter()
            given: dict[str, Any] = {"uncond": uncond, "guidance_scale": scale, "control": hint}
            given |= {"noised": first.noised, "after": first.after, "beside": first.beside}
            given |= {"watch": preview.watching(callback, call)}
            run = self.denoise(first.latents, cond, noise, solver, **given)
            x = first.latents
            for step, x in enumerate(self._bar(run, len(solver) - solver.begin, progress), 1):
                listen(step, x)
                running.check()
            denoised = time.perf_counter()
            made = self._images(x, output_type, about, call.tiling, edit)
            end = time.perf_counter()
        timings = {"text_encoder": encoded - begin, "unet": denoised - started}
        timings |= {"vae_encoder": started - encoded} if edit else {}
        timings |= {"vae_decoder": end - denoised, "total": end - begin}
        report, calls = _with_notes(call.report, call.said), len(solver) - solver.begin
        return PipelineOutput(made, seeds, timings, report, about, calls)

    def _images(
        self,
        latents: np.ndarray,
        output_type: str,
        about: Sequence[dict[str, str]],
        tiles: tiling.Tiling | None,
        edit: Edit | None = None,
    ) -> Any:
        """latents (B, C, h, w) -> PIL images that know how they were made, or an array."""
        if output_type == "latent":
            return latents
        pixels = self._pixels(latents, tiles)
        array = images.to_float(pixels) if output_type == "np" else images.to_uint8(pixels)
        if edit is not None:
            array = edit.finished(array)
        if output_type == "np":
            return array
        made = images.to_pil(array)
        for image, data in zip(made, about, strict=True):
            image.info.update(data)
        return made

    def _metadata(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        seeds: Sequence[int],
        sampler: str,
        steps: int,
        scale: float,
        said: Mapping[str, str],
    ) -> list[dict[str, str]]:
        """How each image is made, as files keep it."""
        r = self.report
        shared = {
            "model": r.model,
            "precision": r.precision,
            "backend": r.backend,
            "engine": r.engine,
            "device": r.device,
            "sampler": sampler,
            "steps": str(steps),
            "guidance": str(scale),
            "sdlite": __version__,
            **said,
        }
        every = zip(prompts, negatives, seeds, strict=True)
        return [
            {"prompt": p, "negative_prompt": n or "", "seed": str(s), **shared} for p, n, s in every
        ]

    # --- arguments

    @property
    def default_sampler(self) -> str:
        """The model's own sampler."""
        return self.artifact.sampler_name

    @staticmethod
    def _bar(run: Iterator[np.ndarray], steps: int, progress: bool) -> Iterator[np.ndarray]:
        if not progress:
            return run
        from tqdm import tqdm

        return iter(tqdm(run, total=steps, unit="step"))

    def _embeds(self, own: Mapping[str, object], repeat: int) -> dict[str, np.ndarray]:
        """The call's embeddings, a row for each image."""
        inputs, width = (
            self.artifact.spec("unet").inputs,
            self.unet_config.get("cross_attention_dim"),
        )
        return embeddings.read(own, self.family.embeds, inputs, width, repeat)

    def _prompts(
        self, prompt: object, negative: object, embeds: Mapping[str, np.ndarray], repeat: int
    ) -> tuple[list[str], list[str | None]]:
        """One text for each image, "" where embeddings are given in its place."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative)):
            nothing = text is None or (isinstance(text, tuple) and not text)
            if f"{name}_embeds" in embeds and not nothing:
                raise InputError(f"{name} and {name}_embeds are both given; give one of them.")
        if "prompt_embeds" in embeds:
            prompts = [""] * embeddings.rows(embeds)
        else:
            prompts = [p for p in arguments.texts("prompt", prompt) for _ in range(repeat)]
        if embeds and embeddings.rows(embeds) != len(prompts):
            raise ShapeError(
                f"{embeddings.rows(embeds) // repeat} rows of negative_prompt_embeds for"
                f" {len(prompts) // repeat} prompts; give as many."
            )
        return prompts, self._negatives(negative, len(prompts), repeat)

    @staticmethod
    def _style(style: object, embeds: Mapping[str, np.ndarray]) -> str | None:
        if style is None:
            return None
        if embeds:
            raise InputError(
                "prompt_weighting reads prompts, and embeddings are given; leave it out."
            )
        return arguments.one_of("prompt_weighting", style, prompt_weights.STYLES)

    @staticmethod
    def _negatives(negative: object, count: int, repeat: int) -> list[str | None]:
        if negative is None:
            return [None] * count
        return [*_each("negative_prompt", negative, count, repeat)]

    def _more(self, given: Mapping[str, object], count: int, repeat: int) -> dict[str, Any]:
        """The family's own keywords: texts one for each image, sizes as pairs of numbers."""
        out: dict[str, Any] = {}
        for name, value in given.items():
            if value is not None and name in self.family.texts:
                out[name] = _each(name, value, count, repeat)
            elif value is not None and name in self.family.sizes:
                out[name] = arguments.pair(name, value)
        return out

    def _refuse_negatives(
        self, negatives: Sequence[str | None], embeds: Mapping[str, np.ndarray], scale: float
    ) -> None:
        """Raises InputError where negative prompts would change nothing."""
        given = "negative_prompt_embeds" if "negative_prompt_embeds" in embeds else ""
        given = "negative_prompt" if any(negatives) else given
        if given and not guided(scale):
            raise InputError(
                f"{given} has no effect at guidance_scale={scale:g}, which is no guidance;"
                " raise it above 1, or leave the prompt out."
            )
        if given and self.family.guides_itself(self.unet_config):
            raise InputError(
                f"{given} has no effect: {self.report.model} takes its guidance as an input"
                " of the UNet, so there is no second call for it; leave the prompt out."
            )

    def _steps(self, steps: object, control: Control) -> int:
        asked = arguments.optional(arguments.integer, "num_inference_steps", steps, 1)
        return control.steps(asked, self.defaults.num_inference_steps)

    def _guidance(self, scale: float | None) -> float:
        """The call's guidance; warns where the student was made to need none."""
        if scale is None:
            return self.defaults.guidance_scale
        own = self.artifact.sampler.get("guidance_scale")
        if arguments.number("guidance_scale", scale, 0) > 1 and own is not None and own <= 1:
            self._warn(
                f"{self.report.model} was trained to need no guidance (its own guidance_scale is"
                f" {own:g}): guidance_scale={scale:g} doubles the work and makes images worse;"
                " leave it out."
            )
        return float(scale)

    def _noise(self, seed: object, generator: object, count: int) -> tuple[list[int], list[Draws]]:
        """Seeds and draws, one for each image."""
        if generator is not None:
            if seed is not None:
                raise InputError("seed and generator are both given; give one of them.")
            every = habits.generators(generator, count)
            return [int(g.initial_seed()) for g in every], [habits.GeneratorNoise(g) for g in every]
        if hasattr(seed, "initial_seed"):
            raise InputError(
                "seed is a torch generator; pass it as generator=, or its seed as a whole number."
            )
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        if isinstance(seed, (list, tuple, range, np.ndarray)):
            seeds = arguments.integers("seed", seed, 0, arguments.SEEDS)
        else:
            first = arguments.integer("seed", seed, 0, arguments.SEEDS - count + 1)
            seeds = [first + i for i in range(count)]
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds for {count} images; give one, or one for each.")
        return seeds, [Noise(s) for s in seeds]

    def _listener(
        self, callback: Callback | None, step_end: StepEnd | None, solver: Sampler
    ) -> Callable[[int, np.ndarray], None]:
        """What is called after each step with (step from 1, latents): they must be numbers, then
        the callbacks have a look.
        """
        if callback is not None:
            arguments.function("callback", callback)
        if step_end is not None:
            arguments.function("callback_on_step_end", step_end)

        def listen(step: int, x: np.ndarray) -> None:
            if not np.isfinite(x).all():
                raise InputError(
                    f"latents are not finite after step {step}; the input latents, the weights or"
                    " the precision are at fault."
                )
            steps = len(solver) - solver.begin
            if callback is not None and callback(step, steps, x) is False:
                raise Cancelled(
                    f"the callback cancelled after step {step} of {steps}; nothing was written."
                )
            if step_end is not None:
                at = solver.timesteps[solver.begin + step - 1]
                habits.step_end(step_end, self, step - 1, at, x)
                images.finite(
                    x, f"the latents that callback_on_step_end returned after step {step}"
                )

        return listen

    def _warn(self, text: str, stacklevel: int = 4) -> None:
        """Once in a pipeline's life."""
        with self._lock:
            known = text in self._warned
            self._warned.add(text)
        if not known:
            warnings.warn(text, SdliteWarning, stacklevel=stacklevel)

    def _most(self) -> int:
        """The model's own `max_pixels`, else sdlite's."""
        if self.artifact.manifest and self.artifact.manifest.max_pixels is not None:
            return self.artifact.manifest.max_pixels
        tall, wide = self.networks.size or (s * self.stride for s in latent_size(self.unet_config))
        return min(max(MAX_PIXELS[0], OWN_IMAGES * tall * wide), MAX_PIXELS[1])

    def _edit_size(
        self, edit: Edit | ControlImage | None, height: int | None, width: int | None
    ) -> tuple[int | None, int | None]:
        """Height and width of a call; that of an image has its size where nothing else is said."""
        own = edit.own_size(max(self.networks.size_multiple, self.stride)) if edit else None
        fixed = self.networks.size is not None
        if own is None or fixed or height is not None or width is not None:
            return height, width
        return own

    def _scheduled(
        self, edit: Edit | None, solver: Sampler, height: int, width: int
    ) -> Edit | None:
        """The edit at the call's size, the solver where it begins."""
        if edit is None:
            return None
        edit.schedule(solver, self.family.spreads(self.index))
        return edit.fitted(height, width)

    def _start(
        self,
        edit: Edit | None,
        solver: Sampler,
        noise: Sequence[Draws],
        size: tuple[int, int],
        given: np.ndarray | None,
        tiles: tiling.Tiling | None,
    ) -> Start:
        """Where the loop starts: with the first draw, or with an image's latents."""

        def drawn() -> np.ndarray:
            return self.init_latents(noise, *size) if given is None else given

        if edit is None:
            return Start(drawn())
        encode = partial(self._encoded, tiles=tiles)
        if self.inpaints:
            return edit.start_beside(encode, solver, noise, drawn)
        posterior = self.vae_config.get("_class_name") != "AutoencoderTiny"
        return edit.start(encode, solver, noise, drawn, posterior)

    def _refuse_unmasked(self, edit: Edit | None) -> None:
        """Raises InputError where an inpainting model is not told what to paint."""
        if self.inpaints and (edit is None or edit.mask is None):
            lacks = "image and mask_image" if edit is None else "mask_image"
            raise InputError(
                f"{self.report.model} is an inpainting model, whose UNet reads an image and a mask:"
                f" give {lacks} (white is painted anew; where all is white, nothing of the image is"
                " kept)."
            )

    def _within(self, count: int, height: int, width: int, most: int | None) -> None:
        """Refuse a call that is too large, before any work.

        Raises:
            ShapeError: more pixels than `most`, or than the pipeline's own `max_pixels`.
        """
        most = self.max_pixels if most is None else arguments.integer("max_pixels", most, 1)
        asked = count * height * width
        if most is not None and asked > most:
            raise ShapeError(
                f"{count} x {height} x {width} is {asked} pixels in one call; accepted: up to"
                f" {most} (max_pixels), for memory and time grow with them. Ask for fewer or"
                f" smaller images in a call, or pass max_pixels={asked}, with"
                " pipe.enable_vae_tiling() if memory is short."
            )

    def _familiar(self, height: int, width: int) -> None:
        """Warn about an image far from the size that the student was trained at."""
        trained = [s * self.stride for s in latent_size(self.unet_config)]
        share = height * width / (trained[0] * trained[1])
        if not FAMILIAR[0] <= share <= FAMILIAR[1]:
            self._warn(
                f"{self.report.model} was trained at {trained[0]}x{trained[1]} pixels: an image of"
                f" {height}x{width} is {share:.3g} times that area, and students repeat or lose"
                " their subject there; leave height and width out."
            )

    def _size(
        self, height: int | None, width: int | None, latents: np.ndarray | None, count: int
    ) -> tuple[int, int, np.ndarray | None]:
        side, channels = latent_size(self.unet_config), self.channels
        if self.networks.size is not None:
            side = (self.networks.size[0] // self.stride, self.networks.size[1] // self.stride)
        if latents is not None:
            latents = np.asarray(latents)
            if (
                latents.ndim != 4
                or latents.shape[:2] != (count, channels)
                or latents.dtype.kind != "f"
            ):
                raise ShapeError(
                    f"latents are {latents.dtype} {latents.shape}; accepted: float ({count},"
                    f" {channels}, height/{self.stride}, width/{self.stride})."
                )
            if not np.isfinite(latents).all():
                raise InputError("latents hold NaN or infinity; give finite unit normal numbers.")
            latents = np.ascontiguousarray(latents, np.float32)
            side = latents.shape[2:]
        out = [
            side[0] * self.stride if height is None else arguments.side("height", height),
            side[1] * self.stride if width is None else arguments.side("width", width),
        ]
        if self.networks.size not in (None, tuple(out)):
            tall, wide = self.networks.size or out
            raise ShapeError(
                f"height={out[0]}, width={out[1]}: this export has networks of {tall}x{wide} pixels"
                " alone; export the model with that height and width in the profile, or for any"
                " shape."
            )
        multiple = max(self.networks.size_multiple, self.stride)
        for label, value in zip(("height", "width"), out, strict=True):
            if value < multiple or value % multiple:
                low = max(value // multiple * multiple, multiple)
                raise ShapeError(
                    f"{label}={value} is not a positive multiple of {multiple}"
                    f" ({self.report.backend}, VAE stride {self.stride}); use {low} or"
                    f" {low + multiple}."
                )
        if latents is not None and [s * self.stride for s in latents.shape[2:]] != out:
            raise ShapeError(
                f"latents {latents.shape} are for"
                f" {latents.shape[2] * self.stride}x{latents.shape[3] * self.stride} pixels, not"
                f" {out[0]}x{out[1]}."
            )
        return out[0], out[1], latents

    # --- diffusers' habits

    def to(self, *wanted: object, **named: object) -> Pipeline:
        """As in diffusers where the pipeline is there already; it does not move.

        Raises:
            InputError: another device or dtype than was loaded.
        """
        habits.moved([*wanted, *named.values()], self.report.device, self.report.precision)
        return self

    if (
        not TYPE_CHECKING
    ):  # a type checker knows the names from above, and finds those that are misspelled

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            raise habits.attribute(name, [n for n in dir(type(self)) if not n.startswith("_")])

        def __setattr__(self, name, value):
            if name in habits.ATTRIBUTES and value is not None:
                raise habits.attribute(name, ())
            object.__setattr__(self, name, value)
