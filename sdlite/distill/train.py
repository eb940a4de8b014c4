"""The one training loop: draw, forward, backward, step, EMA; checkpoint, resume, log, sample.

A `Task` says what is trained and how a batch becomes a loss; `fit` owns everything else. All
randomness of step `k` comes from one generator seeded by (seed, k), so an interrupted run that is
resumed equals one that was not, bit for bit on one process, and several processes draw the same
global batch and take their slice of it. Several processes and machines: start it by Accelerate's
launcher (`accelerate launch --num_processes N -m sdlite.cli distill ...`); with `--use_fsdp`
weights are sharded (`fsdp.py`).
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from sdlite.distill import checkpoints, fsdp
from sdlite.errors import TrainingError
from sdlite.io import append
from sdlite.settings import At, check, settings

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = dict[str, Tensor]  # (B, ...) each
Modules = dict[str, nn.Module]


class Task(ABC):
    """What is trained.

    Attributes:
        modules: the trained networks by name; `fit` prepares them and hands them back to `loss`.
        frozen: networks that only run, such as a teacher; they are compiled with the others.
        shardable: whether the trained networks may be sharded over processes (`fsdp`).
    """

    modules: Modules
    frozen: Mapping[str, nn.Module] = MappingProxyType({})
    shardable: bool = True

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw `size` samples and all the noise they need."""

    @abstractmethod
    def loss(self, modules: Modules, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalar terms by name; `loss` is what is minimized, the others are logged."""

    @abstractmethod
    def save(self, modules: Modules, folder: Path) -> None:
        """Write the (EMA) networks as a user would load them."""

    @abstractmethod
    def sample(self, modules: Modules, path: Path) -> None:
        """Write an image that shows how far training is."""

    def to(self, device: torch.device) -> None:  # noqa: B027  (most tasks have nothing to move)
        """In place: the networks that are not in `modules` go to `device`."""


class Trained(TypedDict):
    """What a training came to; `loss` is a running mean, None where no step was made."""

    images: int
    step: int
    seconds: float
    finished: bool
    loss: float | None


_Count = Annotated[int, At(1, 10**12)]
_Share = Annotated[float, At(0, 1)]
_BelowOne = Annotated[float, At(0, 0.999999)]
_Batch = Annotated[int, At(1, 1_000_000)]


@settings
@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast. Lengths are counted in images, so that they do not depend on the batch
    size.

    Raises:
        InputError: a value is not accepted; the message names it and what is.
    """

    max_images: _Count
    batch_size: _Batch = 64  # over all processes
    # gradient accumulation when smaller than batch_size; None = no accumulation
    micro_batch_size: _Batch | None = None
    lr: Annotated[float, At(1e-12, 100)] = 3e-4
    final_lr: Annotated[float, At(0, 100)] = 1e-5
    warmup_images: Annotated[int, At(0, 10**12)] = 5_000
    decay_from: _Share = 0.5  # constant until this share of max_images, then cosine to final_lr
    betas: tuple[_BelowOne, _BelowOne] = (0.9, 0.99)
    weight_decay: Annotated[float, At(0, 100)] = 0.01
    grad_clip: Annotated[float, At(1e-12, 1e12)] = 1.0
    ema_decay: _BelowOne = 0.999
    # "fp16" needs CUDA; weights, optimizer and EMA stay float32
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    # activations of blocks are computed again in the backward: less memory, about a third more time
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile the networks: minutes at the start, then faster steps
    # matrix products and softmax instead of torch's fused kernel, whose bfloat16 backward is slow
    # on CPUs
    plain_attention: bool = False
    seed: Annotated[int, At(0, 2**63 - 1)] = 0
    log_every: _Count = 20  # steps
    sample_every: Annotated[int, At(0, 10**12)] = 2_000  # steps; 0 = never
    checkpoint_minutes: Annotated[float, At(0, 1e12)] = 5.0
    keep_checkpoints: _Batch = 2

    def __post_init__(self) -> None:
        check(self)

    def lr_at(self, images: int) -> float:
        """The learning rate after so many images: warmup, constant, cosine."""
        if images < self.warmup_images:
            return self.lr * (images + 1) / self.warmup_images
        share = images / self.max_images
        if share <= self.decay_from:
            return self.lr
        phase = min(1.0, (share - self.decay_from) / (1 - self.decay_from))
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * phase))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The one source of randomness of a step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))


