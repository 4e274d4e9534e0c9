"""What a client does when it is asked: shake hands, train, evaluate. No Flower here.

A worker loads the base model once and serves any number of sites, one at a time: all virtual clients of a simulation,
or the one site of an organisation.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apiary.config.schema import RunConfig
from apiary.core import files, lora
from apiary.core.errors import BudgetSpent
from apiary.core.messages import Curated, Decline, Hello, Payload, Score, Spent, Update, Visit
from apiary.core.tensors import StateDict, add
from apiary.data import tokenization
from apiary.data.batches import Corpus
from apiary.data.examples import Example
from apiary.data.stages import rows_by_stage
from apiary.export import adapter_folder
from apiary.models import adapters
from apiary.models.adapters import LanguageModel
from apiary.models.inference import ModelProbe
from apiary.transport.codec import Shapes
from client import compression, control, curated_rows, personal, private_visit, pruning, round_files, state
from client import replay as continual
from client.curated_rows import Choice
from client.curation import Context, Reader
from client.private_visit import Work
from client.replay import StageData
from client.state import Memory
from client.training import trainer, zeroth_order
from client.training.objectives import build_penalties
from client.training.trainer import FitResult, Replay

_HELD_TOKENS = 50_000_000  # tokenised data held at a time (250 MB), however many virtual clients there are
_FEWEST = 5  # held-out examples


class Site(NamedTuple):
    """One organisation: its name, its examples, and the places that are its own."""

    client: str
    train: Sequence[Example]
    test: Sequence[Example]
    folder: Path  # of this run
    ledger: Path  # of all runs on these data
    rank: int  # of its adapter


class Worker:
    """Answers the server's questions for the sites it is given."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.tokenizer = adapters.load_base(config.model)[1]
        self.template = tokenization.make_template(config.prompt, self.tokenizer)
        self._corpora: OrderedDict[tuple[str, str], tuple[object, Corpus]] = OrderedDict()
        self._choices: dict[str, Choice] = {}

    def _model(self, site: Site) -> LanguageModel:
        """The model with an adapter of the site's rank; all ranks share one base."""
        return adapters.load(self.config.model, self.config.adapter.of_rank(site.rank))

    def shapes(self, site: Site) -> Shapes:
        """The shapes of what the site's adapter has in common with the server's."""
        adapter = self._model(site).adapter
        return {n: p.shape for n, p in adapter.items() if self.config.adapter.share == "both" or not lora.is_b(n)}

    def hello(self, site: Site) -> Hello:
        """Who the site is, what it runs, and how much it has to train on.

        Under differential privacy the tokens stay untold, and the rows stand in for them.
        """
        fingerprint = adapters.fingerprint(self._model(site), self.template)
        if self.config.privacy.unit == "record":
            rows = len(site.train)
            return Hello(site.client, fingerprint, site.rank, rows, rows)
        stats = self._corpus(site, "train", tuple(site.train)).stats
        return Hello(site.client, fingerprint, site.rank, stats.examples, stats.response_tokens)

    def train(self, site: Site, number: int, payload: Payload) -> Visit | Decline:
        """Train from the received adapter on the next part of the site's data.

        The rows are curated, those of the stage are taken, and kept rows of earlier stages are mixed in.

        Args:
            site: whose data.
            number: the round, from 1.
            payload: the server's adapter.

        Returns:
            The change of the adapter with its weight (new tokens trained), and counts; or why there is none.
        """
        state.own(site.folder)
        files.sweep(site.folder)
        state.forget_from(site.folder, number)
        for kind in (compression.KIND, personal.KIND, control.KIND):
            round_files.forget_from(site.folder, kind, number)
        site = site._replace(rank=pruning.rank_of(self.config, payload.adapter, site.rank))
        past = state.load(site.folder, before=number)
        payload = self._completed(site, number, payload)
        rows, chosen = self._chosen(site, number, payload)
        data = continual.prepare(rows, site.folder, site.client, self.config, number, past)
        if chosen and past.choice and past.choice != chosen.round:  # other rows: their walk begins anew
            data = data._replace(cursor=trainer.Cursor(data.cursor.epoch + 1))
        if self.config.privacy.unit == "record":
            return self._train_privately(site, number, payload, data)
        corpus = self._corpus(site, "train", data.new)
        if not len(corpus):
            return Decline(site.client, "idle")
        config = self.config.train
        old = self._corpus(site, "buffer", tuple(row.example for row in data.replay))
        replay = Replay(old, data.replay_cursor, self.config.continual.replay)
        steps = trainer.steps_per_round(config, corpus, replay)
        first, total = data.rounds_before * steps, data.rounds * steps
        observers = [state.step_log(site.folder, number)]
        if zeroth_order.used(self.config):
            place = zeroth_order.Place(site.client, data.cursor, first, total, steps)
            result = zeroth_order.fit(self._model(site), payload.model, corpus, self.config, place, observers)
        else:
            result = trainer.fit(
                self._model(site),
                payload.model,
                corpus,
                config,
                seed=self.config.seed,
                client=site.client,
                cursor=data.cursor,
                first_step=first,
                total_steps=total,
                steps=steps,
                replay=replay,
                penalties=(
                    *build_penalties(config.penalties, payload.adapter),
                    *pruning.penalties(self.config, site.rank),
                ),
                observers=observers,
                factors=self.config.adapter.trained(number),
                correction=control.correction(site.folder, payload),
            )
        result = result._replace(delta=pruning.pruned(self.config, payload.adapter, result.delta))
        at = Memory(number, result.cursor, data.stage, result.replay, chosen.round if chosen else 0)
        return self._visit(site, at, payload, result, chosen.counts if chosen else None)

    def _train_privately(self, site: Site, number: int, payload: Payload, data: StageData) -> Visit | Decline:
        """As `train`, under record-level differential privacy: no count of what curation did leaves."""
        both = (*data.new, *(row.example for row in data.replay))
        corpus = self._corpus(site, "train", both)
        new = len(data.new) - sum(row < len(data.new) for row in corpus.dropped)
        rows = rows_by_stage(site.train, self.config)
        try:
            paid = private_visit.visit(
                self._model(site),
                self.config,
                Work(corpus, new, rows, data.rounds_before, data.rounds),
                payload,
                number,
                folder=site.folder,
                ledger=site.ledger,
                penalties=build_penalties(self.config.train.penalties, payload.adapter),
                observers=[state.step_log(site.folder, number)],
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
        curated: Curated | None = None,
        spent: Spent | None = None,
    ) -> Visit:
        delta: StateDict = result.delta
        if self.config.adapter.share == "a":
            personal.keep(site.folder, at.round, payload.adapter, delta)
            self._save_own(site, add(payload.adapter, delta))  # it may never be asked to measure
            delta = lora.only_a(delta)
        state.save(site.folder, at)
        rank = pruning.rank_of(self.config, delta, site.rank)
        update = Update(site.client, delta, float(result.report.tokens), rank)
        return Visit(update, result.report, curated, spent)

    def _save_own(self, site: Site, adapter: StateDict) -> None:
        """Write the model that only the site itself has."""
        adapter_folder.save_adapter_folder(self._model(site), adapter, site.folder / "adapter", self.config)

    def evaluate(self, site: Site, payload: Payload, number: int = sys.maxsize) -> Score:
        """The received adapter's loss on the site's held-out examples, as sums, after round `number`.

        Below `_FEWEST` examples nothing is told: the sum would say too much of each. Under differential privacy
        nothing is told at all, whatever the server asks: a loss without noise would be a way around it.
        """
        site = site._replace(rank=pruning.rank_of(self.config, payload.adapter, site.rank))
        payload = self._completed(site, number + 1, payload)
        if self.config.adapter.share != "both":  # nobody else can put the site's own model together
            self._save_own(site, payload.model)
        if self.config.privacy.unit == "record":
            return Score(0.0, 0, 0)
        corpus = self._corpus(site, "test", site.test)
        if len(corpus) < _FEWEST:
            return Score(0.0, 0, 0)
        lm = self._model(site)
        adapters.set_adapter(lm, payload.model)
        nats, tokens = ModelProbe(lm).losses(corpus)
        return Score(float(nats.sum()), int(tokens.sum()), len(nats))

    def _completed(self, site: Site, number: int, payload: Payload) -> Payload:
        """What was sent as a whole adapter.

        That is with the site's own factors as of before round `number` where it keeps some to itself, or rebuilt where
        scalars alone travel.
        """
        if zeroth_order.used(self.config):
            return zeroth_order.opened(self._model(site), payload, self.config)
        if self.config.adapter.share == "both":
            return payload
        return payload._replace(adapter=personal.complete(self._model(site), site.folder, number, payload.adapter))

    def _chosen(self, site: Site, number: int, payload: Payload) -> tuple[Sequence[Example], Choice | None]:
        """The rows that curation leaves for a round, and what it did; all of them where nothing is configured."""
        if not self.config.curate.steps:
            return tuple(site.train), None
        made = curated_rows.choose(
            site.train,
            self.config.curate,
            self._context(site, payload, number),
            site.folder,
            number,
            self._choices.get(site.client),
            empty_ok=self.config.privacy.unit == "record",
        )
        self._choices[site.client] = made
        return made.examples, made

    def _context(self, site: Site, payload: Payload, number: int) -> Context:
        def probe() -> ModelProbe:
            lm = self._model(site)
            adapters.set_adapter(lm, payload.model)
            return ModelProbe(lm)

        reader = Reader(self.template, self.tokenizer, self.config.prompt, probe)
        return Context(self.config.seed, site.client, site.test, reader, trained=number - 1)

    def _corpus(self, site: Site, part: str, examples: Sequence[Example]) -> Corpus:
        """The tokens of a part of the site's rows; made again where it has come to hold others."""
        key = (site.client, part)
        if key not in self._corpora or self._corpora[key][0] != examples:
            made = tokenization.encode_all(examples, self.template, self.tokenizer, self.config.prompt)
            self._corpora[key] = (examples, made)
            while len(self._corpora) > 1 and sum(c.stats.tokens for _, c in self._corpora.values()) > _HELD_TOKENS:
                self._corpora.popitem(last=False)
        self._corpora.move_to_end(key)
        return self._corpora[key][1]
