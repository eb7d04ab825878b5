"""Runs that start from a Hugging Face folder: what they read, compute first, and refuse."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

import neo
from neo.data.loader import TrainData, open_sources
from neo.data.tokenizer import Tokenizer
from neo.data.tokenizer_training import train as train_tokenizer
from neo.models.decoder import Decoder
from neo.parallel.mesh import make_mesh
from neo.parallel.rules import Layout
from neo.train import Run, initial
from neo.train.checkpoints import flatten
from neo.train.initial_vocabulary import rows_of
from neo.train.progress import Log

torch = pytest.importorskip("torch")

# Attention over the whole window and no first token left out of the loss: what transformers computes on a batch.
PLAIN = dict(model__windows="0", data__cross_document_attention=True, train__steps=1, eval__tokens=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory, save_hf_model, store):
    """(folder with the data's tokenizer, the transformers model that was saved there in bfloat16)."""
    folder = tmp_path_factory.mktemp("hf")
    kind = type(save_hf_model(folder, "Llama", Tokenizer.load(str(store)), num_hidden_layers=2, intermediate_size=64,
                              max_position_embeddings=64, dtype="bfloat16"))
    return folder, kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def config(tiny, store, source):
    overrides = {name.replace("__", "."): value for name, value in PLAIN.items()}
    return neo.config.load(tiny, {**overrides, "data.store": str(store), "init.from_hf": str(source[0])})


def test_first_loss_is_that_of_transformers(source, config, command, tmp_path):
    ended = command(tmp_path / "run", **PLAIN, init__from_hf=source[0])
    assert ended.code == 0, ended.err
    rows = [TrainData(config, open_sources(config)).row(i) for i in range(8)]
    inputs, targets, mask = (np.stack([row[name] for row in rows]) for name in ("inputs", "targets", "loss_mask"))
    with torch.no_grad():
        logits = source[1](torch.tensor(inputs).long(), use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, torch.tensor(targets).long(), reduction="none").numpy()
    first = Run(tmp_path / "run").records()[0]
    assert first["step"] == 1 and first["train/loss"] == pytest.approx((losses * mask).sum() / mask.sum(), abs=2e-5)
    size = sum(p.numel() for p in source[1].parameters()) * 2
    assert f"starting from {source[0]} (Hugging Face model, LlamaForCausalLM)" in ended.err
    assert f"GB read from {source[0]} in" in ended.err
    start = next(event for event in Run(tmp_path / "run").events() if event["event"] == "start")
    assert start["init"]["from"] == str(source[0]) and start["init"]["bytes"] == size
    # Blocks that add nothing: the same loss, from twice the depth.
    deeper = command(tmp_path / "deep", **PLAIN, init__from_hf=source[0], model__num_layers=4, init__depth="interleave",
                     init__new_blocks="identity")
    assert deeper.code == 0 and "2 added blocks (identity) at 1, 3, copies of 0, 1" in deeper.err
    assert Run(tmp_path / "deep").records()[0]["train/loss"] == pytest.approx(first["train/loss"], abs=1e-6)
    # The run's own checkpoint comes first: the folder is not read again.
    resumed = command(tmp_path / "run", **{**PLAIN, "train__steps": 2}, init__from_hf=source[0])
    assert resumed.code == 0 and "resuming from" in resumed.err and "starting from" not in resumed.err


def read(config, tokenizer, lines=None):
    """Parameters as a start with this config reads them, by path."""
    decoder = Decoder(config.model, layout=Layout(make_mesh(config.mesh)))
    log = types.SimpleNamespace(stage=Log(quiet=True).stage)
    params, facts = initial.parameters(config, decoder, tokenizer, Recorder(log, lines if lines is not None else []))
    return flatten(params), facts


class Recorder:
    """A log that keeps its lines."""

    def __init__(self, log, lines):
        self.stage, self._lines = log.stage, lines

    def __call__(self, text):
        self._lines.append(text)


def test_a_folder_is_a_checkpoint_too(config, source):
    """init.checkpoint takes whatever CHECKPOINT is elsewhere."""
    init = dataclasses.replace(config.init, from_hf="", checkpoint=str(source[0]))
    (one, _), (other, _) = read(config, None), read(dataclasses.replace(config, init=init), None)
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path])
        assert array.dtype == np.float32
    state = {name: tensor.numpy() for name, tensor in source[1].state_dict().items()}
    np.testing.assert_array_equal(one["layers/mlp/down"][1], state["model.layers.1.mlp.down_proj.weight"].T)