def _split(batch: Batch, start: int, stop: int) -> Batch:
    return {k: v[start:stop] for k, v in batch.items()}


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


class _State:
    """Networks, their EMA and the optimizer, as one thing that is saved and restored whole, sharded
    or not.
    """

    def __init__(self, modules: Modules, config: TrainConfig, sharded: bool = False):
        self.modules = modules
        self.ema = {k: copy.deepcopy(m).eval().requires_grad_(False) for k, m in modules.items()}
        self._plain = (
            {k: copy.deepcopy(m).cpu() for k, m in self.ema.items()} if sharded else self.ema
        )
        for m in (*self.modules.values(), *self.ema.values()) if sharded else ():
            fsdp.shard(m)
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.names = {p: f"{k}.{n}" for k, m in modules.items() for n, p in m.named_parameters()}

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        for k, m in self.modules.items():
            mine, theirs = (
                [fsdp.local(p.detach()) for p in n.parameters()] for n in (self.ema[k], m)
            )
            torch._foreach_lerp_(mine, theirs, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        out = {
            f"model.{k}.{n}": t for k, m in self.modules.items() for n, t in m.state_dict().items()
        }
        out |= {f"ema.{k}.{n}": t for k, m in self.ema.items() for n, t in m.state_dict().items()}
        for p, s in self.optimizer.state.items():
            out |= {f"optimizer.{self.names[p]}.{field}": t for field, t in s.items()}
        return {
            k: fsdp.whole(t.detach()).contiguous() for k, t in out.items()
        }  # no copies: they would be the peak of memory

    def averaged(self) -> Modules:
        """The EMA as whole networks; when it is sharded all processes must call it."""
        if self._plain is not self.ema:
            for k, m in self.ema.items():
                tensors = {n: fsdp.whole(t) for n, t in m.state_dict().items()}
                self._plain[k].load_state_dict(tensors)
                self._plain[k].to(next(iter(tensors.values())).device)
        return self._plain

    def restore(self, path: Path) -> None:
        """Take a checkpoint's tensors.

        Raises:
            TrainingError: they are another network's.
        """
        try:
            self._restore(path)
        except (RuntimeError, KeyError, ValueError) as e:
            first = str(e).strip().splitlines()
            raise TrainingError(
                f"{path.parent} is of another network ({' '.join(first[:2])[:300]}); go on with the"
                " recipe and teacher that made it."
            ) from e

    @torch.no_grad()
    def _restore(self, path: Path) -> None:
        with safe_open(path, framework="pt") as f:
            names = list(f.keys())
            for prefix, group in (("model", self.modules), ("ema", self.ema)):
                for k, m in group.items():
                    head, own = f"{prefix}.{k}.", m.state_dict()
                    found = {n[len(head) :]: f.get_tensor(n) for n in names if n.startswith(head)}
                    m.load_state_dict({n: fsdp.like(t, own.get(n)) for n, t in found.items()})
            fields: dict[str, dict[str, Tensor]] = {}
            for n in names:
                if n.startswith("optimizer."):
                    parameter, field = n[len("optimizer.") :].rsplit(".", 1)
                    fields.setdefault(parameter, {})[field] = f.get_tensor(n)
        for p, name in self.names.items():
            if name in fields:
                self.optimizer.state[p] = {k: fsdp.like(t, p) for k, t in fields[name].items()}


class _StopSignal:
    """While the block lasts, SIGINT, SIGTERM and SIGHUP ask the loop to stop after the current step
    (a second one ends at once).
    """

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> _StopSignal:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            asked = [
                signal.SIGINT,
                signal.SIGTERM,
                *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),
            ]
            ignored = [s for s in asked if signal.getsignal(s) == signal.SIG_IGN]  # nohup
            self._before = {s: signal.signal(s, self._ask) for s in asked if s not in ignored}
        return self

    def __exit__(self, *exc: object) -> None:
        if self._main:
            for s, handler in self._before.items():
                signal.signal(s, handler)


def _resumed(out: Path, main: bool) -> checkpoints.Checkpoint | None:
    """The newest whole checkpoint, as the main process finds it: all take the same."""
    from accelerate.utils import broadcast_object_list

    said: list[checkpoints.Checkpoint | TrainingError | None] = [None]
    if main:
        try:
            said = [checkpoints.newest(out)]
        except TrainingError as e:
            said = [e]
    broadcast_object_list(said)
    if isinstance(said[0], TrainingError):
        raise said[0]
    return said[0]


