"""Models between two adapters of one base, in the space of the matrices that they add to it.

The mean of factors is not the factors of the mean: (B + B')(A + A') has cross terms that neither model has. Here
products are mixed: W + (1 - w) P + w P', with P and P' what each adapter adds to the base. As factors that is exact,
side by side, of the sum of the ranks.
"""

from __future__ import annotations

import math

from apiary.core import lora
from apiary.core.lora import Factors
from apiary.core.tensors import StateDict
from apiary.models.adapters import LanguageModel


def products(lm: LanguageModel, state: StateDict) -> dict[str, Factors]:
    """What a model adds to the base, by module: factors whose product is s B A and, if any, the base delta."""
    adapter, base_delta = lora.parts(state)
    added = lora.split(base_delta)
    made = {}
    for module, own in lora.split(adapter).items():
        more = [added[module]] if module in added else []
        made[module] = lora.stack([own, *more], [lm.scale, *([1.0] * len(more))])
    return made


def mixed(lm: LanguageModel, first: StateDict, second: StateDict, weight: float) -> StateDict:
    """The model (1 - weight) * first + weight * second, in the space of products; exact.

    Args:
        lm: the base with its adapter.
        first: a state as for `set_adapter`: an adapter, or one with what it adds to the base.
        second: another one of the same base.
        weight: of the second, from 0 to 1.

    Returns:
        The first's factors with B scaled, as the adapter, and all else as base delta, which `save_adapter` writes as
        one PEFT adapter of the summed rank. At weight 0 and 1 the given state itself.

    Raises:
        ValueError: the weight is not from 0 to 1, or the adapters are of different modules.
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight {weight:g}: expected from 0 to 1")
    if weight in (0.0, 1.0):
        return second if weight else first
    adapter, base_delta = lora.parts(first)
    own, other, rest = lora.split(adapter), products(lm, second), lora.split(base_delta)
    if own.keys() != other.keys():
        raise ValueError("the two adapters are of different modules")
    kept = {module: Factors(f.b * (1 - weight), f.a) for module, f in own.items()}
    added = {}
    for module, factors in other.items():
        more = [rest[module]] if module in rest else []
        added[module] = lora.stack([factors, *more], [weight, *([1 - weight] * len(more))])
    return lora.whole(lora.join(kept), lora.join(added))


def distance(lm: LanguageModel, first: StateDict, second: StateDict) -> float:
    """The Frobenius norm of the difference of what two models add to the base, over all modules.

    It depends on the products alone, not on how they are factored.
    """
    one, other = products(lm, first), products(lm, second)
    squares = (lora.norm(lora.stack([factors, other[module]], [1.0, -1.0])) ** 2 for module, factors in one.items())
    return math.sqrt(sum(squares))
