"""FlexLoRA: the mean of products, factored anew by SVD (Bai et al. 2024)."""

from __future__ import annotations

from typing import Literal

from apiary.core.lora import Scaling
from strategies.aggregator import (
    AGGREGATORS,
    Aggregator,
    product_step,
)
from strategies.products import (
    Weighting,
    payload_of_rank,
    product_reducer,
)


@AGGREGATORS.register("flexlora")
def flexlora(
    scaling: Scaling, weighting: Weighting = "tokens", form: Literal["delta", "absolute"] = "delta"
) -> Aggregator:
    """FlexLoRA: the mean of the clients' products, exactly, then the best factors of rank R for it.

    The authors decompose dense matrices; here the stacked factors are decomposed, by QR and a small SVD (Bai et al.
    2024, arXiv 2402.11505). A client of rank r receives the best r ranks.

    Their form is "absolute": the server's product becomes sum_k p_k s_k B_k A_k. With clients of different ranks it
    collapses: in every round slice i shrinks by the part of the clients whose rank is below i, also if nobody trains
    (Wu et al. 2026, arXiv 2602.13486). The form "delta" adds the mean of the clients' *changes* instead,
    s_k (B_k A_k - B_k0 A_k0), and keeps what nobody has changed. With one rank for all, both are the same.

    Args:
        scaling: the scale of a product by its rank.
        weighting: the clients' parts of the round.
        form: what is averaged: changes, or whole products as in the paper.
    """
    reduce = product_reducer("flexlora", scaling, weighting, form == "absolute")
    return Aggregator(
        reduce,
        product_step,
        payload_of_rank(scaling),
        needs="each",
        space="products",
        ranks="mixed",
        trains=("both",),
        recovers="rank" if form == "delta" else "",
    )
