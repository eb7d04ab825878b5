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
