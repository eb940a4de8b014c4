"""Does reading training data keep shards in memory? Peak RSS of `sdlite.distill.data.read` and of
opening every image, for tar shards of growing size.

    python -m benchmarks.data_memory [--sizes 20 200 2048] [--scratch DIR]

Each size is one plain .tar of the same noise image (1 MiB of PNG) with a caption each, read in a
process of its own. One row a size goes to benchmarks/results/data_memory.jsonl. The exit status is
1 where the largest shard takes more than `BAR_MIB` over the smallest.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "data_memory.jsonl"
BAR_MIB = 32.0
SIDE = 591  # pixels: about 1 MiB of noise as a PNG

CHILD = """
import json, resource, sys
from sdlite.distill import data
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    ) / 2**20
before = peak()
found = data.read(sys.argv[1])
indexed = peak()
for item in found.items:
    item.open()
print(json.dumps({"images": len(found.items), "skipped": len(found.skipped),
    "started_mib": before, "indexed_mib": indexed, "opened_mib": peak()}))
"""


def write_shard(path: Path, mib: int) -> Path:
    """A tar of about so many MiB."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    with tarfile.open(path, "w") as tar:
        for i in range(max(1, mib * 2**20 // len(png.getvalue()))):
            for name, content in ((f"{i}.png", png.getvalue()), (f"{i}.txt", b"image %d" % i)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def measure(path: Path) -> dict[str, object]:
    """The row of one shard, without its environment."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - begin
    size = path.stat().st_size / 2**20
    return {"shard_mib": size, "seconds": seconds, **json.loads(done.stdout)}


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--sizes", type=int, nargs="+", default=[20, 200, 2048], help="MiB")
    ap.add_argument("--scratch", type=Path, help="where to write the shards")
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    from benchmarks.env import environment

    about = {**environment(), "command": "python -m benchmarks.data_memory"}
    peaks = []
    for mib in args.sizes:
        with tempfile.TemporaryDirectory(prefix="sdlite-data-", dir=args.scratch) as scratch:
            row = measure(write_shard(Path(scratch) / "s.tar", mib))
        peaks.append(float(str(row["opened_mib"])))
        with open(args.out, "a") as f:
            f.write(json.dumps({"benchmark": "data_memory", **row, **about}) + "\n")
        print(f"{row['shard_mib']:.0f} MiB, {row['images']} images: peak {peaks[-1]:.1f} MiB")
    growth = peaks[-1] - peaks[0]
    print(
        f"growth {growth:.1f} MiB; bar {BAR_MIB:g}: {'held' if growth <= BAR_MIB else 'not held'}"
    )
    return int(growth > BAR_MIB)


if __name__ == "__main__":
    raise SystemExit(main())
