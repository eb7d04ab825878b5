"""Comparing a GGUF file, run by llama.cpp, with the checkpoint it was made from: `verify_gguf`."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import numpy as np

from neo.convert.gguf_reader import GGUFWeights, RoundedWeights
from neo.convert.gguf_runtime import Answers, run_llama
from neo.convert.gguf_tokenizer import vocabulary
from neo.convert.source import Source
from neo.convert.verify import (
    NEW_TOKENS,
    ROUNDING,
    TEXTS,
    Comparison,
    Ours,
    Report,
    compare,
    difference,
    fixed_prompts,
    judge_greedy,
    judge_texts,
    largest,
)
from neo.data.progress import Waiting
from neo.data.tokenizer import CONTROL
from neo.errors import InputError

if TYPE_CHECKING:
    from neo.data.tokenizer import AnyTokenizer

POSITIONS = 4   # ours: next tokens compared per prompt; llama.cpp gives one position per request
# What llama.cpp may differ by with the very same weights, as a share of the largest logit: it rounds the inputs of a matrix
# product to a type that goes with the matrix. Random models, which suffer more than trained ones, showed 1e-5, 1e-3, 2e-2 and,
# with 8 bits, 0.03 to 0.1.
INPUTS = {"F32": (1e-4, "float32 sums in another order"), "F16": (5e-3, "inputs of products rounded to float16"),
          "BF16": (4e-2, "inputs of products rounded to bfloat16")}
QUANTISED = (0.15, "inputs of products rounded to 8 bits")
GELU = 5e-3     # of the largest logit (1e-3 measured): llama.cpp's GELU is the tanh form, from a float16 table


def verify_gguf(source: Source, export: str) -> Report:
    """Compare llama.cpp's results for a file with neo's for the file's weights, and with neo's for the checkpoint.

    The first comparison has the same weights on both sides, so only rounding inside llama.cpp may differ. The second also holds
    what the file's types have rounded off; its tolerance is measured, by rounding the checkpoint's own parameters to them.

    Raises InputError: xllamacpp is not installed, the file is of another model, llama.cpp cannot load it.
    """
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise InputError(f"{source.path} has no tokenizer, so nothing to compare the file's with")
    weights = GGUFWeights(export, source.model)
    header = weights.header
    prompts = fixed_prompts(source.model, tokenizer.vocab_size)
    prompts = [prompt[:header.context_length] for prompt in prompts]
    starts = [prompt for prompt in prompts if len(prompt) + NEW_TOKENS <= header.context_length]
    ends = [sorted({max(len(prompt) * part // POSITIONS, 1) for part in range(1, POSITIONS + 1)}) for prompt in prompts]
    with Waiting(f"llama.cpp on {export}"):
        answers = run_llama(export, vocab_size=header.vocab_size, plain_token=plain_token(tokenizer),
                            prefixes=[prompt[:end] for prompt, some in zip(prompts, ends, strict=True) for end in some],
                            prompts=starts, max_new_tokens=NEW_TOKENS, texts=TEXTS)
    theirs = _per_prompt(answers, ends)
    with Waiting(f"neo on {export}"):
        ours = Ours(weights)
        exported, text = _at(ours.logits(prompts), ends), ours.greedy(starts)
        comparison = _same_weights(source.model.activation, header.type, exported, theirs)
        pairs = [_before_the_end(*pair, ending_tokens(tokenizer)) for pair in zip(text, answers.continuations, strict=True)]
        greedy, problems = judge_greedy([a for a, _ in pairs], [b for _, b in pairs], lambda ids: ours.logits([ids])[0], starts,
                                        comparison.tolerance)
        del ours   # a large model need not be in memory twice
    with Waiting(f"neo on {source.path}"):
        checkpoint = [_log_softmax(one) for one in _at(Ours(source.weights).logits(prompts), ends)]
        rounded = _at(Ours(RoundedWeights(weights, source.weights)).logits(prompts), ends)
    change = difference(checkpoint, [_log_softmax(one) for one in rounded])
    second = compare("the checkpoint", checkpoint, theirs, comparison.tolerance + ROUNDING * change,
                     f"as above, and {ROUNDING:g} times what rounding the checkpoint's own parameters to the file's types does "
                     f"({change:.2e})")
    known = {text: list(ids) for text, ids in zip(TEXTS, answers.tokens, strict=True)}
    words, differing = judge_texts(tokenizer, known.__getitem__)
    notes = vocabulary(tokenizer, header.vocab_size).notes
    if differing and notes:   # known, and said when the file was written
        words, differing = f"{words}; {notes[0]}", ()
    return Report("llama.cpp, through xllamacpp", (comparison, second), greedy, words, (*problems, *differing))


def _before_the_end(ours: list[int], theirs: Sequence[int], ending: Set[int]) -> tuple[list[int], list[int]]:
    """Two texts up to where ours ends and theirs does not: llama.cpp was told not to end, and takes the next best token."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b and a in ending), len(ours))
    return ours[:at], list(theirs[:at])


def ending_tokens(tokenizer: AnyTokenizer) -> Set[int]:
    """Ids that may end a text in llama.cpp: it goes by their names too, but they are always control tokens."""
    return {i for i, (_, _, kind) in enumerate(tokenizer.gguf_pieces()) if kind == CONTROL}


def _same_weights(activation: str, kind: str, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Comparison:
    share, why = INPUTS.get(kind, QUANTISED)
    if activation != "silu":
        share, why = share + GELU, f"{why}, and llama.cpp's GELU"
    return compare("the same weights", [_log_softmax(one) for one in ours], theirs, share * largest(ours),
                   f"{share:g} of the largest logit, for {why}")


def _per_prompt(answers: Answers, ends: list[list[int]]) -> list[np.ndarray]:
    """Log-probabilities [positions, V] of each prompt."""
    return np.split(answers.logprobs, np.cumsum([len(some) for some in ends])[:-1])


def _at(logits: list[np.ndarray], ends: list[list[int]]) -> list[np.ndarray]:
    return [one[np.array(some) - 1] for one, some in zip(logits, ends, strict=True)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def plain_token(tokenizer: AnyTokenizer) -> int:
    """An id whose text is plain letters: llama.cpp reports log-probabilities only with text that is complete."""
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i])
        if text.strip() and text.isascii() and text.isprintable():
            return i
    raise InputError("the tokenizer has no token of plain letters")
