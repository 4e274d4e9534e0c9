"""The client's half of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from apiary.core.tensors import StateDict

Penalty: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]  # live adapter parameters -> scalar, added to the loss


Projection: TypeAlias = Callable[[StateDict], StateDict]  # the finished delta -> what is sent
