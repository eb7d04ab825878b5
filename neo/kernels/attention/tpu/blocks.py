"""Sizes of the TPU kernels' tiles: a table by chip and shape, found by compiling, and the nearest row of it.

The table is blocks.csv beside this file. Its present rows were found by hand with the same counter that
bench/tune_attention_tpu.py searches with; that script writes the file anew. Its columns: chip, seq_len (T = S),
window (empty: full causal), head (h), stack (G), direction (forward, backward), blocks ("field=value field=value ...") and
cycles (a head, as bench/attention_tpu_static.py counts them).
"""

from __future__ import annotations

import contextlib
import contextvars
import csv
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax

from neo.errors import InputError, nearest

TABLE = Path(__file__).with_name("blocks.csv")
MIB = 2**20
# VMEM of a core (jax.experimental.pallas.tpu.get_tpu_info_for_chip, JAX 0.12), and what a kernel of ours may ask of it: XLA
# keeps other things there while a kernel runs, and a limit beyond what the chip has is accepted and then fails.
VMEM = {"v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB, "tpu7x": 64 * MIB}
VMEM_SHARE = 0.78
# As JAX names devices (`device_kind`), without "TPU".
CHIPS = {"v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v5p": "v5p", "v4": "v5p", "v6 lite": "v6e", "v6e": "v6e", "7x": "tpu7x"}
SIBLINGS = {"v5e": "v5p", "v5p": "v5e", "v6e": "tpu7x", "tpu7x": "v6e"}  # whose matrix units have the same size
MOST_ROWS, LANES = 2048, 128

def _divisor(n: int, most: int) -> int:
    """Largest divisor of n that is at most `most`."""
    return max(d for d in range(1, max(1, min(most, n)) + 1) if n % d == 0)


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
    """block_q x block_kv: one tile; block_kv divides block_q.

    chunk_rows x chunk_stack heads: what is computed at once in it; edge_rows x edge_stack: the same in the tiles at the
    diagonal and at the far end of the window, where lower chunks leave more out. newton: whether the last
    division is done by hand. vmem: bytes the kernel may use.
    """

    block_q: int = 512
    block_kv: int = 512
    chunk_rows: int = 512
    chunk_stack: int = 1
    edge_rows: int = 128
    edge_stack: int = 4
    newton: bool = False
    vmem: int = 48 * MIB

    def chunk(self, stack: int, edge: bool) -> tuple[int, int]:
        """(heads, rows) of a chunk for `stack` heads."""
        heads, rows = (self.edge_stack, self.edge_rows) if edge else (self.chunk_stack, self.chunk_rows)
        return _divisor(stack, heads), min(rows, self.block_q)


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
    """block_q x block_kv: one tile; block_q divides block_kv. part: granularity of what edge tiles leave out.

    columns: keys of one piece of a tile of which all counts. unroll: query heads laid out one after the other.
    turned: sums are kept as [h, positions], for matrix units of 256 x 256 (`backward_tile`).
    vmem: bytes that the kernels may use.
    """

    block_q: int = 512
    block_kv: int = 1024
    part: int = 128
    columns: int = 512
    unroll: int = 1
    turned: bool = False
    vmem: int = 100 * MIB


Blocks = TypeVar("Blocks", ForwardBlocks, BackwardBlocks)
_chip: contextvars.ContextVar[str | None] = contextvars.ContextVar("chip", default=None)


@contextlib.contextmanager
def for_chip(name: str) -> Iterator[None]:
    """Kernels traced inside take the blocks of this chip (a key of VMEM): to compile for a TPU that is not there."""
    if name not in VMEM:
        raise InputError(f"unknown TPU {name!r}{nearest(name, VMEM)}; known: {', '.join(VMEM)}")
    token = _chip.set(name)
    try:
        yield
    finally:
        _chip.reset(token)


def chip(device_kind: str = "") -> str:
    """The chip to choose blocks for: `for_chip`'s, else the one that is named, else that of the first device, else v5e.

    device_kind: as JAX names devices, "TPU v5 lite"; "" or that of another platform: not known.
    """
    if (named := _chip.get()) is not None:
        return named
    if not device_kind.startswith("TPU"):
        device_kind = jax.devices()[0].device_kind if jax.default_backend() == "tpu" else "TPU v5e"
    return CHIPS.get(device_kind.removeprefix("TPU").strip(), "v5e")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table."""

    chip: str
    seq_len: int
    window: int | None
    head: int
    stack: int
    direction: str
    blocks: str

    def distance(self, seq_len: int, window: int | None, head: int, stack: int) -> float:
        """How unlike a shape is. Heads in whole lanes count most, then the keys a query sees; ours, a judgement."""
        seen, asked = min(self.window or self.seq_len, self.seq_len), min(window or seq_len, seq_len)
        lanes = -(-self.head // LANES) / -(-head // LANES)
        return (
            4 * abs(math.log2(lanes))
            + 2 * abs(math.log2(seen / asked))
            + abs(math.log2(self.stack / stack))
            + abs(math.log2(self.seq_len / seq_len))
        )


@functools.cache
def table(path: Path = TABLE) -> tuple[Row, ...]:
    """The rows of blocks.csv."""
    with open(path, newline="") as file:
        return tuple(
            Row(
                row["chip"], int(row["seq_len"]), int(row["window"]) if row["window"] else None, int(row["head"]),
                int(row["stack"]), row["direction"], row["blocks"],
            )  # fmt: skip
            for row in csv.DictReader(file)
        )


def _nearest_row(name: str, direction: str, seq_len: int, window: int | None, head: int, stack: int) -> Row | None:
    rows = [row for row in table() if row.direction == direction]
    for known in (name, SIBLINGS[name]):
        if here := [row for row in rows if row.chip == known]:
            return min(here, key=lambda row: row.distance(seq_len, window, head, stack))
    return None


def _parse(kind: type[Blocks], words: str) -> Blocks:
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    given = (word.split("=") for word in words.split())
    return kind(**{name: bool(int(value)) if fields[name] == "bool" else int(value) for name, value in given})


def _fit(blocks: Blocks, row_stack: int, seq_len: int, stack: int, wide: bool) -> Blocks:
    """Blocks of a row of the table for another shape: as many rows of queries in a tile, and no more than there are.

    wide: fp32 operands; tiles are halved, because a register holds half as many numbers.
    """

    def down(n: int, most: int) -> int:
        while n > LANES and n > most:
            n //= 2
        return n

    enough = LANES * 2 ** max(0, math.ceil(math.log2(seq_len / LANES)))
    ratio = row_stack / stack
    block_q = blocks.block_q
    while ratio >= 2 and block_q < MOST_ROWS:
        block_q, ratio = 2 * block_q, ratio / 2
    while ratio <= 0.5 and block_q > LANES:
        block_q, ratio = block_q // 2, ratio * 2
    block_q = down(block_q // 2 if wide and block_q > LANES else block_q, enough)
    block_kv = down(blocks.block_kv // 2 if wide and blocks.block_kv > LANES else blocks.block_kv, enough)
    if isinstance(blocks, BackwardBlocks):
        return dataclasses.replace(blocks, block_q=min(block_q, block_kv), block_kv=block_kv)
    return dataclasses.replace(blocks, block_q=block_q, block_kv=min(block_q, block_kv))


def _blocks(
    kind: type[Blocks], direction: str, most_vmem: int, name: str, seq_len: int, window: int | None, head: int, stack: int,
    wide: bool,
) -> Blocks:  # fmt: skip
    row = _nearest_row(name, direction, seq_len, window, head, stack)
    blocks = kind() if row is None else _parse(kind, row.blocks)
    blocks = _fit(blocks, row.stack if row else 4, seq_len, stack, wide)
    return dataclasses.replace(blocks, vmem=min(most_vmem, int(VMEM_SHARE * VMEM[name])))


def forward_blocks(
    seq_len: int, window: int | None, head: int, stack: int, wide: bool = False, device_kind: str = ""
) -> ForwardBlocks:
    """Blocks for T queries, W (None: all earlier keys), h, G = H / K, on `chip(device_kind)`. wide: fp32 operands."""
    return _blocks(
        ForwardBlocks, "forward", ForwardBlocks.vmem, chip(device_kind), seq_len, window, head, stack, wide
    )


def backward_blocks(
    seq_len: int, window: int | None, head: int, stack: int, wide: bool = False, device_kind: str = ""
) -> BackwardBlocks:
    """The same for the backward."""
    return _blocks(
        BackwardBlocks, "backward", BackwardBlocks.vmem, chip(device_kind), seq_len, window, head, stack, wide
    )
