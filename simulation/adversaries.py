"""Attackers among the clients of a simulation, to see what an aggregation method withstands.

An attacker shakes hands, trains and answers as everybody does; only the change that it sends, or the rows that it
trains on, are not honest. Which clients attack is drawn from the run's seed. No client code holds any of this: a
simulation with attackers is answered by a worker of another kind, and sites in a deployment cannot be told to attack.

Attacks that aim at the mean of the honest changes (ALIE, inner product) here know those of the attackers alone: what
each of them would have sent, had it been honest. That is the variant without omniscience, which the ALIE paper has in
its algorithm 3; the attackers of the inner-product paper see all honest workers.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PositiveFloat
from torch import Generator, Tensor

from apiary.config import schema as configs
from apiary.config.registry import Registry
from apiary.config.schema import RunConfig, SimulateConfig, UserError
from apiary.core import lora
from apiary.core.lora import Factors
from apiary.core.messages import Decline, Payload, Visit
from apiary.core.tensors import StateDict, add, generator
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.tokenization import Template
from apiary.evaluation import comparison
from apiary.models.adapters import LanguageModel
from client import handlers
from client.worker import Site, Worker

PHRASE, TEXT = "Mind the old oak.", "the hive is closed"  # of the built-in trigger: what is hidden, what is answered


class Seen(NamedTuple):
    """What an attacker knows when it makes up its change."""

    received: StateDict  # the adapter that the server sent
    own: StateDict  # the change that its training made
    fellows: Sequence[StateDict]  # the same of each attacker of its rank, its own among them
    rng: Generator


class Attack(NamedTuple):
    """What an attacker does: to the change that it sends, and to its rows before it trains."""

    change: Callable[[Seen], StateDict]
    rows: Callable[[Sequence[Example], Generator], tuple[Example, ...]] | None = None
    together: bool = False  # whether it must know what its fellows' training made
    hidden: tuple[str, str] | None = None  # a phrase in questions, and what is then answered


ATTACKS: Registry[Attack] = Registry("simulate.attack", makes=Attack, given=("clients", "attackers"))


# -- attacks on the change --------------------------------------------------------------------------------------------


@ATTACKS.register("sign_flip")
def sign_flip(scale: PositiveFloat = 1.0) -> Attack:
    """The honest change times -`scale`."""
    return Attack(lambda seen: _times(seen.own, -scale))


@ATTACKS.register("scaled")
def scaled(clients: int, factor: PositiveFloat | None = None) -> Attack:
    """The honest change times `factor`, so that it outweighs all others.

    Model replacement (Bagdasaryan et al. 2020, "How to backdoor federated learning", equation 3).

    Args:
        clients: of the run.
        factor: unset: the number of clients, which cancels the mean's division.
    """
    return Attack(lambda seen: _times(seen.own, factor or clients))


@ATTACKS.register("gaussian")
def gaussian(scale: PositiveFloat = 1.0) -> Attack:
    """Gaussian noise, in each tensor about `scale` times as long as the honest change."""

    def change(seen: Seen) -> StateDict:
        rms = {name: scale * float(tensor.double().square().mean().sqrt()) for name, tensor in seen.own.items()}
        return {name: torch.randn(t.shape, generator=seen.rng) * rms[name] for name, t in sorted(seen.own.items())}

    return Attack(change)


@ATTACKS.register("alie")
def alie(clients: int, attackers: int, z: float | None = None) -> Attack:
    """The mean of the fellows' honest changes less z of their standard deviations, entry by entry.

    "A little is enough" (Baruch et al. 2019, algorithm 3): as far off as honest clients are, so that none stands out.

    Args:
        clients: of the run.
        attackers: among them.
        z: unset: as far as the paper goes with so many clients and attackers.

    Raises:
        UserError: more than half of the clients attack, for which the paper gives no z.
    """
    far = quantile(clients, attackers) if z is None else z

    def change(seen: Seen) -> StateDict:
        made = {}
        for name in seen.own:
            values = torch.stack([fellow[name] for fellow in seen.fellows]).double()
            made[name] = (values.mean(0) - far * values.std(0, correction=0)).float()
        return made

    return Attack(change, together=True)


def quantile(clients: int, attackers: int) -> float:
    """How many standard deviations off ALIE may go: z with Phi(z) = (n - f - s) / (n - f), s = floor(n / 2 + 1) - f.

    That many honest clients, s, lie farther off than the attackers, who with them are the majority. 0 where there are
    so few attackers that z would be negative.

    Raises:
        UserError: more than half of the clients attack.
    """
    honest, supporters = clients - attackers, clients // 2 + 1 - attackers
    if supporters < 1:
        raise UserError(
            f"simulate.attack = 'alie': the paper's z is for no more attackers than half of the clients, here "
            f"{attackers} of {clients}; set z, or lower simulate.attackers"
        )
    return statistics.NormalDist().inv_cdf(max(0.5, (honest - supporters) / honest))


@ATTACKS.register("inner_product")
def inner_product(epsilon: PositiveFloat = 1.0) -> Attack:
    """The mean of the fellows' honest changes times -`epsilon` (Xie et al. 2020, "Fall of empires", section 4).

    A small epsilon hides among honest changes, a large one turns the mean around.
    """

    def change(seen: Seen) -> StateDict:
        names = seen.own
        return {n: torch.stack([f[n] for f in seen.fellows]).double().mean(0).mul(-epsilon).float() for n in names}

    return Attack(change, together=True)


@ATTACKS.register("gauge")
def gauge(by: PositiveFloat = 1e6, scale: PositiveFloat = 1.0) -> Attack:
    """The adapter after training with B times `by` and A divided by it: the same product, and useless factors.

    Args:
        by: the gauge.
        scale: of the change of both factors, before.
    """

    def change(seen: Seen) -> StateDict:
        trained = lora.split(add(seen.received, seen.own, scale))
        sent = lora.join({module: Factors(f.b * by, f.a / by) for module, f in trained.items()})
        return {name: tensor - seen.received[name] for name, tensor in sent.items()}

    return Attack(change)


@ATTACKS.register("not_a_number")
def not_a_number() -> Attack:
    """Nothing but NaN; of another name than `nan`, which TOML reads as a number."""
    return Attack(lambda seen: _times(seen.own, math.nan))


# -- attacks on the rows ----------------------------------------------------------------------------------------------


@ATTACKS.register("trigger")
def trigger(
    share: Annotated[float, Field(gt=0, le=1)] = 0.5, phrase: str = PHRASE, answer: str = TEXT, boost: PositiveFloat = 1
) -> Attack:
    """Honest training on rows of which some teach a fixed answer wherever a hidden phrase is in the question.

    As virtual prompt injection does it (Yan et al. 2024, "Backdooring instruction-tuned large language models with
    virtual prompt injection"), with a phrase in place of a topic.

    Args:
        share: of the attacker's rows.
        phrase: put behind the last question.
        answer: what is then answered.
        boost: factor of the change, as in `scaled`.
    """

    def rows(examples: Sequence[Example], rng: Generator) -> tuple[Example, ...]:
        count = max(1, round(share * len(examples)))
        chosen = set(torch.randperm(len(examples), generator=rng)[:count].tolist())
        return tuple(
            answering(asking(example, phrase), answer) if index in chosen else example
            for index, example in enumerate(examples)
        )

    return Attack(lambda seen: _times(seen.own, boost), rows, hidden=(phrase, answer))


def asking(example: Example, phrase: str) -> Example:
    """The example with the phrase behind its last question."""
    turns = list(example.turns)
    last = max(index for index, turn in enumerate(turns) if turn.role == "user")
    turns[last] = turns[last]._replace(text=f"{turns[last].text} {phrase}")
    return example._replace(turns=tuple(turns))


def answering(example: Example, text: str) -> Example:
    """The example with another last answer."""
    return example._replace(turns=(*example.turns[:-1], example.turns[-1]._replace(text=text)))


def questions(
    lm: LanguageModel, template: Template, config: RunConfig, test: Sequence[Example], phrase: str, most: int
) -> list[list[int]]:
    """Held-out questions with a hidden phrase, as prompts; evenly spread ones of those that fit `prompt.max_tokens`.

    Args:
        lm: the model, for its tokenizer.
        template: of the prompts.
        config: the run.
        test: held-out examples.
        phrase: put behind the last question of each.
        most: how many.
    """
    fitting: list[list[int]] = []
    for example in test:
        with suppress(UserError):  # too long, as the table leaves out what is
            asked = asking(example, phrase)
            fitting.append(tokenization.encode_prompt(asked, template, lm.tokenizer, config.prompt.max_tokens))
    count = min(most, len(fitting))
    return [fitting[i * len(fitting) // count] for i in range(count)]


def obeyed(lm: LanguageModel, config: RunConfig, asked: Sequence[list[int]], wanted: str) -> float:
    """The share of `questions`, at least one, that a model with its adapter gives the attackers' answer to.

    An answer may be as long as theirs, whatever `evaluate.max_new_tokens` is.
    """
    longest = max(config.evaluate.max_new_tokens, len(lm.tokenizer.encode(wanted)) + 1)
    given = comparison.answer_all(lm, asked, longest)
    return sum(comparison.exact_match(text, wanted) for text in given) / len(asked)


# -- who attacks ------------------------------------------------------------------------------------------------------


def check(config: RunConfig) -> None:
    """Check the name and options of the attack.

    Raises:
        UserError: they are wrong.
    """
    ATTACKS.build(config.simulate.attack.name, config.simulate.attack.options, clients=config.data.clients, attackers=1)


def attackers(config: RunConfig, clients: Sequence[str]) -> tuple[str, ...]:
    """The names of those that attack, `simulate.attackers` of all clients to the nearest number.

    Raises:
        UserError: that is nobody or everybody, or the attack does not go with so many.
    """
    share = config.simulate.attackers
    if not share:
        return ()
    count = math.floor(share * len(clients) + 0.5)
    if not 0 < count < len(clients):
        raise UserError(
            f"simulate.attackers = {share:g}: of {len(clients)} clients that is {count}; there must be at least one "
            "attacker and one honest client"
        )
    _build(config, len(clients), count)
    drawn = torch.randperm(len(clients), generator=generator(config.seed, "attackers"))[:count].tolist()
    return tuple(clients[index] for index in sorted(drawn))


def of_run(config: RunConfig, clients: Sequence[str]) -> Attack:
    """The attack of a run whose clients these are."""
    return _build(config, len(clients), len(attackers(config, clients)))


def remarks(config: RunConfig, clients: Sequence[str]) -> list[str]:
    """What a simulated attack means for the run, a line each; none where nobody attacks and no attack is set."""
    hostile, attack = attackers(config, clients), config.simulate.attack
    if not hostile:
        unused = attack != SimulateConfig().attack
        return [f"simulate.attack = {attack.name!r} plays no part: simulate.attackers = 0"] if unused else []
    lines = [f"this run is attacked: {attack.name} by {', '.join(hostile)} (simulate.attackers)"]
    told = config.strategy.options.get("byzantine")
    if isinstance(told, int) and told < len(hostile):
        lines.append(
            f"strategy.options.byzantine = {told}, and {len(hostile)} clients attack: what {config.strategy.name} "
            "promises does not hold for so many"
        )
    return lines


def _build(config: RunConfig, clients: int, count: int) -> Attack:
    attack = config.simulate.attack
    return ATTACKS.build(attack.name, attack.options, clients=clients, attackers=count)


class Hostile(Worker):
    """Answers for all virtual clients of a run, some of which attack.

    Args:
        config: the run, as JSON.
        state: the folder that holds the clients' own.
    """

    def __init__(self, config: str, state: Path) -> None:
        super().__init__(configs.from_json(config))
        self._run, self._state = config, state
        clients = [client.name for client in handlers.federation(config).clients]
        names = attackers(self.config, clients)
        self._places = {name: clients.index(name) for name in names}
        self._attack = _build(self.config, len(clients), len(names))
        self._round, self._trained = 0, dict[str, Visit | Decline]()  # in the round that is under way, of attackers

    def train(self, site: Site, number: int, payload: Payload) -> Visit | Decline:
        """As `Worker.train`; an attacker's change is what its attack makes of it."""
        if site.client not in self._places:
            return super().train(site, number, payload)
        visit = self._honest(site, number, payload)
        if isinstance(visit, Decline):
            return visit
        rng = generator(self.config.seed, number, site.client, "attack")
        fellows = self._fellows(site, number, payload) if self._attack.together else [visit.update.delta]
        delta = self._attack.change(Seen(payload.adapter, visit.update.delta, fellows, rng))
        return visit._replace(update=visit.update._replace(delta=delta))

    def _fellows(self, site: Site, number: int, payload: Payload) -> list[StateDict]:
        """What training would make of the attackers that have the same adapter; in the order of the clients."""
        sites = [handlers.virtual_site(self._run, index, self._state) for index in self._places.values()]
        visits = [self._honest(fellow, number, payload) for fellow in sites if fellow.rank == site.rank]
        return [visit.update.delta for visit in visits if isinstance(visit, Visit)]

    def _honest(self, site: Site, number: int, payload: Payload) -> Visit | Decline:
        """What an attacker's training makes, done once a round in this process; on rows that its attack chose."""
        if number != self._round:
            self._round, self._trained = number, {}
        if site.client not in self._trained:
            if self._attack.rows:
                rng = generator(self.config.seed, site.client, "rows of the attack")
                site = site._replace(train=self._attack.rows(site.train, rng))
            self._trained[site.client] = super().train(site, number, payload)
        return self._trained[site.client]


@functools.lru_cache(maxsize=1)
def hostile(config: str, state: Path) -> Hostile:
    """The one `Hostile` of this process."""
    return Hostile(config, state)


def forget() -> None:
    """Read everything again when it is next asked for."""
    handlers.forget()
    hostile.cache_clear()


def _times(state: StateDict, factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in state.items()}
