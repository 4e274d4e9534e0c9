"""What a run is, in a few words: the method, ranks, server optimiser, codecs and attack that its configuration names.

The terminal, `apiary doctor`, the report and the model card say it alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apiary.config import toml_text
from apiary.config.schema import Method, RunConfig

_FACTORS = {"b": "B alone, and A as it was drawn", "alternate": "B and A in turns"}


def facts(config: RunConfig) -> list[tuple[str, str]]:
    """Name and value of each choice that made the model; what is at its default and changes nothing is left out."""
    adapter, strategy = config.adapter, config.strategy
    choices = [("Method", _named(strategy.name, strategy.options)), ("Rank", _ranks(config))]
    if adapter.train != "both":
        choices.append(("Factors trained", _FACTORS[adapter.train]))
    if adapter.share != "both":
        choices.append(("Factors shared", "A alone; each client keeps a B of its own"))
    if adapter.start is not None:
        choices.append(("Begun from", f"{public_name(adapter.start)} ({adapter.start_digest or 'not read yet'})"))
    if strategy.server_optimizer.name != "none":
        choices.append(("Server optimiser", _method(strategy.server_optimizer)))
    if config.train.penalties:
        choices.append(("Penalties", ", ".join(map(_method, config.train.penalties))))
    if strategy.weighting != "tokens":
        choices.append(("Weights of the clients", strategy.weighting))
    choices.append(("On the wire", wire(config)))
    for name, share in (("Away in a round", config.simulate.away), ("Failing in a round", config.simulate.failing)):
        if share:
            choices.append((name, f"{share:.0%} of the clients"))
    if config.simulate.attackers:
        choices.append(
            ("Attack", f"{_method(config.simulate.attack)} by {config.simulate.attackers:.0%} of the clients")
        )
    return choices


def sentence(config: RunConfig) -> str:
    """The same on one line, such as `flora (base_rank = 16); LoRA rank 16 (rslora); on the wire int8 up and down`."""
    (_, method), *others = facts(config)
    parts = [f"{'LoRA rank' if name == 'Rank' else name[0].lower() + name[1:]} {value}" for name, value in others]
    return "; ".join([method, *parts])


def wire(config: RunConfig) -> str:
    """How changes travel."""
    if seeds(config):
        return "seeds and scalars"
    up, down = (_method(method) for method in (config.wire.up, config.wire.down))
    if up == down:
        return "float32" if up == "fp32" else f"{up} up and down"
    return f"{up} up, {down} down".replace("fp32", "float32")


def coded(config: RunConfig) -> bool:
    """Whether changes travel in another form than float32."""
    return not seeds(config) and {config.wire.up.name, config.wire.down.name} != {"fp32"}


def seeds(config: RunConfig) -> bool:
    """Whether scalars of random directions travel in place of an adapter."""
    return config.strategy.name == "fedkseed"


def sent(config: RunConfig) -> str:
    """What clients send of their training."""
    if seeds(config):
        return "scalars with the seeds of their directions"
    return "changes of the adapter"


def _named(name: str, options: Mapping[str, Any]) -> str:
    """A method with the options that the configuration gives it; of a path only its last part, for a card travels."""
    given = ", ".join(
        f"{key} = {toml_text.shown(public_name(value) if isinstance(value, str) else value)}"
        for key, value in options.items()
    )
    return f"{name} ({given})" if given else name


def public_name(name: str) -> str:
    """A name as it may be passed on: of a path only the last part, so that no folder of this machine stands in it."""
    return Path(name).name if Path(name).is_absolute() or name.startswith("~") else name


def _method(method: Method) -> str:
    return _named(method.name, method.options)


def _ranks(config: RunConfig) -> str:
    adapter = config.adapter
    whole = f"{adapter.rank} ({adapter.scaling})"
    if adapter.ranks == "memory":
        return f"{whole}; clients as their memory allows"
    if set(adapter.ranks) <= {adapter.rank}:
        return whole
    return f"{whole}; clients {', '.join(map(str, adapter.ranks))} in turn"
