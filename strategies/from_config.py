"""The aggregation method that a configuration names, with all that goes with it; or why it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Parameter, signature
from typing import Any

from apiary.config.defaults import resolved
from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.transport.from_config import configured_codec
from strategies.aggregator import AGGREGATORS, Aggregator
from strategies.fedsa import with_own_b
from strategies.local import PLAIN, LocalAlgorithm
from strategies.server_optimizers import SERVER_OPTIMIZERS, with_optimizer


def from_config(config: RunConfig) -> Aggregator:
    """The method of `strategy.name`, with the server optimiser of the run around it.

    Raises:
        UserError: unknown names or options, or parts that do not go together, one line each.
    """
    config = resolved(config)
    strategy, aggregator = config.strategy, method_from_config(config)
    optimizer = SERVER_OPTIMIZERS.build(strategy.server_optimizer.name, strategy.server_optimizer.options)
    if problems := list(_problems(config, aggregator)):
        raise UserError(*problems)
    return with_optimizer(aggregator, optimizer, config.adapter.trained)


def local_from_config(config: RunConfig) -> LocalAlgorithm:
    """The client's half of the run's method.

    Raises:
        UserError: the method has an unknown name or option.
    """
    return method_from_config(config).local


def method_from_config(config: RunConfig) -> Aggregator:
    """The method of `strategy.name` over what `adapter.share` lets travel, without the server optimizer around it.

    Raises:
        UserError: the method has an unknown name or option.
    """
    aggregator = AGGREGATORS.build(config.strategy.name, config.strategy.options, **_given(config))
    return aggregator if config.adapter.share == "both" else with_own_b(aggregator)


def check_for_sites(config: RunConfig) -> None:
    """Check that sites can do what the run asks of them: they load no code by name.

    Raises:
        UserError: the method comes by module:function and has a part at the clients.
    """
    name = config.strategy.name
    if ":" in name and method_from_config(config).local != PLAIN:
        raise UserError(
            f"strategy.name = {name!r}: this method has a part at the clients, and sites load no code that a server "
            "names; put it into strategies/ of what server and sites have installed"
        )


def method_remarks(config: RunConfig, aggregator: Aggregator) -> list[str]:
    """What a run should know of the method that it has chosen, a line each."""
    if aggregator.local.resumes != "counted" or config.train.epochs is None or not config.strategy.norm_guard:
        return []
    return [
        f"train.epochs: with strategy.name = {config.strategy.name!r} a client with many times the rows of others is "
        "refused where its change is as many times longer; set train.steps, or raise strategy.norm_guard"
    ]


def weighs(config: RunConfig) -> bool:
    """Whether the run's method lets a client count by what it trained on."""
    return config.strategy.weighting == "tokens" and _takes_weighting(config)


def _takes_weighting(config: RunConfig) -> bool:
    return "weighting" in signature(AGGREGATORS.builder(config.strategy.name)).parameters


def _given(config: RunConfig) -> dict[str, Any]:
    """What a method gets of the run beside its own options."""
    return {
        "weighting": config.strategy.weighting,
        "alike": config.train.epochs is None,
        "scaling": lora.scaling(config.adapter.alpha, config.adapter.scaling),
        "seed": config.seed,
    }


