"""From any training step back to the documents in its batch, and from a document to the steps that saw it.

The data order is a pure function of the resolved config, the amendments and the store, so nothing was written down while
training: `Ledger.of(workdir)` reads config.json, amendments.json and the newest checkpoint's data state, and works out
the rest. Steps count as in metrics and messages: the first is step 1, and after it the run has done 1 step.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from neo.config import Config, from_dict
from neo.data import amendments, store_files
from neo.data.loader import STATE_VERSION
from neo.data.order import Address, Order
from neo.data.planning import create_order, source_names, store_path
from neo.data.sources import open_sources, open_tokenizer
from neo.errors import InputError, nearest

COMPARED_IDS = 20_000  # ours: ids, over all sources, in which the nearest to an unknown one is looked for


class Part(NamedTuple):
    """What a window holds of a document: its tokens [first, last) of `tokens`, at `place` in the window.

    The end-of-document token is the document's last. In a packed source each piece of a document counts as one.
    """

    document: str
    first: int
    last: int
    tokens: int
    place: int


class Row(NamedTuple):
    """A sequence of a batch: the window that it was cut from, with the parts of documents in it, in order."""

    step: int
    row: int
    index: int
    address: Address
    parts: tuple[Part, ...]


class Sighting(NamedTuple):
    """One window that held tokens of a document: those of `part`, in epoch `epoch` of its source (0 is the first)."""

    step: int
    row: int
    index: int
    epoch: int
    part: Part


class Found(NamedTuple):
    """A document of a training split: its tokens are positions [start, stop) there."""

    source: str
    document: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The documents of a run by step, and the steps by document."""

    workdir: str
    config: Config
    order: Order
    sources: Mapping[str, Any]
    steps_done: int  # steps that the run has done as far as its files say; what comes later is planned

    @classmethod
    def of(cls, workdir: str, store: str = "") -> Ledger:
        """The ledger of a run's workdir, local or a URL. `store`: where the token store lies now, if it was moved.

        Raises InputError: not a run, a damaged file, a store that is missing or not the one the run was trained on.
        """
        workdir = str(workdir)
        tree = _read_json(workdir, "config.json")
        if tree is None:
            raise InputError(f"{workdir} is not a run: it has no config.json; give the workdir of a run of neo.train")
        config = from_dict(tree)
        if store:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=store, stores={}))
        checkpoint = _newest_checkpoint(workdir)
        saved = _data_state(workdir, checkpoint) if checkpoint else None
        listed = _listed_amendments(workdir)
        sources = _open(config, (*amendments.saved_sources(saved), *source_names((), listed)))
        sizes = {name: source.split("train").num_tokens for name, source in sources.items()}
        try:
            _check_sources(workdir, saved, sources)
            # The checkpoint has the phases as they were before amendments; the workdir's list also what came after it.
            phases, changes = amendments.resume(config, saved, sizes)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{workdir}: the data state of checkpoint {checkpoint} is damaged ({what})") from error
        if listed[:len(changes)] == changes:
            changes = listed
        order = create_order(config, sources, changes, phases)
        return cls(workdir, config, order, sources, min(max(checkpoint, _steps_recorded(workdir)), order.num_steps))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The store's tokenizer; None for synthetic data."""
        return open_tokenizer(self.config, self.sources)

    def num_rows(self, step: int) -> int:
        """Sequences of the batch of a step. InputError outside the run."""
        if not 1 <= step <= self.order.num_steps:
            raise InputError(f"step {step} is outside the run's steps 1 to {self.order.num_steps}")
        return self.order.first_index(step) - self.order.first_index(step - 1)

    def row(self, step: int, row: int) -> Row:
        """One row of the batch of a step. InputError outside the run or the batch."""
        rows = self.num_rows(step)
        if not 0 <= row < rows:
            raise InputError(f"row {row}: the batch of step {step} has rows 0 to {rows - 1}")
        index = self.order.first_index(step - 1) + row
        address = self.order.address(index)
        return Row(step, row, index, address, tuple(self._parts(address)))

    def batch(self, step: int) -> Iterator[Row]:
        """The rows of the batch of a step, one after the other. InputError outside the run."""
        return (self.row(step, row) for row in range(self.num_rows(step)))

    def find(self, name: str) -> list[Found]:
        """Where the documents called `name` lie: `source/id`, or an id that is looked for in every source.

        Each shard's table of ids is read once, some megabytes at a time. Raises InputError where there is none, with the
        nearest known id; it says so of one that is held out.
        """
        source, _, document = name.partition("/")
        ways = [(source, document)] if source in self.sources else []
        for one in (ways, [(one, name) for one in self.sources]):  # an id may have slashes of its own
            found = [Found(*pair, *span) for pair in one for span in self._split(pair[0]).find_id(pair[1])]
            if found:
                return found
            ways = [*ways, *one]
        for source, document in ways:
            if self.sources[source].split("validation").find_id(document):
                raise InputError(f"document {document!r} of source {source!r} is held out: no step trains on it")
        known = [f"{one}/{document}" for one in self.sources for document in self._some_ids(one)]
        hint = nearest(name, known) or nearest(f"{next(iter(self.sources))}/{name}", known)
        raise InputError(f"no source of the run has a document {name!r}{hint}; the first one is {known[0]!r}")

    def document(self, source: str, document: str) -> list[Sighting]:
        """Every window of the run that holds a token of the document, by step and row; what comes after `steps_done` is
        planned. Empty where the source has no such document. KeyError for an unknown source.
        """
        spans = self._split(source).find_id(document)
        return sorted(seen for span in spans for seen in self.sightings(Found(source, document, *span)))

    def sightings(self, found: Found) -> list[Sighting]:
        """The same for one document that `find` gave."""
        number = self.order.sources.index(found.source)
        seen = []
        for n in self.order.windows_at(number, found.start, found.stop):
            index, address = self.order.index_of(number, n), self.order.window(number, n)
            step = self.order.step_of(index)
            part = _overlap(found.document, found.start, found.stop, address)
            seen.append(Sighting(step + 1, index - self.order.first_index(step), index, address.epoch, part))
        return sorted(seen)

    def text(self, source: str, start: int, stop: int) -> str:
        """Tokens [start, stop) of a source's training split, decoded; empty for synthetic data."""
        return "" if self.tokenizer is None else self.tokenizer.decode(self._split(source).tokens(start, stop).tolist())

    def _split(self, source: str) -> Any:
        return self.sources[source].split("train")

    def _some_ids(self, source: str) -> list[str]:
        split = self._split(source)
        wanted = COMPARED_IDS // len(self.sources)
        return split.document_ids(0, min(split.num_tokens, wanted * (split.num_tokens // max(split.num_documents, 1))))

    def _parts(self, address: Address) -> Iterator[Part]:
        for first, last, document in self._split(address.source).documents(address.start, address.start + address.length + 1):
            if document:  # not padding
                yield _overlap(document, first, last, address)


def _overlap(document: str, start: int, stop: int, address: Address) -> Part:
    """The part of document [start, stop) that is in the window at `address`."""
    low, high = max(start, address.start), min(stop, address.start + address.length + 1)
    return Part(document, low - start, high - start, stop - start, low - address.start)


def _read_json(workdir: str, *names: str) -> Any | None:
    """A JSON file of the workdir; None where there is none."""
    try:
        return store_files.read_json(store_files.join(workdir, *names))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{store_files.join(workdir, *names)}: cannot be read: {error.strerror or error}") from error


def _open(config: Config, also: tuple[str, ...]) -> dict[str, Any]:
    """The opened sources. InputError as `open_sources`; where nothing is left of the store, with how to name it."""
    where = store_path(config)
    if not (config.data.synthetic or config.data.stores or store_files.list_folders(where)):
        raise InputError(f"{where}: the run's token store is not there; start in the folder the run was started in, or give "
                         "--store=FOLDER")
    return open_sources(config, also)


def _data_state(workdir: str, checkpoint: int) -> dict[str, Any]:
    """The data state of a checkpoint. InputError where there is none, or one of another data order."""
    state = (_read_json(workdir, "checkpoints", str(checkpoint), "data", "data.json") or {}).get("order") or {}
    if state.get("version") != STATE_VERSION:
        raise InputError(f"{workdir}: the data state of checkpoint {checkpoint} has version {state.get('version')}, this neo "
                         f"reads {STATE_VERSION}; use the neo that trained it")
    return state


def _listed_amendments(workdir: str) -> tuple[amendments.Amendment, ...]:
    try:
        return amendments.from_json(_read_json(workdir, amendments.FILE) or ())
    except InputError as error:
        raise InputError(f"{store_files.join(workdir, amendments.FILE)}: {error}") from None


def _check_sources(workdir: str, saved: Mapping[str, Any] | None, sources: Mapping[str, Any]) -> None:
    """InputError for a source whose store is another one than the run was trained on."""
    for name, then in (saved or {}).get("sources", {}).items():
        if name not in sources:
            raise InputError(f"{workdir} was trained on source {name!r}, which its config.json no longer names")
        now = {"tokens": sources[name].split("train").num_tokens, "tokenizer_sha256": sources[name].tokenizer_sha256}
        for what, value in now.items():
            if then.get(what) != value:
                raise InputError(f"source {name!r} ({sources[name].path}) has changed since {workdir} was trained: {what} was "
                                 f"{then.get(what)} and is {value}; give the store it was trained on with --store")


def _newest_checkpoint(workdir: str) -> int:
    """The step of the run's newest checkpoint; 0 when there is none."""
    names = store_files.list_folders(store_files.join(workdir, "checkpoints"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _steps_recorded(workdir: str) -> int:
    """The step that the newest start had reached by its events and metrics; 0 where there are none."""
    events = _read_lines(store_files.join(workdir, "events.jsonl"))
    # A start goes back to its checkpoint: what an older one did beyond that has been trained again since, or will be.
    last = max((i for i, event in enumerate(events) if event.get("event") in ("start", "resume")), default=None)
    if last is None:
        return 0
    records = _read_lines(store_files.join(workdir, "metrics", f"{events[last].get('step')}.jsonl"))
    return max(int(one.get("step", 0)) for one in (*events[last:], *records))


def _read_lines(path: str) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file; a killed process may have left half a line, which is passed over."""
    try:
        lines = store_files.read_bytes(path).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
