"""The rounds with scripted clients on the in-process grid: real Flower messages, no language model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from kept_events import Log

from apiary.config import loading
from apiary.core.messages import Decline, Fingerprint, FitReport, Hello, Score, Spent, Update, Visit
from apiary.transport import flower_records
from server.rounds import Hooks, Progress, Rounds
from strategies import AGGREGATORS, ServerState

PRINT = Fingerprint("base", "tokenizer", "template", "adapter")
START = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
UNGUARDED = ["strategy.norm_guard=0", "strategy.weight_cap=0"]  # scripted changes are such as no optimizer makes
Act = Callable[[int, dict[str, torch.Tensor]], Any]


def add_one(index: int, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The delta of client i: all entries i + 1, with weight 10 (i + 1)."""
    return {name: torch.full_like(t, index + 1.0) for name, t in adapter.items()}


def clients(
    deltas: dict[int, Any] | None = None,
    prints: dict[int, Fingerprint] | None = None,
    loss: Callable[[int, int], float] = lambda i, number: 1.0,
    private: bool = False,
) -> ClientApp:
    """An app whose node i returns `deltas[i](i, adapter)`, or raises it, or declines for it, or is well-behaved.

    Its held-out loss after a round is `loss(i, round)`.
    """
    deltas, prints = deltas or {}, {} if prints is None else prints
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        counts = (None, None) if private else (10, 100)
        hello = Hello(f"c{i}", prints.get(i, PRINT), 4, *counts)
        return Message(flower_records.hello_reply(hello), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        _, payload = flower_records.read_request(message.content)
        act = deltas.get(i, add_one)
        if isinstance(act, Exception):
            raise act
        if act in ("idle", "budget"):
            return Message(flower_records.train_reply(Decline(f"c{i}", act)), reply_to=message)
        update = Update(f"c{i}", act(i, dict(payload.adapter)), 10.0 * (i + 1), 4)
        report = FitReport(10 * (i + 1), 5, 1, math.nan if private else 2.0, 0.1)
        spent = Spent(1.0 + i, 2.0 + i, 1e-5, 1.0, 0.1, 3) if private else None
        return Message(flower_records.train_reply(Visit(update, report, spent=spent)), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        nats = loss(i, flower_records.read_request(message.content)[0]) * 10 * (i + 1)
        return Message(flower_records.score_reply(f"c{i}", Score(nats, 10 * (i + 1), 3)), reply_to=message)

    return app


def rounds(overrides: list[str], progress: Progress = Progress(), **hooks: Any) -> tuple[Rounds, Log]:
    log = Log()
    run = loading.load(None, ["rounds=2", "adapter.rank=4", *UNGUARDED, *overrides])
    made = Rounds(
        run,
        AGGREGATORS.build("fedavg", {}, weighting=run.strategy.weighting),
        PRINT,
        ServerState(0, START, {}, {}),
        Hooks(log, **hooks),
        progress,
    )
    return made, log
