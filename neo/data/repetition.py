"""Rows that repeat themselves: left out of the loss, because they make it spike.

The rule is that of OLMo-core (`find_periodic_sequences` and `InstanceFilterConfig`, allenai/OLMo-core, whose loss mask it
sets for the whole instance): a stretch in which a sequence of 1 to 13 tokens stands 32 times or more, one after the other.
"""

from __future__ import annotations

import numpy as np

MIN_PERIOD, MAX_PERIOD = 1, 13  # tokens
MAX_COUNT = 32  # repetitions of a period that are too many
_GRID = 8  # periods between the places looked at first; 31 periods hold three such places in a row wherever they begin


def repetitive(tokens: np.ndarray) -> np.ndarray:
    """bool [N]: which rows of integers [N, T] hold 32 p tokens on end with period p, for some p in 1 .. 13.

    In such a stretch each token but the first p equals the one p before it: 31 p equalities on end, what OLMo-core
    counts as 32 times. OLMo-core looks at the T tokens of an instance, so give the inputs, not the T+1 tokens.
    """
    found = np.zeros(tokens.shape[0], bool)
    for period in range(MIN_PERIOD, MAX_PERIOD + 1):
        run = (MAX_COUNT - 1) * period
        if tokens.shape[1] < run + period:
            break
        step = _GRID * period
        # Few places are enough to clear nearly all rows.
        equal = tokens[:, period::step] == tokens[:, :-period:step]
        suspects = (equal[:, :-2] & equal[:, 1:-1] & equal[:, 2:]).any(axis=1)
        for row in np.flatnonzero(suspects & ~found):
            unequal = np.flatnonzero(tokens[row, period:] != tokens[row, :-period])
            gaps = np.diff(unequal, prepend=-1, append=tokens.shape[1] - period) - 1
            found[row] = gaps.max() >= run
    return found
