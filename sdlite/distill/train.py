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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from sdlite.arguments import integer, number, one_of, optional, truth
from sdlite.distill import checkpoints, fsdp
from sdlite.errors import InputError, TrainingError
from sdlite.io import append

Batch = dict[str, Any]


class Task(Protocol):
    """What is trained. `modules` are the trained networks by name; `fit` prepares them and hands
    them back to `loss`.
    """

    modules: dict[str, nn.Module]
    # frozen: dict[str, nn.Module]  (optional) networks that only run, such as a teacher: compiled
    # with the others to(device)                    (optional) moves all networks that are not in
    # `modules`

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw `size` samples and all the noise they need; values are tensors (B, ...) or lists of
        length B.
        """

    def loss(self, modules: dict[str, nn.Module], batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalar terms by name; `loss` is what is minimised, the others are logged."""

    def save(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Write the (EMA) networks as a user would load them."""

    def sample(self, modules: dict[str, nn.Module], path: Path) -> None:
        """Write a picture that shows how far training is."""


def _betas(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InputError(
            f"{name}={value!r}; accepted: two numbers, 0 to {_BELOW_ONE}, such as [0.9, 0.99]."
        )
    for i, v in enumerate(value):
        number(f"{name}[{i}]", v, 0, _BELOW_ONE)


_COUNT, _BELOW_ONE = 10**12, 0.999999
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_images": lambda n, v: integer(n, v, 1, _COUNT),
    "batch_size": lambda n, v: integer(n, v, 1, 1_000_000),
    "micro_batch_size": lambda n, v: optional(integer, n, v, 1, 1_000_000),
    "lr": lambda n, v: number(n, v, 1e-12, 100),
    "final_lr": lambda n, v: number(n, v, 0, 100),
    "warmup_images": lambda n, v: integer(n, v, 0, _COUNT),
    "decay_from": lambda n, v: number(n, v, 0, 1),
    "betas": _betas,
    "weight_decay": lambda n, v: number(n, v, 0, 100),
    "grad_clip": lambda n, v: number(n, v, 1e-12, 1e12),
    "ema_decay": lambda n, v: number(n, v, 0, _BELOW_ONE),
    "mixed_precision": lambda n, v: one_of(n, v, ("no", "bf16", "fp16")),
    "gradient_checkpointing": truth,
    "compile": truth,
    "plain_attention": truth,
    "seed": lambda n, v: integer(n, v, 0, 2**63 - 1),
    "log_every": lambda n, v: integer(n, v, 1, _COUNT),
    "sample_every": lambda n, v: integer(n, v, 0, _COUNT),
    "checkpoint_minutes": lambda n, v: number(n, v, 0, 1e12),
    "keep_checkpoints": lambda n, v: integer(n, v, 1, 1_000_000),
}


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast. Lengths are counted in images, so that they do not depend on the batch
    size.

    Raises:
        InputError: a value is not accepted; the message names it and what is.
    """

    max_images: int
    batch_size: int = 64  # over all processes
    # gradient accumulation when smaller than batch_size; None = no accumulation
    micro_batch_size: int | None = None
    lr: float = 3e-4
    final_lr: float = 1e-5
    warmup_images: int = 5_000
    decay_from: float = 0.5  # constant until this share of max_images, then cosine to final_lr
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    # "no", "bf16" or "fp16" (CUDA only); weights, optimizer and EMA stay float32
    mixed_precision: str = "no"
    # activations of blocks are computed again in the backward: less memory, about a third more time
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile the networks: minutes at the start, then faster steps
    # matrix products and softmax instead of torch's fused kernel, whose bfloat16 backward is slow
    # on CPUs
    plain_attention: bool = False
    seed: int = 0
    log_every: int = 20  # steps
    sample_every: int = 2_000  # steps; 0 = never
    checkpoint_minutes: float = 5.0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for f in fields(self):
            _CHECKS[f.name](f.name, getattr(self, f.name))

    def lr_at(self, images: int) -> float:
        if images < self.warmup_images:
            return self.lr * (images + 1) / self.warmup_images
        share = images / self.max_images
        if share <= self.decay_from:
            return self.lr
        phase = min(1.0, (share - self.decay_from) / (1 - self.decay_from))
        return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * phase))


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))


