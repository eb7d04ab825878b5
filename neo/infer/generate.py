"""Continuing prompts: prefill into a key/value cache, then one token at a time, in two compiled programs.

Lengths are rounded up to few sizes (`bucket`), and everything else (number of tokens, sampling settings, seed) is an
argument of the programs, so that a session of many prompts compiles a handful of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neo.errors import InputError
from neo.infer.sampling import Knobs, Sampling, row_keys, sample
from neo.models.cache import KVCache
from neo.models.decoder import Decoder, Params
from neo.parallel.mesh import BATCH_AXES

# All ours. Prompts are read in pieces of PIECE tokens: scores of a piece against the whole cache, and its logits, are
# what the prefill holds in memory. The host looks at the tokens every STEPS: often enough for Ctrl-C.
PIECE = 64
STEPS = 32
ROWS = 16


def bucket(size: int, smallest: int) -> int:
    """The least of smallest, 2 smallest, 4 smallest, ... that is `size` or more."""
    while smallest < size:
        smallest *= 2
    return smallest


def generate(decoder: Decoder, params: Params, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
             temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0, eod_id: int | None,
             stop_ids: Sequence[int] = (), rope_base: float = 0.0, vocab_size: int = 0,
             first_index: int = 0) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without the end of the document.

    Args:
        decoder: with the layout in which `params` lie. With several processes all of them call this with the same
            arguments, and all get the result.
        params: of the decoder; any float dtype.
        prompts: token ids. Documents of the training text end with `eod_id`; an empty prompt is taken as [eod_id]:
            what begins a document that has no first token of its own.
        max_new_tokens: at most so many; a result that is shorter was ended by the model.
        temperature, top_k, top_p, seed: see `Sampling`. Prompt i draws with a key of (seed, first_index + i), so its
            result does not depend on the other prompts, up to the rounding of products of another shape.
        eod_id: ends a result; None: nothing does.
        stop_ids: tokens that end one too (the end of a turn, in models made for chats).
        rope_base: of the phase; 0 = the model's.
        vocab_size: ids from it on are never drawn (rows a model has for padding only); 0 = the model's.

    Raises InputError: a prompt with its new tokens is longer than model.max_seq_len, a token outside the vocabulary,
    a setting out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    prompts = check_prompts(decoder, prompts, max_new_tokens, eod_id)
    knobs = sampling.knobs(min(vocab_size or decoder.config.vocab_size, decoder.config.vocab_size))
    stops = tuple(dict.fromkeys((-1 if eod_id is None else eod_id, *stop_ids)))
    job = _Job(dataclasses.replace(decoder, remat="none"), params, max_new_tokens, knobs, seed, stops, rope_base)
    ways = int(np.prod([decoder.layout.size(axis) for axis in BATCH_AXES]))
    rows = max(ROWS // ways, 1) * ways
    results: list[list[int]] = []
    for start in range(0, len(prompts), rows):
        results += job.run(prompts[start:start + rows], first_index + start, ways)
    return results


def check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                  eod_id: int | None) -> list[list[int]]:
    """The prompts as the model reads them, or InputError with the numbers."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: 1 or more is needed")
    if eod_id is None and not all(len(prompt) for prompt in prompts):
        raise InputError("an empty prompt begins with the end-of-document token, and no eod_id is given")
    ready = [[int(token) for token in prompt] or [int(eod_id)] for prompt in prompts]
    longest, vocab = decoder.config.max_seq_len, decoder.config.vocab_size
    for number, prompt in enumerate(ready):
        which = f"prompt {number + 1} of {len(ready)}" if len(ready) > 1 else "the prompt"
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise InputError(f"{which} has token {min(prompt) if min(prompt) < 0 else max(prompt)}; "
                             f"the model's vocabulary is 0 to {vocab - 1}")
        if len(prompt) + max_new_tokens > longest:
            room = longest - len(prompt)
            cure = f"max_new_tokens={room} would fit" if room > 0 else f"shorten it to {longest - 1} tokens or less"
            raise InputError(f"{which} has {len(prompt)} tokens, with max_new_tokens={max_new_tokens} that is "
                             f"{len(prompt) + max_new_tokens}, more than model.max_seq_len={longest}; {cure}")
    return ready


