"""`sdlite bench`: seconds and memory of a model on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlite import arguments
from sdlite.cli import command, terminal
from sdlite.errors import InputError
from sdlite.io import check_file

EXAMPLES = """
    sdlite bench emoji
    sdlite bench my-int8 --backends onnxruntime openvino --threads 2 --out rows.jsonl"""


def _options(p: argparse.ArgumentParser) -> None:
    from sdlite import backends
    from sdlite.manifest import PRECISIONS

    command.add_model(p, default="emoji")
    p.add_argument(
        "--precisions",
        nargs="+",
        metavar="P",
        help=f"{', '.join(PRECISIONS)}; default: those that the model holds",
    )
    p.add_argument(
        "--backends",
        nargs="+",
        metavar="B",
        help=f"{', '.join(backends.names())}; default: the installed ones that have the"
        " precision, torch only for plain folders",
    )
    command.add_threads(p)
    text = "how long each row is repeated; default: all rows together in under two minutes"
    command.number(p, "--seconds", text, 0)
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSONL file that the rows are added to, with all samples",
    )
    group = command.sampling(p, "sampling and size")
    command.add_guidance(group)
    command.add_size(group)
    command.whole(group, "--batch", "images of one call", 1, arguments.MOST_IMAGES, default=1)


def _run(args: argparse.Namespace) -> None:
    from sdlite import bench

    if args.out:
        check_file(args.out)
    todo = bench.jobs(
        args.model,
        args.precisions,
        args.backends,
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        height=args.height,
        width=args.width,
        batch=args.batch,
        threads=args.threads,
        seconds=args.seconds,
    )
    terminal.say(bench.HEADER)
    rows = bench.bench(todo, lambda row: terminal.say(bench.line(row)))
    ran = [r for r in rows if "error" not in r]
    if not ran:
        raise InputError("every row failed; see above.")
    settings = {
        f"{r['size'][0]}x{r['size'][1]} px, {r['steps']} steps, guidance {r['guidance']:g}"
        for r in ran
    }
    terminal.say(
        f"{args.model}: {', '.join(sorted(settings))}, batch {args.batch}; call s is the median of"
        " N calls after the first"
    )
    if args.out:
        bench.save(rows, args.out)
        terminal.say(f"wrote {args.out}")


BENCH = command.Command(
    "bench",
    "Measure seconds and memory of a model on this machine, each precision and backend in its own"
    " process.",
    EXAMPLES,
    _options,
    _run,
)
