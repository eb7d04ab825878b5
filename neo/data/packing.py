"""Packing documents whole into bins of T tokens: best-fit decreasing (arXiv:2404.10830).

Windows cut from documents that follow one another split most long documents somewhere. Here a document is cut only
where it is longer than T, and the rest of the bins is padding (below 1 % with usual lengths). Everything is a pure
function of the lengths; `neo.data.store_writer.append_packed` writes what it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """`count` tokens of document number `document` from its token `first` on."""

    document: int
    first: int
    count: int


def best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Numbers of the items in each bin of `seq_len` places. ValueError for a length outside 1 .. seq_len.

    Longest first, each into the bin that it leaves least room in, of those the one filled last, else a new bin. Time
    n (log n + seq_len / 64): 1e5 items take below a second at seq_len 8192.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= seq_len):
        raise ValueError(f"lengths from {sizes.min()} to {sizes.max()} do not fit bins of {seq_len}")
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins that have it
    rooms = 0  # bit r is set where some bin has room r: one integer, so the search for the smallest is in C
    order = np.argsort(-sizes, kind="stable")
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            same = by_room[room]
            number = same.pop()
            if not same:
                rooms ^= 1 << room
            bins[number].append(item)
        else:
            room, number = seq_len, len(bins)
            bins.append([item])
        room -= size
        if room:
            same = by_room.setdefault(room, [])
            if not same:
                rooms |= 1 << room
            same.append(number)
    return bins


def pack(lengths: Sequence[int], seq_len: int) -> list[list[Piece]]:
    """Every token of every document exactly once, in bins of at most `seq_len` tokens.

    A document longer than `seq_len` is cut into pieces of that, and its rest is packed like a document. Inside a bin
    the pieces stand by document number, and the bins by their first piece: documents are numbered in shuffled order,
    so the bins are shuffled too, whatever their lengths. ValueError for a length below 1.
    """
    if any(length < 1 for length in lengths):
        raise ValueError("a document without a token cannot be packed")
    full = [Piece(document, first, seq_len) for document, length in enumerate(lengths)
            for first in range(0, length - seq_len + 1, seq_len)]
    rests = [Piece(document, length - length % seq_len, length % seq_len) for document, length in enumerate(lengths)
             if length % seq_len]
    bins = [[piece] for piece in full]
    bins += [sorted(rests[item] for item in items) for items in best_fit([piece.count for piece in rests], seq_len)]
    return sorted(bins)


def fill(bins: Iterable[Sequence[Piece]], seq_len: int) -> float:
    """Share of the places of `bins` that hold a token; 1 for no bin."""
    counts = [sum(piece.count for piece in pieces) for pieces in bins]
    return sum(counts) / (len(counts) * seq_len) if counts else 1.0
