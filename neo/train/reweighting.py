"""Dynamic weights: every data.reweight_steps steps the mixture follows the held-out losses (neo/data/reweight.py).

New weights are an amendment of the data order, effective `reweight_lead` steps after the losses were measured. They ride in
every checkpoint, so a run that is killed and goes on reads the same stream; later decisions repeat because the losses do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from neo.config import Config
from neo.data.amendments import BY_REWEIGHTING, Amendment
from neo.data.mixture import Mixture
from neo.data.planning import epoch_limit
from neo.data.reweight import next_weights
from neo.errors import InputError, StoppedForPerson
from neo.train.evaluation import Evaluation
from neo.train.hooks import Hook

if TYPE_CHECKING:
    from neo.train.session import Session

def check(config: Config, sources: Mapping[str, Any]) -> None:
    """InputError unless these opened sources can be re-weighted as the config asks."""
    data = config.data
    if not data.reweight_steps:
        return
    if data.synthetic:
        raise InputError("config.data.reweight_steps: random tokens (data.synthetic) have no held-out loss to follow")
    without = [name for name, source in sources.items() if not source.split("validation").num_tokens]
    if without:
        raise InputError(f"config.data.reweight_steps={data.reweight_steps} follows the held-out loss of each source, and "
                         f"{', '.join(repr(name) for name in without)} holds no documents out: prepare it with --validation, "
                         "or take it out of the mixtures")


class Reweighting(Hook):
    """Decides new weights at multiples of data.reweight_steps, with the losses of `evaluation`."""

    part = "eval"

    def __init__(self, session: Session, evaluation: Evaluation):
        self._session, self._evaluation = session, evaluation
        self._lead = session.config.data.reweight_lead

    def due(self, step: int, last: bool) -> bool:
        """Also where the run stops there: one that goes on later must find the same weights. A new phase begins with its
        own mixture, so nothing is decided for what is left of one shorter than the lead.
        """
        order = self._session.data.order
        if step % self._session.config.data.reweight_steps or step + self._lead >= order.num_steps:
            return False
        return order.phase_of_step(step) == order.phase_of_step(step + self._lead)

    def act(self, step: int, state: Mapping[str, Any]) -> dict[str, float]:
        session, effective = self._session, step + self._lead
        measured, fresh = self._evaluation.measured(step, state)
        order = session.data.order
        names = [name for name in session.sources if f"eval/loss/{name}" in measured]
        losses = dict(zip(names, _of_process_0([measured[f"eval/loss/{name}"] for name in names]), strict=True))
        tokens = {name: source.split("train").num_tokens for name, source in session.sources.items()}
        try:
            new = next_weights(session.config, order, tokens, losses, effective)
        except ValueError as error:
            raise StoppedForPerson(f"no new weights at step {step}: {error}") from None
        if new is None:
            raise StoppedForPerson(self._all_at_the_limit(step, tokens))
        span = order.span_of_step(effective)
        mixture = Mixture(new)
        if (mixture.names, mixture.weights) != (span.mixture.names, span.mixture.weights):
            total = sum(span.mixture.weights)
            session.amend(Amendment(effective, order.first_index(effective), span.name, new, BY_REWEIGHTING), losses=losses,
                          before={name: weight / total for name, weight in
                                  zip(span.mixture.names, span.mixture.weights, strict=True)})
        return {**(measured if fresh else {}), **{f"data/weight/{name}": weight for name, weight in new.items()}}

    def _all_at_the_limit(self, step: int, tokens: Mapping[str, int]) -> str:
        used = self._session.data.order.tokens_by_source(step)
        named = ", ".join(f"{name} {used[name] / size:.2f} of {epoch_limit(self._session.config, name):g}"
                          for name, size in list(tokens.items())[:8] if used.get(name))
        return (f"at step {step} the sources have too few tokens left for the next {self._session.config.data.reweight_steps} "
                f"steps within their epoch limits ({named}): allow more with --config.data.max_epochs=N, or give the phase "
                "fewer tokens")


def _of_process_0(values: list[float]) -> list[float]:
    """Process 0's numbers, on every process: all of them must mix alike, to the last bit."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils
    bits = np.asarray(values, np.float64).view(np.int32)   # JAX would round 64-bit numbers
    return np.asarray(multihost_utils.broadcast_one_to_all(bits), np.int32).view(np.float64).tolist()
