"""Cross-entropy sums: by hand, in chunks, under masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config.schema import ModelConfig
from neo.models.decoder import Decoder
from neo.train import loss as loss_module
from neo.train.loss import RowSums, chunk_length, row_sums, token_sums

MODEL = ModelConfig(vocab_size=31, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=16)
NAMES = ("loss", "z", "correct", "tokens")


def batch_of(seed=0, rows=3, length=12):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, MODEL.vocab_size, (rows, length + 1))
    mask = (rng.random((rows, length)) < 0.6).astype(np.float32)
    mask[0], mask[1] = 0, 1                        # a row that counts nothing, and one that counts everything
    return {k: jnp.asarray(v) for k, v in dict(
        inputs=text[:, :-1].astype(np.int32), targets=text[:, 1:].astype(np.int32), loss_mask=mask,
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)), segment_ids=np.ones((rows, length), np.int32)).items()}


def test_token_sums_by_hand():
    rng = np.random.default_rng(0)
    logits, targets, mask = rng.normal(size=(2, 5, 7)) * 3, rng.integers(0, 7, (2, 5)), rng.integers(0, 2, (2, 5))
    ours = token_sums(jnp.asarray(logits, jnp.float32), jnp.asarray(targets), jnp.asarray(mask, jnp.float32))
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(ours.loss, ((log_z - picked) * mask).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(ours.z, (log_z**2 * mask).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(ours.correct, ((logits.argmax(-1) == targets) * mask).sum(-1))
    np.testing.assert_array_equal(ours.tokens, mask.sum(-1))


def test_large_logits_do_not_overflow():
    logits = jnp.asarray([[[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]]])
    ours = token_sums(logits, jnp.asarray([[1, 2]]), jnp.ones((1, 2)))
    np.testing.assert_allclose(ours.loss, [1e4 + np.log(3)], rtol=1e-6)


@pytest.mark.parametrize("seq_len,vocab", [(8192, 64256), (2048, 32000), (12, 31), (7, 1 << 27), (6144, 64256)])
def test_chunks_divide_the_sequence_and_fit(seq_len, vocab):
    length = chunk_length(seq_len, vocab)
    assert seq_len % length == 0 and (length * vocab <= loss_module.MAX_LOGITS or length == 1)
    longer = [c for c in range(length + 1, seq_len + 1) if seq_len % c == 0]
    assert not longer or longer[0] * vocab > loss_module.MAX_LOGITS


def sums_and_grads(decoder, params, batch):
    def objective(params):
        rows = row_sums(decoder, params, batch)
        return jnp.sum(rows.loss + 0.1 * rows.z), rows
    return jax.jit(jax.grad(objective, has_aux=True))(params)


@pytest.mark.parametrize("chunk,tied", [(4, False), (1, True)])
def test_chunked_equals_whole_under_uneven_masks(monkeypatch, chunk, tied):
    import dataclasses
    decoder = Decoder(dataclasses.replace(MODEL, tied_embeddings=tied), attention="dense")
    params, batch = decoder.init(jax.random.key(0), 0.2), batch_of()
    grads, rows = sums_and_grads(decoder, params, batch)
    monkeypatch.setattr(loss_module, "MAX_LOGITS", chunk * MODEL.vocab_size)
    assert chunk_length(12, MODEL.vocab_size) == chunk
    chunked_grads, chunked = sums_and_grads(decoder, params, batch)
    for name in NAMES:
        # Sums of 12 terms in another order.
        np.testing.assert_allclose(getattr(rows, name), getattr(chunked, name), rtol=2e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(chunked_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()))
    assert isinstance(rows, RowSums) and rows.tokens.tolist()[:2] == [0, 12]
    assert float(rows.loss[0]) == 0


def test_masked_targets_do_not_matter():
    decoder = Decoder(MODEL, attention="dense")
    params, batch = decoder.init(jax.random.key(0), 0.2), batch_of()
    other = {**batch, "targets": jnp.where(batch["loss_mask"] > 0, batch["targets"], 0)}
    run = jax.jit(lambda b: row_sums(decoder, params, b))
    np.testing.assert_array_equal(run(batch).loss, run(other).loss)
