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

    phase: int          # index into config.phases
    step_in_phase: int  # 0-based
    tokens_before: int  # target tokens of all earlier steps


def place(config: Config, step: int) -> Place:
    """The phase of 0-based `step` and the tokens seen before it. ValueError past the last step."""
    tokens, first = 0, 0
    for i, phase in enumerate(config.phases):
        if step < first + phase.steps:
            return Place(i, step - first, tokens + (step - first) * phase.tokens_per_step)
        first += phase.steps
        tokens += phase.steps * phase.tokens_per_step
    raise ValueError(f"step {step} is past the end of the run ({first} steps)")


def tokens_after(config: Config, steps: int) -> int:
    """Target tokens seen after `steps` whole steps."""
    if steps == 0:
        return 0
    at = place(config, steps - 1)
    return at.tokens_before + config.phases[at.phase].tokens_per_step


def learning_rate(config: Config, step: int) -> float:
    """Rate of 0-based `step`: its phase's piece, at the tokens seen when the step is done.

    So the first step of a warm-up is above start_lr, its last is peak_lr, and the phase's last step
    is final_lr.
    """
    at = place(config, step)
    phase = config.phases[at.phase]
    return phase_rate(phase, (at.step_in_phase + 1) * phase.tokens_per_step)


def phase_rate(phase: PhaseConfig, tokens: int) -> float:
    """Rate after `tokens` tokens of the phase: linear warm-up, then `lr_shape` down to final_lr at its end."""
    if tokens < phase.warmup_tokens:
        return phase.start_lr + (phase.peak_lr - phase.start_lr) * tokens / phase.warmup_tokens
    total = phase.steps * phase.tokens_per_step
    done = (tokens - phase.warmup_tokens) / max(total - phase.warmup_tokens, 1)
    done = min(max(done, 0.0), 1.0)
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[phase.lr_shape]
    return phase.final_lr + (phase.peak_lr - phase.final_lr) * shape if phase.lr_shape != "constant" else phase.peak_lr
