"""The windows that a run takes from one source, in the order in which it takes them.

A stream is a list of ranges: windows of equal length, one after the other from a place (epoch, offset) on, over the end
of the source into the next epochs. Inside a range, each epoch's part is permuted in blocks of BLOCK_WINDOWS windows, with
a key of (seed, source, window length, epoch, first token of the block). Ranges never overlap.

What is left of an epoch but shorter than a window goes to the next range; if that needs more, the next epoch begins at
token 0. A range may be cut where an amendment changes the plan: at the end of the block that has been begun, so that
what was read before stays what it was, and the rest of that block is read next.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

from neo.data.permutation import block_permutation

# Ours. Documents stand in random order already; windows are permuted to keep those of one document apart, and blocks
# keep reading near one place: 4096 windows of 4096 tokens are 34 MB of uint16. A block is also the most that an
# amendment can leave to a phase of another sequence length.
BLOCK_WINDOWS = 4096


class Range(NamedTuple):
    """`count` windows of `length` tokens from token `offset` of `epoch`, where `head` of them fit, then whole epochs."""

    phase: int
    first: int  # windows of the source before
    count: int
    length: int
    epoch: int
    offset: int
    head: int
    per_epoch: int

    def part(self, k: int) -> tuple[int, int, int, int]:
        """(epoch, offset, windows, index in it) of the part of one epoch that window k of the range falls in."""
        if k < self.head:
            return self.epoch, self.offset, min(self.head, self.count), k
        later, k = divmod(k - self.head, self.per_epoch)
        return self.epoch + 1 + later, 0, min(self.per_epoch, self.count - self.head - later * self.per_epoch), k

    def after(self) -> tuple[int, int]:
        """(epoch, offset) of the first token that the range leaves."""
        epoch, offset, windows, _ = self.part(self.count - 1)
        return epoch, offset + windows * self.length

    def block_end(self, k: int) -> int:
        """The smallest k' >= k at which no block is half read."""
        if k == 0 or k == self.count:
            return k
        _, _, windows, place = self.part(k)
        return k if place % BLOCK_WINDOWS == 0 else k - place + min(windows, (place // BLOCK_WINDOWS + 1) * BLOCK_WINDOWS)

    def full(self) -> bool:
        """Whether its last block would stay as it is if the range went on."""
        _, _, windows, _ = self.part(self.count - 1)
        room = self.head if self.count <= self.head else self.per_epoch
        return windows == room or windows % BLOCK_WINDOWS == 0


class Stream:
    """The windows of one source; `used` of them are given out."""

    def __init__(self, source: str, seed: int) -> None:
        self.source, self.seed = source, seed
        self.used = 0
        self._ranges: list[Range] = []
        self._firsts: list[int] = []

    def take(self, phase: int, count: int, length: int, tokens: int) -> None:
        """Give out the next `count` > 0 windows of `length` tokens, of a source of `tokens` tokens."""
        last = self._ranges[-1] if self._ranges else None
        rest = last.first + last.count - self.used if last else 0  # of a block that an amendment cut short
        if rest and last.length == length:
            self.used += min(rest, count)
            count -= min(rest, count)
            if not count:
                return
        # With another length the rest is left out. It still counts in its range: the block's permutation must not change.
        epoch, offset = last.after() if last else (0, 0)
        per_epoch = (tokens - 1) // length
        if (head := (tokens - 1 - offset) // length) == 0:
            epoch, offset, head = epoch + 1, 0, per_epoch
        if last and last.phase == phase and last.length == length and last.full():
            self._ranges[-1] = last._replace(count=last.count + count)
        else:
            self._ranges.append(Range(phase, self.used, count, length, epoch, offset, head, per_epoch))
            self._firsts.append(self.used)
        self.used += count

    def cut(self, used: int) -> None:
        """Take back all but the first `used` windows; of a block that these have begun, the rest is read next."""
        while self._ranges and self._ranges[-1].first >= used:
            self._ranges.pop()
            self._firsts.pop()
        self.used = used
        if self._ranges:
            last = self._ranges[-1]
            if used < last.first + last.count:
                self._ranges[-1] = last._replace(count=last.block_end(used - last.first))

    def find(self, n: int) -> tuple[int, int, int, int]:
        """(phase, epoch, first token, length) of window n."""
        r = self._ranges[bisect.bisect_right(self._firsts, n) - 1]
        epoch, offset, windows, place = r.part(n - r.first)
        block, place = divmod(place, BLOCK_WINDOWS)
        start = offset + block * BLOCK_WINDOWS * r.length
        size = min(BLOCK_WINDOWS, windows - block * BLOCK_WINDOWS)
        place = block_permutation(size, self.seed, self.source, r.length, epoch, start)[place]
        return r.phase, epoch, start + place * r.length, r.length

    def holding(self, first: int, last: int) -> list[int]:
        """Sorted n of the windows that hold one of the tokens [first, last): T + 1 tokens each, so borders count twice."""
        found: list[int] = []
        for r, end in zip(self._ranges, [*self._firsts[1:], self.used], strict=True):
            here: list[int] = []
            k = 0
            while k < r.count:
                epoch, offset, windows, _ = r.part(k)
                low = max(-((offset - first) // r.length) - 1, 0)
                high = min((last - 1 - offset) // r.length + 1, windows)
                for place in range(low, high):
                    block, inside = divmod(place, BLOCK_WINDOWS)
                    size = min(BLOCK_WINDOWS, windows - block * BLOCK_WINDOWS)
                    start = offset + block * BLOCK_WINDOWS * r.length
                    p = block_permutation(size, self.seed, self.source, r.length, epoch, start)
                    here.append(r.first + k + block * BLOCK_WINDOWS + p.inverse(inside))
                k += windows
            found += sorted(n for n in here if n < end)
        return found

    @property
    def left_out(self) -> int:
        """Tokens that are never read: rests of blocks before a phase of another window length."""
        ends = zip(self._ranges, self._firsts[1:], strict=False)
        return sum(max(r.first + r.count - end, 0) * r.length for r, end in ends)