class _Progress(NamedTuple):
    """What goes from one program to the next; its memory is reused."""

    cache: KVCache
    logits: Float[Array, "B V"]     # of the token to draw next
    done: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all rows of one `generate` have in common."""

    decoder: Decoder
    params: Params
    max_new_tokens: int
    knobs: Knobs
    seed: int
    stops: tuple[int, ...]   # -1 is no token
    rope_base: float

    def run(self, prompts: list[list[int]], first_index: int, ways: int) -> list[list[int]]:
        """Generate for the prompts of one batch; the batch is filled up to a multiple of `ways` rows."""
        batch = ways * bucket(-(-len(prompts) // ways), 1)
        capacity = bucket(max(map(len, prompts)) + self.max_new_tokens, PIECE)
        tokens, lengths = np.zeros((batch, capacity), np.int32), np.ones(batch, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, :len(prompt)], lengths[row] = prompt, len(prompt)
        index = np.arange(first_index, first_index + batch, dtype=np.uint32)
        place = functools.partial(_replicated, self.decoder)
        static = {"decoder": self.decoder, "rope_base": self.rope_base}
        padding = np.arange(batch) >= len(prompts)
        progress = _prefill(self.params, place(tokens), place(lengths), place(padding), **static)
        parts = []
        common = place((np.uint32(self.seed), index, np.array(self.stops, np.int32), self.knobs))
        for begun in range(0, self.max_new_tokens, STEPS):
            steps = min(STEPS, self.max_new_tokens - begun)
            counts = place((np.int32(begun), np.int32(steps)))
            progress, drawn = _advance(self.params, progress, *counts, *common, **static)
            parts.append(np.asarray(drawn)[:, :steps])
            if np.asarray(progress.done).all():
                break
        rows = np.concatenate(parts, axis=1)[:len(prompts)].tolist()
        return [list(itertools.takewhile(lambda token: token not in self.stops, row)) for row in rows]


@functools.partial(jax.jit, static_argnames=("decoder", "rope_base"))
def _prefill(params: Params, tokens: Int[Array, "B S"], lengths: Int[Array, "B"], done: Bool[Array, "B"], *,
             decoder: Decoder, rope_base: float) -> _Progress:
    """Read prompts that are padded on the right into a new cache of S entries a row.

    What the padding leaves in the cache stands behind a row's length, where no query sees it, until new tokens
    overwrite it.
    """
    layout, (batch, capacity) = decoder.layout, tokens.shape
    cache = KVCache.empty(decoder.config, batch, capacity, decoder.compute_dtype)
    split = lambda x: layout.constrain(x, "layers", "batch", None, "kv", "head")   # noqa: E731
    cache = dataclasses.replace(cache, key=split(cache.key), value=split(cache.value))

    def read(piece: Array, carry: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        cache, last = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, piece * PIECE, PIECE, axis=1)
        logits, cache = decoder.decode(params, part, cache, rope_base)
        final = lengths - 1
        here = jnp.take_along_axis(logits, (final % PIECE)[:, None, None], axis=1)[:, 0]
        return cache, jnp.where((final // PIECE == piece)[:, None], here, last)

    last = layout.constrain(jnp.zeros((batch, decoder.config.vocab_size), jnp.float32), "batch", "vocab")
    cache, last = jax.lax.fori_loop(0, (lengths.max() + PIECE - 1) // PIECE, read, (cache, last))
    return _Progress(dataclasses.replace(cache, length=lengths), last, layout.constrain(done, None))


@functools.partial(jax.jit, static_argnames=("decoder", "rope_base"), donate_argnames=("progress",))
def _advance(params: Params, progress: _Progress, begun: Int[Array, ""], steps: Int[Array, ""], seed: Int[Array, ""],
             index: Int[Array, "B"], stops: Int[Array, "N"], knobs: Knobs, *, decoder: Decoder,
             rope_base: float) -> tuple[_Progress, Int[Array, "B STEPS"]]:
    """Draw up to `steps` tokens (at most STEPS), fewer when every row has ended; `begun` were drawn before."""
    layout, keys = decoder.layout, row_keys(seed, index)

    def unfinished(carry: Any) -> Array:
        step, progress, _ = carry
        return (step < steps) & ~progress.done.all()

    def advance(carry: Any) -> Any:
        step, (cache, logits, done), drawn = carry
        token = sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, begun + step), knobs)
        token = layout.constrain(token, None)
        logits, cache = decoder.decode(params, token[:, None], cache, rope_base)
        done |= (token[:, None] == stops).any(-1)
        return step + 1, _Progress(cache, logits[:, 0], done), drawn.at[:, step].set(token)

    drawn = jnp.zeros((index.shape[0], STEPS), jnp.int32)
    _, progress, drawn = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), progress, drawn))
    done, drawn = layout.constrain(progress.done, None), layout.constrain(drawn, None, None)
    return progress._replace(done=done), drawn


def _replicated(decoder: Decoder, tree: Any) -> Any:
    """Host values as arrays that every device of the layout has; without a mesh jit places them."""
    if decoder.layout.mesh is None:
        return tree
    put = lambda x: jax.make_array_from_callback(np.shape(x), decoder.layout.sharding(), lambda at: np.asarray(x)[at])   # noqa: E731
    return jax.tree.map(put, tree)
