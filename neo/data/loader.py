"""Sources -> batches on devices. The batch of a step is a pure function of (config, step): nothing here has state.

`TrainData.batch(step, sharding)` maps step -> global sequence indices -> addresses (order.py) -> windows -> rows
(windows.py), reading only the rows that this process's devices hold, whatever the mesh and the processes.
`prefetch` does that in a background thread while the step before it runs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.config.schema import Config
from neo.data import amendments, remote, store_files
from neo.data.order import Order
from neo.data.planning import create_order, source_names, store_path
from neo.data.prefetch import Prefetch, prefetch
from neo.data.sources import open_sources, open_tokenizer
from neo.data.validation import ValidationBatches, ValidationData
from neo.data.windows import Window, assemble, split_rows
from neo.errors import InputError

if TYPE_CHECKING:
    import jax

__all__ = ["Prefetch", "TrainData", "ValidationBatches", "ValidationData", "create_order", "open_sources",
           "open_tokenizer", "place", "prefetch", "store_path"]

STATE_VERSION = 2  # 1 had another data order


class TrainData:
    """Training batches by step number."""

    def __init__(self, config: Config, sources: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> None:
        """The data of a new run, or of one that goes on from the data state `saved` in a checkpoint.

        `sources` as `open_sources` gives them. Raises InputError as `create_order`, and where the config does not go on
        where `saved` stopped, naming the difference.
        """
        self.config = config
        self.sources = dict(sources)
        sizes = {name: source.split("train").num_tokens for name, source in self.sources.items()}
        if saved is not None:
            _require_version(saved)
        with _damage_named():
            if saved is not None:
                self._check_same(saved)
            self.phases, self.amendments = amendments.resume(config, saved, sizes)
        self._set_order(create_order(config, self.sources, self.amendments, self.phases))
        if saved is not None:
            self._check_place(saved)
        # An object store takes its time for an answer, so the rows of a batch are asked for at once.
        far = any(store_files.is_url(source.path) for source in sources.values())
        self._readers = concurrent.futures.ThreadPoolExecutor(remote.AT_ONCE, thread_name_prefix="neo-read") if far else None

    def _set_order(self, order: Order) -> None:
        from neo.data import rows

        windows = rows.windows(order, {name: source.split("train") for name, source in self.sources.items()})
        # One assignment: a thread that makes a batch has the old pair or the new one, and both agree on its steps.
        self._current = (order, windows)

    @property
    def order(self) -> Order:
        """The data order, with all amendments so far."""
        return self._current[0]

    def amend(self, amendment: amendments.Amendment) -> None:
        """Add an amendment that acts from a step that no batch has been made for. Safe while batches are made ahead."""
        added = (*self.amendments, amendment)
        self._set_order(create_order(self.config, self.sources, added, self.phases))
        self.amendments = added

    def row(self, index: int) -> dict[str, np.ndarray]:
        """The row with this global sequence index: int32 [T] inputs, targets, segment_ids, positions; float32 [T]
        loss_mask; int32 [] source (its place in `order.sources`)."""
        order, windows = self._current
        if not 0 <= index < order.num_sequences:  # grain would wrap around
            raise IndexError(f"sequence {index} is outside the run's {order.num_sequences} sequences")
        return split_rows(self._assemble([windows[index]]))[0]

    def host_batch(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """These rows (default: all B) of a step's batch, as numpy arrays [N, T] and source [N]."""
        order, windows = self._current
        first = order.first_index(step)
        batch = order.span_of_step(step).global_batch
        indices = [first + row for row in (range(batch) if rows is None else rows)]
        read = self._readers.map if self._readers else map
        return self._assemble(list(read(windows.__getitem__, indices)))

    def batch(self, step: int, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
        """A step's global batch: [B, T] arrays placed with `sharding`, and source [B] with its first entry.

        Only rows that this process's devices hold are read, each once. Raises InputError if B or T cannot be split.
        """
        span = self.order.span_of_step(step)
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
        begun = [phase for number, phase in enumerate(self.phases)
                 if any(span.phase == number and span.first_step < next_step for span in self.order.spans)]
        relied_on = set(source_names(begun, self.amendments))
        return {
            "version": STATE_VERSION,
            "next_step": next_step,
            "next_index": self.order.first_index(next_step),
            "tokens": self.order.tokens_before(next_step),
            "seed": self.order.seed,
            "synthetic": self.config.data.synthetic,
            "sources": {name: {"tokens": self.sources[name].split("train").num_tokens, "tokens_used": used[name],
                               "tokenizer_sha256": self.sources[name].tokenizer_sha256}
                        for name in self.order.sources if name in relied_on and name in self.sources},
            "phases": [{"name": phase.name, "steps": phase.steps, "seq_len": phase.seq_len,
                        "batches": [list(part) for part in phase.batches], "mixture": dict(phase.mixture),
                        "mixture_end": dict(phase.mixture_end), "mixture_unit": phase.mixture_unit} for phase in begun],
            "amendments": amendments.to_json(self.amendments),
        }

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        """Seed, the sources used so far and the phases begun must be the same; later phases may differ.

        The mixtures of those phases are compared by `amendments.resume`.
        """
        self._compare("data.seed", saved["seed"], self.config.data.seed)
        self._compare("data.synthetic", saved["synthetic"], self.config.data.synthetic)
        for number, then in enumerate(saved["phases"]):
            if number >= len(self.config.phases):
                raise InputError(f"the checkpoint has begun phase {then['name']!r}, which the config no longer has")
            phase = self.config.phases[number]
            self._compare(f"phases.{phase.name}.seq_len", then["seq_len"], phase.seq_len)
            self._compare(f"phases.{phase.name}.tokens and global_batch with its ramp, as [steps, batch],", then["batches"],
                          [list(part) for part in phase.batches])
            if phase.mixture_end or then["mixture_end"]:
                self._compare(f"phases.{phase.name}.mixture_end", then["mixture_end"], dict(phase.mixture_end))
        for name, then in saved["sources"].items():
            source = self.sources.get(name)
            if source is None:
                raise InputError(f"the checkpoint was trained on source {name!r}, which is not among the run's "
                                 f"sources now ({', '.join(self.sources)})")
            self._compare(f"the training tokens of source {name!r} ({source.path})", then["tokens"],
                          source.split("train").num_tokens)
            self._compare(f"the tokenizer of source {name!r} ({source.path}), by sha256,",
                          then["tokenizer_sha256"], source.tokenizer_sha256)

    def _check_place(self, saved: Mapping[str, Any]) -> None:
        with _damage_named():
            if saved["next_step"] > self.order.num_steps:
                raise InputError(f"the checkpoint is at step {saved['next_step']}, the phases end at step "
                                 f"{self.order.num_steps}")
            self._compare("the next sequence index", saved["next_index"], self.order.first_index(saved["next_step"]))

    @staticmethod
    def _compare(what: str, then: Any, now: Any) -> None:
        if then != now:
            raise InputError(f"{what} was {then} when the checkpoint was written and is {now} now; the data already "
                             "seen must not change: put it back, or start a new run in another workdir")

    def _assemble(self, windows: Sequence[Window]) -> dict[str, np.ndarray]:
        data = self.config.data
        return assemble(windows, cross_document_attention=data.cross_document_attention,
                        mask_end_of_document=data.mask_end_of_document, mask_repetition=data.mask_repetition)


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    """What a damaged data state makes Python raise, as InputError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"the checkpoint's data state is damaged ({type(error).__name__}: {error})") from error


def _require_version(saved: Mapping[str, Any]) -> None:
    version = saved.get("version") if isinstance(saved, Mapping) else None
    if version != STATE_VERSION:
        raise InputError(f"the checkpoint's data state has version {version}; this neo reads {STATE_VERSION}")


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