def _split(batch: Batch, start: int, stop: int) -> Batch:
    return {k: v[start:stop] for k, v in batch.items()}


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


class _State:
    """Networks, their EMA and the optimizer, as one thing that is saved and restored whole, sharded
    or not.
    """

    def __init__(self, modules: dict[str, nn.Module], config: TrainConfig, sharded: bool = False):
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

    def averaged(self) -> dict[str, nn.Module]:
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

    def _ask(self, number: int, frame: Any) -> None:
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

    said: list[Any] = [None]
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
    """Trained ones, and the frozen ones that the task holds."""
    return [
        *task.modules.values(),
        *getattr(task, "frozen", {}).values(),
        *(m for m in vars(task).values() if isinstance(m, nn.Module)),
    ]


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
) -> dict[str, Any]:
    """Train `task` until `max_images`, an interrupt, or `max_minutes`; always leaves a checkpoint
    and the EMA networks.

    Args:
        out: folder for checkpoints, `stats.jsonl`, sample pictures and, at the end, what
            `task.save` writes in `model/`.
        resume: go on from the newest whole checkpoint in `out`. Without it a folder that has one is
            refused.
        max_minutes: stop after this wall time; 0 stops at once, None never.

    Returns:
        {"images", "step", "seconds", "finished", "loss"}.

    Raises:
        TrainingError: loss or gradient are not finite (names step and sample ids); memory ran out;
            checkpoints exist and `resume` is False, or none of them is whole; the checkpoint is of
            another network, batch size or seed; the precision or the sharding does not go with
            device or task. What was kept, and how to go on, is said.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    out = Path(out)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise TrainingError(
            "mixed_precision='fp16' needs CUDA, and there is none; use 'bf16' or 'no'."
        )
    AcceleratorState._reset_state()  # another stage of this process may have had another precision
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    micro = config.micro_batch_size or config.batch_size
    if config.batch_size % world or config.batch_size // world % min(
        micro, config.batch_size // world
    ):
        raise TrainingError(
            f"batch_size={config.batch_size} does not split over {world} processes into parts of"
            f" {micro}; choose a multiple."
        )
    sharded = fsdp.asked(world)
    if sharded and not getattr(task, "shardable", True):
        raise TrainingError(
            f"a {type(task).__name__} cannot be sharded; start it without --use_fsdp."
        )
    if not resume and (there := checkpoints.folders(out)):
        raise TrainingError(
            f"{out} already holds {there[-1].name}; pass resume=True to go on from it, or choose"
            " another folder."
        )
    begun = _resumed(out, accelerator.is_main_process)
    for field in ("batch_size", "seed"):
        if begun is not None and begun.config.get(field) != getattr(config, field):
            raise TrainingError(
                f"{begun.folder} was made with {field}={begun.config.get(field)}, now"
                f" {getattr(config, field)}; an exact resume needs the same."
            )
    out.mkdir(parents=True, exist_ok=True)

    if hasattr(task, "to"):
        task.to(device)
    state = _State({k: m.to(device) for k, m in task.modules.items()}, config, sharded)
    step = images = 0
    if begun is not None:
        state.restore(begun.folder / checkpoints.STATE)
        step, images = begun.step, begun.images
    if config.plain_attention:
        use_plain_attention(_networks(task))
    if config.gradient_checkpointing and not use_gradient_checkpointing(_networks(task)):
        raise TrainingError(
            f"gradient_checkpointing: no network of {type(task).__name__} has it; leave it out."
        )
    if config.compile:
        for m in task.modules.values():
            # in place, and after the EMA copies were made: names in checkpoints stay, samples run
            # eagerly
            m.compile()
        for m in getattr(task, "frozen", {}).values():
            m.compile()
    prepared = {
        k: m.train() if sharded else accelerator.prepare_model(m.train())
        for k, m in task.modules.items()
    }
    optimizer = accelerator.prepare_optimizer(state.optimizer, device_placement=False)

    def checkpoint() -> None:
        tensors = state.tensors() if sharded or accelerator.is_main_process else {}
        if accelerator.is_main_process:
            checkpoints.write(
                out,
                tensors,
                {"step": step, "images": images, "config": asdict(config)},
                config.keep_checkpoints,
            )
        accelerator.wait_for_everyone()

    start = last_checkpoint = last_log = time.monotonic()
    first = step
    share = config.batch_size // world
    micro = min(micro, share)
    running: dict[str, float] = {}
    logged_images = images
    bar = tqdm(
        total=config.max_images,
        initial=images,
        unit="img",
        disable=not accelerator.is_main_process,
        mininterval=5,
        smoothing=0.05,
    )
    with _StopSignal() as stop, _memory(out, lambda: step):
        while images < config.max_images:
            late = max_minutes is not None and time.monotonic() - start >= max_minutes * 60
            due = time.monotonic() - last_checkpoint >= config.checkpoint_minutes * 60
            ended, due = _any([late or stop.asked, due], world, device)
            if ended:
                break
            if due and step > first:
                checkpoint()
                last_checkpoint = time.monotonic()
            lr = config.lr_at(images)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = task.batch(config.batch_size, step_generator(config.seed, step))
            batch = _to(_split(batch, rank * share, (rank + 1) * share), device)
            terms: dict[str, float] = {}
            for i in range(0, share, micro):
                part = _split(batch, i, i + micro)
                with accelerator.autocast():
                    losses = task.loss(prepared, part, step)
                for k, v in losses.items():
                    terms[k] = terms.get(k, 0.0) + v.item() * micro / share
                if not math.isfinite(terms["loss"]):
                    raise TrainingError(
                        _diverged(f"loss is {terms['loss']}", step, terms, part, out)
                    )
                accelerator.backward(losses["loss"] * (micro / share))
            norm = float(accelerator.clip_grad_norm_(state.parameters, config.grad_clip))
            if config.mixed_precision != "fp16" and not math.isfinite(
                norm
            ):  # the scaler of fp16 skips such a step
                raise TrainingError(
                    _diverged(f"the gradient's norm is {norm}", step, terms, batch, out)
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.update_ema(min(config.ema_decay, (1 + step) / (10 + step)))
            step, images = step + 1, images + config.batch_size
            terms["grad_norm"] = norm
            for k, v in terms.items():
                running[k] = v if k not in running else 0.95 * running[k] + 0.05 * v
            bar.update(config.batch_size)
            if accelerator.is_main_process and step % config.log_every == 0:
                now = time.monotonic()
                row = {
                    "step": step,
                    "images": images,
                    "lr": lr,
                    "images_per_second": (images - logged_images) / (now - last_log),
                    **running,
                }
                last_log, logged_images = now, images
                append(out / "stats.jsonl", json.dumps(row) + "\n")
                bar.set_postfix(loss=f"{running['loss']:.4f}")
            if config.sample_every and step % config.sample_every == 0:
                averaged = state.averaged() if sharded or accelerator.is_main_process else {}
                if accelerator.is_main_process:
                    task.sample(averaged, out / f"sample-{step:08d}.png")
    checkpoint()
    bar.close()
    if stop.asked:
        print(f"asked to stop: wrote a checkpoint at step {step}")
    averaged = state.averaged() if sharded or accelerator.is_main_process else {}
    if accelerator.is_main_process:
        task.save(averaged, out / "model")
        task.sample(averaged, out / "sample-last.png")
        print(
            f"{out}: {images} images, step {step}, loss {running.get('loss', float('nan')):.4f};"
            f" networks in {out / 'model'}"
        )
    return {
        "images": images,
        "step": step,
        "seconds": time.monotonic() - start,
        "finished": images >= config.max_images,
        "loss": running.get("loss"),
    }
