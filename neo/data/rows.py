"""The windows of a run as a grain dataset: `ds[i]` is the window with global sequence index i.

Imports grain (and with it parts of jax), so only what reads rows imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grain

from neo.data.order import Order
from neo.data.windows import Window, read_window


class SourceWindows(grain.MapDataset):
    """The windows that a run takes from one source, in the run's order.

    A dataset of its own, not `grain.MapDataset.source(...)`: that one's counters cost as much per row as all the rest.
    """

    def __init__(self, order: Order, source: int, split: Any) -> None:
        super().__init__()
        self._order, self._number, self._split = order, source, split

    def __len__(self) -> int:
        return self._order.num_windows(self._number)

    def __getitem__(self, index: int) -> Window:
        _, _, _, start, length = self._order.window(self._number, index)
        return read_window(self._split, start, length, self._number)


class Selection:
    """`Order.select` as a selection map of grain: global index -> (source, index in the source)."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def __len__(self) -> int:
        return self._order.num_sequences

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._order.select(index)


def windows(order: Order, splits: Mapping[str, Any]) -> grain.MapDataset:
    """Random access to all windows of the run. `splits`: the training split of each source that the order reads."""
    used = [i for i in range(len(order.sources)) if order.num_windows(i)]
    # Sources that never come up keep their place in the numbering; grain wants some dataset there.
    numbers = [i if i in used else used[0] for i in range(len(order.sources))]
    return grain.MapDataset.select_from_datasets(
        [SourceWindows(order, i, splits[order.sources[i]]) for i in numbers], Selection(order))
