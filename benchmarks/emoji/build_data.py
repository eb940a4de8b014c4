"""Build the emoji training shard from two npm packages: art and captions in, one WebDataset shard
out.

    npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0     # and unpack both
    python benchmarks/emoji/build_data.py --art emoji-datasource-google/package --names \
        emojibase-data/package

Art: Noto Emoji, 64 px PNG, Apache-2.0 (npm `emoji-datasource-google`). Names and tags: CLDR by way
    of npm `emojibase-data` (MIT). Each sample is `<hexcode>.webp` (64x64 RGBA, lossless) and
    `<hexcode>.json`:

    {"caption": str, "tags": [str], "group": str, "concept": str, "split": "train" | "heldout"}

`concept` is the hexcode without skin tone and gender: one concept has up to 30 pictures, and
samplers weight by concept. `heldout` is a fixed 5% of the skin-tone pictures, chosen by hash and
never trained on: it measures composition. Flags are left out (258 pictures that nobody can name).
The shard is byte-for-byte reproducible.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

from PIL import Image

SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
GENDER_SIGNS = {"2640", "2642"}
PEOPLE = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man, woman -> person
PX = 64


def key(hexcode: str) -> str:
    """Hexcode without the variation selector: the two packages disagree about where it stands."""
    return "-".join(p for p in hexcode.upper().split("-") if p != "FE0F")


def concept_of(hexcode: str) -> str:
    parts = [PEOPLE.get(p, p) for p in hexcode.split("-") if p not in SKIN_TONES]
    out: list[str] = []
    for p in parts:
        if p in GENDER_SIGNS:
            if out and out[-1] == "200D":
                out.pop()
            continue
        out.append(p)
    return "-".join(out)


def is_heldout(hexcode: str) -> bool:
    if not SKIN_TONES & set(hexcode.split("-")):
        return False
    return int(hashlib.sha256(hexcode.encode()).hexdigest(), 16) % 20 == 0


def captions(names: Path) -> dict[str, dict]:
    groups = {
        g["order"]: g["key"] for g in json.loads((names / "en/messages.json").read_text())["groups"]
    }
    out = {}
    for entry in json.loads((names / "en/data.json").read_text()):
        for e in (entry, *entry.get("skins", [])):
            group = groups.get(entry.get("group", -1), "component")
            if group in ("flags", "component"):
                continue
            tags = e.get("tags") or entry.get("tags") or []
            out[key(e["hexcode"])] = {"caption": e["label"], "tags": tags, "group": group}
    return out


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o644
    tar.addfile(info, io.BytesIO(data))


def main() -> None:
    here = Path(__file__).parent
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--art", type=Path, required=True, help="unpacked emoji-datasource-google")
    ap.add_argument("--names", type=Path, required=True, help="unpacked emojibase-data")
    ap.add_argument("--out", type=Path, default=here / "emoji-000000.tar.gz")
    args = ap.parse_args()

    names = captions(args.names)
    files = {key(f.stem): f for f in (args.art / "img/google/64").glob("*.png")}
    both = sorted(set(files) & set(names))
    raw = io.BytesIO()
    counts = {"train": 0, "heldout": 0}
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for k in both:
            image = Image.open(files[k]).convert("RGBA")
            if image.size != (PX, PX):
                image = image.resize((PX, PX), Image.Resampling.LANCZOS)
            webp = io.BytesIO()
            image.save(webp, "WEBP", lossless=True, quality=100, method=6)
            split = "heldout" if is_heldout(k) else "train"
            counts[split] += 1
            meta = {**names[k], "concept": concept_of(k), "split": split}
            add(tar, f"{k}.webp", webp.getvalue())
            add(tar, f"{k}.json", json.dumps(meta, ensure_ascii=False, sort_keys=True).encode())
    tmp = args.out.with_suffix(".tmp")
    with open(tmp, "wb") as f, gzip.GzipFile(fileobj=f, mode="wb", mtime=0, filename="") as z:
        z.write(raw.getvalue())
    os.replace(tmp, args.out)
    concepts = len({concept_of(k) for k in both})
    missing = len(files) - len(both)
    print(
        f"{args.out}: {len(both)} pictures ({counts}), {concepts} concepts,"
        f" {args.out.stat().st_size / 1e6:.2f} MB; {missing} pictures without a caption or in a"
        " left-out group"
    )


if __name__ == "__main__":
    main()
