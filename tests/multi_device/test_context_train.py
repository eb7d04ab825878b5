"""Training with sequences split over `mesh.context`: the losses of one device, and nothing gathered on the way."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config import load
from neo.config.checks import check_on_mesh
from neo.config.schema import Config, MeshConfig, ModelConfig, OptimizerConfig, PhaseConfig
from neo.errors import InputError
from neo.infer.generate import generate
from neo.infer.model import Model
from neo.models.decoder import Decoder
from neo.parallel.mesh import AXES, make_mesh
from neo.parallel.rules import Layout, rules_for
from neo.train import loss as loss_module
from neo.train import memory
from neo.train.optimizer import Optimizer
from neo.train.step import StepOptions, abstract_batch, abstract_state, init_state, make_eval_step, make_step

# A layer with a window, one with all earlier tokens; ALiBi on the second, so that positions and shards both matter.
MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, windows=(6, 0),
                    positions=("rope", "alibi"), attention_sinks=True, max_seq_len=32)
ROWS, LENGTH, STEPS = 8, 32, 3
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


def curve(mesh: dict | None, accumulation: int = 1, remat: str = "none"):
    """[loss, gradient norm, norm of the parameters, each source's loss] of each step, and the last evaluation."""
    decoder, optimizer = parts(mesh, remat)
    state = init_state(decoder, optimizer, 0, 0.1)
    step = make_step(decoder, optimizer, StepOptions(2, accumulation, 1.0, 1e-3))
    records = []
    for batch in batches():
        state, metrics = step(state, placed(decoder, batch), jnp.float32(3e-3), jnp.float32(0.1))
        records.append(np.concatenate([np.ravel(metrics[name]) for name in ("loss", "grad_norm", "param_norm", "source_loss")]))
    return np.array(records), np.asarray(make_eval_step(decoder)(state["params"], placed(decoder, batch)))


@pytest.fixture(scope="module")
def alone():
    return curve(None)


@pytest.mark.parametrize(("mesh", "accumulation", "remat", "logits"), [
    (dict(context=2), 1, "none", None),
    (dict(context=8), 2, "minimal", None),
    (dict(context=4, tensor=2), 1, "full", 2),                 # logits of two tokens a device at a time
    (dict(fsdp=2, context=2, tensor=2), 2, "attention", 4),
    (dict(replica=2, fsdp=2, context=2), 1, "minimal", 1),
], ids=str)
def test_losses_gradients_and_evaluation_equal_one_device(alone, monkeypatch, mesh, accumulation, remat, logits):
    if logits:
        monkeypatch.setattr(loss_module, "MAX_LOGITS", logits * MODEL.vocab_size)
    (ours, evaluated), (one, expected) = curve(mesh, accumulation, remat), alone
    np.testing.assert_allclose(ours[0], one[0], **FIRST)
    np.testing.assert_allclose(ours, one, **LATER)
    np.testing.assert_allclose(evaluated, expected, **LATER)


def test_a_run_from_text_to_samples(tiny, store, tmp_path, monkeypatch):
    """Two phases of the command on a real store: packing, evaluation, samples, checkpoint; then on with one device."""
    from neo.parallel import distributed
    from neo.train.runner import run
    fields = {"data.store": str(store), "train.steps": 10, "phases.long.global_batch": 8, "eval.tokens": 600,
              "eval.sample_every_steps": 10, "eval.sample_prompts": ["the quick"], "eval.sample_tokens": 4}
    many = run(load(tiny, {**fields, "mesh.fsdp": 2, "mesh.context": 4}), tmp_path / "many")
    monkeypatch.setattr(distributed, "devices", lambda: jax.devices()[:1])
    one = run(load(tiny, fields), tmp_path / "one")
    for name in ("train/loss", "eval/loss", "eval/loss/a"):
        ours, wanted = ([record[name] for record in each.records() if name in record] for each in (many, one))
        assert len(ours) == len(wanted) >= 2
        np.testing.assert_allclose(ours, wanted, **LATER, err_msg=name)
    assert (tmp_path / "many" / "samples.jsonl").read_text().count("the quick") == 1
    more = run(load(tiny, {**fields, "train.steps": 11}), tmp_path / "many")
    assert more.events()[-3]["event"] == "resume" and more.events()[-3]["step"] == 10


# -- what moves ----------------------------------------------------------------------------------------------------------


def compiled_step(mesh: dict, model: ModelConfig, rows: int, length: int, remat: str = "minimal"):
    decoder, optimizer = parts(mesh, remat, model)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    state = abstract_state(decoder, optimizer)
    return make_step(decoder, optimizer, StepOptions(2)).lower(
        state, abstract_batch(decoder, rows, length), rate, rate).compile()


def test_activations_stay_where_they_are(monkeypatch):
    """On context=8 alone nothing is gathered: parameters are whole, tokens stay, keys move from neighbour to neighbour.
    Sums over devices are gradients and sums of the loss; one for each gradient and not one for each chunk of the loss."""
    monkeypatch.setattr(loss_module, "MAX_LOGITS", MODEL.vocab_size)
    hlo = compiled_step(dict(context=8), MODEL, ROWS, LENGTH).as_text()
    for name in ("all-gather", "all-to-all", "reduce-scatter"):
        assert not re.search(rf" {name}(-start)?\(", hlo), name
    permuted = re.findall(r"= \(?(\w+\[[\d,]*\]).* collective-permute(?:-start)?\(", hlo)
    sizes = {tuple(map(int, shape.split("[")[1][:-1].split(","))) for shape in permuted}
    # [B, tokens, heads, h] of at most a shard, [B, H, tokens] of lse and delta, [B, tokens] of segments
    assert sizes and all(shape[0] == ROWS and np.prod(shape[1:]) <= LENGTH // 8 * 4 * 8 for shape in sizes)
    inside = [body for body in hlo.split("\n\n") if " all-reduce(" in body and "ENTRY" not in body]
    table = f"f32[{MODEL.d_model},{MODEL.vocab_size}]"
    assert not [body for body in inside if re.search(rf"= {re.escape(table)}\S* all-reduce\(", body)]


@pytest.mark.parametrize(("mesh", "remat"), [(dict(context=4, fsdp=2), "minimal"), (dict(context=4, tensor=2), "full")])
def test_memory_estimate(mesh, remat):
    """As near as on other meshes (test_train_mesh.py)."""
    model = ModelConfig(vocab_size=1024, num_layers=4, d_model=256, num_heads=4, num_kv_heads=4, d_ff=1024, windows=(64, 0))
    sizes = {**dict.fromkeys(AXES, 1), **mesh}
    rows, length = 2 * mesh.get("fsdp", 1), 1024
    phase = PhaseConfig(seq_len=length, global_batch=rows, tokens=1, mixture={"a": 1.0})
    decoder, _ = parts(mesh, remat, model)
    estimate = memory.estimate(decoder, phase, sizes, 2)
    usage = compiled_step(mesh, model, rows, length, remat).memory_analysis()
    counted = usage.argument_size_in_bytes + usage.temp_size_in_bytes
    assert 0.6 < estimate.total / counted < 1.6, f"{estimate.text()}, the compiler counts {counted / 1e9:.3f} GB"
    whole = memory.estimate(decoder, phase, {**sizes, "context": 1}, 2)
    assert estimate.activations < whole.activations / 3 and estimate.params == whole.params


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


def test_generation_and_logits_on_such_a_mesh():
    """Decoding repeats its work on the devices of `context`; `logits` splits the sequence, of any length."""
    prompts, settings = [[5, 6, 7], [9]], dict(max_new_tokens=6, eod_id=None, temperature=1.0, seed=1)
    one, _ = parts(None)
    params = jax.jit(lambda: one.init(jax.random.key(0), 0.2))()
    many, _ = parts(dict(fsdp=2, context=2, tensor=2), attention="auto")
    split = jax.device_put(params, many.layout.shardings(many.axes()))
    assert generate(many, split, prompts, **settings) == generate(one, params, prompts, **settings)
    config = Config(model=dataclasses.replace(MODEL, max_seq_len=30), phases=())
    tokens = np.arange(3 * 29).reshape(3, 29) % MODEL.vocab_size
    got, wanted = (Model(None, config, decoder, arrays, 0.0).logits(tokens)
                   for decoder, arrays in ((many, split), (one, params)))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
