"""Curation of a client's rows before training: mask, drop duplicates and noise, keep a share."""

from __future__ import annotations

from client.curation import steps as steps  # registers them
from client.curation.pipeline import (
    STEPS,
    Context,
    Curation,
    Reader,
    Row,
    Step,
    StepReport,
    StepResult,
    build_steps,
    curate,
    digest,
    restore,
)

__all__ = [
    "STEPS",
    "Context",
    "Curation",
    "Reader",
    "Row",
    "Step",
    "StepReport",
    "StepResult",
    "build_steps",
    "curate",
    "digest",
    "restore",
]