def _problems(config: RunConfig, aggregator: Aggregator) -> Iterator[str]:
    name, adapter = config.strategy.name, config.adapter
    if adapter.train not in aggregator.trains:
        yield (
            f"adapter.train = {adapter.train!r}: strategy.name = {name!r} moves the factor that clients hold fixed; "
            f"it allows {' and '.join(map(repr, aggregator.trains))}"
        )
    if adapter.start is not None and adapter.share != "both":
        yield (
            f"adapter.start: with adapter.share = {adapter.share!r} the B of each client begins at zero, and that of "
            "the start would be lost; leave one of the two out"
        )
    if adapter.start is not None and aggregator.local.gradient_free:
        yield (
            f"adapter.start: strategy.name = {name!r} lets clients make the first adapter anew from the run's seed; "
            "they have no copy of another; leave it out"
        )
    if adapter.init != "kaiming" and _renewed(config, aggregator):
        how = "draws A anew in every round, Kaiming-uniform" if aggregator.renews else "factors A anew in every round"
        yield f"adapter.init = {adapter.init!r}: strategy.name = {name!r} {how}; leave adapter.init out"
    ranks = "memory" if adapter.ranks == "memory" else list(adapter.ranks)
    if aggregator.ranks == "one" and (ranks == "memory" or set(ranks) - {adapter.rank}):
        yield (
            f"adapter.ranks = {ranks!r}: strategy.name = {name!r} takes the rank {adapter.rank} alone; "
            f"methods for several ranks are {', '.join(_for_several_ranks(config))}"
        )
    if config.strategy.weighting != "tokens" and not _takes_weighting(config):
        yield (
            f"strategy.weighting = {config.strategy.weighting!r}: strategy.name = {name!r} has its own weights of the "
            "clients; leave it out"
        )
    if aggregator.root and config.strategy.root is None:
        yield (
            f"strategy.root: strategy.name = {name!r} holds clients against the server's own update; name about 100 "
            "rows that the server trusts"
        )
    if config.strategy.root is not None and not aggregator.root:
        yield f"strategy.root: strategy.name = {name!r} does not use rows of the server's own; leave it out"
    if aggregator.local.personal and adapter.share == "both":  # with share = "a" `apiary.config.compatibility` says so
        yield from _personal_problems(config, aggregator.local)
    if aggregator.local.own and config.train.steps == 1:
        yield f"train.steps = 1: strategy.name = {name!r} shares a visit's steps between two models; set 2 or more"
    yield from _private_problems(config, aggregator)
    if config.personal.enabled and aggregator.local.gradient_free:
        yield (
            f"personal.enabled = true: strategy.name = {name!r} trains without gradients, and its learning rate means "
            "something else to the training with gradients that makes clients' own models; leave personal.enabled out"
        )
    if aggregator.prunes:
        yield from _pruning_problems(config)
    yield from _wire_problems(config, aggregator)
    if config.strategy.min_clients < aggregator.fewest:
        few = config.data.partition.name != "natural" and config.data.clients < aggregator.fewest
        also = f" (and data.clients, now {config.data.clients}, with it)" if few else ""
        yield (
            f"strategy.min_clients = {config.strategy.min_clients}: strategy.name = {name!r} with these options needs "
            f"{aggregator.fewest} answers to keep its promise; raise it{also}, or lower strategy.options.byzantine"
        )


def _private_problems(config: RunConfig, aggregator: Aggregator) -> Iterator[str]:
    if config.privacy.unit != "record":
        return
    name = config.strategy.name
    if aggregator.local.own:
        yield (
            f"privacy.unit = 'record': strategy.name = {name!r} trains each client's own model without noise, and "
            "whether that goes well or how long it takes would show in the client's answer; use fedavg, and tune the "
            "shared model at home when the run is over"
        )
    elif aggregator.local.settle or aggregator.local.gradient_free:
        yield (
            f"privacy.unit = 'record': strategy.name = {name!r} has a part at the clients that no noise covers; use a "
            "method without one, such as fedavg"
        )


def _personal_problems(config: RunConfig, local: LocalAlgorithm) -> Iterator[str]:
    """What asks for one model for all, where clients have models of their own."""
    name = f"strategy.name = {config.strategy.name!r}"
    if config.continual.stages:
        yield f"continual.stages: what is forgotten is measured on one model for all, and {name} makes one a client"
    if config.simulate.attackers:
        yield (
            f"simulate.attackers = {config.simulate.attackers:g}: attacks are measured on one model for all, and "
            f"{name} makes one a client; set 0"
        )
    if config.evaluate.patience:
        yield (
            f"evaluate.patience = {config.evaluate.patience}: {name} leaves each client a model of the last round, so "
            "no earlier one could be delivered; set 0"
        )
    if config.evaluate.clients is False:
        yield f"evaluate.clients = false: {name} makes models that clients score themselves; leave the key out"
    if local.mixes:
        yield from _mixing_problems(config)