@contextmanager
def _memory(out: Path, at: Callable[[], int]) -> Iterator[None]:
    """Memory that runs out is one line that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        text = str(e).lower()
        if (
            not isinstance(e, (MemoryError, torch.OutOfMemoryError))
            and "can't allocate memory" not in text
            and "out of memory" not in text
        ):
            raise
        raise TrainingError(
            f"memory ran out at step {at()}; {_kept(out)} Set micro_batch_size below its value, or"
            " gradient_checkpointing = true: both are free to change when a run goes on."
        ) from e


def _diverged(what: str, step: int, terms: dict[str, float], batch: Batch, out: Path) -> str:
    return (
        f"{what} at step {step} (terms {terms}; samples {batch.get('ids')}); look at these samples,"
        f" or begin another run with a lower lr: this one would come to the same. {_kept(out)}"
    )


def _kept(out: Path) -> str:
    """What a training that stops on an error leaves."""
    left = checkpoints.folders(out)
    return (
        f"{left[-1].name} in {out} is kept, go on with --resume (resume=True)."
        if left
        else f"there is no checkpoint in {out} yet."
    )


def use_plain_attention(networks: Iterable[nn.Module]) -> None:
    """In place: every diffusers network among `networks` and inside them computes attention as two
    matrix products and a softmax.
    """
    from diffusers.models.attention_processor import AttnProcessor

    for m in networks:
        for part in m.modules():
            if hasattr(part, "set_attn_processor"):
                part.set_attn_processor(AttnProcessor())


def use_gradient_checkpointing(networks: Iterable[nn.Module]) -> int:
    """In place: every network among `networks` and inside them that can keeps less for the
    backward. Returns how many can.
    """
    count = 0
    for part in {id(p): p for m in networks for p in m.modules()}.values():
        if hasattr(part, "enable_gradient_checkpointing"):  # diffusers, and ours
            part.enable_gradient_checkpointing()
        elif hasattr(part, "gradient_checkpointing_enable"):  # transformers
            part.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        else:
            continue
        count += 1
    return count


def _networks(task: Task) -> list[nn.Module]:
    """The trained networks, and the frozen ones that the task holds."""
    held = (m for m in vars(task).values() if isinstance(m, nn.Module))
    return [*task.modules.values(), *task.frozen.values(), *held]


def _any(asked: list[bool], world: int, device: torch.device) -> list[bool]:
    """Whether any process asks, for each question: all must act in the same step, or they wait for
    each other for ever.
    """
    if world == 1:
        return asked
    flags = torch.tensor(asked, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return [bool(f) for f in flags.tolist()]


def fit(
    task: Task,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
) -> Trained:
    """Train `task` until `max_images`, an interrupt, or `max_minutes`; always leaves a checkpoint
    and the EMA networks.

    Args:
        out: folder for checkpoints, `stats.jsonl`, sample images and, at the end, what
            `task.save` writes in `model/`.
        resume: go on from the newest whole checkpoint in `out`. Without it a folder that has one is
            refused.
        max_minutes: stop after this wall time; 0 stops at once, None never.

    Raises:
        TrainingError: loss or gradient are not finite (names step and sample ids); memory ran out;
            checkpoints exist and `resume` is False, or none of them is whole; the checkpoint is of
            another network, batch size or seed; the precision or the sharding does not go with
            device or task. What was kept, and how to go on, is said.
    """
    loop = _Loop(task, config, Path(out), resume)
    with _StopSignal() as stop, _memory(loop.out, lambda: loop.step):
        while loop.images < config.max_images:
            if loop.ended(stop.asked, max_minutes):
                break
            loop.report(loop.train_step())
            loop.sample()
    loop.checkpoint()
    if stop.asked:
        print(f"asked to stop: wrote a checkpoint at step {loop.step}")
    return loop.finish()


class _Loop:
    """A training in one process: where it stands, and the parts of its steps in their order."""

    def __init__(self, task: Task, config: TrainConfig, out: Path, resume: bool):
        self.task, self.config, self.out = task, config, out
        self.accelerator = _accelerator(config)
        self.world, self.device = self.accelerator.num_processes, self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.share, self.micro = _batches(config, self.world)
        self.sharded = _sharded(task, self.device)
        begun = _begun(out, resume, config, self.main)
        out.mkdir(parents=True, exist_ok=True)
        task.to(self.device)
        modules = {k: m.to(self.device) for k, m in task.modules.items()}
        self.state = _State(modules, config, self.sharded)
        self.step = self.images = 0
        if begun is not None:
            self.state.restore(begun.folder / checkpoints.STATE)
            self.step, self.images = begun.step, begun.images
        self.first = self.step
        _adapt(task, config)
        self.prepared = self._prepared()
        self.optimizer = self.accelerator.prepare_optimizer(
            self.state.optimizer, device_placement=False
        )
        self.start = self.last_checkpoint = time.monotonic()
        self.log = _Log(out, config, self.images, self.main)

    def _prepared(self) -> Modules:
        modules = {k: m.train() for k, m in self.task.modules.items()}
        if self.sharded:
            return modules
        return {k: self.accelerator.prepare_model(m) for k, m in modules.items()}

    def ended(self, asked: bool, max_minutes: float | None) -> bool:
        """Whether to stop before the next step; writes a checkpoint where one is due."""
        now = time.monotonic()
        late = max_minutes is not None and now - self.start >= max_minutes * 60
        due = now - self.last_checkpoint >= self.config.checkpoint_minutes * 60
        ended, due = _any([late or asked, due], self.world, self.device)
        if due and not ended and self.step > self.first:
            self.checkpoint()
            self.last_checkpoint = time.monotonic()
        return ended

    def train_step(self) -> dict[str, float]:
        """One step on one batch: the terms of its loss, and "lr" and "grad_norm"."""
        config, lr = self.config, self.config.lr_at(self.images)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self._batch()
        terms = self._backward(batch)
        norm = float(self.accelerator.clip_grad_norm_(self.state.parameters, config.grad_clip))
        # the scaler of fp16 skips a step that is not finite
        if config.mixed_precision != "fp16" and not math.isfinite(norm):
            raise self._diverged(f"the gradient's norm is {norm}", terms, batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.update_ema(min(config.ema_decay, (1 + self.step) / (10 + self.step)))
        self.step, self.images = self.step + 1, self.images + config.batch_size
        return {**terms, "grad_norm": norm, "lr": lr}

    def _batch(self) -> Batch:
        """This process' share of the step's batch."""
        generator = step_generator(self.config.seed, self.step)
        batch = self.task.batch(self.config.batch_size, generator)
        begin = self.accelerator.process_index * self.share
        return _to(_split(batch, begin, begin + self.share), self.device)

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Gradients of the batch, a part at a time; the mean of each term."""
        terms: dict[str, float] = {}
        for i in range(0, self.share, self.micro):
            part = _split(batch, i, i + self.micro)
            with self.accelerator.autocast():
                losses = self.task.loss(self.prepared, part, self.step)
            for k, v in losses.items():
                terms[k] = terms.get(k, 0.0) + v.item() * self.micro / self.share
            if not math.isfinite(terms["loss"]):
                raise self._diverged(f"loss is {terms['loss']}", terms, part)
            self.accelerator.backward(losses["loss"] * (self.micro / self.share))
        return terms

    def _diverged(self, what: str, terms: dict[str, float], batch: Batch) -> TrainingError:
        return TrainingError(_diverged(what, self.step, terms, batch, self.out))

    def report(self, terms: dict[str, float]) -> None:
        """Show the step's terms, and write them every `log_every` steps."""
        self.log.add(self.step, self.images, terms)

    def sample(self) -> None:
        """Write sample images every `sample_every` steps."""
        if self.config.sample_every and self.step % self.config.sample_every == 0:
            averaged = self._averaged()
            if self.main:
                self.task.sample(averaged, self.out / f"sample-{self.step:08d}.png")

    def _averaged(self) -> Modules:
        return self.state.averaged() if self.sharded or self.main else {}

    def checkpoint(self) -> None:
        """Write one; all processes must call it."""
        tensors = self.state.tensors() if self.sharded or self.main else {}
        if self.main:
            meta = {"step": self.step, "images": self.images, "config": asdict(self.config)}
            checkpoints.write(self.out, tensors, meta, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def finish(self) -> Trained:
        """Save the networks and their last images; all processes must call it.

        They end it together: a thread of gloo's may still hold what was gathered last, and a
        process that Python leaves meanwhile is aborted, one in thirty or so
        (https://github.com/pytorch/pytorch/issues/190489).
        """
        self.log.close()
        averaged, loss = self._averaged(), self.log.loss
        if self.main:
            self.task.save(averaged, self.out / "model")
            self.task.sample(averaged, self.out / "sample-last.png")
            print(
                f"{self.out}: {self.images} images, step {self.step}, loss"
                f" {math.nan if loss is None else loss:.4f}; networks in {self.out / 'model'}"
            )
        self.accelerator.wait_for_everyone()
        return {
            "images": self.images,
            "step": self.step,
            "seconds": time.monotonic() - self.start,
            "finished": self.images >= self.config.max_images,
            "loss": loss,
        }


class _Log:
    """`stats.jsonl` and the progress bar: running means of what the steps say."""

    def __init__(self, out: Path, config: TrainConfig, images: int, main: bool):
        self.path, self.every, self.main = out / "stats.jsonl", config.log_every, main
        self.running: dict[str, float] = {}
        self.written, self.written_images = time.monotonic(), images
        self.images = images
        self.bar = tqdm(
            total=config.max_images,
            initial=images,
            unit="img",
            disable=not main,
            mininterval=5,
            smoothing=0.05,
        )

    @property
    def loss(self) -> float | None:
        return self.running.get("loss")

    def add(self, step: int, images: int, terms: dict[str, float]) -> None:
        """Take a step's terms and "lr"; write a row where one is due."""
        for k, v in terms.items():
            if k != "lr":
                before = self.running.get(k)
                self.running[k] = v if before is None else 0.95 * before + 0.05 * v
        self.bar.update(images - self.images)
        self.images = images
        if self.main and step % self.every == 0:
            self._write(step, terms["lr"])

    def _write(self, step: int, lr: float) -> None:
        now = time.monotonic()
        row = {
            "step": step,
            "images": self.images,
            "lr": lr,
            "images_per_second": (self.images - self.written_images) / (now - self.written),
            **self.running,
            **_gpu_peak(),
        }
        self.written, self.written_images = now, self.images
        append(self.path, json.dumps(row) + "\n")
        self.bar.set_postfix(loss=f"{self.running['loss']:.4f}")

    def close(self) -> None:
        self.bar.close()


def _gpu_peak() -> dict[str, float]:
    """The most memory that tensors had on the GPU since the process began, where there is one."""
    if not torch.cuda.is_initialized():
        return {}
    return {"gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20}


def _accelerator(config: TrainConfig) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise TrainingError(
            "mixed_precision='fp16' needs CUDA, and there is none; use 'bf16' or 'no'."
        )
    AcceleratorState._reset_state()  # another stage of this process may have had another precision
    return Accelerator(mixed_precision=config.mixed_precision)


def _batches(config: TrainConfig, world: int) -> tuple[int, int]:
    """Images of a step in each process, and of each part of it."""
    share, micro = config.batch_size // world, config.micro_batch_size or config.batch_size
    if config.batch_size % world or share % min(micro, share):
        raise TrainingError(
            f"batch_size={config.batch_size} does not split over {world} processes into parts of"
            f" {micro}; choose a multiple."
        )
    return share, min(micro, share)


def _sharded(task: Task, device: torch.device) -> bool:
    """Whether the networks are sharded over the processes."""
    if not fsdp.asked():
        return False
    if not task.shardable:
        raise TrainingError(
            f"a {type(task).__name__} cannot be sharded; start it without --use_fsdp."
        )
    fsdp.join(device)
    return True


def _begun(
    out: Path, resume: bool, config: TrainConfig, main: bool
) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from."""
    if not resume and (there := checkpoints.folders(out)):
        raise TrainingError(
            f"{out} already holds {there[-1].name}; pass resume=True to go on from it, or choose"
            " another folder."
        )
    begun = _resumed(out, main)
    for name in ("batch_size", "seed"):
        if begun is not None and begun.config.get(name) != getattr(config, name):
            raise TrainingError(
                f"{begun.folder} was made with {name}={begun.config.get(name)}, now"
                f" {getattr(config, name)}; an exact resume needs the same."
            )
    return begun


def _adapt(task: Task, config: TrainConfig) -> None:
    """In place: the networks compute as `config` says, with the weights that they have."""
    if config.plain_attention:
        use_plain_attention(_networks(task))
    if config.gradient_checkpointing and not use_gradient_checkpointing(_networks(task)):
        raise TrainingError(
            f"gradient_checkpointing: no network of {type(task).__name__} has it; leave it out."
        )
    if config.compile:
        # in place, and after the EMA copies were made: names in checkpoints stay, samples run
        # eagerly
        for m in (*task.modules.values(), *task.frozen.values()):
            m.compile()
