"""`neo.convert verify`: does the export compute what the checkpoint computes? Asked of the library that will run it.

Logits are compared at every position of fixed prompts (of token ids, so that no tokenizer stands between), one of them longer
than the model's longest window; greedy text is grown token by token; and the tokenizers' ids are compared. The library for
Hugging Face folders is transformers, for GGUF files libllama through xllamacpp (`gguf_verify`). Both sides compute in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neo.cli import Namespace
from neo.config.schema import ModelConfig
from neo.convert import endings
from neo.convert.source import open_source
from neo.errors import StoppedForPerson
from neo.infer.generate import bucket, generate
from neo.models.decoder import Decoder, Params
from neo.models.weights import Weights, parameter_shapes

if TYPE_CHECKING:
    from neo.data.tokenizer import AnyTokenizer

PROMPTS = 3            # ours: short prompts, of PROMPT_TOKENS or what the context has room for
PROMPT_TOKENS = 48
PAST_WINDOW = 24       # ours: so many tokens beyond the longest window in the long prompt
NEW_TOKENS = 40        # ours: length of the greedy text
FLOAT32 = 1e-4         # ours: of the largest logit. Float32 sums in another order differ by 1e-6 to 1e-5 of it
ROUNDING = 4.0         # ours: times what rounding the checkpoint's own parameters to the export's type changes
SMALLEST = 64          # ours: of the lengths that are compiled
SEED = 20240601
# What tokenizers get wrong: leading and doubled spaces, newlines, digits, scripts, emoji of several parts, rare bytes.
TEXTS = ("Hello world", "  two spaces  before and after  ", "line\n\n\tindented\r\n", "def f(x):\n    return x ** 2  # 3.14159",
         "1234567890 0007", "naïve café — “quotes” …", "你好，世界。", "مرحبا שלום", "👩‍👩‍👧‍👦🏳️‍🌈", "\u200b\u00a0x", "ﬁ Å Å ①",
         "</p><b>&amp;")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One side's logits against the other's over all prompts.

    Attributes:
        max_difference: the largest |logit - logit|, or of log-probabilities where the library gives only those.
        kl: mean over positions of KL(reference || other), in nats.
        agreement: share of positions with the same likeliest token;
            NaN where that was not asked.
        tolerance: for max_difference.
        reason: where the tolerance comes from.
    """

    what: str
    max_difference: float
    kl: float
    agreement: float
    tolerance: float
    reason: str

    @property
    def passed(self) -> bool:
        return self.max_difference <= self.tolerance   # false for NaN


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found; `problems` are words about anything that is not a number."""

    library: str
    comparisons: tuple[Comparison, ...]
    greedy: str
    tokenizer: str
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems and all(one.passed for one in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"passed": self.passed, "library": self.library, "greedy": self.greedy, "tokenizer": self.tokenizer,
                "problems": list(self.problems),
                "comparisons": [{name: value for name, value in {**dataclasses.asdict(one), "passed": one.passed}.items()
                                 if not isinstance(value, float) or math.isfinite(value)} for one in self.comparisons]}

    def table(self) -> str:
        """For people."""
        rows = [("", "max |dlogit|", "tolerance", "KL (nats)", "same argmax", "")]
        rows += [(one.what, f"{one.max_difference:.2e}", f"{one.tolerance:.2e}", f"{one.kl:.2e}",
                  "" if math.isnan(one.agreement) else f"{one.agreement:.2%}", "ok" if one.passed else "BEYOND")
                 for one in self.comparisons]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"tolerance of '{one.what}': {one.reason}" for one in self.comparisons]
        lines += [f"greedy text: {self.greedy}", f"tokenizer: {self.tokenizer}", f"against {self.library}"]
        return "\n".join([*lines, *(f"problem: {text}" for text in self.problems)])


def run(args: Namespace) -> None:
    """Compare, print, and end with exit code 3 when something is beyond its tolerance."""
    source = open_source(args.checkpoint)
    if args.export.endswith(".gguf"):
        from neo.convert.gguf_verify import verify_gguf
        report = verify_gguf(source, args.export)
    else:
        from neo.convert.verify_hf import verify_hf
        report = verify_hf(source, args.export)
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.table())
    if not report.passed:
        reasons = [f"{one.what}: {one.max_difference:.2e} apart (tolerance {one.tolerance:.2e}), KL {one.kl:.2e}"
                   for one in report.comparisons if not one.passed]
        raise StoppedForPerson(f"{args.export} does not compute what {source.path} does: "
                               f"{'; '.join([*reasons, *report.problems])}")
    if not args.json:
        out = Path(args.export).absolute()
        uses = endings.uses_of_gguf(out) if args.export.endswith(".gguf") else endings.uses_of_folder(out)
        print("\n".join([f"{args.export} computes what {source.path} does, within tolerance", *uses]))


def fixed_prompts(model: ModelConfig, vocab_size: int = 0) -> list[list[int]]:
    """Token ids that are always the same for a model: PROMPTS short prompts, and one longer than the longest window."""
    draw = np.random.default_rng(SEED)
    vocab, room = min(vocab_size or model.vocab_size, model.vocab_size), max(model.max_seq_len - NEW_TOKENS, 1)
    lengths = [max(min(PROMPT_TOKENS, room) - 3 * i, 1) for i in range(PROMPTS)]
    windows = [window for window in model.layer_windows if window and window < model.max_seq_len]
    if windows:
        lengths.append(min(max(windows) + PAST_WINDOW, model.max_seq_len))
    return [draw.integers(0, vocab, length).tolist() for length in lengths]


class Ours:
    """neo's side: the parameters of some weights in float32, and what the decoder makes of prompts."""

    def __init__(self, weights: Weights, round_to: np.dtype | None = None, scale: float = 1.0):
        """Read all parameters; `round_to` rounds each to a type of fewer bits first, after multiplying it by `scale`."""
        self.decoder = Decoder(weights.config, jnp.float32, "none")
        self.params: dict[str, Any] = {}
        for path in parameter_shapes(weights.config):
            *folders, name = path.split("/")
            place = self.params
            for folder in folders:
                place = place.setdefault(folder, {})
            value = weights.read(path).astype(np.float32)
            if round_to is not None:
                value = (value * np.float32(scale)).astype(round_to).astype(np.float32) / np.float32(scale)
            place[name] = jnp.asarray(value)

    def logits(self, prompts: list[list[int]]) -> list[np.ndarray]:
        """Float32 [T, V] of each prompt."""
        with jax.default_matmul_precision("highest"):
            return [self._logits(prompt) for prompt in prompts]

    def _logits(self, prompt: list[int]) -> np.ndarray:
        # The padding stands on the right, where causal attention does not look; few lengths are few programs to compile.
        padded = np.zeros((1, bucket(len(prompt), SMALLEST)), np.int32)
        padded[0, :len(prompt)] = prompt
        return np.asarray(_forward(self.params, padded, self.decoder))[0, :len(prompt)]

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        """NEW_TOKENS likeliest tokens after each prompt; no token ends the text."""
        with jax.default_matmul_precision("highest"):
            return generate(self.decoder, self.params, prompts, max_new_tokens=NEW_TOKENS, temperature=0.0, eod_id=None)


