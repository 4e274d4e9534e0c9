"""Robust aggregation entry by entry, of the factors A and B apart.

These rules see coordinates, and coordinates of factors have a meaning as far as the clients share a gauge: they do
where all start a round from one adapter and go a little way. They are at their best where only B is trained, or A and B
in turns, for then the factors' coordinates are those of the product. What comes before a rule, and Bulyan's choice of
clients, goes by distances between the factors too: those are what is mixed and averaged here, and a client that hides
B times 1e6 behind A times 1e-6 is far off in them.

Clients count alike, as in `strategies.robust`, and the same warning holds: this stops crude poisoning of the model, not
poisoned data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from apiary.core.messages import Update
from strategies import gram_rules as rules
from strategies.aggregator import AGGREGATORS, Aggregator, Gradient, ServerState, plain_step, same_payload
from strategies.gram_rules import Preprocessing, check_answers
from strategies.products import each_and_refused


class _Kept(NamedTuple):
    """What a rule makes of n values of each entry."""

    result: Tensor  # (d,)
    low: Tensor  # (d,): the least value of those that were averaged
    high: Tensor  # (d,): the largest


Entrywise: TypeAlias = Callable[[Tensor, int], _Kept]  # of values (n, d), float64, and of f


@AGGREGATORS.register("median")
def median(byzantine: NonNegativeInt | None = None, clip: bool = False, nearest: bool = False) -> Aggregator:
    """The median of each entry (Yin et al. 2018, "Byzantine-robust distributed learning", definition 1).

    Args:
        byzantine: hostile clients expected; a round then needs 2 f + 1 answers. The median itself needs no number.
        clip: clip each change of the factors to the median norm before.
        nearest: mix each change with its n - f nearest before; for clients whose data differ.
    """
    return _entrywise("median", _median, byzantine, Preprocessing(clip, nearest))


@AGGREGATORS.register("trimmed_mean")
def trimmed_mean(byzantine: NonNegativeInt, clip: bool = False, nearest: bool = False) -> Aggregator:
    """The mean of each entry without its f smallest and f largest values (Yin et al. 2018, definition 2).

    Args:
        byzantine: the hostile clients f to withstand; a round needs 2 f + 1 answers.
        clip: clip each change of the factors to the median norm before.
        nearest: mix each change with its n - f nearest before; for clients whose data differ.
    """
    return _entrywise("trimmed_mean", _trimmed_mean, byzantine, Preprocessing(clip, nearest))


@AGGREGATORS.register("bulyan")
def bulyan(byzantine: NonNegativeInt, clip: bool = False, nearest: bool = False) -> Aggregator:
    """The mean of each entry's n - 4 f values nearest to its median, of the n - 2 f clients that Krum picks one by one.

    El Mhamdi et al. 2018, "The hidden vulnerability of distributed learning in Byzantium", section 4.

    Args:
        byzantine: the hostile clients f to withstand; a round needs 4 f + 3 answers.
        clip: clip each change of the factors to the median norm before.
        nearest: mix each change with its n - f nearest before; for clients whose data differ.
    """
    return _entrywise("bulyan", _around_the_median, byzantine, Preprocessing(clip, nearest), _picked_by_krum)


# -- rules ------------------------------------------------------------------------------------------------------------


def _median(values: Tensor, byzantine: int) -> _Kept:
    n = len(values)
    return _middle(values, (n - 1) // 2)


def _trimmed_mean(values: Tensor, byzantine: int) -> _Kept:
    return _middle(values, byzantine)


def _middle(values: Tensor, cut: int) -> _Kept:
    """The mean of each entry's values without the `cut` smallest and largest."""
    kept = values.sort(dim=0).values[cut : len(values) - cut]
    return _Kept(kept.mean(0), kept[0], kept[-1])


def _around_the_median(values: Tensor, byzantine: int) -> _Kept:
    """The mean of each entry's values without the 2 f farthest from its median."""
    off = (values - _median(values, byzantine).result).abs()
    kept = values.gather(0, off.sort(dim=0, stable=True).indices[: len(values) - 2 * byzantine])
    return _Kept(kept.mean(0), kept.amin(0), kept.amax(0))


def _everyone(gram: Tensor, byzantine: int) -> tuple[list[int], dict[int, str]]:
    return list(range(len(gram))), {}


def _picked_by_krum(gram: Tensor, byzantine: int) -> tuple[list[int], dict[int, str]]:
    """The n - 2 f clients that Krum takes one after the other, each from those left; and why not the others."""
    left = list(range(len(gram)))
    for _ in range(len(gram) - 2 * byzantine):
        left.pop(int(rules.krum_scores(gram[left][:, left], byzantine).argmin()))
    kept = [k for k in range(len(gram)) if k not in left]
    return kept, rules.far(rules.krum_scores(gram, byzantine), torch.tensor(kept))


# -- the fold ---------------------------------------------------------------------------------------------------------


def _entrywise(
    name: str,
    rule: Entrywise,
    byzantine: int | None,
    before: Preprocessing,
    choose: Callable[[Tensor, int], tuple[list[int], dict[int, str]]] = _everyone,
) -> Aggregator:
    """The aggregator that chooses clients by the Gram matrix of the factors, then applies a rule to each entry."""
    before.check(byzantine)

    def finish(state: ServerState, answers: Sequence[Update], refused: int) -> Gradient:
        hostile = max(0, (byzantine or 0) - refused)
        check_answers(name, hostile, len(answers))
        clients = [update.client for update in answers]
        gram = _inner_products([update.delta for update in answers])
        mix, reasons = before(gram, hostile)
        chosen, cut = choose(mix @ gram @ mix.T, hostile)
        tensors, used = {}, torch.zeros(len(chosen)).double()
        for tensor in state.adapter:
            values = torch.stack([update.delta[tensor].flatten() for update in answers]).double()
            values = (mix @ values if before.clip or before.nearest else values)[chosen]
            kept = rule(values, hostile)
            tensors[tensor] = kept.result.reshape(state.adapter[tensor].shape).float()
            used += _say(values, kept)
        used = used / used.sum() if used.any() else torch.full_like(used, 1 / len(used))
        shares = mix[chosen].T @ used
        reasons = {**_dropped(chosen, used), **cut, **reasons}
        return Gradient(
            tensors,
            shares=dict(zip(clients, shares.tolist(), strict=True)),
            notes=before.notes(clients, shares, reasons),
        )

    reduce = each_and_refused(name, "one", finish)
    fewest = rules.fewest(name, byzantine)
    return Aggregator(reduce, plain_step, same_payload, needs="each", fewest=fewest, judges=True)


def _inner_products(deltas: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The Gram matrix (n, n) of the changes of all factors, float64."""
    gram = torch.zeros(len(deltas), len(deltas)).double()
    for name in deltas[0]:
        flat = torch.stack([delta[name].flatten() for delta in deltas]).double()
        gram += flat @ flat.T
    return (gram + gram.T) / 2


def _say(values: Tensor, kept: _Kept) -> Tensor:
    """In how many entries each client's value was averaged, (n,); ties share, and entries where all agree tell nothing.

    By the range of what was averaged, for with values that a codec made coarse many are equal.
    """
    inside = ((values >= kept.low) & (values <= kept.high)).double()
    spread = values.amin(0) < values.amax(0)
    return (inside / inside.sum(0))[:, spread].sum(1)


def _dropped(chosen: Sequence[int], used: Tensor) -> dict[int, str]:
    little = rules.where(used < rules.NAMED / len(used))
    return {
        chosen[k]: f"dropped in most entries; {float(used[k]) * len(used):.0%} of an even share left" for k in little
    }
