"""The codecs that a configuration names, and what should be said of them."""

from __future__ import annotations

import inspect
from typing import Literal

from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.transport.codec import (
    SHARE,
    SHARE_DOWN,
    Codec,
)
from apiary.transport.codecs import CODECS


def configured_codec(config: RunConfig, way: Literal["up", "down"], own: str = "fp32") -> Codec:
    """The codec of one direction in a run.

    On the way down each message has in it what the last one left out (`apiary.transport.downlink`). There a codec
    needs no feedback of its own and rounds to the nearest unless told otherwise, for nothing is lost by it.

    Args:
        config: the run.
        way: "up" to the server, or "down" to the clients.
        own: the codec of the method itself, which carries its updates up where `wire.up` is left as it is.

    Raises:
        UserError: unknown name or options, by their key.
    """
    method = config.wire.up if way == "up" else config.wire.down
    if way == "up" and method.name == "fp32" != own:
        return CODECS.build(own)
    options = method.options
    try:
        if way == "down" and "feedback" in options:
            raise UserError("wire.down: the way down has feedback by itself; leave the option 'feedback' out")
        if way == "down" and "rounding" in inspect.signature(CODECS.builder(method.name)).parameters:
            options = {"rounding": "nearest", **options}
        return CODECS.build(method.name, options)
    except UserError as error:
        raise UserError(*(line.replace(CODECS.key, f"wire.{way}") for line in error.problems)) from None


def remarks(config: RunConfig) -> list[str]:
    """What a run should know of the codecs that it has chosen, a line each."""
    share = config.wire.down.options.get("share", SHARE)
    if config.wire.down.name != "topk" or not isinstance(share, int | float) or share >= SHARE_DOWN:
        return []
    return [
        f"wire.down = 'topk' with share = {share:g}: clients train from copies that lag far behind the adapter; in our "
        f"runs 0.01 ended above the untuned loss, and {SHARE_DOWN:g} held (docs/wire.md)"
    ]
