"""README's image: eight of the 64 prompts by the teacher, the student, and the student in int8.

python benchmarks/emoji/readme_grid.py     writes docs/grid.webp from benchmarks/emoji/grids
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "docs" / "grid.webp"
ROWS = (
    ("teacher-50", "teacher", "31M, 100 calls"),
    ("student-4", "student", "5.4M, 4 calls"),
    ("student-4-int8", "student, int8", "5.4M, 4 calls"),
)
CELLS = ((0, 7), (1, 5), (2, 3), (2, 7), (4, 0), (4, 7), (6, 0), (6, 6))  # row, column of a grid
SIDE, SHOWN, LABEL, GAP = 64, 96, 132, 4  # pixels


def main() -> None:
    size = (LABEL + len(CELLS) * (SHOWN + GAP), len(ROWS) * (SHOWN + GAP) - GAP)
    out = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(out)
    for y, (name, title, cost) in enumerate(ROWS):
        top = y * (SHOWN + GAP)
        draw.text((4, top + 28), title, "black", ImageFont.load_default(18))
        draw.text((4, top + 52), cost, "#555555", ImageFont.load_default(14))
        grid = Image.open(HERE / "grids" / f"{name}.webp").convert("RGB")
        for x, (row, column) in enumerate(CELLS):
            box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
            cell = grid.crop(box).resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)
            out.paste(cell, (LABEL + x * (SHOWN + GAP), top))
    out.save(OUT, quality=90, method=6)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
