"""New mixture weights from held-out losses: dynamic batch loading of Sheared-LLaMA (arXiv:2310.06694, algorithm 1), capped.

With k sources, weights w that sum to 1, losses l and reference losses r (nats per token):

    d = clip(l - r, 0, clip)             the paper's max(l - r, 0), and an upper end (ours): one bad loss moves nothing far
    w = w * exp(rate * d), normalised    rate 1 in the paper
    w = (1 - floor) * w + floor / k      1e-4 in the authors' code, after DoReMi (arXiv:2305.10429)

The authors' code leaves out the max, so there a source below its reference shrinks; here it only shrinks as others grow.
A small source's weight can run away; so no source gets more of the next interval than its epoch limit leaves it
(data.max_epochs): `most_shares` says how much that is, `capped` spreads the rest. All of it is float64 in Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from neo.config.schema import Config
from neo.data.order import Order
from neo.data.planning import epoch_limit

MARGIN_WINDOWS = 2  # `Mixture` keeps a source within so many windows of its weight


def next_weights(config: Config, order: Order, tokens: Mapping[str, int], losses: Mapping[str, float],
                 step: int) -> dict[str, float] | None:
    """Weights for the reweight_steps steps from 0-based `step` on (or to the end of its phase); they sum to 1.

    Args:
        order: with the weights in force at `step` so far. The sources are those that the config gives to its phase.
        tokens: training tokens of each source.
        losses: held-out loss of each source, nats per token.

    None where the epoch limits leave fewer tokens than the interval takes. ValueError for a loss that is not finite.
    """
    data, span = config.data, order.span_of_step(step)
    now = dict(zip(span.mixture.names, span.mixture.weights, strict=True))
    weights = {name: now.get(name, 0) for name, weight in config.phases[span.phase].mixture.items() if weight > 0}
    wanted = updated(weights, losses, data.reweight_reference, rate=data.reweight_rate, floor=data.reweight_floor,
                     clip=data.reweight_clip)
    # A phase is rounded up to whole steps: like the plan's own check, the last resort is one step over the limit.
    for margin in (MARGIN_WINDOWS, -span.global_batch):
        found = capped(wanted, most_shares(config, order, tokens, step, margin))
        if found is not None:
            return found
    return None


def most_shares(config: Config, order: Order, tokens: Mapping[str, int], step: int, margin: int) -> dict[str, float]:
    """Source -> largest share of the interval from 0-based `step` on with which it stays within its epoch limit.

    What later phases plan to read of a source is kept for them, and `margin` windows are left free.
    """
    span = order.span_of_step(step)
    phase_end = max(other.first_step + other.steps for other in order.spans if other.phase == span.phase)
    sequences = order.first_index(min(step + config.data.reweight_steps, phase_end)) - order.first_index(step)
    before, to_phase_end, whole = (order.tokens_by_source(at) for at in (step, phase_end, order.num_steps))
    shares = {}
    for name, size in tokens.items():
        limit = epoch_limit(config, name)
        if math.isinf(limit):
            shares[name] = limit
            continue
        left = limit * size - before[name] - (whole[name] - to_phase_end[name])
        shares[name] = max(left // span.seq_len - margin, 0) / sequences
    return shares


def updated(weights: Mapping[str, float], losses: Mapping[str, float], references: Mapping[str, float], *, rate: float,
            floor: float, clip: float) -> dict[str, float]:
    """The formula above. `weights` (of any sum) name the sources; the result has the same ones and sums to 1.

    A weight of 0 comes back as floor / k. Raises ValueError for a loss that is not finite.
    """
    bad = [name for name in weights if not math.isfinite(losses[name])]
    if bad:
        raise ValueError(f"the loss of source {bad[0]!r} is {losses[bad[0]]}")
    grown = {name: weight * math.exp(rate * min(max(losses[name] - references[name], 0.0), clip))
             for name, weight in weights.items()}
    total = math.fsum(grown.values())
    mixed = {name: (1 - floor) * weight / total + floor / len(grown) for name, weight in grown.items()}
    total = math.fsum(mixed.values())
    return {name: weight / total for name, weight in mixed.items()}


def capped(weights: Mapping[str, float], most: Mapping[str, float]) -> dict[str, float] | None:
    """Weights that sum to 1 with none above its `most` (a share from 0 up); None where the `most` do not add up to 1.

    Water filling: sources above their most get it, and what they lose goes to the others in proportion to their weights;
    again while that lifts another one above its most. A source without weight gets none.
    """
    free = {name: weight for name, weight in weights.items() if weight > 0}
    if math.fsum(most[name] for name in free) < 1:
        return None
    full: dict[str, float] = {}
    while free:
        scale = (1 - math.fsum(full.values())) / math.fsum(free.values())
        over = [name for name, weight in free.items() if weight * scale > most[name]]
        if not over:
            break
        for name in over:
            full[name] = most[name]
            del free[name]
    return {name: full[name] if name in full else free[name] * scale if name in free else 0.0 for name in weights}
