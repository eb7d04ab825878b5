"""Cached generation against the full forward pass, alone and in batches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.infer import generate as generate_module
from neo.infer.generate import PIECE, STEPS, bucket, generate
from neo.models.decoder import Decoder

V, EOD = 97, 1
GREEDY = dict(temperature=0.0, eod_id=None)
LENGTHS = (3, PIECE + 1, 17, PIECE - 1)   # so that few programs serve the whole file: compiling is what takes time
LONGEST = 2 * PIECE


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocab_size=V, num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48,
                         max_seq_len=LONGEST, windows=(7, 0))
    decoder = Decoder(config, attention="dense")
    return decoder, decoder.init(jax.random.key(0), 0.2)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, V, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def full(model):
    """tokens -> logits of the next one, by a full forward pass of fixed length."""
    decoder, params = model
    apply = jax.jit(lambda tokens, base: decoder.apply(params, tokens, rope_base=base), static_argnums=1)

    def last(tokens, base=0.0):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, :len(tokens)] = tokens
        return np.asarray(apply(padded, base))[0, len(tokens) - 1]
    return last


def greedy_by_hand(full, prompt, count, base=0.0):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(full(tokens, base))))
    return tokens[len(prompt):]


@pytest.mark.parametrize("which", range(len(LENGTHS)))
def test_greedy_equals_the_full_forward_pass(model, prompts, full, which):
    """Sliding windows, lengths around a piece, two rounds of STEPS."""
    count = STEPS + 5
    found = generate(*model, prompts[which:which + 1], max_new_tokens=count, **GREEDY)
    assert found == [greedy_by_hand(full, prompts[which], count)]


def test_rope_base_of_a_phase(model, prompts, full):
    found = generate(*model, prompts[:1], max_new_tokens=8, rope_base=50.0, **GREEDY)
    assert found == [greedy_by_hand(full, prompts[0], 8, 50.0)]
    assert found != generate(*model, prompts[:1], max_new_tokens=8, **GREEDY)


def test_a_prompt_does_not_know_its_batch(model, prompts):
    together = generate(*model, prompts, max_new_tokens=12, **GREEDY)
    assert together == [generate(*model, [one], max_new_tokens=12, **GREEDY)[0] for one in prompts]
    assert together[::-1] == generate(*model, prompts[::-1], max_new_tokens=12, **GREEDY)


@pytest.mark.parametrize("settings", [dict(temperature=1.0), dict(temperature=0.7, top_k=20, top_p=0.9)])
def test_samples_depend_on_seed_and_index_only(model, prompts, settings, monkeypatch):
    draw = lambda some, **more: generate(*model, some, max_new_tokens=12, eod_id=EOD, **settings, **more)   # noqa: E731
    together = draw(prompts, seed=3)
    assert together == [draw([one], seed=3, first_index=i)[0] for i, one in enumerate(prompts)]
    assert together != draw(prompts, seed=4)
    same = draw([prompts[0]] * 3, seed=3)
    assert same[0] == together[0]
    assert same[0] != same[1] != same[2]
    monkeypatch.setattr(generate_module, "ROWS", 2)   # several batches
    assert draw(prompts, seed=3) == together


def test_longer_runs_begin_like_shorter_ones(model, prompts):
    draw = lambda count: generate(*model, prompts[::2], max_new_tokens=count, temperature=1.0, eod_id=None)   # noqa: E731
    long = draw(2 * STEPS + 3)
    assert [len(one) for one in long] == [2 * STEPS + 3] * 2
    for count in (1, STEPS, STEPS + 1):
        assert draw(count) == [one[:count] for one in long]


def test_stops_before_the_end_of_the_document(model, prompts):
    free = generate(*model, prompts, max_new_tokens=STEPS + 8, temperature=1.0, eod_id=None)
    for eod in (free[0][0], free[2][5], free[1][STEPS + 2]):
        found = generate(*model, prompts, max_new_tokens=STEPS + 8, temperature=1.0, eod_id=eod)
        assert found == [row[:row.index(eod)] if eod in row else row for row in free]
        assert any(len(row) < STEPS + 8 for row in found)


def test_any_of_several_tokens_ends_a_result(model, prompts):
    """Models made for chats end a turn and a document with different tokens."""
    free = generate(*model, prompts[:1], max_new_tokens=12, temperature=0.0, eod_id=None)[0]
    stops = (free[4], free[7])
    found = generate(*model, prompts[:1], max_new_tokens=12, temperature=0.0, eod_id=None, stop_ids=stops)[0]
    assert found == free[:min(free.index(token) for token in stops)] and len(found) < 12


def test_an_empty_prompt_begins_a_document(model):
    assert generate(*model, [[]], max_new_tokens=6, temperature=0.0, eod_id=EOD) == \
        generate(*model, [[EOD]], max_new_tokens=6, temperature=0.0, eod_id=EOD)
    assert generate(*model, [], max_new_tokens=6, temperature=0.0, eod_id=EOD) == []


def test_ids_past_the_vocabulary_are_not_drawn(model, prompts):
    free = generate(*model, prompts, max_new_tokens=40, temperature=2.0, eod_id=None)
    held = generate(*model, prompts, max_new_tokens=40, temperature=2.0, eod_id=None, vocab_size=50)
    assert max(map(max, free)) >= 50 > max(map(max, held))


def test_up_to_the_longest_context(model, prompts, full):
    long = prompts[1]
    room = LONGEST - len(long)
    found = generate(*model, [long], max_new_tokens=room, **GREEDY)[0]
    tokens = long + found
    assert len(tokens) == LONGEST
    assert tokens[-1] == int(np.argmax(full(tokens[:-1])))


def test_few_programs_are_compiled(model):
    """Many lengths, settings and numbers of tokens: one program each, because all are in one bucket."""
    decoder, params = model
    before = generate_module._prefill._cache_size(), generate_module._advance._cache_size()
    for length in range(PIECE - 3, 2 * PIECE - 10, 5):
        generate(decoder, params, [[5] * length] * (3 + length % 2), max_new_tokens=4 + length % 3,
                 temperature=length % 4 / 2, top_k=length % 2, top_p=0.5 + length % 2 / 2, seed=length,
                 eod_id=length % 5)
    assert generate_module._prefill._cache_size() - before[0] <= 1
    assert generate_module._advance._cache_size() - before[1] <= 1


def test_bfloat16_is_near(model, prompts, full):
    """The cache of a bfloat16 model is bfloat16; its first greedy tokens are likely ones of the exact model."""
    decoder, params = model
    half = dataclasses.replace(decoder, compute_dtype=jnp.bfloat16)
    token = generate(half, params, prompts[:1], max_new_tokens=1, **GREEDY)[0][0]
    logits = full(prompts[0])
    assert logits.max() - logits[token] < 0.1 * logits.std()


@pytest.mark.parametrize("size,smallest,wanted", [(1, 1, 1), (3, 1, 4), (64, 64, 64), (65, 64, 128), (1, 64, 64)])
def test_bucket(size, smallest, wanted):
    assert bucket(size, smallest) == wanted


@pytest.mark.parametrize("prompts,settings,named", [
    ([[5] * 100], dict(max_new_tokens=64), r"100 tokens.*64.*164.*max_seq_len=128; max_new_tokens=28 would fit"),
    ([[5], [5] * 300], dict(), r"prompt 2 of 2 has 300 tokens.*shorten it to 127"),
    ([[5, V]], dict(), rf"token {V}.*0 to {V - 1}"),
    ([[-3]], dict(), "token -3"),
    ([[5]], dict(max_new_tokens=0), "max_new_tokens=0"),
    ([[]], dict(eod_id=None), "no eod_id"),
    ([[5]], dict(top_p=2.0), "top_p=2.0"),
])
def test_bad_input(model, prompts, settings, named):
    with pytest.raises(InputError, match=named):
        generate(*model, prompts, **{"max_new_tokens": 8, "temperature": 1.0, "eod_id": EOD, **settings})
