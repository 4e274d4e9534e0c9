"""The rounds: who is asked, what they receive, and how their answers become the next adapter.

The one Flower strategy of the project. It contains no aggregation mathematics: that is the `Aggregator` it is given.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from apiary import records
from apiary.config import RunConfig
from apiary.exchange import ClientInfo, Fingerprint, FitReport, Payload, Score, Update
from apiary.tensors import StateDict, generator, is_finite
from server.sampling import choose
from strategies import Aggregator, ServerState

logger = logging.getLogger(__name__)
_POLL_S = 0.05  # how often a grid is asked for new replies
_OWN = "client:"  # before a client's name in the metrics of an evaluation
_PULL = 8  # replies asked for at a time


class RunFailed(RuntimeError):
    """The run cannot go on; the message is one line for the operator (exit code 1)."""


class Evaluation(NamedTuple):
    """The shared adapter's loss on the server's held-out examples."""

    score: Score
    interval: tuple[float, float]  # 95% bootstrap interval of the loss


class EventLog(Protocol):
    """Where events go; `apiary.runlog.RunLog` is one."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record one event."""


class Progress(NamedTuple):
    """Plain values that a checkpoint keeps beside the tensors."""

    best_loss: float = math.inf
    evaluations_without_gain: int = 0
    stopped: bool = False
    last_round: Mapping[str, int] = MappingProxyType({})  # by client, its last round of taking part


class _Member(NamedTuple):
    node: int
    info: ClientInfo


