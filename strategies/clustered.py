"""Clustered federation: clients whose changes point the same way share an adapter, and groups learn apart.

After Sattler et al. 2020 (arXiv 1910.01991), who group clients by the angle between their changes, and FedLEASE (Wang
et al. 2025, arXiv 2509.15087), which does so for adapters by agglomerative clustering, once, and takes the number of
groups with the best silhouette. Its experts and their routing are not here: a client uses the adapter of its group
alone.

The angle is that of the changes of the weights: U_k = s (B_k A_k - B_0 A_0), the matrices of all modules seen as one
long vector. FedLEASE compares the factors B, which depend on how a client's B and A share the change between them; the
products do not. Their inner products follow from the factors (`apiary.core.lora.change_gram`) without a dense matrix.

Nothing but the changes is looked at, which the server has anyway, so no figure more leaves a client. Where changes are
private, so is what is made of them: grouping is post-processing, and costs no privacy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from apiary.core import lora
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import StateDict, add
from strategies.aggregator import AGGREGATORS, FLOOR, Aggregator, Gradient, Reducer, ServerState, plain_step
from strategies.fedavg import fedavg
from strategies.local import LocalAlgorithm
from strategies.products import each

_COUNT, _MEMBER, _GROUP = "groups", "member/", "group/"  # in a state's memory
_FEWEST = 3  # clients that can be two groups of which one has company; a silhouette of two would say nothing


class Grouping(NamedTuple):
    """How clients fall into groups."""

    labels: tuple[int, ...]  # each client's group, numbered by who comes first; all 0: there is one
    silhouette: float  # of the best split into two or more, whether or not it was taken


@AGGREGATORS.register("clustered")
def clustered(
    weighting: Literal["tokens", "uniform"] = "tokens",
    after: Annotated[int, Field(ge=1)] = 1,
    most: Annotated[int, Field(ge=2)] = 8,
    separation: Annotated[float, Field(ge=0, lt=1)] = 0.2,
) -> Aggregator:
    """Clients whose changes point the same way form a group, and each group has an adapter of its own.

    Up to a round all clients train one adapter by federated averaging. Then those that answer are clustered once by
    the angles between their changes of the weights, with average linkage (FedLEASE: Wang et al. 2025, arXiv
    2509.15087), into the number of groups of the best mean silhouette (Rousseeuw 1987). From then on each group
    averages its own changes into its own adapter. Where the silhouette of no split reaches `separation` there is one
    group, and the run stays federated averaging.

    The adapter of the run is that of clients without a group: the mean of the groups' products, each counted by its
    clients, and the best factors of the adapter's rank for it. A client that comes later is sent that one once, and
    then belongs to the group towards which its change points; that one change moves no adapter, for it does not begin
    at the group's.

    Args:
        weighting: the clients' parts of their group.
        after: the round whose changes make the groups.
        most: the highest number of groups.
        separation: the mean silhouette below which there is one group.
    """
    average = functools.partial(_average, fedavg(weighting).reduce)

    def finish(state: ServerState, updates: Sequence[Update]) -> Gradient:
        whole = average(state, updates)
        if _COUNT in state.memory:
            joined = {u.client: _nearest(state, u) for u in updates if _MEMBER + u.client not in state.memory}
            counted = {u.client: g for u in updates if (g := group_of(state, u.client)) is not None}
            memory, told = dict[str, Tensor](), dict[str, Any](groups=joined) if joined else {}
        elif state.round + 1 < after or len(updates) < _FEWEST:
            return Gradient(whole)
        else:
            made = grouping(_gram(state.adapter, updates), most, separation)
            joined = counted = dict(zip([update.client for update in updates], made.labels, strict=True))
            memory = {_COUNT: torch.tensor(1.0 + max(made.labels))}
            told = {"groups": joined, "silhouette": round(made.silhouette, 5)}
        for g in sorted(set(counted.values())):
            moved = average(state, [update for update in updates if counted.get(update.client) == g])
            memory |= {f"{_GROUP}{g}/{name}": tensor for name, tensor in moved.items()}
        memory |= {_MEMBER + client: torch.tensor(float(g)) for client, g in joined.items()}
        return Gradient(whole, memory=memory, told=told)

    return Aggregator(
        each("clustered", "one", finish),
        _step,
        _payload,
        needs="each",
        trains=("both",),  # the adapter of who has no group gets another A in each round
        averages="always",
        group=group_of,
        models=_models,
        local=LOCAL,
    )


def _average(mean: Reducer, state: ServerState, updates: Sequence[Update]) -> StateDict:
    acc = mean.start(state)
    for update in updates:
        acc = mean.add(acc, update)
    return mean.finish(state, acc, torch.Generator()).adapter


LOCAL = LocalAlgorithm(personal="Clients whose changes point the same way share the adapter of their group")


def group_of(state: ServerState, client: str) -> int | None:
    """The group whose adapter a client is sent; None where it has none, or there is one for all."""
    member = state.memory.get(_MEMBER + client)
    return None if member is None or _count(state.memory) < 2 else int(member)


def _count(memory: StateDict) -> int:
    return int(memory.get(_COUNT, torch.tensor(0.0)))


def _adapter(state: ServerState, group: int) -> dict[str, Tensor]:
    """The adapter of a group; before its first step the one that all have."""
    return {name: state.memory.get(f"{_GROUP}{group}/{name}", tensor) for name, tensor in state.adapter.items()}


def _models(state: ServerState) -> Mapping[str, StateDict]:
    """The adapter of each group, by the name of its folder."""
    count = _count(state.memory)
    return {f"group-{g}": _adapter(state, g) for g in range(count)} if count > 1 else {}


def _payload(state: ServerState, client: ClientInfo) -> Payload:
    group = group_of(state, client.client)
    return Payload(state.adapter if group is None else _adapter(state, group), state.base_delta)


def _step(state: ServerState, gradient: Gradient) -> ServerState:
    """Each group's adapter moved by its clients' mean change, and the adapter of who has none made of them."""
    memory = {**state.memory, **{n: t for n, t in gradient.memory.items() if not n.startswith(_GROUP)}}
    count = _count(memory)
    if count < 2:
        return plain_step(state, gradient)._replace(memory=memory)
    adapters = []
    for g in range(count):
        moved = {n: gradient.memory[key] for n in state.adapter if (key := f"{_GROUP}{g}/{n}") in gradient.memory}
        held = _adapter(state, g)
        adapters.append(add(held, moved) if moved else held)
        memory |= {f"{_GROUP}{g}/{name}": tensor for name, tensor in adapters[-1].items()}
    members = [int(tensor) for name, tensor in memory.items() if name.startswith(_MEMBER)]
    shares = [members.count(g) / len(members) for g in range(count)]
    return state._replace(round=state.round + 1, adapter=_mean(adapters, shares), memory=memory)


def _mean(adapters: Sequence[StateDict], shares: Sequence[float]) -> dict[str, Tensor]:
    """The best factors of the adapters' rank for the weighted mean of their products."""
    held = [lora.split(adapter) for adapter in adapters]
    made = {}
    for module, first in held[0].items():
        wide = lora.stack([factors[module] for factors in held], shares)
        made[module] = lora.balanced(lora.svd(wide, first.rank), first.rank, FLOOR)
    return lora.join(made)


