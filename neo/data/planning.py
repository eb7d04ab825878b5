"""From a config to its data order: source sizes, on disk or planned, and the limit on epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neo.config.schema import Config
from neo.data.order import Order


def create_order(config: Config, sources: Mapping[str, Any]) -> Order:
    """The run's data order. InputError as `Order.create`."""
    tokens = {name: source.split("train").num_tokens for name, source in sources.items()}
    return Order.create(config.phases, config.sources, tokens, config.data.seed)
