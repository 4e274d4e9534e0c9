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
from collections.abc import Sequence
from pathlib import Path

import torch

from apiary.config import loading
from apiary.config.schema import RunConfig, SimulateConfig
from apiary.core.errors import UserError
from apiary.core.messages import Decline, Payload, Visit
from apiary.core.tensors import StateDict, generator
from client import handlers
from client.site import Site
from client.worker import Worker
from simulation.attacks import (
    ATTACKS,
    Attack,
    Seen,
)

# -- attacks on the change --------------------------------------------------------------------------------------------


# -- attacks on the rows ----------------------------------------------------------------------------------------------


# -- who attacks ------------------------------------------------------------------------------------------------------


def check(config: RunConfig) -> None:
    """Check the name and options of the attack.

    Raises:
        UserError: the attack has an unknown name or option.
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


class MaliciousWorker(Worker):
    """Answers for all virtual clients of a run, some of which attack.

    Args:
        config: the run, as JSON.
        state: the folder that holds the clients' own.
    """

    def __init__(self, config: str, state: Path) -> None:
        super().__init__(loading.from_json(config))
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
def malicious_worker(config: str, state: Path) -> MaliciousWorker:
    """The one `MaliciousWorker` of this process."""
    return MaliciousWorker(config, state)


def forget() -> None:
    """Read everything again when it is next asked for."""
    handlers.forget()
    malicious_worker.cache_clear()
