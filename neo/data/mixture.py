"""Which source each sequence of a phase comes from: a closed form, exact for any index.

The sources with a positive weight stand in a balanced binary tree, in the order of their names. Of the
first k sequences of a node, round(k * W_left / W) go to its left half, so sequence k goes left exactly where
that count steps up. A lookup walks ceil(log2 n) levels; nothing is stored but the n integer weights. At every
prefix of k sequences the count of a source is within ceil(log2 n) / 2 of k times its weight (each level
rounds once, by at most 1/2, and passes its own error on times a share below 1), plus k * n / 2**40 from the
weights being integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

SCALE = 1 << 40  # weights are integers that sum to this


class Mixture:
    """Weights of one phase. Weights of 0 (or below 2**-40 of the sum) switch a source off."""

    __slots__ = ("names", "weights", "_sums")

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Raises ValueError for a negative or non-finite weight, or when none is positive."""
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of source {name!r} is {weight}; weights are finite and not negative")
        total = math.fsum(weights.values())  # exactly rounded: the same on every machine, in any order
        if total <= 0:
            raise ValueError("a mixture needs at least one source with a positive weight")
        scaled = {name: math.floor(weight / total * SCALE) for name, weight in sorted(weights.items())}
        largest = max(scaled, key=lambda name: (scaled[name], name))
        scaled[largest] += SCALE - sum(scaled.values())
        kept = {name: weight for name, weight in scaled.items() if weight > 0}
        self.names = tuple(kept)
        self.weights = tuple(kept.values())
        sums = [0]
        for weight in self.weights:
            sums.append(sums[-1] + weight)
        self._sums = tuple(sums)

    def select(self, index: int) -> tuple[int, int]:
        """(position of the source in `names`, how many earlier sequences of the phase came from it)."""
        sums = self._sums
        low, high = 0, len(sums) - 1
        while high - low > 1:
            middle = (low + high) >> 1
            left, all_ = sums[middle] - sums[low], sums[high] - sums[low]
            before = (2 * index * left + all_) // (2 * all_)
            if (2 * (index + 1) * left + all_) // (2 * all_) != before:
                index, high = before, middle
            else:
                index, low = index - before, middle
        return low, index

    def counts(self, prefix: int) -> list[int]:
        """How many of the first `prefix` sequences come from each of `names`."""
        sums = self._sums
        counts = [0] * len(self.names)
        nodes = [(0, len(self.names), prefix)]
        while nodes:
            low, high, count = nodes.pop()
            if high - low == 1:
                counts[low] = count
                continue
            middle = (low + high) >> 1
            left, all_ = sums[middle] - sums[low], sums[high] - sums[low]
            to_left = (2 * count * left + all_) // (2 * all_)
            nodes += [(low, middle, to_left), (middle, high, count - to_left)]
        return counts
