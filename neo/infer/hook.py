"""Samples while a model trains: samples.jsonl in the workdir."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from neo.infer.generate import generate
from neo.infer.model import continuation
from neo.train.hooks import Hook, every
from neo.train.metrics import stamp
from neo.train.schedule import tokens_after
from neo.train.workdir import JsonLines

if TYPE_CHECKING:
    from neo.train.session import Session

TEMPERATURE = 0.8   # as in `python -m neo.infer`, so that its --seed=0 draws the same text up to rounding


class SampleHook(Hook):
    """Continues `eval.sample_prompts` every `eval.sample_every_steps` steps and at the end, on all devices of the run.

    One line per prompt: step, tokens, phase, time, prompt, text (prompt and continuation), new_tokens. Prompts are cut
    to what the model can take. A step that is trained again after a resume adds its lines again; the last ones count.
    """

    part = "eval"

    def __init__(self, session: Session):
        self._session = session
        self._tokenizer = session.tokenizer
        model, config = session.config.model, session.config.eval
        self._new_tokens = min(config.sample_tokens, model.max_seq_len - 1)
        room = model.max_seq_len - self._new_tokens
        self._prompts = [self._tokenizer.encode_prompt(prompt)[:room] for prompt in config.sample_prompts]

    def due(self, step: int, last: bool) -> bool:
        interval = self._session.config.eval.sample_every_steps
        return bool(self._prompts) and self._new_tokens > 0 and every(interval, step, last)

    def act(self, step: int, state: Mapping[str, Any]) -> None:
        session, tokenizer = self._session, self._tokenizer
        phase = session.phase_after(step)
        found = generate(session.decoder, state["params"], self._prompts, max_new_tokens=self._new_tokens,
                         temperature=TEMPERATURE, eod_id=tokenizer.eod_id, vocab_size=tokenizer.vocab_size,
                         rope_base=phase.rope_base)
        if jax.process_index() > 0:
            return
        file = JsonLines(session.workdir.path / "samples.jsonl", keep=True)
        about = stamp(step, tokens_after(session.config, step), phase.name)
        for prompt, ids, new in zip(session.config.eval.sample_prompts, self._prompts, found, strict=True):
            shown = prompt if len(tokenizer.encode_prompt(prompt)) == len(ids) else tokenizer.decode(ids)
            file.write({**about, "prompt": prompt, "text": shown + continuation(tokenizer, ids, new),
                        "new_tokens": len(new)})
