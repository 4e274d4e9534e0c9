"""The rounds: who is asked, what they receive, and how their answers become the next adapter.

The one Flower strategy of the project. It contains no aggregation mathematics: that is the `Aggregator` it is given.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Generator
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from apiary.config import schedule
from apiary.config.schema import RunConfig
from apiary.core import errors
from apiary.core.errors import RunFailed, TooFewAnswers
from apiary.core.messages import ClientInfo, Decline, Fingerprint, FitReport, Hello, Payload, Score, Update, Visit
from apiary.core.stages import rounds_of, stage_of
from apiary.core.tensors import StateDict, generator, is_finite
from apiary.transport import codec, flower_records, from_config
from server import client_scores, messaging, round_metrics, validation
from server.broadcast import Copies
from server.client_scores import Best, Scores
from server.membership import EventLog, Roster
from server.sampling import choose, panel
from strategies import Aggregator, Gradient, ServerState
from strategies.aggregator import ROOT

logger = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """The shared adapter's loss on the server's held-out examples."""

    score: Score
    interval: tuple[float, float]  # 95% bootstrap interval of the loss


class Progress(NamedTuple):
    """Plain values that a checkpoint keeps beside the tensors."""

    best: Mapping[str, Sequence[float]] = MappingProxyType({})  # by client, its `Score` at the best evaluation
    evaluations_without_gain: int = 0
    stopped: bool = False
    last_round: Mapping[str, int] = MappingProxyType({})  # by client, its last round of taking part
    spent: Mapping[str, Sequence[float]] = MappingProxyType({})  # by client, its newest `Spent`
    ranks: Mapping[str, int] = MappingProxyType({})  # by client, the rank that it has pruned itself to
    unchanged: int = 0  # rounds that left the model as it was: too few good answers, or all clients declined


class _Folded(NamedTuple):
    """The answers of a round, summed up."""

    acc: Any  # the reducer's
    gauge: round_metrics.Watched
    good: Sequence[FitReport]
    poisoned: Mapping[str, str]  # by client, why its answer was refused, which no honest client gives
    declined: int
    bytes_up: int
    float32_up: int  # what the same changes would have been without the codec; 0 where there is none


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
        score_stages: an adapter's scores on the held-out examples of each stage, for a `stage` event before the first
            round and after the last one of each stage; None where that is not measured.
        name_of: the name that a node's key is registered under, which it must then tell as its own; empty where a key
            has none, and None where there are no keys, as in a simulation.
        root: the server's own update of a round, for a method that asks for one.
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
        score_stages: Callable[[StateDict], Mapping[str, Any]] | None = None,
        name_of: Callable[[int], str | None] = lambda node: None,
        root: Callable[[int, Payload], Update] | None = None,
    ) -> None:
        self.config, self.aggregator, self.state = config, aggregator, state
        self.progress = progress or Progress()
        self._log, self._on_round, self._evaluate, self._score_stages = log, on_round, evaluate, score_stages
        self._root = root
        self._up, self._coded = from_config.configured_codec(config, "up"), config.wire.up.name != "fp32"
        self._copies = None if from_config.configured_codec(config, "down").whole else Copies(config, state.copies)
        self._roster = Roster(
            config,
            fingerprint,
            mixed=aggregator.ranks == "mixed",
            log=log,
            name_of=name_of,
            info_of=self._info_of,
        )
        self._spent_out: set[str] = set()  # clients whose privacy budget is spent; they are not asked again
        self._cohort: list[str] = []
        self._told: dict[str, Any] = {}  # of how the round was put together
        self._spared = 0  # bytes that changes are less than whole adapters, in messages made and not yet weighed
        self._sent: dict[tuple[int, int], tuple[Payload, tuple[ArrayRecord, ...]]] = {}  # by round and rank

    # -- the run --------------------------------------------------------------------------------

    def run(self, grid: Grid, expected: int) -> ServerState:
        """All rounds that are left; returns the final state.

        Args:
            grid: how to reach the clients.
            expected: clients to wait for before the first round.

        Raises:
            RunFailed: too few clients joined, too few answered well, or nobody ever trained.
        """
        self._roster.wait_for(grid, expected)
        if self.state.round == 0:
            if self.config.evaluate.every:
                self._measure(0, grid)
            self._measure_stages(0)
        for number in range(self.state.round + 1, self.config.rounds + 1):
            if self.progress.stopped:
                break
            self._round(number, grid)
            self._stop_if_spent(number)
        if not self.progress.last_round:
            raise RunFailed(f"no client trained in any of {self.state.round} rounds; the lines above say why")
        if 0 < self.state.round <= self.progress.unchanged:
            raise RunFailed(f"none of {self.state.round} rounds changed the model; the lines above say why")
        return self.state

    def _stop_if_spent(self, number: int) -> None:
        if self._roster.members and self._roster.members.keys() <= self._spent_out:
            self.progress = self.progress._replace(stopped=True)
            self._log.event("stop", round=number, reason="all clients' privacy budgets are spent (privacy.epsilon)")
            self._on_round(self.state, self.progress)

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
        self.state = self.state._replace(adapter=flower_records.from_arrays(initial_arrays))
        self.run(grid, self.config.strategy.min_clients)
        return Result(arrays=flower_records.to_arrays(self.state.adapter))

    def _round(self, number: int, grid: Grid) -> None:
        began = time.monotonic()
        self._roster.gather(grid, number)
        arrays = flower_records.to_arrays(self.state.adapter)
        messages = list(self.configure_train(number, arrays, ConfigRecord(), grid))
        down = self._weight(messages, "down")
        replies = self._exchange(grid, messages, number)
        _, metrics = self.aggregate_train(number, replies)
        fields = {**down, **dict(metrics or {}), **self._told}
        self._log.event("round", round=number, asked=len(messages), seconds=time.monotonic() - began, **fields)
        every = self.config.evaluate.every
        if every and (number % every == 0 or number == self.config.rounds):
            self._measure(number, grid)
        self._measure_stages(number)
        self._on_round(self.state, self.progress)

    # -- who and what --------------------------------------------------------------------------

    def _info_of(self, hello: Hello) -> ClientInfo:
        """What the run knows of a client that has passed the handshake."""
        if self._copies:
            self._copies.greet(hello.client, hello.holds)
        rank = min(hello.rank, self.progress.ranks.get(hello.client, hello.rank))
        return ClientInfo(hello.client, rank, self.progress.last_round.get(hello.client, 0))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's cohort and its train messages; clients with the same payload share one record."""
        strategy = self.config.strategy
        self._cohort = choose(
            self._roster.members.keys() - self._spent_out,
            fraction=strategy.fraction,
            minimum=strategy.min_clients,
            seed=self.config.seed,
            round_number=server_round,
        )
        self._log.event("asked", round=server_round, clients=self._cohort)
        return [self._message("train", client, server_round) for client in self._cohort]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluate messages to the panel: the same clients in every round, whoever trained in it."""
        strategy = self.config.strategy
        asked = panel(
            self._roster.members, fraction=strategy.fraction, minimum=strategy.min_clients, seed=self.config.seed
        )
        return [self._message("evaluate", client, server_round) for client in asked]

    def _message(self, kind: str, client: str, number: int) -> Message:
        member = self._roster.members[client]
        payload, arrays = self._payload(member.info)
        if self._copies:
            parcel = flower_records.parcel_arrays(self._copies.pack(member.info, payload.adapter))
            self._spared += flower_records.record_bytes(arrays[0]) - flower_records.record_bytes(parcel)
            arrays = (parcel, *arrays[1:])
        # Who is only measured needs no control variate.
        content = flower_records.request(
            number, *arrays[: 3 if kind == "train" else 2], last_round=member.info.last_round
        )
        return Message(content, member.node, kind, group_id=str(number))

    def _weight(self, messages: Sequence[Message], way: str) -> dict[str, int]:
        """The bytes of the arrays in messages just made, and where changes alone travel down, of whole adapters."""
        size = sum(flower_records.array_bytes(message.content) for message in messages)
        spared, self._spared = self._spared, 0
        return {f"bytes_{way}": size, **({f"float32_{way}": size + spared} if self._copies else {})}

    def _payload(self, client: ClientInfo) -> tuple[Payload, tuple[ArrayRecord, ...]]:
        """What a client receives now, and its records, which all clients of its rank share."""
        key = (self.state.round, client.rank)
        if key not in self._sent:
            self._sent = {old: sent for old, sent in self._sent.items() if old[0] == key[0]}
            known = len(self._roster.members.keys() | self.progress.last_round.keys())
            payload = self.aggregator.payload(self.state, client._replace(clients=known))
            self._sent[key] = payload, tuple(flower_records.to_arrays(part) for part in payload[:3])
        return self._sent[key]

    # -- exchange -------------------------------------------------------------------------------

    def _exchange(self, grid: Grid, messages: list[Message], number: int) -> Iterator[Message]:
        """Good replies, one by one as they arrive; a failed or late client becomes one `refused` event."""
        names = {member.node: client for client, member in self._roster.members.items()}
        limit = self.config.strategy.deadline_s or math.inf
        deadline = time.monotonic() + limit
        waiting, pause = messaging.push(grid, messages), messaging.Pause()
        for message in messages:
            if message.metadata.dst_node_id not in waiting.values():
                self._refuse(names[message.metadata.dst_node_id], "it could not be reached", number)
        while waiting and time.monotonic() < deadline:
            arrived = messaging.pull(grid, waiting)
            for node, reply in arrived:
                if reply.has_error():
                    self._refuse(names[node], reply.error.reason or "it failed without a reason", number)
                else:
                    yield reply
            if arrived:
                pause = messaging.Pause()
            else:
                pause.sleep(len(waiting))
        for node in waiting.values():
            self._refuse(names[node], f"no answer within {limit:g} s", number)

    # -- fold -----------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come, then take the step; holds one reply at a time.

        Clients that rightly decline, with no rows for this stage or a spent privacy budget, do not count against the
        quorum. Where the quorum is met, but a robust method has too few answers for its promise, the model stays.

        Raises:
            RunFailed: fewer good replies than the quorum, or the step led to NaN or infinity.
        """
        self._told = {}
        folded = self._fold(server_round, replies)
        if folded.declined == len(self._cohort):  # all of them rightly
            self._pass(server_round)
        else:
            self._check_quorum(server_round, len(folded.good), len(self._cohort) - folded.declined)
            self._conclude(server_round, folded)
        up = {"bytes_up": folded.bytes_up, **({"float32_up": folded.float32_up} if self._coded else {})}
        return None, MetricRecord({**client_scores.trained(folded.good), **up})

    def _fold(self, number: int, replies: Iterable[Message]) -> _Folded:
        """Add the answers to the round's sum as they come; what cannot be used becomes an event.

        Raises:
            RunFailed: the method cannot take an update that passed all checks.
        """
        reducer = self.aggregator.reduce
        acc, gauge = reducer.start(self.state), round_metrics.watch(self.config, self.aggregator, self.state)
        good: list[FitReport] = []
        poisoned: dict[str, str] = {}
        declined = up = plain = 0
        for message in replies:
            try:
                answer = self._read(message)
            except errors.WireError as error:
                self._refuse(sender := self._roster.sender_of(message), str(error), number)
                if isinstance(error, errors.Poisoned):
                    acc, poisoned[sender] = reducer.refused(acc), f"refused: {error}"
                continue
            self._heard(answer.client if isinstance(answer, Decline) else answer.update.client)
            if isinstance(answer, Decline):
                declined += 1
                self._spent_out |= {answer.client} if answer.reason == "budget" else set()
                self._log.event("declined", round=number, **answer._asdict())
                continue
            size = flower_records.array_bytes(message.content)
            try:
                acc, gauge = reducer.add(acc, answer.update), round_metrics.add(gauge, answer.update)
            except ValueError as error:  # it may have been added in part
                raise RunFailed(f"round {number}: {error}") from error
            good.append(answer.report)
            up += size
            plain += codec.float32_bytes(answer.update.delta) if self._coded else 0
            self._note_visit(answer.update, number)
            self._log_visit(answer, number, size)
        return _Folded(acc, gauge, good, poisoned, declined, up, plain)

    def _conclude(self, number: int, folded: _Folded) -> None:
        """Take the step that the answers come to, and keep what is told of it.

        Raises:
            RunFailed: there is no such step, or it led to NaN or infinity.
        """
        reducer, acc = self.aggregator.reduce, folded.acc
        acc = reducer.add(acc, self._own_update(self._root, number)) if self._root else acc
        try:
            gradient = reducer.finish(self.state, acc, self._generator(number))
            self._step(number, gradient)
            self._told = round_metrics.facts(folded.gauge, gradient, self.state, folded.poisoned)
        except TooFewAnswers as error:  # nothing is learnt then; a client must not end a run by answering badly
            self._pass(number)
            self._told = {"unchanged": True}
            self._log.event("warning", round=number, message=f"the round changes nothing: {error}")
        except (ValueError, LinAlgError) as error:  # a decomposition that does not converge, say
            raise RunFailed(f"round {number}: {error}") from error

    def _pass(self, number: int) -> None:
        """Let a round be over that leaves the model as it is."""
        self.state = self.state._replace(round=number)
        self.progress = self.progress._replace(unchanged=self.progress.unchanged + 1)

    def _read(self, message: Message) -> Visit | Decline:
        """The answer in a message, checked.

        Raises:
            WireError: it is not what this run allows.
        """
        answer = flower_records.read_train_reply(message.content)
        if isinstance(answer, Decline):
            self._roster.check_sender(answer.client, message)
            validation.check_decline(answer, self.config)
            return answer
        self._roster.check_sender(answer.update.client, message)
        self._note_spent(answer)  # whatever else is wrong with it: it was sent
        member = self._roster.members[answer.update.client]
        client, rank = member.info, answer.update.rank
        if self.aggregator.prunes and 0 < rank < client.rank:
            client = client._replace(rank=rank)
        answer = self._decoded(answer, flower_records.read_message(message.content), client)
        validation.check_visit(answer, self.config, member.examples, self._payload(client)[0], self.state.round + 1)
        if rank != client.rank:
            raise errors.WireError(f"its update has rank {rank}, and it was sent rank {client.rank}")
        if control := self._payload(client)[0].control:
            validation.check_walk(answer.report, self.config)
            far = schedule.walked(self.config, self.state.round + 1, answer.report.steps)
            answer = answer._replace(update=answer.update._replace(control=control, walked=far))
        return answer

    def _own_update(self, root: Callable[[int, Payload], Update], number: int) -> Update:
        """The server's own, from what clients of full rank received.

        Raises:
            RunFailed: its training diverged.
        """
        try:
            return root(number, self._payload(ClientInfo(ROOT, self.config.adapter.rank, number - 1))[0])
        except FloatingPointError as error:
            raise RunFailed(f"round {number}: the server's own training on strategy.root diverged: {error}") from None

    def _decoded(self, visit: Visit, message: bytes, client: ClientInfo) -> Visit:
        """The visit with the change that its message holds, if it has one.

        Raises:
            WireError: it is not what this run allows.
        """
        if not message:
            return visit
        try:
            delta = codec.decode(message, self._up, codec.shapes_of(self._payload(client)[0].adapter))
        except errors.CodecError as error:
            kind = errors.Poisoned if isinstance(error, errors.NotFinite) else errors.WireError
            raise kind(f"its update cannot be decoded: {error}") from None
        return visit._replace(update=visit.update._replace(delta=delta))

    def _heard(self, client: str) -> None:
        if self._copies:
            self._copies.arrived(client)

    def _log_visit(self, visit: Visit, number: int, size: int) -> None:
        more: dict[str, Any] = {
            part: values._asdict() for part in ("curated", "spent") if (values := getattr(visit, part))
        }
        client = visit.update.client
        if self.aggregator.prunes:
            more["rank"] = visit.update.rank
        self._log.event("client", round=number, client=client, bytes_up=size, **visit.report._asdict(), **more)

    def _generator(self, number: int) -> Generator:
        return generator(self.config.seed, number, "aggregate")

    def _step(self, number: int, gradient: Gradient) -> None:
        state = self.aggregator.step(self.state, gradient)
        if not all(is_finite(part) for part in (state.adapter, state.base_delta, state.memory)):
            raise RunFailed(
                f"round {number}: strategy.name = {self.config.strategy.name!r} made NaN or infinity of finite "
                "updates; the round before it is kept"
            )
        self.state = state
        if self._copies:
            copies = self._copies.advance(number, lambda rank: self._payload(ClientInfo("", rank, 0))[0].adapter)
            self.state = state._replace(copies=copies)

    def _note_visit(self, update: Update, number: int) -> None:
        client, info = update.client, self._roster.members[update.client].info
        if update.rank < info.rank:
            self.progress = self.progress._replace(ranks={**self.progress.ranks, client: update.rank})
        self._roster.note(info._replace(last_round=number, rank=update.rank))
        self.progress = self.progress._replace(last_round={**self.progress.last_round, client: number})

    def _refuse(self, client: str, reason: str, number: int) -> None:
        self._log.event("refused", client=client, reason=reason, round=number)

    def _note_spent(self, visit: Visit) -> None:
        if visit.spent is not None and self.config.privacy.unit != "none" and all(map(math.isfinite, visit.spent)):
            self.progress = self.progress._replace(
                spent={**self.progress.spent, visit.update.client: list(visit.spent)}
            )

    def _check_quorum(self, number: int, good: int, asked: int) -> None:
        needed = max(1, math.ceil(self.config.strategy.quorum * asked - 1e-9))
        if good < needed:
            raise RunFailed(
                f"round {number}: {good} of {asked} clients answered well, strategy.quorum = "
                f"{self.config.strategy.quorum:g} asks for {needed}; the lines above say why"
            )

    # -- measure --------------------------------------------------------------------------------

    def _measure(self, number: int, grid: Grid) -> None:
        fields: dict[str, Any] = {}
        found: Scores = {}
        if self._evaluate is not None:
            score, interval = self._evaluate(self.state.model)
            found = {"": score}
            fields = {"loss": score.loss, "ci95": list(interval), "n": score.examples}
        if self.config.scores_from_clients:
            messages = list(self.configure_evaluate(number, ArrayRecord(), ConfigRecord(), grid))
            sent = self._weight(messages, "evaluate")
            metrics = self.aggregate_evaluate(number, self._exchange(grid, messages, number))
            # Stopping early on the examples of the final table would flatter it.
            found, told = client_scores.of_clients(metrics or {})  # type: ignore[arg-type]
            fields = {**fields, **told, **sent}
        self._log.event("evaluate", round=number, **fields)
        self._note_scores(number, found)

    def _measure_stages(self, number: int) -> None:
        """What the model knows of each stage, when one has ended; told before the checkpoint, as all of a round is."""
        stages = len(self.config.continual.stages)
        if not stages or self._score_stages is None:
            return
        finished = stage_of(number, self.config.rounds, stages) + 1 if number else 0
        if number == 0 or number == rounds_of(finished - 1, self.config.rounds, stages)[-1]:
            self._log.event("stage", round=number, stage=finished, **self._score_stages(self.state.model))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The `Score` of each client on its own held-out rows, a list of its three sums: zeros if they are too few."""
        sums: dict[str, list[float]] = {}
        for message in replies:
            try:
                client, score = flower_records.read_score_reply(message.content)
                self._roster.check_sender(client, message)
                validation.check_score(score, self.config)
            except errors.WireError as error:
                self._refuse(self._roster.sender_of(message), str(error), server_round)
                continue
            self._heard(client)
            sums[client] = [float(value) for value in score]
        return MetricRecord({name: sums[name] for name in sorted(sums)})

    def _note_scores(self, number: int, found: Scores) -> None:
        if not found:
            return
        best = client_scores.after(Best(self.progress.best, self.progress.evaluations_without_gain), found)
        self.progress = self.progress._replace(best=best.scores, evaluations_without_gain=best.without_gain)
        patience = self.config.evaluate.patience
        if 0 < patience <= best.without_gain:
            self.progress = self.progress._replace(stopped=True)
            self._log.event(
                "stop",
                round=number,
                reason=f"no better loss in {best.without_gain} evaluations (evaluate.patience = {patience})",
            )

    def summary(self) -> None:
        """Log what this run is."""
        logger.info("%d rounds of %s", self.config.rounds, self.config.strategy.name)
