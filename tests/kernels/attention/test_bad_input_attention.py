"""What `attention` refuses: one line that names the argument, its value and what would be right."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from neo.errors import InputError
from neo.kernels.attention import Mask, attention, resolve
from neo.kernels.attention.kernel import Request

SHAPES = {"q": (2, 8, 4, 64), "k": (2, 8, 2, 64), "v": (2, 8, 2, 64)}


def refused(match: tuple[str, ...], **changes) -> None:
    """The call with these changes is an InputError that holds every word of `match`, in one line."""
    arguments = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in SHAPES.items()} | {"mask": Mask()} | changes
    with pytest.raises(InputError) as error:
        attention(**arguments)
    text = str(error.value)
    assert "\n" not in text and error.value.exit_code == 2
    assert all(word in text for word in match), text


def ones(*shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.ones(shape, dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (2, 4), (1, 2)])
def test_heads_that_do_not_divide(heads, kv_heads):
    k = ones(2, 8, kv_heads, 64)
    refused((f"{heads} query heads", f"{kv_heads} key/value heads", "multiple"), q=ones(2, 8, heads, 64), k=k, v=k)


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "8"])
def test_windows_of_no_keys(window):
    with pytest.raises(InputError, match="window") as error:
        Mask(window=window)
    assert repr(window) in str(error.value) and "1 or more" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"segment_ids": ones(2, 9, dtype=jnp.int32)}, ("segment_ids", "(2, 9)", "(2, 8) would be right")),
        ({"segment_ids": ones(8, dtype=jnp.int32)}, ("segment_ids", "(8,)", "(2, 8) would be right")),
        ({"segment_ids": ones(2, 8, dtype=jnp.int32), "kv_segment_ids": ones(2, 7, dtype=jnp.int32)},
         ("kv_segment_ids", "(2, 7)", "(2, 8) would be right")),
        ({"kv_segment_ids": ones(2, 8, dtype=jnp.int32)}, ("kv_segment_ids", "without segment_ids")),
        ({"segment_ids": ones(2, 8)}, ("segment_ids", "bfloat16", "integer")),
        ({"segment_ids": ones(2, 8, dtype=jnp.bool_)}, ("segment_ids", "bool", "integer")),
    ],
)  # fmt: skip
def test_segments_of_another_shape_or_type(changes, match):
    refused(match, **changes)


@pytest.mark.parametrize("shape", [(2,), (4, 1), (), (1, 4), (5,)])
def test_sinks_are_one_a_query_head(shape):
    refused(("sinks", str(shape), "(4,) would be right"), sinks=jnp.ones(shape))


def test_sinks_are_numbers():
    refused(("sinks", "int32", "floating"), sinks=jnp.ones(4, jnp.int32))


ASKED = {
    "pallas_tpu": Request("tpu", "bfloat16", 512, 4, 2, 64, device_kind="TPU v5p"),
    "pallas_gpu": Request("gpu", "bfloat16", 512, 4, 2, 64, device_kind="NVIDIA H200"),
    "blockwise": Request("cpu", "float32", 512, 4, 2, 64),
}


@pytest.mark.parametrize(("name", "changes", "match"), [
    *((name, changes, match) for name in ("pallas_tpu", "pallas_gpu") for changes, match in (
        ({"head_size": 72}, ("head size 72", "64", "128", "192")),
        ({"head_size": 512}, ("head size 512", "256")),
        ({"dtype": "float16"}, ("float16", "bfloat16")),
        ({"platform": "cpu", "device_kind": "cpu"}, ("cpu",)),
    )),
    ("pallas_gpu", {"dtype": "float32"}, ("float32", "bfloat16")),
    ("pallas_gpu", {"device_kind": "NVIDIA A100-SXM4-80GB"}, ("NVIDIA A100-SXM4-80GB", "H100")),
    *((name, changes, match) for name in ASKED for changes, match in (
        ({"kv_len": 520}, ("520 keys for 512 queries", "dense")),
        ({"q_offset": True}, ("q_offset", "dense")),
        ({"causal": False, "alibi": True}, ("alibi_slopes", "causal=False", "dense")),
    )),
])  # fmt: skip
def test_what_an_implementation_lacks(name, changes, match):
    request = ASKED[name]
    assert resolve(name, request)[0] == name
    with pytest.raises(InputError) as error:
        resolve(name, dataclasses.replace(request, **changes))
    text = str(error.value)
    assert text.startswith(f"attention '{name}' lacks ") and "\n" not in text
    assert all(word in text for word in match), text


def test_the_entry_point_says_it_too():
    refused(("'pallas_tpu' lacks", "cpu"), implementation="pallas_tpu")
    q, k = (jnp.ones((2, 8, n, 72)) for n in (4, 2))
    refused(("'pallas_tpu' lacks head size 72",), q=q, k=k, v=k, implementation="pallas_tpu", interpret=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k": ones(2, 8, 2, 32), "v": ones(2, 8, 2, 32)}, ("(2, 8, 4, 64)", "(2, 8, 2, 32)", "head size")),
        ({"k": ones(3, 8, 2, 64), "v": ones(3, 8, 2, 64)}, ("(3, 8, 2, 64)", "batch")),
        ({"v": ones(2, 8, 4, 64)}, ("(2, 8, 2, 64)", "(2, 8, 4, 64)", "one shape")),
        ({"q": ones(2, 8, 64)}, ("(2, 8, 64)", "4 dimensions")),
        ({"k": ones(2, 0, 2, 64), "v": ones(2, 0, 2, 64)}, ("at least one", "(2, 0, 2, 64)")),
        ({"k": ones(2, 8, 2, 64, dtype=jnp.float32)}, ("bfloat16", "float32", "one floating type")),
        ({"q": ones(2, 8, 4, 64, dtype=jnp.int32), "k": ones(2, 8, 2, 64, dtype=jnp.int32),
          "v": ones(2, 8, 2, 64, dtype=jnp.int32)}, ("int32", "floating")),
        ({"alibi_slopes": jnp.ones(3)}, ("alibi_slopes", "(3,)", "(4,) would be right")),
        ({"q_offset": jnp.zeros(3, jnp.int32)}, ("q_offset", "(3,)", "(2,) would be right")),
        ({"softcap": 0.0}, ("softcap", "0.0", "above 0")),
        ({"softcap": float("nan")}, ("softcap", "nan", "above 0")),
        ({"scale": float("nan")}, ("scale", "nan")),
        ({"scale": "1"}, ("scale", "'1'")),
        ({"mask": 128}, ("mask", "128", "Mask")),
        ({"implementation": "palas_tpu"}, ("'palas_tpu'", "did you mean 'pallas_tpu'", "known: auto, dense")),
    ],
)  # fmt: skip
def test_other_impossible_arguments(changes, match):
    refused(match, **changes)


def test_gradients_without_a_cotangent_are_zero():
    """An output that nothing uses has a cotangent of zeros (JAX makes it), never None: the gradients are 0."""
    q, k = (jnp.ones((2, 8, n, 64)) for n in (4, 2))

    def loss(q, k, v, sinks):
        attention(q, k, v, mask=Mask(), sinks=sinks, implementation="blockwise", return_lse=True)
        return jnp.zeros(())

    gradients = jax.grad(loss, (0, 1, 2, 3))(q, k, k, jnp.ones(4))
    assert not any(x.any() for x in gradients)
