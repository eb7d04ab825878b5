"""What is converted: any CHECKPOINT of neo, or a Hugging Face folder, seen as one thing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.config import Config
from neo.config.schema import ModelConfig
from neo.convert.output import content_digest
from neo.data.progress import say
from neo.data.tokenizer import load_tokenizer
from neo.errors import InputError
from neo.models.weights import Weights
from neo.train.checkpoint_format import Checkpoint, resolve
from neo.train.checkpoint_hf import HFCheckpoint

if TYPE_CHECKING:
    from neo.data.tokenizer import AnyTokenizer

ORIGIN = "made_from"   # in data.json of imported and averaged checkpoints: lines for people
HF_CLASS = "hf_model_type"   # in data.json of imported ones
# Files of a Hugging Face folder that say how to use it: a copy of the model takes them along as they are, an imported
# checkpoint beside its tokenizer.
PASSED_ON = ("generation_config.json", "chat_template.jinja")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk: its parameters, read a slice at a time, and what is known about it.

    Attributes:
        path: what CHECKPOINT was resolved to.
        weights: with the rope base of the phase the checkpoint is from.
        tokenizer: None for a model that came without one.
        config: of the run that trained it, or None.
        step, tokens, phase: where that run stood.
        measured: eval/... at this step, when the run's metrics lie beside it.
        made_from: of imported and averaged checkpoints, lines for people.
        hf_class: model_type of the Hugging Face model it was read or imported from; empty for neo's own.
        passed_on: files of a Hugging Face folder that a copy of the model keeps.
    """

    path: str
    weights: Weights
    tokenizer: AnyTokenizer | None = None
    config: Config | None = None
    step: int = 0
    tokens: int = 0
    phase: str = ""
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    made_from: tuple[str, ...] = ()
    hf_class: str = ""
    passed_on: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.weights.config

    @property
    def name(self) -> str:
        """The last part of its path that is not just a number."""
        parts = [part for part in self.path.split("/") if part]
        named = [part for part in parts if not part.isdigit() and part != "checkpoints"]
        return (named or parts or ["model"])[-1]

    @functools.cached_property
    def digest(self) -> str:
        """Tells this checkpoint from any other, whatever its path."""
        return content_digest(self.path)


def open_source(text: str, *, synthetic: bool = False) -> Source:
    """Resolve a CHECKPOINT and say what it was resolved to.

    Raises InputError: nothing there, unreadable, a tokenizer of another model, and unless `synthetic` is allowed a model
    that was trained on random tokens.
    """
    found = resolve(text)
    say(f"{found.path}: {found.title}")
    return source_of(found, synthetic=synthetic)


def source_of(found: Checkpoint | HFCheckpoint, *, synthetic: bool = False) -> Source:
    """The Source of a checkpoint that was resolved; see `open_source`."""
    weights: Any = found.weights()
    files = found.tokenizer_files()
    tokenizer = load_tokenizer(files, str(found.path)) if files else None
    if tokenizer is not None and tokenizer.vocab_size > weights.config.vocab_size:
        raise InputError(f"{found.path}: the tokenizer has {tokenizer.vocab_size} ids, the model {weights.config.vocab_size} "
                         "rows of embeddings: it is another model's")
    if isinstance(found, HFCheckpoint):
        kept = {name: (found.path / name).read_bytes() for name in PASSED_ON if (found.path / name).exists()}
        return Source(str(found.path), weights, tokenizer, hf_class=weights.hf_class.model_type, passed_on=kept)
    config, data = found.config(), found.data()
    if data.get("synthetic") and not synthetic:
        raise InputError(f"{found.path} was trained on random tokens (data.synthetic): there is nothing to export")
    phase = data.get("phase") or ""
    base = next((one.rope_base for one in config.phases if one.name == phase), 0.0)
    if base and base != weights.config.rope_base:
        weights = _OfPhase(weights, base)
    return Source(str(found.path), weights, tokenizer, config, found.step, found.tokens, phase, _measured(found),
                  tuple(map(str, data.get(ORIGIN, ()))), str(data.get(HF_CLASS, "")),
                  {name: files[name] for name in PASSED_ON if name in files})


class _OfPhase:
    """Weights whose config is that of the phase: it may train with another rope base than the model's."""

    def __init__(self, weights: Weights, rope_base: float):
        self._weights = weights
        self.config = dataclasses.replace(weights.config, rope_base=rope_base)

    def dtype(self, path: str) -> np.dtype:
        """The type it is stored in."""
        return self._weights.dtype(path)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One parameter in neo's layout; see `Weights.read`."""
        return self._weights.read(path, layer)


def _measured(found: Checkpoint) -> dict[str, Any]:
    """The run's evaluation at this step, when the checkpoint lies in its workdir."""
    from neo.train.workdir import read_records
    if found.path.parent.name != "checkpoints":
        return {}
    merged: dict[str, Any] = {}
    for record in read_records(found.path.parent.parent):
        if record.get("step") == found.step:
            merged |= {name: value for name, value in record.items() if name in ("eval/loss", "eval/bits_per_byte")}
    return merged
