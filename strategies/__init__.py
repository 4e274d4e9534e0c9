"""Aggregation methods: torch and the shared core, no Flower.

Each module beside this one is imported, so that dropping a file in registers its methods.
"""

from __future__ import annotations

import importlib
import pkgutil

from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, traits

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from strategies.from_config import from_config  # noqa: E402 (it builds what the others register)

__all__ = ["AGGREGATORS", "Aggregator", "Gradient", "Reducer", "ServerState", "from_config", "traits"]