def test_another_tokenizer_brings_its_own_rows(config, source, store):
    old = Tokenizer.load(str(store))
    new = train_tokenizer(["photosynthesis makes the brown fox green, as rain in spain does\n"] * 40, 290)
    init = dataclasses.replace(config.init, extend_vocab=True)
    wide = dataclasses.replace(config, init=init, model=dataclasses.replace(config.model, vocab_size=296))
    lines = []
    params, facts = read(wide, new, lines)
    rows, table = rows_of(old, new), source[1].get_input_embeddings().weight.detach().numpy()
    assert params["embed/table"].shape == (296, 32) and params["head/kernel"].shape == (32, 296)
    assert any(len(row) > 1 for row in rows)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(params["embed/table"][i], table[list(row)].mean(0), atol=1e-6)
    head = source[1].lm_head.weight.detach().numpy()
    np.testing.assert_allclose(params["head/kernel"][:, 291], head[:old.vocab_size].mean(0), atol=1e-6)
    assert any(line.startswith("vocabulary: 290 ids instead of 300; ") for line in lines), lines
    assert any(change.startswith("vocabulary:") for change in facts["changes"])


def test_texts_that_begin_otherwise_are_told(config, source, store):
    lines = []
    read(config, dataclasses.replace(Tokenizer.load(str(store)), add_bos=True), lines)
    assert any("does not know texts that begin with a token (BOS), the data has one" in line for line in lines), lines


def test_padding_and_its_remark(config, source):
    lines = []
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=328))
    params, _ = read(wide, None, lines)
    np.testing.assert_allclose(params["embed/table"][325], params["embed/table"][:320].mean(0), atol=1e-6)
    assert "8 rows of padding start at the mean of the 320 rows" in lines


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, save_hf_model):
    """A model with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("stranger")
    save_hf_model(folder, "Llama", train_tokenizer(["some other words, and yet others\n"] * 40, 290), num_hidden_layers=2,
                  intermediate_size=64, max_position_embeddings=64)
    return folder


WRONG = {
    "both": (dict(init__checkpoint="{source}"), ["config.init.checkpoint and config.init.from_hf are both given"]),
    "model": (dict(model__d_ff=32, model__norm_eps=1e-6),
              ["is not the model of {source}: d_ff=32 (there 64), norm_eps=1e-06 (there 1e-05)",
               "give --config.model.d_ff=64 --config.model.norm_eps=1e-05"]),
    "layers": (dict(model__num_layers=3), ["--config.model.num_layers=2, or --config.init.depth=interleave"]),
    "fewer": (dict(model__num_layers=1, init__depth="stack"), ["num_layers=1 is fewer than the 2 blocks"]),
    "depth": (dict(init__depth="stack"), ["init.depth=stack adds blocks", "has already"]),
    "scheme": (dict(init__depth="stacked"), ["init.depth='stacked' (did you mean 'stack'?)"]),
    "blocks": (dict(init__new_blocks="identity"), ["init.new_blocks=identity", "none are added"]),
    "nothing": (dict(init__from_hf="", init__extend_vocab=True), ["init.extend_vocab=True changes a model"]),
    "tokenizer": (dict(init__from_hf="{stranger}"), ["the tokenizer of the data has 300 ids, that of {stranger} 290",
                                                     "--config.init.extend_vocab=True"]),
    "no_such": (dict(init__from_hf="./nowhere"), ["'./nowhere' does not exist", "repository id"]),
    "checkpoint": (dict(init__from_hf="{store}"), ["{store} has no checkpoint"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_before_anything_is_written(source, stranger, store, command, tmp_path, name):
    overrides, parts = WRONG[name]
    places = {"source": source[0], "stranger": stranger, "store": store}
    filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in overrides.items()}
    refused = command(tmp_path / "run", **{**PLAIN, "init__from_hf": source[0], **filled})
    assert refused.code == 2
    for part in parts:
        assert part.format(**places) in refused.error
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_checkpoint_of_neo_is_sent_to_the_other_option(tmp_path, monkeypatch):
    monkeypatch.setattr(initial, "resolve", lambda text: types.SimpleNamespace(kind="neo", path=text))
    with pytest.raises(neo.InputError, match=r"is a checkpoint of neo: use --config.init.checkpoint="):
        initial.find(neo.config.schema.InitConfig(from_hf=str(tmp_path)))
