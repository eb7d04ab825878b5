"""These tests need 8 devices: run them in a process of their own, `pytest tests/multi_device`."""

from __future__ import annotations

import os

import pytest

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:  # read when JAX makes its devices, so set before that
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    import jax

    if jax.device_count() != 8:
        pytest.fail(f"{jax.device_count()} devices instead of 8: run `pytest tests/multi_device` by itself")


@pytest.fixture(scope="module")
def shared_compile_cache(compile_cache):
    """Programs compiled in earlier sessions are taken from there: for modules whose time is mostly compiling."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache as cache

    jax.config.update("jax_compilation_cache_dir", str(compile_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    cache.reset_cache()
