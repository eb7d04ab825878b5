"""Training with sequences split over `mesh.context`: the losses of one device, and nothing gathered on the way."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config import load
from neo.config.checks import check_on_mesh
from neo.config.schema import Config, MeshConfig, ModelConfig, OptimizerConfig, PhaseConfig
from neo.errors import InputError
from neo.infer.model import Model
from neo.models.cache import KVCache
from neo.models.decoder import Decoder
from neo.parallel.mesh import AXES, make_mesh
from neo.parallel.rules import Layout, rules_for
from neo.train import loss as loss_module
from neo.train import memory
from neo.train.optimizer import Optimizer
from neo.train.step import StepOptions, abstract_batch, abstract_state, init_state, make_step, state_shardings

pytestmark = pytest.mark.usefixtures("shared_compile_cache")

# A layer with a window and ALiBi, one with all earlier tokens and rotations by position: a halo and a ring.
MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, windows=(6, 0),
                    positions=("alibi", "rope"), attention_sinks=True, max_seq_len=32)
ROWS, LENGTH, STEPS = 8, 32, 2
# As between other meshes (test_sharding.py): sums over devices go in another order.
FIRST, LATER = dict(rtol=2e-6), dict(rtol=2e-4, atol=2e-6)


def batches():
    """Packed documents whose ends stand anywhere in the shards, positions that start again, masked tokens."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        text = rng.integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
        starts = np.concatenate([np.ones((ROWS, 1), bool), rng.random((ROWS, LENGTH - 1)) < 0.1], axis=1)
        at = np.arange(LENGTH)
        positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
        mask = rng.random((ROWS, LENGTH)) >= at / (2 * LENGTH)   # other sums on each shard
        yield dict(inputs=text[:, :-1], targets=text[:, 1:], loss_mask=mask.astype(np.float32),
                   segment_ids=np.cumsum(starts, axis=1).astype(np.int32), positions=positions.astype(np.int32),
                   source=np.arange(ROWS, dtype=np.int32) % 2)


def parts(mesh: dict | None, remat: str = "none", model: ModelConfig = MODEL, attention: str = "blockwise"):
    layout = Layout()
    if mesh is not None:
        config = MeshConfig(**{"fsdp": 1, **mesh})
        devices = jax.devices()[:int(np.prod(list(mesh.values())))]
        layout = Layout(make_mesh(config, devices), rules_for(model.num_kv_heads, config.tensor))
    decoder = Decoder(model, jnp.float32, remat, attention, layout)
    return decoder, Optimizer(OptimizerConfig(), decoder.axes())


def placed(decoder: Decoder, batch: dict):
    if decoder.layout.mesh is None:
        return batch
    return {k: jax.device_put(v, decoder.layout.sharding(*("batch", "sequence")[:v.ndim])) for k, v in batch.items()}


@functools.cache
def start():
    """The state of step 0, on the host: drawing it anew on each mesh is tested elsewhere (test_sharding.py)."""
    return jax.tree.map(np.asarray, init_state(*parts(None), 0, 0.1))


def curve(mesh: dict | None, accumulation: int = 1, remat: str = "none"):
    """[loss, gradient norm, norm of the parameters, each source's loss] of each step."""
    decoder, optimizer = parts(mesh, remat)
    state = start() if mesh is None else jax.device_put(start(), state_shardings(decoder, optimizer))
    step = make_step(decoder, optimizer, StepOptions(2, accumulation, 1.0, 1e-3))
    records = []
    for batch in batches():
        state, metrics = step(state, placed(decoder, batch), jnp.float32(3e-3), jnp.float32(0.1))
        records.append(np.concatenate([np.ravel(metrics[name]) for name in ("loss", "grad_norm", "param_norm", "source_loss")]))
    return np.array(records)


@pytest.fixture(scope="module")
def alone():
    return curve(None)


