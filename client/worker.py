"""What a client does when it is asked: shake hands, train, evaluate. No Flower here.

A worker loads the base model once and serves any number of sites, one at a time: all virtual clients of a simulation,
or the one site of an organisation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apiary import models, prompts
from apiary.batches import Corpus
from apiary.config import RunConfig
from apiary.examples import Example
from apiary.exchange import FitReport, Hello, Payload, Score, Update
from apiary.probe import ModelProbe
from client import memory, trainer
from client.objectives import build_penalties

_HELD_TOKENS = 50_000_000  # tokenised data held at a time (250 MB), however many virtual clients there are
_FEWEST = 5  # held-out examples


class Site(NamedTuple):
    """One organisation: its name, its examples, and the folder that is its own."""

    client: str
    train: Sequence[Example]
    test: Sequence[Example]
    folder: Path


class Worker:
    """Answers the server's questions for the sites it is given."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.lm = models.load(config.model, config.adapter)
        self.template = prompts.make_template(config.prompt, self.lm.tokenizer)
        self._corpora: OrderedDict[tuple[str, str], Corpus] = OrderedDict()

    def hello(self, site: Site) -> Hello:
        """Who the site is, what it runs, and how much it has to train on."""
        stats = self._corpus(site, "train").stats
        fingerprint = models.fingerprint(self.lm, self.template)
        return Hello(site.client, fingerprint, self.config.adapter.rank, stats.examples, stats.response_tokens)

    def train(self, site: Site, number: int, payload: Payload) -> tuple[Update, FitReport]:
        """Train from the received adapter on the next part of the site's data.

        Args:
            site: whose data.
            number: the round, from 1.
            payload: the server's adapter.

        Returns:
            The change of the adapter with its weight (trained tokens), and the counts of the visit.
        """
        config = self.config.train
        corpus = self._corpus(site, "train")
        _refuse_base_delta(payload)
        memory.forget_from(site.folder, number)
        past = memory.load(site.folder, before=number)
        steps = trainer.steps_per_round(config, corpus)
        result = trainer.fit(
            self.lm,
            payload.adapter,
            corpus,
            config,
            seed=self.config.seed,
            client=site.client,
            cursor=past.cursor,
            first_step=(number - 1) * steps,
            total_steps=self.config.rounds * steps,
            steps=steps,
            penalties=build_penalties(config.penalties, payload.adapter),
            observers=[memory.step_log(site.folder, number)],
        )
        memory.save(site.folder, memory.Memory(number, result.cursor))
        update = Update(site.client, result.delta, float(result.report.tokens), self.config.adapter.rank)
        return update, result.report

    def evaluate(self, site: Site, payload: Payload) -> Score:
        """The received adapter's loss on the site's held-out examples, as sums.

        Below `_FEWEST` examples nothing is told: the sum would say too much of each.
        """
        corpus = self._corpus(site, "test")
        _refuse_base_delta(payload)
        if len(corpus) < _FEWEST:
            return Score(0.0, 0, 0)
        models.set_adapter(self.lm, payload.adapter)
        nats, tokens = ModelProbe(self.lm).losses(corpus)
        return Score(float(nats.sum()), int(tokens.sum()), len(nats))

    def _corpus(self, site: Site, part: str) -> Corpus:
        key = (site.client, part)
        if key not in self._corpora:
            examples = site.train if part == "train" else site.test
            self._corpora[key] = prompts.encode_all(examples, self.template, self.lm.tokenizer, self.config.prompt)
            while len(self._corpora) > 1 and sum(c.stats.tokens for c in self._corpora.values()) > _HELD_TOKENS:
                self._corpora.popitem(last=False)
        self._corpora.move_to_end(key)
        return self._corpora[key]


def _refuse_base_delta(payload: Payload) -> None:
    if payload.base_delta:
        raise ValueError("this version folds no base delta into its base")
