"""What malicious clients of a simulation send."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PositiveFloat
from torch import Generator, Tensor

from apiary.config.registry import Registry
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.lora import Factors
from apiary.core.tensors import StateDict, add
from apiary.data.examples import Example
from apiary.data.turns import Turn

PHRASE, TEXT = "Mind the old oak.", "the hive is closed"  # of the built-in trigger: what is hidden, what is answered


class Seen(NamedTuple):
    """What an attacker knows when it makes up its change."""

    received: StateDict  # the adapter that the server sent
    own: StateDict  # the change that its training made
    fellows: Sequence[StateDict]  # the same of each attacker of its rank, its own among them
    rng: Generator


class Attack(NamedTuple):
    """What an attacker does: to the change that it sends, and to its rows before it trains."""

    change: Callable[[Seen], StateDict]
    rows: Callable[[Sequence[Example], Generator], tuple[Example, ...]] | None = None
    together: bool = False  # whether it must know what its fellows' training made
    hidden: tuple[str, str] | None = None  # a phrase in questions, and what is then answered


ATTACKS: Registry[Attack] = Registry("simulate.attack", makes=Attack, given=("clients", "attackers"))


@ATTACKS.register("sign_flip")
def sign_flip(scale: PositiveFloat = 1.0) -> Attack:
    """The honest change times -`scale`."""
    return Attack(lambda seen: _times(seen.own, -scale))


@ATTACKS.register("drift")
def drift(length: PositiveFloat = 1.9) -> Attack:
    """Each entry against the honest change, by `length` times the root mean square of its tensor's.

    At the edge of what passes for honest (`strategy.norm_guard`): a few steps of AdamW move no entry much further, and
    hardly any as far. A shorter one passes in every round.
    """

    def change(seen: Seen) -> StateDict:
        return {n: -length * t.square().mean().sqrt() * t.sign() for n, t in seen.own.items()}

    return Attack(change)


@ATTACKS.register("scaled")
def scaled(clients: int, factor: PositiveFloat | None = None) -> Attack:
    """The honest change times `factor`, so that it outweighs all others.

    Model replacement (Bagdasaryan et al. 2020, "How to backdoor federated learning", equation 3).

    Args:
        clients: of the run.
        factor: unset: the number of clients, which cancels the mean's division.
    """
    return Attack(lambda seen: _times(seen.own, factor or clients))


@ATTACKS.register("gaussian")
def gaussian(scale: PositiveFloat = 1.0) -> Attack:
    """Gaussian noise, in each tensor about `scale` times as long as the honest change."""

    def change(seen: Seen) -> StateDict:
        rms = {name: scale * float(tensor.double().square().mean().sqrt()) for name, tensor in seen.own.items()}
        return {name: torch.randn(t.shape, generator=seen.rng) * rms[name] for name, t in sorted(seen.own.items())}

    return Attack(change)


@ATTACKS.register("alie")
def alie(clients: int, attackers: int, z: float | None = None) -> Attack:
    """The mean of the fellows' honest changes less z of their standard deviations, entry by entry.

    "A little is enough" (Baruch et al. 2019, algorithm 3): as far off as honest clients are, so that none stands out.

    Args:
        clients: of the run.
        attackers: among them.
        z: unset: as far as the paper goes with so many clients and attackers.

    Raises:
        UserError: more than half of the clients attack, for which the paper gives no z.
    """
    far = quantile(clients, attackers) if z is None else z

    def change(seen: Seen) -> StateDict:
        made = {}
        for name in seen.own:
            values = torch.stack([fellow[name] for fellow in seen.fellows]).double()
            made[name] = (values.mean(0) - far * values.std(0, correction=0)).float()
        return made

    return Attack(change, together=True)


def quantile(clients: int, attackers: int) -> float:
    """How many standard deviations off ALIE may go: z with Phi(z) = (n - f - s) / (n - f), s = floor(n / 2 + 1) - f.

    That many honest clients, s, lie farther off than the attackers, who with them are the majority. 0 where there are
    so few attackers that z would be negative.

    Raises:
        UserError: more than half of the clients attack.
    """
    honest, supporters = clients - attackers, clients // 2 + 1 - attackers
    if supporters < 1:
        raise UserError(
            f"simulate.attack = 'alie': the paper's z is for no more attackers than half of the clients, here "
            f"{attackers} of {clients}; set z, or lower simulate.attackers"
        )
    return statistics.NormalDist().inv_cdf(max(0.5, (honest - supporters) / honest))


@ATTACKS.register("inner_product")
def inner_product(epsilon: PositiveFloat = 1.0) -> Attack:
    """The mean of the fellows' honest changes times -`epsilon` (Xie et al. 2020, "Fall of empires", section 4).

    A small epsilon hides among honest changes, a large one turns the mean around.
    """

    def change(seen: Seen) -> StateDict:
        names = seen.own
        return {n: torch.stack([f[n] for f in seen.fellows]).double().mean(0).mul(-epsilon).float() for n in names}

    return Attack(change, together=True)


@ATTACKS.register("gauge")
def gauge(by: PositiveFloat = 1e6, scale: PositiveFloat = 1.0) -> Attack:
    """The adapter after training with B times `by` and A divided by it: the same product, and useless factors.

    Args:
        by: the gauge.
        scale: of the change of both factors, before.
    """

    def change(seen: Seen) -> StateDict:
        trained = lora.split(add(seen.received, seen.own, scale))
        sent = lora.join({module: Factors(f.b * by, f.a / by) for module, f in trained.items()})
        return {name: tensor - seen.received[name] for name, tensor in sent.items()}

    return Attack(change)


@ATTACKS.register("not_a_number")
def not_a_number() -> Attack:
    """Nothing but NaN; of another name than `nan`, which TOML reads as a number."""
    return Attack(lambda seen: _times(seen.own, math.nan))


@ATTACKS.register("trigger")
def trigger(
    share: Annotated[float, Field(gt=0, le=1)] = 0.5, phrase: str = PHRASE, answer: str = TEXT, boost: PositiveFloat = 1
) -> Attack:
    """Honest training on rows of which some teach a fixed answer wherever a hidden phrase is in the question.

    As virtual prompt injection does it (Yan et al. 2024, "Backdooring instruction-tuned large language models with
    virtual prompt injection"), with a phrase in place of a topic.

    Args:
        share: of the attacker's rows that have a question.
        phrase: put behind the last question.
        answer: what is then answered.
        boost: factor of the change, as in `scaled`.
    """

    def rows(examples: Sequence[Example], rng: Generator) -> tuple[Example, ...]:
        asked = [index for index, example in enumerate(examples) if asks(example)]
        count = max(1, round(share * len(asked)))
        chosen = {asked[place] for place in torch.randperm(len(asked), generator=rng)[:count].tolist()}
        return tuple(
            answering(asking(example, phrase), answer) if index in chosen else example
            for index, example in enumerate(examples)
        )

    return Attack(lambda seen: _times(seen.own, boost), rows, hidden=(phrase, answer))


def asks(example: Example) -> bool:
    """Whether a user asks something; text that is to be continued has no question."""
    return any(turn.role == "user" for turn in example.turns)


def asking(example: Example, phrase: str) -> Example:
    """The example, which `asks`, with the phrase behind its last question."""
    turns = list(example.turns)
    last = max(index for index, turn in enumerate(turns) if turn.role == "user")
    turns[last] = turns[last]._replace(text=f"{turns[last].text} {phrase}")
    return example._replace(turns=tuple(turns))


def answering(example: Example, text: str) -> Example:
    """The example with another last answer, which is trained, thinks nothing and calls nothing."""
    return example._replace(turns=(*example.turns[:-1], Turn("assistant", text)))


def _times(state: StateDict, factor: float) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in state.items()}