# -- angles ------------------------------------------------------------------------------------------------------------


def _gram(start: StateDict, updates: Sequence[Update]) -> Tensor:
    """The inner products of the changes B_k A_k - B_0 A_0 of all modules together, (n, n) float64."""
    deltas = [lora.split(update.delta) for update in updates]
    grams = [lora.change_gram(held, [delta[module] for delta in deltas]) for module, held in lora.split(start).items()]
    return torch.stack(grams).sum(0)


def grouping(gram: Tensor, most: int, separation: float) -> Grouping:
    """Group n changes by the angles between them: average linkage on 1 - cosine, cut at the best mean silhouette.

    Of equally good numbers of groups the smallest is taken. A change of nothing is at right angles to all others.

    Args:
        gram: inner products, (n, n), n >= 3.
        most: the highest number of groups; there are n - 1 at most.
        separation: the mean silhouette below which all are one group.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    lengths = norms[:, None] * norms[None]
    cosines = torch.where(lengths > 0, gram / lengths.clamp_min(torch.finfo(gram.dtype).tiny), 0.0)
    apart = (1 - (cosines + cosines.T) / 2).clamp(0, 2).fill_diagonal_(0).numpy()
    tree = hierarchy.linkage(squareform(apart, checks=False), "average")
    found = Grouping((0,) * len(gram), -1.0)
    for count in range(2, min(most, len(gram) - 1) + 1):
        labels = hierarchy.cut_tree(tree, n_clusters=count)[:, 0]
        if (score := silhouette(apart, labels)) > found.silhouette:
            found = Grouping(_numbered(labels), score)
    enough = found.silhouette >= separation and found.silhouette > 0
    return found if enough else found._replace(labels=(0,) * len(gram))


def _numbered(labels: np.ndarray[Any, Any]) -> tuple[int, ...]:
    order = list(dict.fromkeys(labels.tolist()))
    return tuple(order.index(label) for label in labels.tolist())


def silhouette(apart: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """The mean over all points of (b - a) / max(a, b) (Rousseeuw 1987).

    a is a point's mean distance to the others of its group, b the least of its mean distances to the other groups; a
    point that is alone counts 0.

    Args:
        apart: distances, (n, n).
        labels: each point's group, (n,), of two groups at least.
    """
    scores = []
    for k, label in enumerate(labels):
        own = labels == label
        if own.sum() == 1:
            scores.append(0.0)
            continue
        a = apart[k, own].sum() / (own.sum() - 1)
        b = min(apart[k, labels == other].mean() for other in set(labels.tolist()) - {label})
        scores.append((b - a) / max(a, b) if max(a, b) > 0 else 0.0)
    return float(np.mean(scores))


def _nearest(state: ServerState, update: Update) -> int:
    """The group of a client that came later: from the adapter that it was sent, its change points towards the group's.

    By the cosine of its change and the difference of the group's product to that adapter's; of equal ones the first.
    """
    count = _count(state.memory)
    if count < 2:
        return 0
    held, delta = lora.split(state.adapter), lora.split(update.delta)
    cosines = []
    for g in range(count):
        towards, across = 0.0, 0.0
        for module, group in lora.split(_adapter(state, g)).items():
            way = lora.stack([group, held[module]], [1.0, -1.0])
            towards += lora.inner(lora.change(held[module], delta[module]), way)
            across += lora.inner(way, way)
        cosines.append(towards / across**0.5 if across > 0 else 0.0)
    return int(np.argmax(cosines))
