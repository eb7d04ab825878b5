"""Held-out loss and bits per byte, per source and in all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from neo.data.loader import ValidationData, place
from neo.train.hooks import Hook, every
from neo.train.step import make_eval_step

if TYPE_CHECKING:
    from neo.train.session import Session


class Evaluation(Hook):
    """Evaluates at intervals and at the end, at the sequence length and rope base of the current phase."""

    part = "eval"

    def __init__(self, session: Session):
        self._session = session
        self._data = None if session.config.data.synthetic else ValidationData(session.config, session.sources)
        self._steps: dict[float, Any] = {}
        self._latest: tuple[int, dict[str, float]] = (-1, {})

    @property
    def names(self) -> tuple[str, ...]:
        """Sources with held-out documents."""
        return self._data.names if self._data is not None else ()

    def due(self, step: int, last: bool) -> bool:
        return bool(self.names) and every(self._session.config.eval.every_steps, step, last)

    def measured(self, step: int, state: Mapping[str, Any]) -> tuple[dict[str, float], bool]:
        """What `act` gives after this step, and whether it was evaluated for this call alone."""
        fresh = self._latest[0] != step
        return (self.act(step, state) if fresh else self._latest[1]), fresh

    def act(self, step: int, state: Mapping[str, Any]) -> dict[str, float]:
        session = self._session
        phase = session.phase_after(step)
        evaluate = self._steps.setdefault(phase.rope_base, make_eval_step(session.decoder, phase.rope_base))
        batch_size = session.batch_ways * session.micro_batches[phase.name]
        totals, total_bytes, record = np.zeros(3), 0.0, {}
        for source in self.names:
            batches = self._data.batches(source, phase.seq_len, batch_size, session.config.eval.tokens)
            # Dispatch all, then read: the devices never wait for the host between batches.
            pending = [evaluate(state["params"], place(batch, session.batch_sharding)) for batch in batches]
            sums = np.sum([np.asarray(jax.device_get(one), np.float64) for one in pending], axis=0)
            record[f"eval/loss/{source}"] = sums[0] / sums[2]
            record[f"eval/bits_per_byte/{source}"] = sums[0] / math.log(2) / batches.num_bytes
            totals, total_bytes = totals + sums, total_bytes + batches.num_bytes
        record["eval/loss"] = totals[0] / totals[2]
        record["eval/accuracy"] = totals[1] / totals[2]
        record["eval/bits_per_byte"] = totals[0] / math.log(2) / total_bytes
        self._latest = step, {name: float(value) for name, value in record.items()}
        return self._latest[1]
