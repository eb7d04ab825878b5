"""Writing a neo checkpoint of parameters that were not just trained: imported, or averaged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import neo
from neo.config import Config
from neo.convert import output
from neo.convert.source import HF_CLASS, ORIGIN, Source
from neo.data.progress import Progress, say
from neo.models.weights import parameter_shapes
from neo.train.checkpoint_format import open_checkpoint
from neo.train.weights import fill_checkpoint


def write(source: Source, out: Path, facts: Mapping[str, Any], made_from: Sequence[str], overwrite: bool) -> bool:
    """Write OUT in the type the parameters are stored in, unless this very conversion is there already.

    Interrupted, the same call goes on. Returns whether anything was done. InputError when something else is at OUT and
    `overwrite` is not given; StoppedForPerson when the disk is too small.
    """
    facts = {"format": "neo.conversion", "version": 1, **facts, "neo": neo.__version__}
    if output.is_finished(out, facts, overwrite, lambda path: open_checkpoint(path).weights()):
        say(f"{out} is finished already: nothing to do")
        return False
    weights = source.weights
    config = source.config or Config(name=re.sub(r"[^\w.-]", "_", out.name), model=source.model)
    data = {"step": source.step, "tokens": source.tokens, "phase": source.phase, "synthetic": False, "order": {},
            ORIGIN: list(made_from), **({HF_CLASS: source.hf_class} if source.hf_class else {})}
    tokenizer_files = {**source.tokenizer.files(), **source.passed_on} if source.tokenizer is not None else {}
    output.check_room(out, _num_bytes(source))
    partial, _ = output.open_partial(out, facts, overwrite)
    with _Told(f"{out.name} from {source.name}") as told:
        fill_checkpoint(weights, partial, config, data, tokenizer_files, told)
    output.finish(partial, out)
    return True


def _num_bytes(source: Source) -> int:
    total = 0
    for path, shape in parameter_shapes(source.model).items():
        size = source.weights.dtype(path).itemsize
        for length in shape:
            size *= length
        total += size
    return total


class _Told:
    """Progress as `fill_checkpoint` reports it, (bytes written, bytes in all), for the bar, which counts what it sees."""

    def __init__(self, label: str):
        self._label = label
        self._bar: Progress | None = None
        self._done = 0

    def __enter__(self) -> _Told:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if done:
                say(f"going on: {done / 1e9:.2f} of {total / 1e9:.2f} GB were written before")
            self._bar, self._done = Progress(self._label, total - done).__enter__(), done
            return
        self._bar.advance(done - self._done)
        self._done = done

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)