class Rounds(Strategy):
    """Federated rounds over any Flower grid, from any finished round on.

    Args:
        config: the run.
        aggregator: the aggregation method.
        fingerprint: what a client must agree on to take part.
        state: where to start: fresh, or from a checkpoint.
        progress: the checkpoint's plain values.
        log: receives the run's events.
        on_round: called after each round with the state and progress; writes the checkpoint.
        evaluate: the loss of an adapter on the server's own held-out examples; None when the server has none.
    """

    def __init__(
        self,
        config: RunConfig,
        aggregator: Aggregator,
        fingerprint: Fingerprint,
        state: ServerState,
        *,
        log: EventLog,
        progress: Progress | None = None,
        on_round: Callable[[ServerState, Progress], None] = lambda state, progress: None,
        evaluate: Callable[[StateDict], Evaluation] | None = None,
    ) -> None:
        self.config, self.aggregator, self.fingerprint, self.state = config, aggregator, fingerprint, state
        self.progress = progress or Progress()
        self._log, self._on_round, self._evaluate = log, on_round, evaluate
        self._members: dict[str, _Member] = {}
        self._refused: set[int] = set()
        self._greeted: dict[str, int] = {}  # hellos without an answer yet: message id -> node
        self._cohort: list[str] = []
        self._sent: Payload | None = None
        self._arrays: tuple[ArrayRecord, ...] = ()  # its records, shared by all clients that get the same payload

    # -- the run --------------------------------------------------------------------------------

    def run(self, grid: Grid, expected: int) -> ServerState:
        """All rounds that are left; returns the final state.

        Args:
            grid: how to reach the clients.
            expected: clients to wait for before the first round.

        Raises:
            RunFailed: too few clients joined, or too few answered well.
        """
        self._wait_for(grid, expected)
        if self.state.round == 0 and self.config.evaluate.every:
            self._measure(0, grid)
        for number in range(self.state.round + 1, self.config.rounds + 1):
            if self.progress.stopped:
                break
            self._round(number, grid)
        return self.state

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's entry point: runs from `initial_arrays`; rounds and time limits are those of the run's config."""
        self.state = self.state._replace(adapter=records.from_arrays(initial_arrays))
        self.run(grid, self.config.strategy.min_clients)
        return Result(arrays=records.to_arrays(self.state.adapter))

    def _round(self, number: int, grid: Grid) -> None:
        began = time.monotonic()
        self._gather(grid, number)
        arrays = records.to_arrays(self.state.adapter)
        messages = list(self.configure_train(number, arrays, ConfigRecord(), grid))
        down = sum(records.array_bytes(message.content) for message in messages)
        replies = self._exchange(grid, messages, number)
        _, metrics = self.aggregate_train(number, replies)
        fields = dict(metrics or {})
        self._log.event(
            "round", round=number, asked=len(messages), bytes_down=down, seconds=time.monotonic() - began, **fields
        )
        every = self.config.evaluate.every
        if every and (number % every == 0 or number == self.config.rounds):
            self._measure(number, grid)
        self._on_round(self.state, self.progress)

    # -- who ------------------------------------------------------------------------------------

    def _wait_for(self, grid: Grid, expected: int) -> None:
        deadline = time.monotonic() + self.config.strategy.join_timeout_s
        while len(nodes := list(grid.get_node_ids())) < expected:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{len(nodes)} of {expected} clients joined within strategy.join_timeout_s = "
                    f"{self.config.strategy.join_timeout_s:g} s"
                )
            time.sleep(_POLL_S)
        self._greet(grid, patience=self.config.strategy.join_timeout_s)
        needed = min(self.config.strategy.min_clients, expected)
        if len(self._members) < needed:
            raise RunFailed(
                f"{len(self._members)} clients passed the handshake, {needed} are needed; see the lines above"
            )

    def _gather(self, grid: Grid, number: int) -> None:
        """Look who is there now; wait a while if that is fewer than a round may have."""
        needed = self.config.strategy.min_clients
        deadline = time.monotonic() + self.config.strategy.join_timeout_s
        self._greet(grid)
        while len(self._members) < needed:
            if time.monotonic() > deadline:
                there = len(self._members)
                raise RunFailed(f"round {number}: {there} clients are left, strategy.min_clients = {needed} are needed")
            time.sleep(_POLL_S)
            self._greet(grid)

    def _greet(self, grid: Grid, patience: float = 0.0) -> None:
        """Shake hands with nodes that are new, and forget those that left.

        Waits as long as answers keep coming within `patience` seconds of each other. Who has not answered by then
        holds nobody up: a later call admits it.
        """
        nodes = set(grid.get_node_ids())
        self._members = {name: m for name, m in self._members.items() if m.node in nodes}
        self._greeted = {i: node for i, node in self._greeted.items() if node in nodes}
        known = {member.node for member in self._members.values()} | self._refused | set(self._greeted.values())
        if new := sorted(nodes - known):
            hellos = [Message(RecordDict(), node, records.HELLO, group_id="0") for node in new]
            self._greeted |= self._push(grid, hellos)
        last = time.monotonic()
        while self._greeted:
            answers = self._pull(grid, self._greeted)
            for node, reply in answers:
                self._meet(node, reply)
                last = time.monotonic()
            if not answers:
                if time.monotonic() - last >= patience:
                    return
                time.sleep(_POLL_S)

    def _meet(self, node: int, reply: Message) -> None:
        if reply.has_error():
            self._refuse(node, f"node {node}", reply.error.reason or "it failed without a reason", 0)
            return
        try:
            self._admit(node, records.read_hello_reply(reply.content))
        except records.WireError as error:
            self._refuse(node, f"node {node}", str(error), 0)

    def _admit(self, node: int, hello: Any) -> None:
        wrong = [
            part
            for part, ours, theirs in zip(Fingerprint._fields, self.fingerprint, hello.fingerprint, strict=True)
            if ours != theirs
        ]
        if wrong:
            reason = f"it holds another {' and '.join(wrong)} than the server (fingerprints differ)"
            self._refuse(node, hello.client, reason, 0)
        elif (other := self._members.get(hello.client)) and other.node != node:
            # Not for good: an organisation that restarted may come before its old node is given up.
            self._refuse(None, hello.client, "another client of this name is still there", 0)
        elif hello.tokens == 0:
            self._refuse(node, hello.client, "it has nothing to train on", 0)
        else:
            last = self.progress.last_round.get(hello.client, 0)
            self._members[hello.client] = _Member(node, ClientInfo(hello.client, hello.rank, last))
            self._log.event("handshake", client=hello.client, examples=hello.examples, tokens=hello.tokens)

    def _refuse(self, node: int | None, client: str, reason: str, number: int) -> None:
        if node is not None and number == 0:
            self._refused.add(node)
        self._log.event("refused", client=client, reason=reason, round=number)

    # -- what -----------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's cohort and its train messages; clients with the same payload share one record."""
        self._cohort = self._choose(server_round)
        self._log.event("asked", round=server_round, clients=self._cohort)
        return [self._message("train", client, server_round) for client in self._cohort]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluate messages to the clients of this round (before the first round: to those of the first)."""
        cohort = self._cohort or self._choose(1)
        return [self._message("evaluate", client, server_round) for client in cohort]

    def _choose(self, number: int) -> list[str]:
        strategy = self.config.strategy
        return choose(
            self._members,
            fraction=strategy.fraction,
            minimum=strategy.min_clients,
            seed=self.config.seed,
            round_number=number,
        )

    def _message(self, kind: str, client: str, number: int) -> Message:
        member = self._members[client]
        payload = self.aggregator.payload(self.state, member.info)
        if (
            self._sent is None
            or self._sent.adapter is not payload.adapter
            or self._sent.base_delta is not payload.base_delta
        ):
            self._sent, self._arrays = payload, tuple(records.to_arrays(part) for part in payload)
        content = records.request(number, *self._arrays)
        return Message(content, member.node, kind, group_id=str(number))

    # -- exchange -------------------------------------------------------------------------------

    def _exchange(self, grid: Grid, messages: list[Message], number: int) -> Iterator[Message]:
        """Good replies, one by one as they arrive; a failed or late client becomes one `refused` event."""
        names = {member.node: client for client, member in self._members.items()}
        limit = self.config.strategy.deadline_s or math.inf
        deadline = time.monotonic() + limit
        waiting = self._push(grid, messages)
        for message in messages:
            if message.metadata.dst_node_id not in waiting.values():
                self._refuse(None, names[message.metadata.dst_node_id], "it could not be reached", number)
        while waiting and time.monotonic() < deadline:
            arrived = self._pull(grid, waiting)
            for node, reply in arrived:
                if reply.has_error():
                    self._refuse(None, names[node], reply.error.reason or "it failed without a reason", number)
                else:
                    yield reply
            if not arrived:
                time.sleep(_POLL_S)
        for node in waiting.values():
            self._refuse(None, names[node], f"no answer within {limit:g} s", number)

    @staticmethod
    def _push(grid: Grid, messages: list[Message]) -> dict[str, int]:
        """The ids of the messages that got under way, with their nodes; grids leave the others out, or without id."""
        ids = list(grid.push_messages(messages))
        if len(ids) == len(messages):
            return {i: m.metadata.dst_node_id for i, m in zip(ids, messages, strict=True) if i}
        return {m.metadata.message_id: m.metadata.dst_node_id for m in messages if m.metadata.message_id in set(ids)}

    @staticmethod
    def _pull(grid: Grid, waiting: dict[str, int]) -> list[tuple[int, Message]]:
        """A few replies with their nodes, taken out of `waiting`; asking for few keeps few in memory."""
        asked = list(waiting)[:_PULL]
        found = []
        for reply in grid.pull_messages(asked):
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                found.append((node, reply))
        for message_id in asked:  # the next call asks for others
            if message_id in waiting:
                waiting[message_id] = waiting.pop(message_id)
        return found

    # -- fold -----------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come, then take the step; holds one reply at a time.

        Raises:
            RunFailed: fewer good replies than the quorum.
        """
        reducer = self.aggregator.reduce
        acc = reducer.start(self.state)
        good: list[FitReport] = []
        up = 0
        for message in replies:
            try:
                update, report = records.read_train_reply(message.content)
                self._check(update, message.metadata.src_node_id)
            except records.WireError as error:
                self._refuse(None, self._client_of(message), str(error), server_round)
                continue
            size = records.array_bytes(message.content)
            acc = reducer.add(acc, update)
            good.append(report)
            up += size
            self._note_visit(update.client, server_round)
            self._log.event("client", round=server_round, client=update.client, bytes_up=size, **report._asdict())
        self._check_quorum(server_round, len(good))
        gradient = reducer.finish(self.state, acc, generator(self.config.seed, server_round, "aggregate"))
        self.state = self.aggregator.step(self.state, gradient)
        tokens = sum(report.tokens for report in good)
        loss = sum(report.loss * report.tokens for report in good) / max(tokens, 1)
        metrics = MetricRecord({"clients": len(good), "train_loss": loss, "tokens": tokens, "bytes_up": up})
        return None, metrics

    def _note_visit(self, client: str, number: int) -> None:
        member = self._members[client]
        self._members[client] = member._replace(info=member.info._replace(last_round=number))
        self.progress = self.progress._replace(last_round={**self.progress.last_round, client: number})

    def _check(self, update: Update, node: int) -> None:
        ours = self.state.adapter
        if update.client not in self._members or self._members[update.client].node != node:
            raise records.WireError(f"it answers as {update.client!r}, which is not who was asked")
        if set(update.delta) != set(ours):
            odd = sorted(set(update.delta) ^ set(ours))
            raise records.WireError(
                f"its update has other tensors than the adapter ({len(odd)} differ, first {odd[0]})"
            )
        for name, tensor in update.delta.items():
            if tensor.dtype != ours[name].dtype:
                raise records.WireError(f"its {name} is {tensor.dtype}, the adapter's {ours[name].dtype}")
            if tensor.shape != ours[name].shape:
                raise records.WireError(f"its {name} is {tuple(tensor.shape)}, the adapter's {tuple(ours[name].shape)}")
        if not is_finite(update.delta):
            raise records.WireError("its update holds NaN or infinity")
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise records.WireError(f"its weight is {update.weight}; a positive number is needed")

    def _check_quorum(self, number: int, good: int) -> None:
        asked = len(self._cohort)
        needed = max(1, math.ceil(self.config.strategy.quorum * asked - 1e-9))
        if good < needed:
            raise RunFailed(
                f"round {number}: {good} of {asked} clients answered well, strategy.quorum = "
                f"{self.config.strategy.quorum:g} asks for {needed}; the lines above say why"
            )

    def _client_of(self, message: Message) -> str:
        node = message.metadata.src_node_id
        return next((name for name, m in self._members.items() if m.node == node), f"node {node}")

    # -- measure --------------------------------------------------------------------------------

    def _measure(self, number: int, grid: Grid) -> None:
        fields: dict[str, Any] = {}
        loss = math.nan
        if self._evaluate is not None:
            result = self._evaluate(self.state.adapter)
            loss = result.score.loss
            fields = {"loss": loss, "ci95": list(result.interval), "n": result.score.examples}
        if self.config.evaluate.clients:
            messages = list(self.configure_evaluate(number, ArrayRecord(), ConfigRecord(), grid))
            metrics = self.aggregate_evaluate(number, self._exchange(grid, messages, number))
            found = {str(k): float(v) for k, v in (metrics or {}).items()}  # type: ignore[arg-type]
            own = {k.removeprefix(_OWN): v for k, v in found.items() if k.startswith(_OWN)}
            fields |= {"clients": own, "clients_loss": found.get("all", math.nan)}
            # Stopping early on the examples of the final table would flatter it.
            loss = found.get("all", loss)
        self._log.event("evaluate", round=number, **fields)
        self._note_loss(number, loss)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The loss of each client on its own held-out rows, and over all of them as "all"."""
        scores: dict[str, Score] = {}
        for message in replies:
            try:
                client, score = records.read_score_reply(message.content)
            except records.WireError as error:
                self._refuse(None, self._client_of(message), str(error), server_round)
                continue
            if score.tokens and math.isfinite(score.nats):
                scores[client] = score
        if not scores:
            return None
        total = Score(*(sum(column) for column in zip(*scores.values(), strict=True)))
        return MetricRecord({**{_OWN + name: scores[name].loss for name in sorted(scores)}, "all": total.loss})

    def _note_loss(self, number: int, loss: float) -> None:
        if loss < self.progress.best_loss:
            self.progress = self.progress._replace(best_loss=loss, evaluations_without_gain=0)
            return
        without = self.progress.evaluations_without_gain + 1
        patience = self.config.evaluate.patience
        self.progress = self.progress._replace(evaluations_without_gain=without, stopped=0 < patience <= without)
        if self.progress.stopped:
            self._log.event(
                "stop", round=number, reason=f"no better loss in {without} evaluations (evaluate.patience = {patience})"
            )

    def summary(self) -> None:
        """Log what this run is."""
        logger.info("%d rounds of %s", self.config.rounds, self.config.strategy.name)
