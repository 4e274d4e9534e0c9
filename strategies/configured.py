"""The aggregation method that a configuration names, with all that goes with it; or why it cannot be."""

from __future__ import annotations

from collections.abc import Iterator

from apiary import lora
from apiary.config import RunConfig, UserError
from strategies.core import AGGREGATORS, Aggregator
from strategies.server_opt import SERVER_OPTIMIZERS, with_optimizer


def from_config(config: RunConfig) -> Aggregator:
    """The method of `strategy.name`, with the server optimiser of the run around it.

    Raises:
        UserError: unknown names or options, or parts that do not go together, one line each.
    """
    strategy = config.strategy
    aggregator = AGGREGATORS.build(
        strategy.name,
        strategy.options,
        weighting=strategy.weighting,
        scaling=lora.scaling(config.adapter.alpha, config.adapter.scaling),
        seed=config.seed,
    )
    optimizer = SERVER_OPTIMIZERS.build(strategy.server_optimizer.name, strategy.server_optimizer.options)
    if problems := list(_problems(config, aggregator)):
        raise UserError(*problems)
    return with_optimizer(aggregator, optimizer, config.adapter.trained)


def _problems(config: RunConfig, aggregator: Aggregator) -> Iterator[str]:
    name, adapter = config.strategy.name, config.adapter
    if adapter.train not in aggregator.trains:
        yield (
            f"adapter.train = {adapter.train!r}: strategy.name = {name!r} moves the factor that clients hold fixed; "
            f"it allows {' and '.join(map(repr, aggregator.trains))}"
        )
    if adapter.init != "kaiming" and aggregator.renews:
        yield (
            f"adapter.init = {adapter.init!r}: strategy.name = {name!r} draws A anew in every round, Kaiming-uniform; "
            "leave adapter.init out"
        )
    if aggregator.ranks == "one" and set(adapter.ranks) - {adapter.rank}:
        mixed = "flora, flexlora, hetlora, rank_slices, and all robust methods in the space of products"
        yield (
            f"adapter.ranks = {list(adapter.ranks)}: strategy.name = {name!r} takes the rank {adapter.rank} alone; "
            f"methods for several ranks are {mixed}"
        )
    if config.strategy.min_clients < aggregator.fewest:
        yield (
            f"strategy.min_clients = {config.strategy.min_clients}: strategy.name = {name!r} with these options needs "
            f"{aggregator.fewest} answers to keep its promise; raise it, or lower strategy.options.byzantine"
        )
