"""Robust aggregation in the space of products.

A client's change is U_k = s_k (B_k A_k - B_0 A_0), the matrices of all modules seen as one long vector. All that these
methods ask of a cohort is the Gram matrix of the U_k, in which no gauge shows: a client that sends B times 1e6 and A
times 1e-6 is judged, and counted, as if it had sent B and A. The result is sum_k c_k U_k with a factor for each client.

Clients count alike here, whatever `strategy.weighting` says: a weight is a client's own claim, and these methods are
for clients that lie. They stop crude poisoning of the model. They do not stop poisoned data, whose updates look like
any others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from apiary.core import lora
from apiary.core.lora import Factors, Scaling
from apiary.core.messages import Update
from strategies import gram_rules as rules
from strategies.aggregator import AGGREGATORS, ROOT, Aggregator, Gradient, ServerState, plain_step, product_step
from strategies.gram_rules import Preprocessing, Rule, check_answers
from strategies.products import each_and_refused, payload_of_rank

_LOST = 0.01  # most that rounding may add in a client's name, relative to its norm or the median norm
_EPS = torch.finfo(torch.float32).eps / 2


@AGGREGATORS.register("norm_clip")
def norm_clip(
    scaling: Scaling,
    limit: PositiveFloat | None = None,
    byzantine: NonNegativeInt | None = None,
    nearest: bool = False,
) -> Aggregator:
    """The mean of the clients' changes, each clipped to the median norm of the round or to a given limit.

    Bounds what one client can do, no more: hostile clients that agree still pull the mean (Sun et al. 2019, "Can you
    really backdoor federated learning?").

    Args:
        scaling: the scale of a product by its rank.
        limit: Frobenius norm of a change to all weights; unset: the median of the round's.
        byzantine: hostile clients expected; more than half honest must be among a round's answers.
        nearest: mix each change with its n - byzantine nearest before.
    """
    return _robust(_Method("norm_clip", rules.mean_clipped(limit), byzantine, Preprocessing(False, nearest)), scaling)


@AGGREGATORS.register("krum")
def krum(scaling: Scaling, byzantine: NonNegativeInt, clip: bool = False, nearest: bool = False) -> Aggregator:
    """The change of the one client that is closest to its n - f - 2 nearest (Blanchard et al. 2017).

    Where clients' data differ, one of them is a poor average; `multi_krum` keeps more.

    Args:
        scaling: the scale of a product by its rank.
        byzantine: the hostile clients f to withstand; a round needs 2 f + 3 answers.
        clip: clip each change to the median norm before.
        nearest: mix each change with its n - f nearest before; for clients whose data differ.
    """
    aggregator = _robust(_Method("krum", rules.krum(1), byzantine, Preprocessing(clip, nearest)), scaling)
    return aggregator._replace(takes_one=True)


@AGGREGATORS.register("multi_krum")
def multi_krum(
    scaling: Scaling,
    byzantine: NonNegativeInt,
    select: PositiveInt | None = None,
    clip: bool = False,
    nearest: bool = False,
) -> Aggregator:
    """The mean of the clients whose changes are closest to their n - f - 2 nearest (Blanchard et al. 2017).

    Args:
        scaling: the scale of a product by its rank.
        byzantine: the hostile clients f to withstand; a round needs 2 f + 3 answers.
        select: how many to keep, of at most n - f; unset: n - f.
        clip: clip each change to the median norm before.
        nearest: mix each change with its n - f nearest before; for clients whose data differ.
    """
    return _robust(_Method("multi_krum", rules.krum(select), byzantine, Preprocessing(clip, nearest)), scaling)


@AGGREGATORS.register("geometric_median")
def geometric_median(
    scaling: Scaling, byzantine: NonNegativeInt | None = None, clip: bool = False, nearest: bool = False
) -> Aggregator:
    """The point with the least sum of distances to the clients' changes; RFA (Pillutla et al. 2022).

    Args:
        scaling: the scale of a product by its rank.
        byzantine: hostile clients expected; a round then needs 2 f + 1 answers. The median itself needs no number.
        clip: clip each change to the median norm before.
        nearest: mix each change with its n - f nearest before; for clients whose data differ.
    """
    return _robust(
        _Method("geometric_median", rules.geometric_median, byzantine, Preprocessing(clip, nearest)), scaling
    )


@AGGREGATORS.register("fltrust")
def fltrust(
    scaling: Scaling, byzantine: NonNegativeInt | None = None, clip: bool = False, nearest: bool = False
) -> Aggregator:
    """Clients count as far as they point where the server's own update does, at its length (Cao et al. 2021).

    The server trains the adapter that it sends on rows of its own, the root set (the paper: about 100 that it trusts),
    and folds its change in like a client's, at any place in the round, in the name of `ROOT` and with its own rank.
    The method has `root=True` to ask for that. No client may call itself so.

    Args:
        scaling: the scale of a product by its rank.
        byzantine: hostile clients, needed by `nearest` alone.
        clip: clip each change to the median norm before, which shows after mixing only.
        nearest: mix each change with its n - f nearest before.
    """
    return _robust(_Method("fltrust", rules.trust, byzantine, Preprocessing(clip, nearest)), scaling, root=True)


class _Method(NamedTuple):
    name: str
    rule: Rule
    byzantine: int | None
    before: Preprocessing


def _robust(method: _Method, scaling: Scaling, root: bool = False) -> Aggregator:
    """The aggregator that applies a rule to the Gram matrix of the products; it holds all updates of a round."""
    method.before.check(method.byzantine)

    def finish(state: ServerState, answers: Sequence[Update], refused: int) -> Gradient:
        held = lora.split(state.adapter)
        own = _trusted(answers) if root else []
        answers = [update for update in answers if not own or update.client != ROOT]
        clients = [update.client for update in answers]
        deltas = [_in_units(held, update, scaling) for update in [*answers, *own]]
        gram, sizes = _inner_products(held, deltas, scaling)
        shares, reasons = _judge(_left(method, refused), gram, sizes, len(own))
        of_clients = deltas[: len(clients)]
        return Gradient(
            lora.join({module: _combine(f, [d[module] for d in of_clients], shares) for module, f in held.items()}),
            shares=dict(zip(clients, shares.tolist(), strict=True)),
            notes=method.before.notes(clients, shares, reasons),
        )

    reduce = each_and_refused(method.name, "mixed", finish)
    return Aggregator(
        reduce,
        step,
        payload_of_rank(scaling),
        needs="each",
        space="products",
        ranks="mixed",
        fewest=rules.fewest(method.name, method.byzantine),
        keeps=("b", "alternate"),
        judges=True,
        root=root,
    )


def step(state: ServerState, gradient: Gradient) -> ServerState:
    """The next state: as `product_step`, but where only B (or only A) moved, the other factor stays bit by bit.

    Factoring anew would be as exact, and replace an A that clients hold fixed.
    """
    held, change = lora.split(state.adapter), lora.split(gradient.adapter)
    if not any(bool(f.a.any()) and bool(f.b.any()) for f in change.values()):  # nobody counts
        return state._replace(round=state.round + 1)
    if all(torch.equal(change[module].a, f.a) for module, f in held.items()):
        moved = {module: Factors(change[module].b, torch.zeros_like(f.a)) for module, f in held.items()}
    elif all(torch.equal(change[module].b, f.b) for module, f in held.items()):
        moved = {module: Factors(torch.zeros_like(f.b), change[module].a) for module, f in held.items()}
    else:
        return product_step(state, gradient)
    return plain_step(state, gradient._replace(adapter=lora.join(moved)))


def _left(method: _Method, refused: int) -> _Method:
    """The method with the hostile clients that may be left among the answers."""
    return method if method.byzantine is None else method._replace(byzantine=max(0, method.byzantine - refused))


def _trusted(answers: Sequence[Update]) -> list[Update]:
    own = [update for update in answers if update.client == ROOT]
    if len(own) != 1:
        raise ValueError(f"fltrust needs one update of the server's own, this round has {len(own)}; give it a root set")
    return own


def _rank(factors: Mapping[str, Factors]) -> int:
    return next(iter(factors.values())).rank


def _in_units(held: Mapping[str, Factors], update: Update, scaling: Scaling) -> dict[str, Factors]:
    """The change of a client to the leading rows of A and columns of B, all in units of the server's s_R.

    What a client of rank r holds is B times s_R / s_r (`core.of_rank`), so that its dB counts s_r / s_R times.
    """
    deltas, whole = lora.split(update.delta), _rank(held)
    ratio = scaling(_rank(deltas)) / scaling(whole)
    return deltas if ratio == 1 else {module: Factors(d.b * ratio, d.a) for module, d in deltas.items()}


def _change(held: Factors, delta: Factors) -> Factors:
    """The factors of (B + dB)(A + dA) - B A; of rank r, and not 2 r, where only one factor moved."""
    start = lora.resize(held, delta.rank)
    if not delta.a.any():
        return Factors(delta.b, start.a)
    if not delta.b.any():
        return Factors(start.b, delta.a)
    return lora.change(start, delta)


def _inner_products(
    held: Mapping[str, Factors], deltas: Sequence[Mapping[str, Factors]], scaling: Scaling
) -> tuple[Tensor, Tensor]:
    """The Gram matrix (n, n) of the changes, and how large (n,) the parts are that each is the sum of; float64.

    The size of sum_i b_i a_i^T is sum_i |b_i| |a_i|, which no scaling of columns and rows alters. Far above the norm it
    tells of parts that cancel. A change that is not finite counts as 0, and has an infinite size.
    """
    gram, squares = torch.zeros(len(deltas), len(deltas)).double(), torch.zeros(len(deltas)).double()
    for module, start in held.items():
        own = [delta[module] for delta in deltas]
        sizes = torch.stack([_size(_change(start, delta)) for delta in own])
        squares += sizes.square()
        gram += lora.change_gram(
            start,
            [d if bool(s.isfinite()) else Factors(*map(torch.zeros_like, d)) for d, s in zip(own, sizes, strict=True)],
        )
    scale = scaling(_rank(held))
    return (gram + gram.T) * (scale**2 / 2), squares.sqrt() * scale


def _size(x: Factors) -> Tensor:
    norm = torch.linalg.vector_norm
    size = (norm(x.b, dim=0, dtype=torch.float64) * norm(x.a, dim=1, dtype=torch.float64)).sum()
    return torch.where(size.isfinite(), size, torch.inf)


def _judge(method: _Method, gram: Tensor, sizes: Tensor, own: int) -> tuple[Tensor, dict[int, str]]:
    """The factor of each client (n,) and why it is small; the server's own changes are the last `own` of the matrix.

    Whoever sends parts so large, and so near to cancelling, that float32 cannot add them up, is cut beforehand: there
    the norm says little of what would come into the adapter.
    """
    n, byzantine = len(gram) - own, method.byzantine or 0
    check_answers(method.name, byzantine, n)
    norms = gram.diagonal()[:n].clamp_min(0).sqrt()
    fine = sizes[:n] * _EPS <= _LOST * norms.clamp_min(float(norms.quantile(0.5)))
    sound = rules.where(fine)
    byzantine = max(0, byzantine - (n - len(sound)))
    check_answers(method.name, byzantine, len(sound))
    mix, little = method.before(gram[sound][:, sound], byzantine)
    seen = [*sound, *range(n, len(gram))]
    wide = torch.block_diag(mix, torch.eye(own, dtype=mix.dtype))
    verdict = method.rule(wide @ gram[seen][:, seen] @ wide.T, byzantine)
    shares = torch.zeros(n, dtype=gram.dtype).index_copy_(0, torch.tensor(sound), mix.T @ verdict.weights)
    reasons = {sound[k]: reason for k, reason in {**verdict.reasons, **little}.items()}
    return shares, reasons | dict.fromkeys(rules.where(~fine), "huge factors that cancel each other")


def _combine(held: Factors, deltas: Sequence[Factors], shares: Tensor) -> Factors:
    """The factors of sum_k c_k U_k, float32, from who has a share.

    As sum_k c_k dB_k A_k + B_0 sum_k c_k dA_k, of rank sum_k r_k + R. Where only B moved, A stays that of the adapter,
    and where only A moved, B does.
    """
    counted = [(delta, share) for delta, share in zip(deltas, shares.tolist(), strict=True) if share]
    b = _sum([(lora.resize(d, held.rank).b, share) for d, share in counted], held.b)
    if not any(bool(delta.a.any()) for delta, _ in counted):
        return Factors(b, held.a)
    a = _sum([(lora.resize(d, held.rank).a, share) for d, share in counted], held.a)
    if not any(bool(delta.b.any()) for delta, _ in counted):
        return Factors(held.b, a)
    terms = [
        _levelled(Factors(delta.b.double() * share, (lora.resize(held, delta.rank).a + delta.a).double()))
        for delta, share in counted
    ]
    return lora.stack([*terms, Factors(held.b, a)])


def _levelled(x: Factors) -> Factors:
    """The product in float32, each column of B as long as its row of A.

    What is left of a huge change, a tiny B and a huge A, would be beyond what float32 can factor.
    """
    b, a = x.b.norm(dim=0), x.a.norm(dim=1)
    ratio = torch.where((b > 0) & (a > 0), a / b, 1.0).sqrt()
    return Factors((x.b * ratio).float(), (x.a / ratio[:, None]).float())


def _sum(terms: Sequence[tuple[Tensor, float]], like: Tensor) -> Tensor:
    """sum_k c_k x_k, added up in float64."""
    total = torch.zeros_like(like, dtype=torch.float64)
    for tensor, share in terms:
        total += tensor.double() * share
    return total.float()
