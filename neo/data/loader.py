"""Sources -> batches on devices. The batch of a step is a pure function of (config, step): nothing here has state.

`TrainData.batch(step, sharding)` maps step -> global sequence indices -> addresses (order.py) -> windows -> rows
(windows.py), reading only the rows that this process's devices hold, whatever the mesh and the processes.
`prefetch` does that in a background thread while the step before it runs.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.config.schema import Config
from neo.data import store_files
from neo.data.mixture import Mixture
from neo.data.planning import create_order
from neo.data.prefetch import Prefetch, prefetch
from neo.data.sources import open_sources, open_tokenizer, store_path
from neo.data.validation import ValidationBatches, ValidationData
from neo.data.windows import Window, assemble, split_rows
from neo.errors import InputError

if TYPE_CHECKING:
    import jax

__all__ = ["Prefetch", "TrainData", "ValidationBatches", "ValidationData", "create_order", "open_sources",
           "open_tokenizer", "place", "prefetch", "store_path"]

STATE_VERSION = 1
REMOTE_READERS = 32  # ours: an object store answers in some 50 ms, so the rows of a batch are asked for at once


class TrainData:
    """Training batches by step number."""

    def __init__(self, config: Config, sources: Mapping[str, Any]) -> None:
        """`sources` as `open_sources` gives them. InputError as `Order.create`."""
        from neo.data import rows

        self.config = config
        self.sources = dict(sources)
        self.order = create_order(config, sources)
        self.windows = rows.windows(self.order, {name: source.split("train") for name, source in sources.items()})
        remote = any(store_files.is_url(source.path) for source in sources.values())
        self._readers = concurrent.futures.ThreadPoolExecutor(
            REMOTE_READERS, thread_name_prefix="neo-read") if remote else None

    def row(self, index: int) -> dict[str, np.ndarray]:
        """The row with this global sequence index: int32 [T] inputs, targets, segment_ids, positions; float32 [T]
        loss_mask; int32 [] source (its place in `config.sources`)."""
        return split_rows(self._assemble([self._read(index)]))[0]

    def host_batch(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """These rows (default: all B) of a step's batch, as numpy arrays [N, T] and source [N]."""
        first = self.order.first_index(step)
        batch = self.order.spans[self.order.phase_of_step(step)].global_batch
        indices = [first + row for row in (range(batch) if rows is None else rows)]
        read = self._readers.map if self._readers else map
        return self._assemble(list(read(self._read, indices)))

    def batch(self, step: int, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
        """A step's global batch: [B, T] arrays placed with `sharding`, and source [B] with its first entry.

        Only rows that this process's devices hold are read, each once. Raises InputError if B or T cannot be split.
        """
        span = self.order.spans[self.order.phase_of_step(step)]
        shape = (span.global_batch, span.seq_len)
        rows = _rows_held(sharding, shape)
        return place(self.host_batch(step, rows), sharding, shape=shape, rows=rows)

    def documents(self, step: int) -> list[str]:
        """`source/document id` of every document with a token in a step's batch, in order, each once."""
        first = self.order.first_index(step)
        names: dict[str, None] = {}
        for index in range(first, self.order.first_index(step + 1)):
            address = self.order.address(index)
            split = self.sources[address.source].split("train")
            ids = split.document_ids(address.start, address.start + address.length + 1)
            names.update(dict.fromkeys(f"{address.source}/{document}" for document in ids))
        return list(names)

    def state(self, next_step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data, as readable JSON: where the run goes on, and what it has relied on."""
        used = self.order.tokens_by_source(next_step)
        begun = [(phase, span) for phase, span in zip(self.config.phases, self.order.spans, strict=True)
                 if span.first_step < next_step and span.steps]
        relied_on = {name for _, span in begun for name in span.mixture.names if name in self.sources}
        return {
            "version": STATE_VERSION,
            "next_step": next_step,
            "next_index": self.order.first_index(next_step),
            "tokens": self.order.tokens_before(next_step),
            "seed": self.order.seed,
            "synthetic": self.config.data.synthetic,
            "sources": {name: {"tokens": self.sources[name].split("train").num_tokens, "tokens_used": used[name],
                               "tokenizer_sha256": self.sources[name].tokenizer_sha256}
                        for name in self.order.sources if name in relied_on},
            "phases": [{"name": span.name, "steps": span.steps, "seq_len": span.seq_len,
                        "global_batch": span.global_batch, "mixture": dict(phase.mixture)} for phase, span in begun],
        }

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raises InputError, naming the difference, unless this order goes on where the saved state stopped.

        Seed, the sources used so far and the phases begun must be the same; later phases may differ.
        """
        try:
            version = saved["version"]
            if version != STATE_VERSION:
                raise InputError(f"the checkpoint's data state has version {version}; this neo reads {STATE_VERSION}")
            self._compare("data.seed", saved["seed"], self.order.seed)
            self._compare("data.synthetic", saved["synthetic"], self.config.data.synthetic)
            for number, then in enumerate(saved["phases"]):
                self._check_phase(number, then)
            for name, then in saved["sources"].items():
                source = self.sources.get(name)
                if source is None:
                    raise InputError(f"the checkpoint was trained on source {name!r}, which is not among the run's "
                                     f"sources now ({', '.join(self.sources)})")
                self._compare(f"the training tokens of source {name!r} ({source.path})", then["tokens"],
                              source.split("train").num_tokens)
                self._compare(f"the tokenizer of source {name!r} ({source.path}), by sha256,",
                              then["tokenizer_sha256"], source.tokenizer_sha256)
            if saved["next_step"] > self.order.num_steps:
                raise InputError(f"the checkpoint is at step {saved['next_step']}, the phases end at step "
                                 f"{self.order.num_steps}")
            self._compare("the next sequence index", saved["next_index"], self.order.first_index(saved["next_step"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"the checkpoint's data state is damaged ({type(error).__name__}: {error})") from error

    def _check_phase(self, number: int, then: Mapping[str, Any]) -> None:
        if number >= len(self.order.spans):
            raise InputError(f"the checkpoint has begun phase {then['name']!r}, which the config no longer has")
        span = self.order.spans[number]
        at = f"phases.{span.name}"
        self._compare(f"{at}.seq_len", then["seq_len"], span.seq_len)
        self._compare(f"{at}.global_batch", then["global_batch"], span.global_batch)
        self._compare(f"{at}.tokens, in steps,", then["steps"], span.steps)
        mixture = Mixture(then["mixture"])
        if (mixture.names, mixture.weights) != (span.mixture.names, span.mixture.weights):
            self._compare(f"{at}.mixture", then["mixture"], dict(self.config.phases[number].mixture))

    @staticmethod
    def _compare(what: str, then: Any, now: Any) -> None:
        if then != now:
            raise InputError(f"{what} was {then} when the checkpoint was written and is {now} now; the data already "
                             "seen must not change: put it back, or start a new run in another workdir")

    def _read(self, index: int) -> Window:
        if not 0 <= index < self.order.num_sequences:  # grain would wrap around
            raise IndexError(f"sequence {index} is outside the run's {self.order.num_sequences} sequences")
        return self.windows[index]

    def _assemble(self, windows: Sequence[Window]) -> dict[str, np.ndarray]:
        data = self.config.data
        return assemble(windows, cross_document_attention=data.cross_document_attention,
                        mask_end_of_document=data.mask_end_of_document)


def _rows_held(sharding: jax.sharding.NamedSharding, shape: tuple[int, int]) -> list[int]:
    """Sorted rows of a global [B, T] array that this process's devices hold, each once."""
    try:
        indices = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise InputError(f"a batch of {shape[0]} sequences of {shape[1]} tokens cannot be split over the mesh "
                         f"{dict(sharding.mesh.shape)} as {sharding.spec}: {error}") from error
    return sorted({row for index in indices.values() for row in range(*index[0].indices(shape[0]))})


def place(batch: Mapping[str, np.ndarray], sharding: jax.sharding.NamedSharding, *,
          shape: tuple[int, int] | None = None, rows: Sequence[int] | None = None) -> dict[str, jax.Array]:
    """Numpy rows -> global arrays: [B, T] with `sharding`, [B] with the first entry of its spec.

    `batch` holds the sorted `rows` of the global batch of `shape` (B, T), at least those this process's devices
    hold; by default all of them. No process talks to another.
    """
    import jax

    if shape is None:
        shape = batch["inputs"].shape
    if rows is None:
        rows = range(shape[0])
    at = {row: i for i, row in enumerate(rows)}
    spec = sharding.spec[0] if len(sharding.spec) else None
    by_row = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(spec))

    def put(value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            # A device holds a contiguous range of rows, so these lie together in `batch` too.
            low, high, _ = index[0].indices(shape[0])
            return value[at[low]:at[low] + high - low][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape[:value.ndim], sharding if value.ndim == 2 else by_row, part)

    return {name: put(value) for name, value in batch.items()}
