"""What a client does when it is asked: shake hands, train, evaluate. No Flower here.

A worker loads the base model once and serves any number of sites, one at a time: all virtual clients of a simulation,
or the one site of an organisation.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from apiary.config import schedule
from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.errors import BudgetSpent
from apiary.core.messages import CurationCounts, Decline, Hello, Payload, Score, Spent, Update, Visit
from apiary.core.tensors import StateDict, add, is_finite
from apiary.data import store, tokenization
from apiary.data.batches import Corpus
from apiary.data.federation import FEWEST, deciding_of
from apiary.data.stages import rows_by_stage
from apiary.export import adapter_folder
from apiary.models import adapters, gates
from apiary.models.adapters import LanguageModel
from apiary.models.inference import ModelProbe
from apiary.transport.codec import Shapes
from client import compression, private_visit, replay, round_files, second_adapter, state, told
from client.private_visit import Work
from client.replay import StageData
from client.site import Site
from client.site_rows import SiteRows
from client.state import Memory
from client.training import trainer, zeroth_order
from client.training.objectives import build_penalties
from client.training.trainer import FitResult, Replay, VisitPlan
from strategies.from_config import local_from_config
from strategies.local import NOTHING, Client, Hooks, LocalAlgorithm, Opened


class Worker:
    """Answers the server's questions for the sites it is given. What it holds between them can be made again.

    Args:
        config: the run.
        local: the client's half of the run's method; None: the one that the configuration names.

    Raises:
        UserError: unknown names or options, or the model or the template can't be had.
    """

    def __init__(self, config: RunConfig, local: LocalAlgorithm | None = None) -> None:
        self.config = config
        self.local = local or local_from_config(config)
        self.tokenizer = adapters.load_base(config.model)[1]
        self.template = tokenization.make_template(config.prompt, self.tokenizer)
        self._rows = SiteRows(config, self.tokenizer, self.template)
        self._up = compression.up(config, self.local)

    def _model(self, site: Site) -> LanguageModel:
        """The model with an adapter of the site's rank; all ranks share one base."""
        return adapters.load(self.config.model, self.config.adapter.of_rank(site.rank))

    def _probe(self, site: Site, payload: Payload) -> ModelProbe:
        """The model with a received adapter, to be asked."""
        lm = self._model(site)
        adapters.set_adapter(lm, payload.model)
        return ModelProbe(lm)

    def shapes(self, site: Site) -> Shapes:
        """The shapes of what the site's adapter has in common with the server's."""
        return {n: p.shape for n, p in self._model(site).adapter.items() if self.local.shares(n)}

    def hello(self, site: Site) -> Hello:
        """Who the site is, what it runs, and how much it has to train on, as its policy for counts lets it tell.

        Under differential privacy how much that is stays untold.
        """
        fingerprint = adapters.fingerprint(self._model(site), self.template)
        if self.config.privacy.unit == "record":
            return Hello(site.client, fingerprint, site.rank, None, None, counts=site.counts.kind)
        stats = self._rows.corpus(site, "train", site.train).stats
        enough = stats.examples >= site.fewest
        known = (stats.examples, stats.response_tokens) if enough else (0, 0)
        counts = told.handshake(site.counts, *known, self.config)
        return Hello(site.client, fingerprint, site.rank, *counts, counts=site.counts.kind)

    # -- training -------------------------------------------------------------------------------

    def train(self, site: Site, number: int, payload: Payload) -> Visit | Decline:
        """Train from the received adapter on the next part of the site's data.

        The rows are curated, those of the stage are taken, and kept rows of earlier stages are mixed in. Of few rows a
        site tells no loss, and without privacy it neither trains on so few nor replays them. Where the method has an
        own adapter beside, it is trained too, and its steps and tokens are counted with the others.

        Args:
            site: whose data.
            number: the round, from 1.
            payload: the server's adapter.

        Returns:
            The change of the adapter with its weight (new tokens trained), and counts; or why there is none.
        """
        round_files.begin(site.folder, number)
        site = self._of_round(site, payload)
        past = state.load(site.folder, before=number)
        opened, own = self._open(site, number, payload), self._open_own(site, number, payload)
        payload = opened.over(payload)
        rows, chosen = self._rows.chosen(site, number, lambda: self._probe(site, payload))
        data = replay.prepare(rows, site.folder, site.client, self.config, number, past)
        if chosen and past.choice and past.choice != chosen.round:  # other rows: their epochs begin anew
            data = data._replace(cursor=trainer.Cursor(data.cursor.epoch + 1))
        if self.config.privacy.unit == "record":
            return self._train_privately(site, number, payload, opened.hooks, data)
        corpus = self._rows.corpus(site, "train", data.new)
        if len(corpus) < max(1, site.fewest):
            return Decline(site.client, "idle")
        plan = self._plan(site, number, corpus, data)
        hooks = self._with_penalties(opened.hooks, payload)
        result = self._fit(site, payload, corpus, second_adapter.plan_of_sent(self.local, plan)._replace(hooks=hooks))
        if own:
            then = second_adapter.plan_of_own(self.local, plan, result)
            then = then._replace(observers=(state.step_log(site.folder, number, own=True),))
            made = second_adapter.train(self._model(site), own, payload.base_delta, corpus, self.config.train, then)
            begun = made.result or self._kept(site, number, payload)  # else it still is whatever the server sends
            own = own._replace(adapter=made.adapter) if begun else None
            result = second_adapter.whole_visit(result, made)
        at = Memory(number, result.cursor, data.stage, result.replay, chosen.round if chosen else 0)
        report = result.report if result.walked >= site.fewest else result.report._replace(loss=math.nan)
        result = result._replace(report=told.report(site.counts, report, self.config, result.rows))
        curated = told.curated(site.counts, chosen.counts if chosen else None)
        return self._visit(site, at, payload, result, own=own.adapter if own else {}, curated=curated)

    def _plan(self, site: Site, number: int, corpus: Corpus, data: StageData) -> VisitPlan:
        """A visit with all of its steps, and without hooks."""
        config = self.config.train
        kept = data.replay if len(data.replay) >= site.fewest else ()
        old = self._rows.corpus(site, "buffer", tuple(row.example for row in kept))
        again = Replay(old, data.replay_cursor, self.config.continual.replay)
        steps = trainer.steps_per_round(config, corpus, again)
        return VisitPlan(
            seed=self.config.seed,
            client=site.client,
            steps=steps,
            total_steps=data.rounds * steps,
            first_step=data.rounds_before * steps,
            cursor=data.cursor,
            replay=again,
            factors=self.config.adapter.trained(number),
            observers=(state.step_log(site.folder, number),),
        )

    def _fit(self, site: Site, payload: Payload, corpus: Corpus, plan: VisitPlan) -> FitResult:
        lm, config = self._model(site), self.config.train
        if plan.hooks.descend:
            return zeroth_order.fit(lm, payload.model, corpus, config, plan, plan.hooks.descend)
        return trainer.fit(lm, payload.model, corpus, config, plan)

    def _with_penalties(self, hooks: Hooks, payload: Payload) -> Hooks:
        """The method's hooks with the configured penalties, which come first."""
        configured = build_penalties(self.config.train.penalties, payload.adapter)
        return hooks._replace(penalties=(*configured, *hooks.penalties))

    def _train_privately(
        self, site: Site, number: int, payload: Payload, hooks: Hooks, data: StageData
    ) -> Visit | Decline:
        """As `train`, under record-level differential privacy: no count of what curation did leaves.

        Raises:
            ValueError: the method asks for more than penalties, which alone are known to cost no privacy.
        """
        if hooks != Hooks(penalties=hooks.penalties) or self.local.own or self.local.mixes:
            raise ValueError("the client's half of this method does not go with record-level privacy")
        both = store.joined([data.new, tuple(row.example for row in data.replay)])
        corpus = self._rows.corpus(site, "train", both)
        new = len(data.new) - sum(row < len(data.new) for row in corpus.dropped)
        try:
            paid = private_visit.visit(
                self._model(site),
                self.config,
                site,
                Work(
                    corpus,
                    new,
                    site.counts.planned(rows_by_stage(site.train, self.config)),
                    data.rounds_before,
                    data.rounds,
                    self._with_penalties(hooks, payload).penalties,
                    (state.step_log(site.folder, number),),
                ),
                payload,
                number,
            )
        except BudgetSpent:
            return Decline(site.client, "budget")
        if paid is None:
            return Decline(site.client, "idle")
        result, spent = paid
        return self._visit(site, Memory(number, stage=data.stage), payload, result, spent=spent)

    def _visit(
        self,
        site: Site,
        at: Memory,
        payload: Payload,
        result: FitResult,
        *,
        own: StateDict = NOTHING,
        curated: CurationCounts | None = None,
        spent: Spent | None = None,
    ) -> Visit:
        """The answer of a finished visit, once what the site keeps of it is on its disk."""
        sent, kept = self.local.finish(payload.adapter, result.delta)
        if kept := own or kept:
            round_files.save_of_method(site.folder, self.local, at.round, kept, payload.last_round, self.config)
        if self.local.personal:  # it may never be asked to measure
            mine = payload._replace(adapter=own or add(payload.adapter, result.delta))
            self._save_own(site, mine)
        state.save(site.folder, at, round_files.sound_before(self.config, at.round))
        update = Update(site.client, sent, float(result.report.tokens), self.local.rank(sent, site.rank))
        return Visit(update, result.report, curated, spent)

    def send(self, site: Site, number: int, payload: Payload, answer: Visit | Decline) -> bytes:
        """The message of an answer's change, once what the method keeps of a change that is sent is on disk.

        A change with NaN, which only an attacker has, is not coded, for no codec takes it; nor is there one to decline.
        """
        if isinstance(answer, Decline):
            return b""
        delta = answer.update.delta
        try:
            message = compression.encode(self.config, self._up, site, number, delta)
        except ValueError:
            if is_finite(delta):
                raise
            message = b""
        if self.local.settle and payload.extra:
            arrived = compression.arrives(self._up, message, delta)
            lr_sum = schedule.lr_sum(self.config, number, answer.report.steps)
            settled = self.local.settle(self._kept(site, number, payload), payload, arrived, lr_sum)
            kept = {**round_files.load(site.folder, self.local.keeps, number), **settled}
            round_files.save_of_method(site.folder, self.local, number, kept, payload.last_round, self.config)
        return message

    # -- measuring ------------------------------------------------------------------------------

    def evaluate(self, site: Site, payload: Payload, number: int = sys.maxsize) -> Score:
        """The received adapter's loss on the site's held-out examples, as sums, after round `number`.

        Where the run may stop early, on the half of them that decides. Below `FEWEST` examples nothing is told, for the
        sum would say too much of each; nor of a half by a site whose other half is so small, which the sum over both
        would then tell. Under differential privacy nothing is told at all, whatever the server asks: a loss without
        noise would be a way around it.
        """
        site = self._of_round(site, payload)
        payload = (self._open_own(site, number + 1, payload) or self._open(site, number + 1, payload)).over(payload)
        if self.local.personal:
            self._save_own(site, payload)
        if self.config.privacy.unit == "record":
            return Score(0.0, 0, 0)
        rows = deciding_of(site.test) if self.config.evaluate.patience else site.test
        corpus = self._rows.corpus(site, "test", rows)
        if len(corpus) < FEWEST or 0 < len(site.test) - len(rows) < site.fewest:
            return Score(0.0, 0, 0)
        nats, tokens = self._probe(site, payload).losses(corpus)
        return told.score(site.counts, Score(float(nats.sum()), int(tokens.sum()), len(nats)), self.config)

    def _save_own(self, site: Site, mine: Payload) -> None:
        """Write the model that only the site itself has."""
        sample = self._rows.corpus(site, "gates", gates.sample(site.train)) if self.local.mixes else None
        save_own(self._model(site), mine.model, site.folder / "adapter", self.config, sample)

    # -- the method -----------------------------------------------------------------------------

    def _of_round(self, site: Site, payload: Payload) -> Site:
        """The site with the rank that it has in this round."""
        return site._replace(rank=self.local.rank(payload.adapter, site.rank))

    def _open(self, site: Site, number: int, payload: Payload) -> Opened:
        """What a visit of round `number` starts from: a whole adapter, and the method's hooks."""
        return open_received(self._model(site), self.config, self.local, self._kept(site, number, payload), payload)

    def _open_own(self, site: Site, number: int, payload: Payload) -> Opened | None:
        """Where the training of the client's own adapter starts in that visit; None where the method has none."""
        return open_own(self._model(site), self.config, self.local, self._kept(site, number, payload), payload)

    def _kept(self, site: Site, number: int, payload: Payload) -> StateDict:
        """The method's state that a visit of round `number` starts with."""
        return round_files.of_method(site.folder, self.local, number, payload.last_round)


