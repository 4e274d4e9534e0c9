"""Curation of a client's rows before training: mask, drop duplicates and noise, keep a share.

Each module beside this one is imported, so that dropping a file in registers its steps.
"""

from __future__ import annotations

import importlib
import pkgutil

from client.curation.core import (
    STEPS,
    Context,
    Curation,
    Kept,
    Reader,
    Row,
    Step,
    StepReport,
    build_steps,
    curate,
    digest,
    restore,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "STEPS",
    "Context",
    "Curation",
    "Kept",
    "Reader",
    "Row",
    "Step",
    "StepReport",
    "build_steps",
    "curate",
    "digest",
    "restore",
]
