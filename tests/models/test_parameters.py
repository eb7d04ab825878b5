"""Parameter counts and names of every recipe, by abstract initialisation: nothing is allocated."""

from __future__ import annotations

import math

import jax
import pytest

import neo.config
from neo.models.decoder import Decoder
from neo.models.flops import parameter_count

# Billions, total and without embedding table and head, to the digits given by the authors' checkpoints.
PUBLISHED = {
    "neo_7b": (7.794, 7.399), "neo_2b": (2.245, 1.982), "neo_980m": (0.980, 0.717), "neo_460m": (0.4617, 0.330),
    "neo_250m": (0.2509, 0.1196), "moxin_7b": (8.114, 7.852), "mpt_7b": (6.649, 6.443), "yulan_mini": (2.234, 2.044),
}


def digits(number: float) -> int:
    return len(str(number).split(".")[1])


@pytest.mark.parametrize("name", sorted(neo.config.known()))
def test_count_equals_abstract_initialisation(name):
    model = neo.config.load(name).model
    params = Decoder(model).abstract_params()
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    count = parameter_count(model)
    assert count["total"] == total
    ends = sum(math.prod(x.shape) for x in jax.tree.leaves([params["embed"], params.get("head", {})]))
    assert count["non_embedding"] == total - ends


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_equals_publication(name):
    count = parameter_count(neo.config.load(name).model)
    for key, published in zip(("total", "non_embedding"), PUBLISHED[name], strict=True):
        assert abs(count[key] / 1e9 - published) <= 0.51 * 10 ** -max(digits(published), 3), (key, count[key])


def test_names_and_shapes_do_not_depend_on_the_pattern(tiny):
    shapes = [jax.tree_util.tree_map(lambda x: x.shape, Decoder(tiny(windows=w)).abstract_params())
              for w in ((0,), (4, 0), (4, 8, 0))]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0] == {
        "embed": {"table": (97, 32)}, "final_norm": {"scale": (32,)}, "head": {"kernel": (32, 97)},
        "layers": {
            "attention_norm": {"scale": (3, 32)}, "mlp_norm": {"scale": (3, 32)},
            "attention": {"query": (3, 32, 4, 8), "key": (3, 32, 2, 8), "value": (3, 32, 2, 8), "output": (3, 4, 8, 32)},
            "mlp": {"gate": (3, 32, 48), "up": (3, 32, 48), "down": (3, 48, 32)}}}


def test_axes_name_every_dimension(tiny):
    decoder = Decoder(tiny())
    is_axes = lambda x: isinstance(x, tuple)   # noqa: E731
    axes = decoder.axes()
    shapes = jax.tree.map(lambda x: x.shape, decoder.abstract_params())
    assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(shapes, is_leaf=is_axes)
    for names, shape in zip(jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(shapes, is_leaf=is_axes), strict=True):
        assert len(names) == len(shape)


def test_tied_has_no_head_and_norms_start_at_one(build):
    _, params = build(tied_embeddings=True)
    assert "head" not in params
    assert (params["final_norm"]["scale"] == 1).all() and (params["layers"]["mlp_norm"]["scale"] == 1).all()


def test_matrices_are_drawn_with_the_given_deviation_and_apart(build):
    decoder, _ = build(d_model=64, d_ff=256)
    params = decoder.init(jax.random.key(1), 0.02)
    gate, up = params["layers"]["mlp"]["gate"], params["layers"]["mlp"]["up"]
    for x in (gate[0], gate[1], up[0], params["embed"]["table"], params["head"]["kernel"]):
        # The deviation of n normal draws is off by 1/sqrt(2n): n >= 6208, five of those are 4.5 %.
        assert abs(float(x.std()) / 0.02 - 1) < 0.045
    for one, other in ((gate[0], gate[1]), (gate[0], up[0])):
        assert abs(float((one * other).mean())) < 5 * 0.02**2 / one.size**0.5