@functools.partial(jax.jit, static_argnames=("decoder",))
def _forward(params: Params, tokens: Int[Array, "B T"], decoder: Decoder) -> Float[Array, "B T V"]:
    return decoder.apply(params, tokens)


def compare(what: str, ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float, reason: str) -> Comparison:
    """The figures of one row of the report; lists of float32 [T, V], one per prompt."""
    difference, kl, same, count = 0.0, 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        gap = np.abs(a - b).max()
        difference = gap if math.isnan(gap) else max(difference, float(gap))
        one, other = _log_softmax(a), _log_softmax(b)
        kl += float((np.exp(one) * (one - other)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(a)
    return Comparison(what, float(difference), max(kl / count, 0.0), same / count, tolerance, reason)


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest |logit - logit|."""
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def largest(logits: list[np.ndarray]) -> float:
    """The largest |logit|, the scale of float32 rounding; at least 1."""
    return max(1.0, *(float(np.abs(one).max()) for one in logits))


def judge_greedy(ours: list[list[int]], theirs: list[list[int]], logits: Callable[[list[int]], np.ndarray],
                 prompts: list[list[int]], tie: float) -> tuple[str, tuple[str, ...]]:
    """(words for the report, problems) about two greedy continuations of each prompt.

    They may part where the two likeliest tokens are a tie, closer than the logits of the two sides agree.

    Args:
        logits: neo's, float32 [T, V] of some tokens.
        tie: the smallest gap between the two tokens that counts.
    """
    parted = []
    for number, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True), 1):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if at == len(a) == len(b):
            continue
        last = logits([*prompt, *a[:at]])[-1] if at < min(len(a), len(b)) else None
        gap = abs(float(last[a[at]] - last[b[at]])) if last is not None else math.inf
        if not gap <= tie:
            return f"prompt {number} parts after {at} of {len(a)} tokens", (
                f"the greedy text of prompt {number} parts after {at} tokens, at logits that are {gap:.2e} apart",)
        parted.append(f"{number} after {at}")
    if parted:
        return f"equal up to ties closer than {tie:.1e} (prompt {', '.join(parted)} tokens)", ()
    return f"{len(prompts)} x {NEW_TOKENS} tokens, equal", ()


def judge_texts(tokenizer: AnyTokenizer, encode: Callable[[str], list[int]]) -> tuple[str, tuple[str, ...]]:
    """(words for the report, problems) about another tokenizer that should give the ids a model is prompted with."""
    wrong = [text for text in TEXTS if list(encode(text)) != tokenizer.encode_prompt(text)]
    if not wrong:
        return f"the same ids for {len(TEXTS)} texts", ()
    return f"other ids for {len(wrong)} of {len(TEXTS)} texts", (f"the tokenizers read {wrong[0]!r} differently",)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
