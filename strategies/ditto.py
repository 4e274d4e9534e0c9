"""Ditto: a shared model, and beside it one of each client's own that is tied to it (Li et al. 2021, arXiv 2012.04221).

Clients train the shared model w for everybody, as in federated averaging. Each also keeps a model v_k of its own, on
its own disk, and trains it on its own rows with a pull towards the w that it has just received:

    v_k := v_k - lr (grad F_k(v_k) + lambda (v_k - w))        (algorithm 1, line 6; equation 1 is what it minimises)

v_k never travels, and what is sent does not depend on it: the shared model is that of federated averaging with the
steps that are left to it.

The paper's v and w are vectors of weights. Here they are the weights that an adapter stands for, so v_k - w is the
difference of the products, s (B_v A_v - B_w A_w), and not that of the factors. Factors are not unique: (B G)(G^-1 A) is
the same model, which a distance of factors would call another one and pull at. It would also weigh the same step in a
large B and a small A otherwise than in a small B and a large A, and would compare factors that drifted apart round by
round, while the products are those of the models that are measured in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from apiary.core import lora
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import Payload
from apiary.core.tensors import StateDict
from strategies.aggregator import AGGREGATORS, Aggregator
from strategies.fedavg import fedavg
from strategies.local import Client, Hooks, LocalAlgorithm, Opened, Penalty


@AGGREGATORS.register("ditto")
def ditto(
    scaling: Scaling,
    weighting: Literal["tokens", "uniform"] = "tokens",
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1,
    own: Annotated[float, Field(gt=0, lt=1)] = 0.5,
) -> Aggregator:
    """Ditto: federated averaging, and each client trains a model of its own beside, tied to the shared one.

    The server is that of federated averaging (Li et al. 2021, arXiv 2012.04221, algorithm 1). A client's own model
    begins at the shared one that it first receives, and is trained by the run's optimizer on its loss plus
    lambda/2 ||W_v - W_w||^2, with W_v and W_w the weights of its own model and of the received one: the squared
    Frobenius norm of s (B_v A_v - B_w A_w) over all modules.

    A visit makes `train.steps` steps in all, as with every method. The own model gets a share of them and the shared
    one the others, each with a learning rate that falls over its own steps: for as many steps of the shared model as
    without this method, raise `train.steps`.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of the round.
        penalty: the pull of the shared model on the own one, the paper's lambda.
        own: the share of a visit's steps that train the own model.
    """

    def opened(state: StateDict, payload: Payload, client: Client) -> Opened:
        start, shared = state or payload.adapter, payload.adapter
        return Opened(start, Hooks(penalties=(pull(start, shared, penalty, scaling(client.rank)),)))

    local = LocalAlgorithm(
        keeps="own",
        own=opened,
        own_share=own,
        personal="Clients train one shared adapter, and each keeps one of its own beside it that is tied to the shared",
    )
    return fedavg(weighting)._replace(local=local)


def pull(start: StateDict, shared: StateDict, penalty: float, scale: float) -> Penalty:
    """The term lambda/2 sum_m ||s (B A - B_w A_w)||_F^2 of a client's loss, over all modules m.

    The difference is taken as dB A + B_w dA, with dB = B - B_w and dA = A - A_w, in which nothing large is subtracted
    from anything large: at the shared model the term and its gradient are exactly zero. It costs r x r products.

    Args:
        start: the own adapter before its training, which has the factors that rest in the round.
        shared: the received adapter, B_w and A_w.
        penalty: lambda.
        scale: s, of the adapter's rank.
    """
    anchors: list[StateDict] = []  # of both, moved to the parameters' device once, not on every step

    def term(adapter: Mapping[str, Tensor]) -> Tensor:
        if not anchors:
            like = next(iter(adapter.values()))
            anchors.extend({n: t.to(like.device, like.dtype, copy=True) for n, t in s.items()} for s in (start, shared))
        squares = []
        held = lora.split(anchors[1])
        for module, live in lora.split({**anchors[0], **adapter}).items():
            w = held[module]
            apart = lora.change(w, Factors(live.b - w.b, live.a - w.a))
            squares.append(((apart.b.T @ apart.b) * (apart.a @ apart.a.T)).sum())
        return penalty * scale**2 / 2 * torch.stack(squares).sum()

    return term
