"""Engines: the same server and client apps, run in this process or by Flower's simulation on Ray."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, ErrorCode
from flwr.serverapp import Grid, ServerApp

from apiary.config.registry import Registry
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from client import handlers
from client.app import make_app
from simulation import absence
from simulation.adversaries import malicious_worker
from simulation.in_process_grid import LocalGrid


class Engine(Protocol):
    """Runs a server app against `clients` virtual nodes until it returns or raises."""

    def __call__(self, app: ServerApp, config: RunConfig, clients: int, folder: Path) -> None:
        """Run."""


_LOOK_S = 0.1  # between looks for the first replies of Ray's workers

ENGINES: Registry[Engine] = Registry("simulate.engine", given=("config",))


def site_facts(config: str, folder: Path) -> Mod:
    """A mod that gives a virtual node what a real one gets from its operator: the run's config and its own folder."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        # A context of its own: Flower refuses to see its run config changed. What the app keeps in `state` is shared.
        facts = {**context.node_config, "state-path": str(folder / "clients")}
        own = Context(context.run_id, context.node_id, facts, context.state, {"config": config})
        return call_next(message, own)

    return mod


def failures(config: RunConfig) -> Mod:
    """A mod that lets the clients fail that `simulate.failing` has fail, before they train."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        clients, index = (int(context.node_config[key]) for key in (NUM_PARTITIONS_KEY, PARTITION_ID_KEY))
        asked = message.metadata.message_type == "train"
        if asked and absence.fails(config, clients, index, int(message.metadata.group_id)):
            reason = "it failed, as simulate.failing has it"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        return call_next(message, context)

    return mod


def _server_context(config: RunConfig, clients: int, folder: Path) -> Context:
    values: dict[str, Any] = {"config": config.to_json(), "out": str(folder), "expected": clients}
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=values)


@ENGINES.register("local")
def local() -> Engine:
    """One process, one client at a time: deterministic, debuggable, memory constant in the number of clients."""

    def run(app: ServerApp, config: RunConfig, clients: int, folder: Path) -> None:
        grid = LocalGrid(_client_app(config, folder), clients)
        app(grid, _server_context(config, clients, folder))

    return run


@ENGINES.register("ray")
def ray(config: RunConfig) -> Engine:
    """Flower's simulation: one Ray worker per `cpus_per_client` cores and share of a GPU, each with its own base.

    Raises:
        UserError: more cores or GPUs are asked for than the machine has.
    """
    resources = _resources(config)

    def run(app: ServerApp, config: RunConfig, clients: int, folder: Path) -> None:
        from flwr.simulation import run_simulation

        failure: list[BaseException] = []
        stop = threading.Event()
        outer = ServerApp()

        @outer.main()
        def main(grid: Grid, context: Context) -> None:
            try:
                app(cast(Grid, _RayGrid(grid, stop)), _server_context(config, clients, folder))
            except BaseException as error:  # Flower would wrap it beyond recognition
                failure.append(error)

        try:
            run_simulation(outer, _client_app(config, folder), clients, backend_config=resources)
        finally:
            stop.set()
        if failure:
            raise failure[0]

    return run


class _RayGrid:
    """Flower's grid in front of Ray's workers, as the server app uses it.

    It differs from a grid of real nodes in two ways. Once `stop` is set, its next use ends the server app: Flower runs
    that in a thread of its own, which would wait for replies long after Ctrl-C or a crash of Ray has ended the rest,
    and keep the process alive. And the first messages, which are those of the handshake, are waited for as long as it
    takes: virtual nodes are there from the start, but none answers before Ray has started and its workers have loaded
    torch and the base, and on a busy machine that takes longer than `strategy.join_timeout_s` lets a site be silent.
    """

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self._flower, self._stop = grid, stop
        self._first: set[str] | None = None  # the first messages without a reply yet; None before there are any

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; returns their ids."""
        ids = list(self._grid().push_messages(messages))
        if self._first is None:
            self._first = set(ids)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; at least one if a reply to the first messages is asked for."""
        asked = list(message_ids)
        first = self._first or set()
        replies = list(self._grid().pull_messages(asked))
        while not replies and not first.isdisjoint(asked):
            self._stop.wait(_LOOK_S)
            replies = list(self._grid().pull_messages(asked))
        first -= {reply.metadata.reply_to_message_id for reply in replies}
        return replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid(), name)

    def _grid(self) -> Grid:
        if self._stop.is_set():
            raise KeyboardInterrupt
        return self._flower


def _client_app(config: RunConfig, folder: Path) -> ClientApp:
    virtual = None
    if config.simulate.attackers:
        virtual = functools.partial(
            handlers.simulated, worker_of=functools.partial(malicious_worker, state=folder / "clients")
        )
    mods = [failures(config)] if config.simulate.failing else []
    return make_app(*mods, site_facts(config.to_json(), folder), virtual=virtual)


def _resources(config: RunConfig) -> Any:
    """What Ray gives each worker."""
    cores = os.cpu_count() or 1
    wanted = config.simulate.cpus_per_client
    if wanted > cores:
        raise UserError(f"simulate.cpus_per_client = {wanted}: this machine has {cores} cores")
    gpus = torch.cuda.device_count()
    if config.simulate.gpus_per_client > gpus:
        raise UserError(
            f"simulate.gpus_per_client = {config.simulate.gpus_per_client:g}: this machine has {gpus} GPUs; use 0"
        )
    logging.getLogger("flwr").setLevel(logging.ERROR)
    quiet = {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    return {
        "init_args": quiet,
        "client_resources": {"num_cpus": wanted, "num_gpus": config.simulate.gpus_per_client},
    }