@pytest.mark.parametrize(("mesh", "accumulation", "remat", "logits"), [
    (dict(context=8), 2, "minimal", None),
    (dict(replica=2, context=4), 1, "full", 2),                 # logits of two tokens a device at a time
    (dict(fsdp=2, context=2, tensor=2), 2, "attention", 4),
], ids=str)
def test_losses_and_gradients_equal_one_device(alone, monkeypatch, mesh, accumulation, remat, logits):
    if logits:
        monkeypatch.setattr(loss_module, "MAX_LOGITS", logits * MODEL.vocab_size)
    ours = curve(mesh, accumulation, remat)
    np.testing.assert_allclose(ours[0], alone[0], **FIRST)
    np.testing.assert_allclose(ours, alone, **LATER)


def test_a_run_on_real_text(tiny, store, tmp_path, monkeypatch):
    """The command on a real store: packing, evaluation, checkpoint."""
    from neo.parallel import distributed
    from neo.train.runner import run
    fields = {"data.store": str(store), "train.steps": 7, "phases.long.global_batch": 8, "eval.tokens": 600}
    many = run(load(tiny, {**fields, "mesh.fsdp": 2, "mesh.context": 4}), tmp_path / "many")
    monkeypatch.setattr(distributed, "devices", lambda: jax.devices()[:1])
    one = run(load(tiny, fields), tmp_path / "one")
    for name in ("train/loss", "eval/loss", "eval/loss/a"):
        ours, wanted = ([record[name] for record in each.records() if name in record] for each in (many, one))
        assert len(ours) == len(wanted) >= 2
        np.testing.assert_allclose(ours, wanted, **LATER, err_msg=name)


# -- what moves ----------------------------------------------------------------------------------------------------------


WIDE = ModelConfig(vocab_size=1280, num_layers=4, d_model=256, num_heads=4, num_kv_heads=4, d_ff=1024, windows=(64, 0),
                   max_seq_len=1024)
WIDE_ROWS, WIDE_LENGTH, HEAD = 2, 1024, (256, 1, 1280)


@pytest.fixture(scope="module")
def compiled():
    """(the decoder, a compiled step) on context=8; the loss takes 16 of a device's 128 tokens at a time."""
    decoder, optimizer = parts(dict(context=8), "minimal", WIDE)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "MAX_LOGITS", 16 * WIDE.vocab_size)
        yield decoder, make_step(decoder, optimizer, StepOptions(2)).lower(
            abstract_state(decoder, optimizer), abstract_batch(decoder, WIDE_ROWS, WIDE_LENGTH), rate, rate).compile()