def _mixing_problems(config: RunConfig) -> Iterator[str]:
    """What clients' own adapters, weighed by gates, do not go with."""
    name = f"strategy.name = {config.strategy.name!r}"
    if config.adapter.start is not None:
        yield (
            f"adapter.start: {name} lets clients make the first adapter anew from the run's seed; they have no copy of "
            "another; leave it out"
        )
    if config.wire.down.name != "fp32":
        yield (
            f"wire.down = {config.wire.down.name!r}: {name} has each client take itself out of the mean that it "
            "is sent, which must be the exact one; use fp32"
        )
    if config.adapter.dropout:
        yield (
            f"adapter.dropout = {config.adapter.dropout:g}: {name} works out a layer's product twice, which would be "
            "dropped differently each time; set 0"
        )


def _for_several_ranks(config: RunConfig) -> Iterator[str]:
    """The registered methods that take clients of several ranks, whatever their options."""
    given = _given(config)
    for name in AGGREGATORS:
        parameters = signature(AGGREGATORS.builder(name)).parameters.values()
        needed = [p.name for p in parameters if p.default is Parameter.empty and p.name not in given]
        try:
            method = AGGREGATORS.build(name, dict.fromkeys(needed, 1), **given)  # all such are counts of clients
        except UserError:  # one that somebody has added, and that needs more
            continue
        if method.ranks == "mixed":
            yield name


def _renewed(config: RunConfig, aggregator: Aggregator) -> bool:
    """Whether the factors have another basis after each round."""
    return aggregator.renews or (aggregator.space == "products" and config.adapter.train not in aggregator.keeps)


def _pruning_problems(config: RunConfig) -> Iterator[str]:
    key = f"strategy.options.prune = {config.strategy.options['prune']}"
    if config.privacy.unit != "none":
        yield f"{key}: the rank that a client prunes itself to tells of its rows; leave it out under privacy"
    if config.simulate.attackers:
        yield f"{key}: simulated attackers keep their rank; leave simulate.attackers out"


def _wire_problems(config: RunConfig, aggregator: Aggregator) -> Iterator[str]:
    if config.simulate.relays and aggregator.reduce.merge is None:
        yield (
            f"simulate.relays = {config.simulate.relays}: a relay sends a sum on, and strategy.name = "
            f"{config.strategy.name!r} must see each client's update; set 0"
        )
    try:
        up, down = configured_codec(config, "up", aggregator.local.codec), configured_codec(config, "down")
    except UserError as error:
        yield from error.problems
        return
    name = config.strategy.name
    renewed = _renewed(config, aggregator)
    if up.feedback and renewed:
        yield (
            f"wire.up = {config.wire.up.name!r}: its error feedback is kept in the factors' basis, which "
            f"strategy.name = {name!r} changes in every round; use a codec with feedback = false, such as int8"
        )
    if aggregator.group:
        if up.feedback:
            yield (
                f"wire.up = {config.wire.up.name!r}: its error feedback is kept in the factors' basis, and with "
                f"strategy.name = {name!r} a client comes to have those of its group; use a codec with "
                "feedback = false, such as int8"
            )
        if not down.whole:
            yield (
                f"wire.down = {config.wire.down.name!r}: strategy.name = {name!r} sends each group of clients another "
                "adapter, and changes are kept of one alone; use fp32"
            )
        return
    if aggregator.prunes and (up.feedback or not down.whole):
        yield (
            "strategy.options.prune: clients that prune change their rank, and what a codec keeps for the next message "
            "has the rank of this one; use wire.down fp32, and up a codec without feedback"
        )
    if not down.whole and renewed:
        yield (
            f"wire.down = {config.wire.down.name!r}: strategy.name = {name!r} factors the adapter anew in every round, "
            "and the difference of two factorisations is as large as the weights; use fp32"
        )
    elif not down.whole and aggregator.base:
        yield (
            f"wire.down = {config.wire.down.name!r}: strategy.name = {name!r} counts the residual of products from the "
            "server's own adapter, which clients would then hold only nearly; use fp32"
        )
