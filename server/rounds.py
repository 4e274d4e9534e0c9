"""The rounds: a loop in which a cohort trains, its updates are aggregated, and the result is measured and kept.

`Rounds` is the one Flower strategy of the project. It contains no aggregation mathematics (that is the `Aggregator` it
is given), and leaves to others what is sent (`server.payloads`), what comes back (`server.replies`), what becomes of it
(`server.aggregation`), who takes part (`server.membership`) and what is measured (`server.evaluation`).
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from apiary.config.schema import RunConfig
from apiary.core.errors import RunFailed, TooFewAnswers
from apiary.core.messages import ClientInfo, Decline, Fingerprint, Hello, Spent, Update
from apiary.core.tensors import StateDict
from apiary.transport import flower_records, from_config
from server import aggregation, client_scores, evaluation, explosion, messaging, round_metrics, validation
from server.aggregation import Folded, OwnUpdate
from server.client_scores import Best, Scores
from server.evaluation import Evaluation
from server.membership import EventLog, Member, Roster
from server.payloads import Payloads, Source
from server.replies import Refusal, Terms, read_score, read_train
from server.sampling import Draw, choose, panel
from server.screen import Settled
from strategies import Aggregator, ServerState, guard
from strategies.guard import Reference

logger = logging.getLogger(__name__)
_UNDECIDED = (
    "no client tells a loss to decide by: while that is so, evaluate.patience cannot stop the run, and the last round "
    "is delivered"
)
Reply = TypeVar("Reply")


class Progress(NamedTuple):
    """Plain values that a checkpoint keeps beside the tensors."""

    best: Mapping[str, Sequence[float]] = MappingProxyType({})  # by client, its `Score` at the best evaluation
    best_trained: Mapping[str, Sequence[float]] = MappingProxyType({})  # likewise, the one before training left out
    best_round: int | None = None  # of the latter; None before there is one
    evaluations_without_gain: int = 0
    stopped: bool = False
    last_round: Mapping[str, int] = MappingProxyType({})  # by client, the last round in which its update counted
    spent: Mapping[str, Sequence[float]] = MappingProxyType({})  # by client, its newest `Spent`
    ranks: Mapping[str, int] = MappingProxyType({})  # by client, the rank that it has pruned itself to
    unchanged: int = 0  # rounds that left the model as it was: too few valid updates, or all clients declined
    lengths: Mapping[str, Sequence[float]] = MappingProxyType({})  # `Reference.lengths` of the rounds so far
    weights: Sequence[float] = ()  # likewise
    first_loss: float | None = None  # the first that was measured; None before there is one
    sound_round: int = 0  # the newest whose loss was measured and had not exploded
    budget_spent: Sequence[str] = ()  # the clients that declined because their privacy budget is spent, by name

    @property
    def reference(self) -> Reference:
        """What was usual in the rounds so far."""
        return Reference(self.lengths, self.weights)

    def with_budget_spent(self, client: str) -> Progress:
        """Without a client in later cohorts; a run that goes on draws them from the same names."""
        return self._replace(budget_spent=sorted({*self.budget_spent, client}))

    def with_spent(self, client: str, spent: Spent | None) -> Progress:
        """With the privacy that a client has spent; as it is where the client tells none."""
        return self._replace(spent={**self.spent, client: list(spent)}) if spent is not None else self

    def with_update(self, update: Update, number: int, rank: int) -> Progress:
        """With a client's valid update of a round.

        Args:
            update: the client's.
            number: the round.
            rank: the client's so far, which the update may have lowered.
        """
        pruned = {update.client: update.rank} if update.rank < rank else {}
        last_round = {**self.last_round, update.client: number}
        return self._replace(last_round=last_round, ranks={**self.ranks, **pruned})

    def with_loss(self, number: int, loss: float | None) -> Progress:
        """With the loss after round `number`, which has not exploded; as it is where there is none."""
        if loss is None or not math.isfinite(loss):
            return self
        return self._replace(first_loss=loss if self.first_loss is None else self.first_loss, sound_round=number)

    def with_scores(self, number: int, scores: Scores) -> Progress:
        """With the scores of the evaluation after round `number`, which may be the best so far.

        The untuned model counts where it is asked whether a run still gets better. It is no round that could be
        delivered, so the best of the rounds is known besides; the two are the same once a round is better than it.
        """
        if not scores:  # nobody has told one
            return self
        best = client_scores.update_best(Best(self.best, self.evaluations_without_gain), scores)
        after = self._replace(best=best.scores, evaluations_without_gain=best.without_gain)
        trained = client_scores.update_best(Best(self.best_trained, 0), scores)
        if number == 0 or min(best.without_gain, trained.without_gain) > 0:
            return after
        return after._replace(best_trained=scores, best_round=number)


class Hooks(NamedTuple):
    """What the rounds use of what surrounds them."""

    log: EventLog  # receives the run's events
    # Called after each round with the state and progress; writes the checkpoint.
    on_round: Callable[[ServerState, Progress], None] = lambda state, progress: None
    # Measures an adapter on the server's held-out examples; None where the server has none.
    evaluate: Callable[[StateDict], Evaluation] | None = None
    # Removes the checkpoints of the rounds after this one.
    forget: Callable[[int, Progress], None] = lambda number, progress: None
    # An adapter's scores on the held-out examples of each stage, the fields of a `stage` event; None where these are
    # not measured.
    score_stages: Callable[[StateDict], Mapping[str, Any]] | None = None
    # The name that a node's key is registered under; see `Roster`.
    name_of: Callable[[int], str | None] = lambda node: None
    # The clients that a simulation has away in a round; a deployment sees for itself.
    away: Callable[[int], frozenset[str]] = lambda number: frozenset()
    # Trains the server's own update of a round, for a method that asks for one.
    own_update: OwnUpdate | None = None


class Rounds(Strategy):
    """Federated rounds over any Flower grid, from any finished round on.

    It owns what a checkpoint keeps (`state` and `progress`), the cohort of the round in progress, and the clients that
    are not asked any more because their privacy budget is spent.

    Args:
        config: the run.
        aggregator: the aggregation method.
        fingerprint: what a client must agree on to take part.
        state: where to start: fresh, or from a checkpoint.
        hooks: the log, the checkpoint's writer and the rest of what surrounds the rounds.
        progress: the checkpoint's plain values.
    """

    def __init__(
        self,
        config: RunConfig,
        aggregator: Aggregator,
        fingerprint: Fingerprint,
        state: ServerState,
        hooks: Hooks,
        progress: Progress = Progress(),
    ) -> None:
        self.config, self.aggregator, self.state, self.progress = config, aggregator, state, progress
        self._hooks, self._log = hooks, hooks.log
        self._codec = from_config.configured_codec(config, "up", aggregator.local.codec)
        self._payloads = Payloads(config, state.copies)
        mixed = aggregator.ranks == "mixed"
        self._roster = Roster(
            config, fingerprint, mixed=mixed, log=hooks.log, name_of=hooks.name_of, info_of=self._info_of
        )
        self._draw = Draw(config.strategy.fraction, config.strategy.min_clients, config.seed)
        self._cohort: list[str] = []
        self._watch = explosion.Watch(config)
        self._round_fields: dict[str, Any] = {}  # of the `round` event, from the newest `aggregate_train`

    # -- the loop -------------------------------------------------------------------------------

    def run(self, grid: Grid, expected: int) -> ServerState:
        """Do all rounds that are left.

        Args:
            grid: how to reach the clients.
            expected: clients to wait for before the first round.

        Returns:
            The state after the last round.

        Raises:
            RunFailed: too few clients joined, too few updates of a round were valid, a step led to NaN or infinity, no
                client trained in any round, or no round changed the model.
        """
        try:
            self._roster.wait_for(grid, expected)
        except RunFailed as error:
            if self.state.round < self.config.rounds and not self.progress.stopped:
                raise
            self._log.event("warning", message=f"{error}; no round is left, so the run is delivered without them")
        if self.state.round == 0:
            self._measure(0, grid)
        for number in range(self.state.round + 1, self.config.rounds + 1):
            if self.progress.stopped:
                break
            self._round(number, grid)
            if self._roster.members and self._roster.members.keys() <= set(self.progress.budget_spent):
                self._stop(number, "all clients' privacy budgets are spent (privacy.epsilon)")
                self._hooks.on_round(self.state, self.progress)
        if not self.progress.last_round:
            raise RunFailed(f"no client trained in any of {self.state.round} rounds; the lines above say why")
        if 0 < self.state.round <= self.progress.unchanged:
            raise RunFailed(f"none of {self.state.round} rounds changed the model; the lines above say why")
        return self.state

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """Flower's entry point: runs from `initial_arrays`; rounds and time limits are those of the run's config."""
        self.state = self.state._replace(adapter=flower_records.from_arrays(initial_arrays))
        self.run(grid, self.config.strategy.min_clients)
        return Result(arrays=ArrayRecord(dict(self.state.adapter)))  # an array a tensor, as who calls it expects

    def summary(self) -> None:
        """Log what this run is."""
        logger.info("%d rounds of %s", self.config.rounds, self.config.strategy.name)

    def _round(self, number: int, grid: Grid) -> None:
        began = time.monotonic()
        self._roster.gather(grid, number)
        messages = list(self.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
        down = self._payloads.count_bytes(messages, "down")
        _, metrics = self.aggregate_train(number, self._exchange(grid, messages, number))
        fields = {**down, **dict(metrics or {}), **self._round_fields}
        self._log.event("round", round=number, asked=len(messages), seconds=time.monotonic() - began, **fields)
        self._measure(number, grid)
        self._hooks.on_round(self.state, self.progress)

    def _stop(self, number: int, reason: str) -> None:
        self.progress = self.progress._replace(stopped=True)
        self._log.event("stop", round=number, reason=reason)

    # -- what is sent ---------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The train messages to the round's cohort, which is drawn here; `arrays` and `config` are not used."""
        can_train = _there(self, server_round) - set(self.progress.budget_spent)
        self._cohort = choose(can_train, self._draw, server_round)
        self._log.event("asked", round=server_round, clients=self._cohort)
        members = [self._roster.members[client] for client in self._cohort]
        return self._payloads.messages("train", members, server_round, self._source(self.state))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The evaluate messages to the panel: of those who are there the same in every round, whoever trained in it."""
        members = [self._roster.members[client] for client in panel(_there(self, server_round), self._draw)]
        return self._payloads.messages("evaluate", members, server_round, self._source(self.state))

    def _source(self, state: ServerState) -> Source:
        clients = len(self._roster.members.keys() | self.progress.last_round.keys())
        return Source(self.aggregator, state, clients)

    def _info_of(self, hello: Hello) -> ClientInfo:
        """What the run knows of a client that has passed the handshake."""
        self._payloads.set_version(hello.client, hello.holds)
        rank = min(hello.rank, self.progress.ranks.get(hello.client, hello.rank))
        return ClientInfo(hello.client, rank, self.progress.last_round.get(hello.client, 0))

    def _exchange(self, grid: Grid, messages: Sequence[Message], number: int) -> Iterator[Message]:
        """The replies one by one as they arrive; a failed or late client becomes one `refused` event."""

        def refuse(node: int, reason: str) -> None:
            self._log_refusal(self._roster.name(node), reason, number)

        return messaging.exchange(grid, messages, self.config.strategy.deadline_s, refuse)

    # -- what comes back ------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come, then take the step; holds one reply at a time and those that have to wait.

        Clients that rightly decline, with no rows for this stage or a spent privacy budget, do not count against the
        quorum. Where the quorum is met, but a robust method has too few updates for its promise, the model stays.

        Raises:
            RunFailed: fewer valid updates than the quorum, the method cannot use them, or the step led to NaN or
                infinity.
        """
        payload_of = functools.partial(self._payloads.payload, self._source(self.state))
        agreed = guard.agreed([member.tokens for member in self._roster.members.values()], self.config)
        reference = self.progress.reference
        terms = Terms(self.config, self.aggregator, self._codec, server_round, payload_of, reference, agreed)
        self._round_fields, sums = {}, aggregation.Sums(self.state, self._cohort, terms)
        for client, reply, size in self._read(replies, functools.partial(read_train, terms=terms)):
            for settled in sums.add(client, reply, size):
                _record(self, server_round, settled)
        for settled in sums.close():
            _record(self, server_round, settled)
        self.progress = self.progress._replace(**sums.reference()._asdict())
        folded = sums.whole()
        asked = len(self._cohort) - folded.declined
        if asked == 0:  # all of them declined rightly
            self._leave_unchanged(server_round)
        else:
            aggregation.check_quorum(folded, asked, terms)
            self._aggregate(folded, terms)
        return None, MetricRecord({**aggregation.training_fields(folded, self.config)})

    def _read(
        self, replies: Iterable[Message], check: Callable[[RecordDict, Member | None], Reply]
    ) -> Iterator[tuple[str, Reply, int]]:
        """Each reply as it comes: the server's own name for its sender, the checked reply, and its arrays' bytes."""
        for message in replies:
            node, size = message.metadata.src_node_id, flower_records.array_bytes(message.content)
            yield self._roster.name(node), check(message.content, self._roster.member(node)), size

    def _log_refusal(self, client: str, reason: str, number: int) -> None:
        self._log.event("refused", client=client, reason=validation.one_line(reason), round=number)

    def _aggregate(self, folded: Folded, terms: Terms) -> None:
        """Take the step that the updates of a round come to.

        Raises:
            RunFailed: there is no such step, or it led to NaN or infinity.
        """
        number = terms.number
        if self._hooks.own_update:
            folded = aggregation.fold_own(folded, self._hooks.own_update, terms)
        try:
            state, gradient = aggregation.step(folded, self.state, terms)
            self.state = self._payloads.advance(number, self._source(state))
            self._round_fields = round_metrics.round_fields(folded.error, gradient, self.state, folded.poisoned)
        except TooFewAnswers as error:  # nothing is learnt then; a client must not end a run by answering badly
            self._leave_unchanged(number)
            self._round_fields = {"unchanged": True}
            self._log.event("warning", round=number, message=f"the round changes nothing: {error}")
        except (ValueError, LinAlgError) as error:  # a decomposition that does not converge, say
            raise RunFailed(f"round {number}: {error}") from error

    def _leave_unchanged(self, number: int) -> None:
        """End a round that leaves the model as it is."""
        self.state = self.state._replace(round=number)
        self.progress = self.progress._replace(unchanged=self.progress.unchanged + 1)

    # -- what is measured -----------------------------------------------------------------------

    def _measure(self, number: int, grid: Grid) -> None:
        """Measure what is due after a round; logged before the checkpoint is written, as all of a round is."""
        if evaluation.is_due(number, self.config):
            self._evaluate(number, grid)
        stages, score_stages = evaluation.finished_stages(number, self.config), self._hooks.score_stages
        if stages is not None and score_stages is not None:
            self._log.event("stage", round=number, stage=stages, **score_stages(self.state.model))

    def _evaluate(self, number: int, grid: Grid) -> None:
        server = self._hooks.evaluate(self.state.model) if self._hooks.evaluate is not None else None
        panel_scores: Scores | None = None
        sent: dict[str, int] = {}
        if self.config.scores_from_clients:
            messages = list(self.configure_evaluate(number, ArrayRecord(), ConfigRecord(), grid))
            sent = self._payloads.count_bytes(messages, "evaluate")
            replies = self._exchange(grid, messages, number)
            panel_scores = self.aggregate_evaluate(number, replies) or {}  # type: ignore[assignment]
        scores, fields = evaluation.combine(server, panel_scores)
        self._log.event("evaluate", round=number, **fields, **sent)
        if reason := self._watch.hold(number, server, panel_scores, self.progress):
            self._hooks.forget(self.progress.sound_round, self.progress)
            raise RunFailed(reason)
        self.progress = self.progress.with_loss(number, self._watch.loss)
        if not scores and number == 0 and self.config.evaluate.patience:
            self._log.event("warning", round=number, message=_UNDECIDED)
        self.progress = self.progress.with_scores(number, scores)
        if reason := evaluation.stop_reason(self.progress.evaluations_without_gain, self.config):
            self._stop(number, reason)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The `Score` of each client on its own held-out rows, a list of its three sums: zeros if they are too few."""
        sums: dict[str, list[float]] = {}
        for client, score, _ in self._read(replies, functools.partial(read_score, config=self.config)):
            if isinstance(score, Refusal):
                self._watch.senseless += score.poisoned
                self._log_refusal(client, score.reason, server_round)
                continue
            self._payloads.confirm(client)
            sums[client] = [float(value) for value in score]
        return MetricRecord({name: sums[name] for name in sorted(sums)})


def _there(rounds: Rounds, number: int) -> set[str]:
    """The members that can be asked in a round."""
    return rounds._roster.members.keys() - rounds._hooks.away(number)


def _record(rounds: Rounds, number: int, settled: Settled) -> None:
    """Enter a settled reply into the log, the progress and its sender's info."""
    client, reply, size = settled[:3]
    if not isinstance(reply, Decline):
        rounds.progress = rounds.progress.with_spent(client, reply.spent)
    if isinstance(reply, Refusal):
        rounds._log_refusal(client, reply.reason, number)
        return
    rounds._payloads.confirm(client)
    if isinstance(reply, Decline):
        if reply.reason == "budget":
            rounds.progress = rounds.progress.with_budget_spent(client)
        rounds._log.event("declined", round=number, **reply._asdict())
        return
    info = rounds._roster.members[client].info
    rounds.progress = rounds.progress.with_update(reply.update, number, info.rank)
    rounds._roster.set_info(info._replace(last_round=number, rank=reply.update.rank))
    rounds._watch.add(reply)
    fields = {**round_metrics.visit_fields(reply, rounds.aggregator), **settled.limits}
    rounds._log.event("client", round=number, client=client, bytes_up=size, **fields)