def open_received(
    lm: LanguageModel, config: RunConfig, local: LocalAlgorithm, kept: StateDict, payload: Payload
) -> Opened:
    """What a client makes of a payload: a whole adapter, and the hooks that the method asks for.

    Args:
        lm: the model with an adapter of the client's rank.
        config: the run.
        local: the client's half of its method.
        kept: the method's state at the client.
        payload: as it was received.

    Raises:
        apiary.core.errors.StateLost: the client no longer has the state that the server counts on.
    """
    return local.open(kept, payload, _client(lm, config))


def open_own(
    lm: LanguageModel, config: RunConfig, local: LocalAlgorithm, kept: StateDict, payload: Payload
) -> Opened | None:
    """The client's own adapter beside the one that it trains for everybody, as `open_received`; None without any."""
    return local.own(kept, payload, _client(lm, config)) if local.own else None


def save_own(lm: LanguageModel, model: StateDict, folder: Path, config: RunConfig, sample: Corpus | None) -> None:
    """Write a client's model of its own as a PEFT folder.

    Args:
        lm: the base with an adapter of its rank.
        model: as for `set_adapter`.
        folder: where to.
        config: the run.
        sample: of a model with gates some training rows, over which these are fixed; None: it has none.
    """
    about = "" if sample is None else gates.FIXED
    plain = model if sample is None else gates.fixed(lm, model, sample)
    adapter_folder.save_adapter_folder(lm, plain, folder, config, about=about)


def _client(lm: LanguageModel, config: RunConfig) -> Client:
    shapes = {name: parameter.shape for name, parameter in lm.adapter.items()}
    rank = next(iter(lora.split(lm.adapter).values())).rank
    return Client(rank, shapes, fresh=lambda: adapters.fresh_adapter(lm, config.seed))
