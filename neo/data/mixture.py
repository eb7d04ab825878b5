"""Which source each sequence of a stretch comes from: a closed form, exact for any index.

The sources with a positive weight are the leaves of a binary tree whose halves weigh as nearly the same as can be. Of
the first k sequences of a node, round(k * W_left / W) go to its left half, so sequence k goes left exactly where that
count steps up. A look-up walks about log2(1 / weight) levels; nothing is stored but the n integer weights.

At every prefix the count of a source is within 2 of prefix * weight: each level rounds once, by at most 1/2, and passes
its parent's error on times its share of the parent. Sorted by weight, a node splits so that no inner node is more than
2/3 of its parent: inner errors stay below 1/2 + 2/3 * 1/2 + ... = 3/2, and a leaf adds 1/2. So in any run of
consecutive sequences a source is within 4 of its weight. (Weights are integers of SCALE: prefix / SCALE comes on top.)
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

SCALE = 1 << 40  # weights are integers that sum to this


class Mixture:
    """Weights of one stretch of a run. Weights of 0 (or below 2**-40 of the sum) switch a source off."""

    __slots__ = ("names", "weights", "_nodes", "_paths")

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Raises ValueError for a negative or non-finite weight, or when none is positive."""
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of source {name!r} is {weight}; weights are finite and not negative")
        total = math.fsum(weights.values())  # exactly rounded: the same on every machine, in any order
        if total <= 0:
            raise ValueError("a mixture needs at least one source with a positive weight")
        names = sorted(weights)
        scaled = apportion([weights[name] / total * SCALE for name in names], SCALE)
        kept = [(name, weight) for name, weight in zip(names, scaled, strict=True) if weight > 0]
        self.names = tuple(name for name, _ in kept)
        self.weights = tuple(weight for _, weight in kept)
        self._nodes, self._paths = _tree(self.weights)

    def select(self, index: int) -> tuple[int, int]:
        """(position of the source in `names`, how many earlier sequences of the stretch came from it)."""
        nodes, node = self._nodes, 0 if self._nodes else ~0
        while node >= 0:
            twice_left, twice_all, left, right = nodes[node]
            to_left, rest = divmod(index * twice_left + (twice_all >> 1), twice_all)
            if rest + twice_left >= twice_all:
                index, node = to_left, left
            else:
                index, node = index - to_left, right
        return ~node, index

    def counts(self, prefix: int) -> list[int]:
        """How many of the first `prefix` sequences come from each of `names`."""
        counts = [0] * len(self.names)
        open_nodes = [(0 if self._nodes else ~0, prefix)]
        while open_nodes:
            node, count = open_nodes.pop()
            if node < 0:
                counts[~node] = count
                continue
            twice_left, twice_all, left, right = self._nodes[node]
            to_left = (count * twice_left + (twice_all >> 1)) // twice_all
            open_nodes += [(left, to_left), (right, count - to_left)]
        return counts

    def index_of(self, place: int, n: int) -> int:
        """The inverse of `select`: index of sequence n of the source at this position in `names`."""
        for node, is_left in self._paths[place]:
            twice_left, twice_all, _, _ = self._nodes[node]
            # The smallest prefix in which the child has n + 1 sequences, less one; halves are rounded up to the left.
            if is_left:
                n = -(-(twice_all * (2 * n + 1)) // (2 * twice_left)) - 1
            else:
                n = twice_all * (2 * n + 1) // (2 * (twice_all - twice_left))
        return n


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within 1 of its share (largest remainders; ties to the earlier).

    `shares` are not negative and sum to `total`, up to rounding.
    """
    whole = [math.floor(share) for share in shares]
    missing = total - sum(whole)
    by_rest = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in itertools.islice(itertools.cycle(by_rest), max(missing, 0)):
        whole[i] += 1
    for i in itertools.islice(itertools.cycle(sorted(range(len(whole)), key=lambda i: -whole[i])), max(-missing, 0)):
        whole[i] -= 1  # shares that summed to a little more
    return whole


@functools.lru_cache(maxsize=1024)
def _tree(weights: tuple[int, ...]) -> tuple[tuple, tuple]:
    """Nodes (2 * left weight, 2 * weight, left child, right child), the root first; and each leaf's path to the root.

    A child is a node's number, or ~position of a leaf. A path is (node, whether the leaf is in its left half) upwards.
    """
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    sums = [0, *itertools.accumulate(weights[i] for i in order)]
    nodes: list[list[int]] = []
    paths: list[tuple] = [()] * len(weights)

    def grow(low: int, high: int, path: tuple) -> int:
        if high - low == 1:
            paths[order[low]] = path
            return ~order[low]
        half = sums[low] + sums[high]  # twice the sum in the middle
        middle = min(max(bisect.bisect_left(sums, -(-half // 2), low + 1, high), low + 1), high - 1)
        if middle - 1 > low and half - 2 * sums[middle - 1] <= abs(2 * sums[middle] - half):
            middle -= 1
        number = len(nodes)
        nodes.append([2 * (sums[middle] - sums[low]), 2 * (sums[high] - sums[low]), 0, 0])
        nodes[number][2] = grow(low, middle, ((number, True), *path))
        nodes[number][3] = grow(middle, high, ((number, False), *path))
        return number

    grow(0, len(order), ())
    return tuple(map(tuple, nodes)), tuple(paths)
