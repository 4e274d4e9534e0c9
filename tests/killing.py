"""A run that is killed between a round and its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from server import checkpoint


@contextmanager
def killed_before_checkpoint(number: int) -> Iterator[None]:
    """Kill the run at its checkpoint `number`: the round is done, and clients remember what the server does not."""
    save, calls = checkpoint.save, []

    def killed(*args: Any, **keys: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return save(*args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            yield
