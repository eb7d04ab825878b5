"""The one table of metric names, and how a step's device values become a record."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

# name -> meaning. `<source>` stands for a source's name. Every record also has step, tokens, phase and time (UTC).
METRICS: dict[str, str] = {
    "train/loss": "mean cross-entropy over the step's target tokens, nats",
    "train/z_loss": "its z-loss term, as added to the objective",
    "train/accuracy": "share of target tokens with the largest logit",
    "train/loss/<source>": "train/loss over one source's tokens of this step",
    "train/accuracy/<source>": "train/accuracy over one source's tokens of this step",
    "optim/lr": "learning rate of the step",
    "optim/grad_norm": "global norm of the gradient before clipping",
    "optim/param_norm": "global norm of the parameters after the step",
    "perf/tokens_per_s": "target tokens per second over all devices since the last record",
    "perf/tokens_per_s_per_device": "the same per device",
    "perf/step_s": "seconds per step since the last record",
    "perf/mfu": "model FLOPs over peak, every query-key pair of window or sequence counted",
    "perf/mfu_causal": "model FLOPs over peak, only the pairs the mask lets through counted",
    "eval/loss": "held-out cross-entropy over all sources' validation tokens, nats per token",
    "eval/loss/<source>": "the same for one source",
    "eval/accuracy": "share of held-out target tokens with the largest logit",
    "eval/bits_per_byte": "held-out bits per byte of UTF-8 text, over all sources",
    "eval/bits_per_byte/<source>": "the same for one source",
    "data/weight/<source>": "share of the sequences that re-weighting gives a source from its next amendment on",
    "goodput/step": "share of the time since start spent in training steps",
    "goodput/data": "share spent waiting for data",
    "goodput/eval": "share spent in evaluation and sampling",
    "goodput/checkpoint": "share spent in saving that training had to wait for",
    "goodput/startup": "share spent before the first step, compilation included",
}


def known_metric(name: str) -> bool:
    """Whether a name is in the table, with any source's name in the place of `<source>`."""
    return name in METRICS or f"{name.rsplit('/', 1)[0]}/<source>" in METRICS


def stamp(step: int, tokens: int, phase: str) -> dict[str, Any]:
    """What every record starts with: steps done, target tokens seen, phase, UTC time."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"step": step, "tokens": tokens, "phase": phase, "time": now}


def step_values(values: Mapping[str, Any], sources: Sequence[str]) -> dict[str, float]:
    """Host values of a step's metrics under their table names; sources without tokens in the step are left out."""
    record = {"train/loss": float(values["loss"]), "train/accuracy": float(values["accuracy"]),
              "optim/grad_norm": float(values["grad_norm"]), "optim/param_norm": float(values["param_norm"])}
    if values["z_loss"]:
        record["train/z_loss"] = float(values["z_loss"])
    for i, source in enumerate(sources):
        if values["source_tokens"][i] > 0:
            record[f"train/loss/{source}"] = float(values["source_loss"][i])
            record[f"train/accuracy/{source}"] = float(values["source_accuracy"][i])
    return record
