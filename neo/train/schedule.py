"""Learning rate and tokens as functions of the step, in exact host arithmetic.

Steps and tokens are Python integers (a run of 1e13 tokens overflows int32 256 steps in); rates are
float64 and reach the device as float32 scalars of each step.
"""

from __future__ import annotations

import dataclasses
import math

from neo.config.schema import Config, PhaseConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step stands in the run."""

    phase: int            # index into config.phases
    step_in_phase: int    # 0-based
    tokens_before: int    # target tokens of all earlier steps
    phase_tokens: int     # target tokens of the phase's earlier steps
    global_batch: int     # sequences of the step
    tokens: int           # its target tokens


def place(config: Config, step: int) -> Place:
    """The phase of 0-based `step`, its batch, and the tokens seen before it. ValueError past the last step."""
    tokens = first = 0
    for i, phase in enumerate(config.phases):
        begin, begin_tokens = first, tokens
        for steps, batch in phase.batches:
            per_step = batch * phase.seq_len
            if step < first + steps:
                before = tokens + (step - first) * per_step
                return Place(i, step - begin, before, before - begin_tokens, batch, per_step)
            first += steps
            tokens += steps * per_step
    raise ValueError(f"step {step} is past the end of the run ({first} steps)")


def tokens_after(config: Config, steps: int) -> int:
    """Target tokens seen after `steps` whole steps."""
    if steps == 0:
        return 0
    at = place(config, steps - 1)
    return at.tokens_before + at.tokens


def learning_rate(config: Config, step: int) -> float:
    """Rate of 0-based `step`: its phase's piece, at the tokens seen when the step is done.

    So the first step of a warm-up is above start_lr, its last is peak_lr, and the phase's last step
    is final_lr.
    """
    at = place(config, step)
    return phase_rate(config.phases[at.phase], at.phase_tokens + at.tokens)


def phase_rate(phase: PhaseConfig, tokens: int) -> float:
    """Rate after `tokens` tokens of the phase: linear warm-up, then `lr_shape` down to final_lr at its end."""
    if tokens < phase.warmup_tokens:
        return phase.start_lr + (phase.peak_lr - phase.start_lr) * tokens / phase.warmup_tokens
    total = phase.whole_tokens
    done = (tokens - phase.warmup_tokens) / max(total - phase.warmup_tokens, 1)
    done = min(max(done, 0.0), 1.0)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[phase.lr_shape]
    return phase.final_lr + (phase.peak_lr - phase.final_lr) * shape if phase.lr_shape != "constant" else phase.peak_lr