def shapes(hlo: str, operation: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, shape) of all results of a collective."""
    lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", hlo)
    found = [pair for line in lines for pair in re.findall(r"(\w+)\[([\d,]*)\]", line)]
    return [(kind, tuple(map(int, dims.split(","))) if dims else ()) for kind, dims in found]


def test_activations_stay_where_they_are(compiled):
    """On context=8 alone nothing is gathered: parameters are whole, tokens stay, keys move from neighbour to neighbour."""
    hlo = compiled[1].as_text()
    for name in ("all-gather", "reduce-scatter", "all-to-all"):
        assert not [shape for kind, shape in shapes(hlo, name) if kind.startswith("f")], name
    # Of a shard's 128 tokens at most: keys [B, tokens, K, h], half of the queries, lse and delta [B, H, tokens].
    local = WIDE_ROWS * WIDE_LENGTH // 8 * 256
    moved = shapes(hlo, "collective-permute")
    assert moved and all(shape[0] == WIDE_ROWS and np.prod(shape) <= local for _, shape in moved)
    reduced = [shape for _, shape in shapes(hlo, "all-reduce")]
    # Sums over devices: of gradients, which have the shapes of parameters (the head's, of its columns in one part), and of
    # one number a sequence.
    parameters = {leaf.shape for leaf in jax.tree.leaves(compiled[0].abstract_params())}
    gradients = parameters | {shape[1:] for shape in parameters} | {HEAD}
    assert {shape for shape in reduced if np.prod(shape) > WIDE_ROWS} <= gradients


def test_the_head_is_summed_over_devices_once(compiled):
    """And not in every turn of the loop over the tokens of a device."""
    bodies = [(body, shapes(body, "all-reduce")) for body in compiled[1].as_text().split("\n\n")]
    found = ["ENTRY" in body for body, reduced in bodies for _, shape in reduced if shape == HEAD]
    assert found == [True]


def test_memory_estimate(compiled):
    """As near as on other meshes (test_train_mesh.py)."""
    decoder, step = compiled
    phase = PhaseConfig(seq_len=WIDE_LENGTH, global_batch=WIDE_ROWS, tokens=1, mixture={"a": 1.0})
    sizes = {**dict.fromkeys(AXES, 1), "context": 8}
    estimate = memory.estimate(decoder, phase, sizes, WIDE_ROWS)
    usage = step.memory_analysis()
    counted = usage.argument_size_in_bytes + usage.temp_size_in_bytes
    assert 0.6 < estimate.total / counted < 1.6, f"{estimate.text()}, the compiler counts {counted / 1e9:.3f} GB"
    whole = memory.estimate(decoder, phase, {**sizes, "context": 1}, WIDE_ROWS)
    assert estimate.activations < whole.activations / 6 and estimate.params == whole.params


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("windows", "seq_len", "context", "words"), [
    ((8,), 36, 8, ("phases.main.seq_len=36", "mesh.context=8", "a multiple of 8", "32 or 40")),
    ((8, 0), 40, 8, ("phases.main.seq_len=40", "mesh.context=8", "a multiple of 16", "layers without a window", "32 or 48")),
    ((40,), 40, 8, ("phases.main.seq_len=40", "a multiple of 16")),      # this window hides nothing
    ((0,), 64, 64, ("phases.main.seq_len=64", "a multiple of 128", "use a smaller mesh.context")),
    ((8,), 40, 8, ()), ((0,), 48, 8, ()),
])  # fmt: skip
def test_what_cannot_be_split_is_named(windows, seq_len, context, words):
    model = dataclasses.replace(MODEL, windows=windows, positions=("rope",), max_seq_len=64)
    phase = PhaseConfig(tokens=1, seq_len=seq_len, global_batch=ROWS, mixture={"a": 1.0})
    config, sizes = Config(model=model, phases=(phase,)), {**dict.fromkeys(AXES, 1), "context": context}
    if not words:
        check_on_mesh(config, sizes)
        return
    with pytest.raises(InputError) as error:
        check_on_mesh(config, sizes)
    assert [word for word in words if word not in str(error.value)] == [] and "\n" not in str(error.value)


REFUSED = {
    "length": (dict(mesh__context=8, mesh__fsdp=1, phases__short__seq_len=40), ["phases.short.seq_len=40", "32 or 48"]),
    "dense": (dict(mesh__context=2, train__attention="dense"), ["'dense' lacks a sequence split 2 ways", "mesh axis context"]),
    "devices": (dict(mesh__context=3), ["context=3", "multiple of 3 devices", "has 8"]),
    "zero": (dict(mesh__context=0), ["config.mesh.context=0"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_refuses_in_one_line(tiny, capfd, tmp_path, name):
    from neo.cli import invoke
    from neo.train.__main__ import COMMAND, run
    fields, words = REFUSED[name]
    argv = [f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.data.synthetic=True"]
    fields = {"phases__long__global_batch": 8, **fields}
    argv += [f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()]
    assert invoke(COMMAND, run, argv) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("neo.train: error: ")
    assert [word for word in words if word not in last] == []


# -- inference -----------------------------------------------------------------------------------------------------------


def test_decoding_and_logits_on_such_a_mesh():
    """Decoding repeats its work on the devices of `context`; `logits` splits the sequence, of any length."""
    one, _ = parts(None)
    many, _ = parts(dict(fsdp=2, context=2, tensor=2), attention="auto")
    params = start()["params"]
    split = jax.device_put(params, many.layout.shardings(many.axes()))
    tokens = (np.arange(4 * 29).reshape(4, 29) % MODEL.vocab_size).astype(np.int32)
    wanted = jax.jit(one.apply)(params, tokens)
    config = Config(model=dataclasses.replace(MODEL, max_seq_len=30), phases=())
    np.testing.assert_allclose(Model(None, config, many, split, 0.0).logits(tokens), wanted, atol=1e-5)
    decode, cache = jax.jit(many.decode), KVCache.empty(MODEL, 4, 32)
    for part in (tokens[:, :13], tokens[:, 13:14]):
        logits, cache = decode(split, part, cache)
    np.testing.assert_allclose(logits, wanted[:, 13:14], atol=1e-5)
