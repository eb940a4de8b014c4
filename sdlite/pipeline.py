"""Prompt to image: tokenize -> encode_text -> init_latents -> denoise -> decode.

Each stage is callable alone and takes exactly what the one before returns; `Pipeline.__call__` reads as these five lines.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdlite import backends, hub, images, tiling
from sdlite.artifact import Artifact, SamplerDefaults, writing
from sdlite.errors import ArtifactError, InputError, MissingExtraError, SdliteError, ShapeError
from sdlite.sampling import Noise, Sampler, Schedule, denoise, get_sampler, sampler_of
from sdlite.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

Callback = Callable[[int, int, np.ndarray], Any]  # (step, number of steps, latents) -> False cancels


class Cancelled(SdliteError):
    """A callback returned False."""


@dataclass
class PipelineOutput:
    """`images` and `seeds` have one entry per picture; `timings` is seconds per stage of the whole call."""

    images: list[Image]
    seeds: list[int]
    timings: dict[str, float]
    report: backends.Report


def _convert(artifact: Artifact) -> Artifact:
    try:
        from sdlite.exporters.onnx import convert_cached
    except ModuleNotFoundError as e:
        raise MissingExtraError(
            f"{artifact.folder} has no ONNX graphs, and making them needs {e.name!r}: pip install 'sdlite[export]', or use backend='torch'."
        ) from e
    return convert_cached(artifact)


class Pipeline:
    """Text-to-image with one student on one backend. Build it with `from_pretrained`."""

    def __init__(self, artifact: Artifact, networks: backends.Networks):
        self.artifact, self.networks, self.report = artifact, networks, networks.report
        self.tokenizer = ClipTokenizer.from_pretrained(artifact.folder / "tokenizer")
        self.scheduler_config = artifact.config("scheduler")
        self.schedule = Schedule.from_config(self.scheduler_config)
        self.unet_config, self.vae_config = artifact.config("unet"), artifact.config("vae")
        self.stride = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        own = artifact.sampler
        self.defaults = SamplerDefaults(own.get("num_inference_steps", 50), own.get("guidance_scale", 7.5))  # diffusers' for a plain folder
        self.tiling: tiling.Tiling | None = None

    @classmethod
    def from_pretrained(cls, model: str | Path, *, precision: str | None = None, backend: str = "auto", device: str = "cpu",
                        revision: str | None = None, threads: int | None = None, arithmetic: str | None = None) -> Pipeline:  # fmt: skip
        """Load a model.

        Args:
            model: name of an embedded model ("emoji"), a model folder, or a hub id "org/name".
            precision: "fp32", "fp16", "int8-dynamic" or "int8-static"; "bf16" for engines that were exported so (backend "tensorrt").
                None: the first one that the artefact holds, or what the folder was exported in, else fp32.
            backend: "auto" (see `report`), "onnxruntime" or "torch". "onnxruntime" converts a plain diffusers folder once, into the cache.
            device: "cpu" or "cuda".
            revision: branch, tag or commit, for hub ids.
            threads: CPU threads per network call; None is the engine's own choice.
            arithmetic: what float layers are computed in: "float32", "bfloat16" or "float16", on "openvino". None: float32 for fp32; for fp16
                and what int8 leaves in float, the CPU's half precision where it has one. The report says which it is.

        Raises:
            UnknownNameError, PrecisionError, MissingExtraError, ArtifactError, HubError: see `sdlite.errors`; each names the next step.
        """
        artifact = Artifact.open(hub.resolve(model, revision))
        if precision is None:
            precision = next(iter(artifact.manifest.variants), "fp32") if artifact.manifest else artifact.exported or "fp32"
        if artifact.manifest is None and artifact.exported and backend != "tensorrt":
            raise ArtifactError(
                f"{artifact.folder} was exported for another runtime, which runs it; give the model that it was exported from, or export it with a "
                "dynamic onnx profile."
            )
        note = None
        if backend == "onnxruntime" and artifact.manifest is None and precision in ("fp32", "fp16"):
            artifact, note = _convert(artifact), f"converted to ONNX from {artifact.folder}, once, into the cache"
        pipe = cls(artifact, backends.load(artifact, precision, backend, device, threads, arithmetic))
        pipe.report.notes += [note] if note else []
        return pipe

    def save_pretrained(self, folder: str | Path) -> Path:
        """Copy the whole artefact to `folder` (new or empty), verified, all or nothing."""
        if self.artifact.manifest:
            self.artifact.verify()
        out = Path(folder)
        with writing(out) as tmp:
            shutil.copytree(
                self.artifact.folder, tmp, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
            )
        return out

    def enable_vae_tiling(self, size_px: int | None = None, overlap: float = 0.25) -> None:
        """Decode pictures larger than a tile in overlapping, blended tiles: the decoder's memory no longer grows with the picture.

        Args:
            size_px: side of a tile, at most; default as in diffusers: the size that the autoencoder was made for. 320 makes four tiles of
                a 512 px picture, each a third of its area.
            overlap: share of a tile that its neighbour has too, at least.

        Raises:
            InputError: not a multiple of the VAE's stride, or an overlap outside 0 to 1.
        """
        chosen = tiling.Tiling(self.vae_config.get("sample_size") or 512 if size_px is None else size_px, overlap)
        chosen.check(self.stride)
        self.disable_vae_tiling()
        self.tiling = chosen
        self.report.notes.append(str(chosen))

    def disable_vae_tiling(self) -> None:
        if self.tiling is not None:
            self.report.notes.remove(str(self.tiling))
        self.tiling = None

    # --- the five stages ---------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """prompts -> ids int64 (B, L); one warning shows what did not fit the window."""
        return self.tokenizer(prompts)

    def encode_text(self, ids: np.ndarray) -> np.ndarray:
        """ids int64 (B, L) -> embeds float32 (B, L, D)."""
        return self.networks.text_encoder(input_ids=ids)

    def init_latents(self, noise: Sequence[Noise], height: int, width: int) -> np.ndarray:
        """One generator per image -> unit normal latents float32 (B, C, height/8, width/8)."""
        shape = (self.unet_config["in_channels"], height // self.stride, width // self.stride)
        return np.stack([n.normal(shape) for n in noise])

    def denoise(self, latents: np.ndarray, embeds: np.ndarray, noise: Sequence[Noise], solver: Sampler, *,
                uncond: np.ndarray | None = None, guidance_scale: float = 1.0) -> Iterator[np.ndarray]:  # fmt: skip
        """Unit normal latents (B, C, h, w) and embeds (B, L, D) -> latents after each step of `solver`.

        Args:
            uncond: embeds (B, L, D) of the negative prompt; None runs without guidance, one network row per image.
            noise: the images' generators, for samplers that draw again.
        """
        return denoise(self.networks.unet, latents, embeds, noise, solver, uncond=uncond, guidance_scale=guidance_scale)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """latents (B, C, h, w) -> images uint8 (B, H, W, 3)."""
        z = latents / np.float32(self.vae_config.get("scaling_factor", 0.18215)) + np.float32(self.vae_config.get("shift_factor") or 0.0)
        if self.tiling is None:
            return images.to_uint8(self.networks.vae_decoder(latent_sample=z))
        return images.to_uint8(tiling.decode(lambda tile: self.networks.vae_decoder(latent_sample=tile), z, self.tiling, self.stride))

    # --- the call ----------------------------------------------------------------------------------------------------

    def __call__(self, prompt: str | Sequence[str], *, negative_prompt: str | Sequence[str] | None = None, num_inference_steps: int | None = None,
                 guidance_scale: float | None = None, seed: int | Sequence[int] | None = None, num_images_per_prompt: int = 1,
                 height: int | None = None, width: int | None = None, sampler: str | None = None, latents: np.ndarray | None = None,
                 callback: Callback | None = None, progress: bool = False) -> PipelineOutput:  # fmt: skip
        """Generate pictures.

        Args:
            prompt: one or several; each makes `num_images_per_prompt` pictures, in order.
            negative_prompt: what guidance leads away from; default "". Needs guidance_scale other than 1.
            num_inference_steps, guidance_scale, sampler: default to the artefact's own. guidance g is u + g (c - u): 1 runs without
                guidance (one network row per picture), 0 is the negative prompt's picture.
            seed: picture i uses seed + i, or seed[i]; None draws one. Equal to diffusers with one CPU generator per picture.
            height, width: pixels; default to the size that the student was trained at.
            latents: unit normal float (B, C, height/8, width/8) instead of the draw.
            callback: called after each step with (step from 1, steps, latents); return False to cancel.
            progress: show a tqdm bar.

        Raises:
            InputError, ShapeError, UnknownNameError: an argument is not accepted. Cancelled: by the callback.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("prompt is an empty list; give at least one string.")
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt={num_images_per_prompt}; at least 1.")
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        negatives = self._negatives(negative_prompt, len(prompts), num_images_per_prompt)
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        if not np.isfinite(scale):
            raise InputError(f"guidance_scale={scale} is not a finite number.")
        if negative_prompt is not None and scale == 1:
            raise InputError("negative_prompt has no effect at guidance_scale=1; raise guidance_scale or leave it out.")
        solver = get_sampler(sampler if sampler is not None else self.default_sampler, self.schedule, steps)
        seeds = self._seeds(seed, len(prompts))
        height, width, start = self._size(height, width, latents, len(prompts))
        noise = [Noise(s) for s in seeds]

        timings: dict[str, float] = {}
        clock = time.perf_counter
        begin = mark = clock()
        ids = self.tokenize(prompts if scale == 1 else [*prompts, *negatives])
        embeds = self.encode_text(ids)
        embeds, uncond = (embeds, None) if scale == 1 else np.split(embeds, 2)
        timings["text_encoder"], mark = clock() - mark, clock()
        x = self.init_latents(noise, height, width) if start is None else start
        run = self.denoise(x, embeds, noise, solver, uncond=uncond, guidance_scale=scale)
        total = len(solver)  # pndm takes its second step twice
        for step, x in enumerate(self._bar(run, total, progress), 1):
            if not np.isfinite(x).all():
                raise InputError(f"latents are not finite after step {step}; the input latents, the weights or the precision are at fault.")
            if callback is not None and callback(step, total, x) is False:
                raise Cancelled(f"the callback cancelled after step {step} of {total}; nothing was written.")
        timings["unet"], mark = clock() - mark, clock()
        pixels = self.decode(x)
        timings["vae_decoder"] = clock() - mark
        timings["total"] = clock() - begin
        return PipelineOutput(images.to_pil(pixels), seeds, timings, self.report)

    # --- arguments ---------------------------------------------------------------------------------------------------

    @property
    def default_sampler(self) -> str:
        """The artefact's own sampler."""
        own = self.artifact.sampler.get("name")
        return own or sampler_of(self.scheduler_config)

    @staticmethod
    def _bar(run: Iterator[np.ndarray], steps: int, progress: bool) -> Iterator[np.ndarray]:
        if not progress:
            return run
        from tqdm import tqdm

        return iter(tqdm(run, total=steps, unit="step"))

    @staticmethod
    def _negatives(negative: str | Sequence[str] | None, count: int, repeat: int) -> list[str]:
        if negative is None or isinstance(negative, str):
            return [negative or ""] * count
        out = [n for n in negative for _ in range(repeat)]
        if len(out) != count:
            raise InputError(f"{len(out) // repeat} negative prompts for {count // repeat} prompts; give one, or one for each.")
        return out

    @staticmethod
    def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        seeds = [int(seed) + i for i in range(count)] if isinstance(seed, (int, np.integer)) else [int(s) for s in seed]
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds for {count} pictures; give one, or one for each.")
        return seeds

    def _size(self, height: int | None, width: int | None, latents: np.ndarray | None, count: int) -> tuple[int, int, np.ndarray | None]:
        sample, channels = self.unet_config["sample_size"], self.unet_config["in_channels"]
        side = (sample, sample) if isinstance(sample, int) else sample
        if latents is not None:
            latents = np.asarray(latents)
            if latents.ndim != 4 or latents.shape[:2] != (count, channels) or latents.dtype.kind != "f":
                raise ShapeError(
                    f"latents are {latents.dtype} {latents.shape}; accepted: float ({count}, {channels}, height/{self.stride}, width/{self.stride})."
                )
            if not np.isfinite(latents).all():
                raise InputError("latents hold NaN or infinity; give finite unit normal numbers.")
            latents = np.ascontiguousarray(latents, np.float32)
            side = latents.shape[2:]
        out = [side[0] * self.stride if height is None else height, side[1] * self.stride if width is None else width]
        multiple = max(self.networks.size_multiple, self.stride)
        for label, value in zip(("height", "width"), out, strict=True):
            if value < multiple or value % multiple:
                low = max(value // multiple * multiple, multiple)
                raise ShapeError(
                    f"{label}={value} is not a positive multiple of {multiple} ({self.report.backend}, VAE stride {self.stride}); use {low} or {low + multiple}."
                )
        if latents is not None and [s * self.stride for s in latents.shape[2:]] != out:
            raise ShapeError(
                f"latents {latents.shape} are for {latents.shape[2] * self.stride}x{latents.shape[3] * self.stride} pixels, not {out[0]}x{out[1]}."
            )
        return out[0], out[1], latents
