"""`python -m benchmarks.hostile [corpus|fuzz|table] ...`: see the package's text."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.env import environment
from benchmarks.hostile.attempts import FAULTS, VERDICTS

RESULTS = Path(__file__).parent.parent / "results" / "hostile.jsonl"


def _corpus(args: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.hostile import run

    out = []
    for seed in args.seeds:
        tried = []
        for one in run.try_all(run.chosen(seed, args.only, args.every), args.jobs):
            tried.append(one)
            if one["verdict"] in FAULTS:
                _say(f"{one['attempt']}, {one['case']}: {one['verdict']}: {one['said']}")
        out += run.counted(tried, seed)
    return out


def _fuzz(args: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.hostile import fuzz

    out = []
    for name in args.readers or fuzz.READERS:
        if not fuzz.able(fuzz.READERS[name]):
            _say(f"{name}: left out, {', '.join(fuzz.READERS[name].needs)} is not installed")
            continue
        row = fuzz.fuzz(name, args.count, args.seed)
        _say(f"{name}: {', '.join(f'{v} {row[v]}' for v in VERDICTS)}; {row['seconds']} s")
        for i, said in row["faults"].items():
            _say(f"  {i}: {said}")
        out.append(row)
    return out


def _say(line: str) -> None:
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(shown[:400], flush=True)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: one line for each kind of bad model and each way to read it, of the last commit."""
    head = ["what", "tried", "refused in one line", "run rightly", *FAULTS, "commit"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for what, group in _groups(rows).items():
        sums = Counter({v: sum(r[v] for r in group) for v in ("tried", *VERDICTS)})
        cells = [what, *(f"{sums[v]:,}" for v in ("tried", *VERDICTS)), f"`{group[0]['commit']}`"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the last commit of each corpus and reader."""
    last = {r.get("corpus", r.get("reader")): r["commit"] for r in rows}
    out: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["commit"] == last[row.get("corpus", row.get("reader"))]:
            name = f"corpus {row['corpus']}, {row['attempt']}" if "corpus" in row else row["reader"]
            out.setdefault(name, []).append(row)
    return out


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    corpus = what.add_parser("corpus", help="bad model folders")
    corpus.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    corpus.add_argument("--only", default="", help="kinds or names that hold this text")
    corpus.add_argument("--every", type=int, default=1, help="one case of so many")
    corpus.add_argument("--jobs", type=int, default=2, help="processes at once")
    corpus.set_defaults(run=_corpus)
    fuzz = what.add_parser("fuzz", help="changed files by the thousand, reader by reader")
    fuzz.add_argument("--readers", nargs="+", help="default: all")
    fuzz.add_argument("--count", type=int, default=10_000)
    fuzz.add_argument("--seed", type=int, default=0)
    fuzz.set_defaults(run=_fuzz)
    for each in (corpus, fuzz):
        each.add_argument("--save", action="store_true", help=f"add rows to {RESULTS.name}")
    what.add_parser("table", help="the table of the last saved rows")
    args = parser.parse_args()
    if args.what == "table":
        print(*table(read()), sep="\n")
        return 0
    about = environment()
    rows = [{**row, **about} for row in args.run(args)]
    if args.save:
        with open(RESULTS, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    print(*table(rows), sep="\n")
    return int(any(row[v] for row in rows for v in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
