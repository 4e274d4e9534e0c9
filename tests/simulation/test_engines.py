"""What the Ray engine adds to Flower's grid: patience at the start, and an end when the rest has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.serverapp import Grid

from simulation import engines


class LateGrid:
    """Replies to a message once it has been asked for so often; `sent` counts the looks."""

    def __init__(self, **looks: int) -> None:
        self.looks = looks

    def push_messages(self, messages: Iterable[str]) -> list[str]:
        return list(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
        asked = list(message_ids)
        for i in asked:
            self.looks[i] -= 1
        return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=i)) for i in asked if self.looks[i] == 0]

    def get_node_ids(self) -> list[int]:
        return [1, 2]


def pulled(grid: Any, *ids: str) -> list[str]:
    return [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)]


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    monkeypatch.setattr(engines, "_LOOK_S", 0.001)
    return threading.Event()


def test_the_first_messages_are_waited_for_and_no_later_ones(stop: threading.Event) -> None:
    grid = engines._RayGrid(cast(Grid, LateGrid(a=20, b=40, c=3)), stop)
    assert grid.push_messages(cast(Any, ["a", "b"])) == ["a", "b"]
    assert pulled(grid, "a", "b") == ["a"]
    assert pulled(grid, "b") == ["b"]
    assert grid.push_messages(cast(Any, ["c"])) == ["c"]
    assert [pulled(grid, "c") for _ in range(3)] == [[], [], ["c"]]
    assert grid.get_node_ids() == [1, 2]


def test_who_waits_is_ended_with_the_rest(stop: threading.Event) -> None:
    grid = engines._RayGrid(cast(Grid, LateGrid(a=10**9)), stop)
    grid.push_messages(cast(Any, ["a"]))
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(KeyboardInterrupt):
            grid.pull_messages(["a"])
        ended.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    assert not ended.is_set()
    stop.set()
    waiting.join(60)
    assert ended.is_set()
    for use in (lambda: grid.get_node_ids(), lambda: grid.push_messages([])):
        with pytest.raises(KeyboardInterrupt):
            use()
