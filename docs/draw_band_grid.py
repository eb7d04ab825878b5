"""Draw docs/images/band_grid.png and docs/images/context_ring.png, from the code that they explain.

    python docs/draw_band_grid.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from neo.kernels.attention.tpu.tiles import EMPTY, FULL, Tiles, row_grid, row_step  # noqa: E402

INTERIOR, EDGE, IDLE, LINE = "#2f6f9f", "#f2b155", "#e6e6e6", "#b03a2e"
DEVICES = ("#2f6f9f", "#f2b155", "#7aa874", "#b07aa1")
# 12 blocks of 128 queries and keys, a window of 3.5 blocks: small enough to see, and no edge falls on a border.
BLOCK, BLOCKS, WINDOW = 128, 12, 448
DEVICE_COUNT = 4


def cell(axes, x: float, y: float, colour: str, text: str = "", **options) -> None:
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2, **options))
    if text:
        dark = colour in (INTERIOR, *DEVICES[::3])
        axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def prepare(axes, width: int, height: int, title: str, across: str, down: str) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(down, fontsize=9)
    axes.set_xticks([x + 0.5 for x in range(width)], range(width), fontsize=8)
    axes.set_yticks([y + 0.5 for y in range(height)], range(height), fontsize=8)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def colour_of(tiles: Tiles, i: int, j: int) -> str | None:
    kind = tiles.kind(tiles.offset + i * tiles.block_q - j * tiles.block_kv)
    return None if kind == EMPTY else INTERIOR if kind == FULL else EDGE


def draw_band(path: Path) -> None:
    """The tiles of the score matrix that are visited, and the grid that visits them."""
    length = BLOCK * BLOCKS
    tiles = Tiles(1, 1, length, length, 128, BLOCK, BLOCK, True, WINDOW)
    grid = row_grid(tiles)
    figure, (matrix, steps) = plt.subplots(1, 2, figsize=(9.6, 5.9), dpi=110, width_ratios=(BLOCKS, grid.width + 2))

    prepare(matrix, BLOCKS, BLOCKS, "the score matrix", "key block j", "query block i")
    for i in range(BLOCKS):
        for j in range(BLOCKS):
            matrix.add_patch(Rectangle((j, i), 1, 1, facecolor="white", edgecolor=IDLE, linewidth=0.8))
    for i in range(BLOCKS):
        for j in range(BLOCKS):
            if colour := colour_of(tiles, i, j):
                cell(matrix, j, i, colour)
    matrix.plot([0, BLOCKS], [0, BLOCKS], color=LINE, linewidth=1)
    matrix.plot([0, BLOCKS - WINDOW / BLOCK], [WINDOW / BLOCK, BLOCKS], color=LINE, linewidth=1)

    prepare(steps, grid.width, grid.rows, "the grid: row, step", "step", "row")
    for row in range(grid.rows):
        for step in range(grid.width):
            i, u = (int(x) for x in row_step(tiles, grid, row, step))
            j = tiles.last_kv(i) - u
            colour = colour_of(tiles, i, j) if 0 <= j < BLOCKS and u < tiles.band else None
            cell(steps, step, row, colour or IDLE, f"{i},{j}" if colour else "")
    legend = [Patch(color=INTERIOR, label="sees everything: the body without a mask"),
              Patch(color=EDGE, label="diagonal or border of the window: a body that masks"),
              Patch(color=IDLE, label="idle step: no copy, no product"),
              Patch(facecolor="white", edgecolor=IDLE, label="not in the grid")]  # fmt: skip
    figure.legend(handles=legend, loc="lower center", ncols=2, fontsize=8.5, frameon=False)
    figure.suptitle(f"T = {BLOCKS} blocks, W = {WINDOW / BLOCK:g} blocks; a cell of the grid says which tile (i, j) it takes",
                    fontsize=10.5, x=0.06, ha="left")  # fmt: skip
    figure.tight_layout(rect=(0, 0.09, 1, 0.98))
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def visits(zigzag: bool) -> list[list[tuple[int, int]]]:
    """[query chunk][key chunk] -> (device, hop) for 2n chunks of a causal sequence."""
    n = DEVICE_COUNT
    owner = [min(c, 2 * n - 1 - c) if zigzag else c // 2 for c in range(2 * n)]
    return [[(owner[i], (owner[i] - owner[j]) % n) for j in range(i + 1)] for i in range(2 * n)]


def draw_ring(path: Path) -> None:
    """Who works on which part of a causal score matrix, and when, in a ring of 4 devices."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 5.6), dpi=110)
    for place, zigzag in zip(axes, (False, True), strict=True):
        chunks = 2 * DEVICE_COUNT
        title = "zigzag: device d has chunks d and 2n-1-d" if zigzag else "in order: device d has chunks 2d and 2d+1"
        prepare(place, chunks, chunks, title, "chunk of keys", "chunk of queries")
        work = [[0.0] * DEVICE_COUNT for _ in range(DEVICE_COUNT)]  # [hop][device], in whole tiles
        for i, row in enumerate(visits(zigzag)):
            for j, (device, hop) in enumerate(row):
                cell(place, j, i, DEVICES[device], str(hop))
                work[hop][device] += 0.5 if i == j else 1.0
        slowest = sum(max(hop) for hop in work)
        total = sum(map(sum, work))
        counted = f"the slowest device of each visit:\n{slowest:g} tiles in all, {total / DEVICE_COUNT:g} at best"
        place.text(chunks, 0.2, counted, ha="right", va="top", fontsize=8.5)
    handles = [Patch(color=colour, label=f"device {d}") for d, colour in enumerate(DEVICES)]
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8.5, frameon=False)
    figure.suptitle("A causal ring of n = 4 devices; the number is how far the keys have travelled", fontsize=10.5, x=0.06,
                    ha="left")  # fmt: skip
    figure.tight_layout(rect=(0, 0.08, 1, 0.98))
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images"
    draw_band(folder / "band_grid.png")
    draw_ring(folder / "context_ring.png")


if __name__ == "__main__":
    main()
