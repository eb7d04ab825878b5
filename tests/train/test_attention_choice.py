"""Which attention a run takes, and what happens where the kernel computes something else than the plain form."""

from __future__ import annotations

import dataclasses

import pytest

from neo.config import load
from neo.errors import InputError
from neo.train import attention_choice
from neo.train.attention_choice import checked, choose, requests

ONE = {"replica": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


def recipe(tiny, **changes):
    return load(str(tiny), changes)


def test_one_request_for_each_kind_of_layer(tiny):
    config = recipe(tiny, **{"model.windows": (8, 0), "model.num_layers": 4, "model.positions": ("rope", "alibi"),
                             "model.attention_softcap": 30.0, "model.attention_sinks": True})
    asked = requests(config, "bfloat16", {**ONE, "tensor": 2, "context": 2}, "tpu", "TPU v5")
    assert [(one.window, one.alibi) for one in asked] == [(8, False), (None, True)]
    for one in asked:
        assert (one.platform, one.device_kind, one.dtype, one.sequence_shards) == ("tpu", "TPU v5", "bfloat16", 2)
        assert one.num_heads == config.model.num_heads // 2 and one.head_size == config.model.head_size
        assert one.softcap and one.sinks and one.segments == (not config.data.cross_document_attention)
        assert one.seq_len == max(phase.seq_len for phase in config.phases)


def test_what_one_layer_lacks_decides_for_all(tiny, monkeypatch):
    config = recipe(tiny)
    asked = requests(recipe(tiny, **{"model.windows": (8, 0)}), "bfloat16", ONE, "tpu")
    assert len(asked) == 2
    answers = {8: ("pallas_tpu", "fits"), None: ("blockwise", "lacks it")}
    monkeypatch.setattr(attention_choice, "resolve", lambda name, request: answers[request.window])
    assert choose(config, asked) == ("blockwise", "lacks it")
    assert choose(config, asked[:1]) == ("pallas_tpu", "fits")


def test_a_named_one_that_lacks_something_is_refused(tiny):
    config = recipe(tiny, **{"train.attention": "dense"})
    with pytest.raises(InputError, match="'dense' lacks a sequence split 2 ways"):
        choose(config, requests(config, "float32", {**ONE, "context": 2}, "cpu"))


def test_a_kernel_that_is_wrong_on_the_device_is_not_used(tiny):
    config = recipe(tiny)
    asked = requests(config, "bfloat16", ONE, "gpu", "NVIDIA H200")
    right, wrong = (lambda kernel, request: ""), (lambda kernel, request: "out is off by 3")
    name, why = checked(config, ("blockwise", "because"), asked, wrong)
    assert (name, why) == ("blockwise", "because")   # the plain form is what the others are held against
    name, why = checked(config, ("cudnn", "because"), asked, right)
    assert name == "cudnn" and "agrees with blockwise" in why
    name, why = checked(config, ("cudnn", "because"), asked, wrong)
    assert name == "blockwise" and "cudnn differs from blockwise on NVIDIA H200: out is off by 3" in why
    named = recipe(tiny, **{"train.attention": "cudnn"})
    refusal = "config.train.attention=cudnn: .* out is off by 3; --config.train.attention=blockwise"
    with pytest.raises(InputError, match=refusal):
        checked(named, ("cudnn", "asked for by name"), asked, wrong)
    off = recipe(tiny, **{"train.check_attention": False})
    assert checked(off, ("cudnn", "because"), asked, wrong) == ("cudnn", "because")


def test_the_check_runs_the_kernel_itself(tiny):
    """Not only its stand-ins above: a kernel that fails to run is found out, and nothing is raised."""
    config = recipe(tiny)
    asked = [dataclasses.replace(one, seq_len=32) for one in requests(config, "float32", ONE, "cpu", "cpu")]
    name, why = checked(config, ("cudnn", "because"), asked)
    assert name == "blockwise" and "does not run" in why
