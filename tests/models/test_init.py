"""The initial values: a normal distribution, the same bits everywhere."""

from __future__ import annotations

import hashlib

import jax
import numpy as np

from neo.models.init import normal


def test_moments_and_tails_are_those_of_a_normal():
    x = np.asarray(normal(jax.random.key(0), (1000, 1000), 1.0), np.float64)
    assert abs(x.mean()) < 4e-3 and abs(x.var() - 1) < 6e-3          # 4 standard errors of 1e6 draws
    assert abs((x**4).mean() - 3) < 0.04 and abs((x**3).mean()) < 0.02
    for sigmas, share in ((1, 0.3173), (2, 0.0455), (3, 0.0027), (4, 6.33e-5)):
        assert abs((np.abs(x) > sigmas).mean() - share) < 4 * np.sqrt(share / x.size) + 1e-6
    assert np.unique(x).size > 0.9 * x.size                          # no coarse grid


def test_std_scales_and_keys_differ():
    one, half = (np.asarray(normal(jax.random.key(1), (64, 64), std)) for std in (1.0, 0.5))
    np.testing.assert_array_equal(one * np.float32(0.5), half)
    assert not np.array_equal(one, np.asarray(normal(jax.random.key(2), (64, 64), 1.0)))
    assert not np.asarray(normal(jax.random.key(1), (8,), 0.0)).any()


def test_the_bits_are_the_same_on_every_machine_and_jax():
    x = np.asarray(normal(jax.random.key(7), (33, 17), 0.02))
    assert x.dtype == np.float32
    assert hashlib.sha256(x.tobytes()).hexdigest() == GOLDEN


GOLDEN = "1e1a6bc837ab17bb457bff8164cf37a078fa0bdc5c95232e51e87333ce261541"
