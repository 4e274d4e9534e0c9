"""The table of aggregation methods in the docs, asked of the methods themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Final

import torch

from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import StateDict
from strategies import AGGREGATORS, Aggregator, ServerState
from strategies.aggregator import ROOT
from strategies.server_optimizers import SERVER_OPTIMIZERS, with_optimizer

CLIENTS: Final = 16
_SHAPES: Final = {"m.lora_A.weight": (2, 64), "m.lora_B.weight": (64, 2)}
_PAPER = re.compile(r"([A-Z]\w+(?: [A-Z]\w+)* et al\. \d{4})(?:,[^;()]*? arXiv (\d{4}\.\d{5}))?")
_CITED = re.compile(r" \([A-Z][^()]* \d{4}[^()]*\)")


def table() -> str:
    """A row for each registered method."""
    lines = [
        "| `strategy.name` | what it does | paper | server holds | ranks | `adapter.train` | server optimisers "
        "| least answers | down | up |",
        "|---" * 10 + "|",
    ]
    for name in AGGREGATORS:
        method, document = _build(name, 0), inspect.getdoc(AGGREGATORS.builder(name)) or ""
        down, up = _wire(method)
        cells = [
            f"`{name}`",
            _CITED.sub("", document.partition("\n")[0]),
            _paper(document),
            _holds(method),
            method.ranks,
            ", ".join(method.trains),
            _optimisers(method),
            _least(name),
            down,
            up,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _build(name: str, byzantine: int) -> Aggregator:
    given = {"scaling": lora.scaling(16.0, "rslora"), "seed": 0, "weighting": "tokens"}
    known = "byzantine" in inspect.signature(AGGREGATORS.builder(name)).parameters
    return AGGREGATORS.build(name, {"byzantine": byzantine} if known else {}, **given)


def _paper(document: str) -> str:
    found = _PAPER.search(" ".join(document.split()))
    if found is None:
        return ""
    return f"[{found[1]}](https://arxiv.org/abs/{found[2]})" if found[2] else found[1]


def _optimisers(method: Aggregator) -> str:
    """Which ones the code lets through."""

    def works(name: str) -> bool:
        try:
            with_optimizer(method, SERVER_OPTIMIZERS.build(name))
        except UserError:
            return False
        return True

    moving = [name for name in SERVER_OPTIMIZERS if name not in ("none", "auto")]
    allowed = [name for name in moving if works(name)]
    return "all" if allowed == moving else ", ".join(allowed) or "none"


def _least(name: str) -> str:
    """The fewest answers, with f hostile clients among them."""
    none, one = (_build(name, f).fewest for f in (0, 1))
    slope = "f" if one - none == 1 else f"{one - none} f"
    return f"{slope} + {none}" if one > none else str(none)


def _holds(method: Aggregator) -> str:
    """What is in the server's memory during a round, seen by folding in more."""
    state, sizes = ServerState(0, _draw(0), {}, {}), []
    if method.needs == "sum":
        return "a sum"
    acc = method.reduce.start(state)
    for k in range(3):
        acc = method.reduce.add(acc, Update(f"c{k}", _draw(k), 1.0, 2))
        sizes.append(_tensors(acc))
    return "a sum of what it makes of each" if len(set(sizes)) == 1 else "every update"


def _tensors(value: object) -> int:
    """Entries of all tensors in a nest of tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_tensors, parts))


def _wire(method: Aggregator) -> tuple[str, str]:
    """What one client receives and sends in the round after the first of 16 clients, in adapters of float32."""
    state = ServerState(0, {n: torch.zeros(s) if lora.is_b(n) else _draw(0)[n] for n, s in _SHAPES.items()}, {}, {})
    if method.scalars:  # as large for every adapter
        size = 4 * _entries(method.payload(state, ClientInfo("c01", 2, 0)).adapter) / 1000
        return f"{size:.0f} kB", f"at most {size:.0f} kB"
    updates = [Update(ROOT if k == 0 and method.root else f"c{k:02}", _draw(k), 1.0, 2) for k in range(CLIENTS + 1)]
    acc = method.reduce.start(state)
    for update in updates[not method.root :]:
        acc = method.reduce.add(acc, update)
    after = method.step(state, method.reduce.finish(state, acc, torch.Generator()))
    payload: Payload = method.payload(after, ClientInfo("c01", 2, 1))
    own = _entries(payload.adapter)
    times = sum(_entries(part) for part in (payload.adapter, payload.base_delta, payload.extra)) / own
    grows = ", more each round" if payload.base_delta else ""
    return f"{times:.2g}{grows}", "1"  # a number beside the adapter is not worth a digit


def _draw(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in _SHAPES.items()}


def _entries(state: StateDict | Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
