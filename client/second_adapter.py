"""A client's own adapter beside the one that it trains for everybody: trained in the same visit, and never sent.

What is sent is trained first, so that nothing of it depends on the own adapter; that goes on with the rows that come
next. Each of the two has a schedule of the learning rate over its own steps.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from apiary.config.schema import TrainConfig
from apiary.core import lora
from apiary.core.tensors import StateDict, add
from apiary.data.batches import Corpus
from apiary.models.adapters import LanguageModel
from client.training import trainer
from client.training.trainer import FitResult, Replay, VisitPlan
from strategies.local import LocalAlgorithm, Opened


class OwnModel(NamedTuple):
    """A client's own adapter after a visit."""

    adapter: dict[str, Tensor]
    result: FitResult | None  # of its training; None where the visit had no step for it


def plan_of_sent(local: LocalAlgorithm, plan: VisitPlan) -> VisitPlan:
    """The plan of a whole visit with the steps that train what is sent."""
    return _with_steps(plan, plan.steps - local.own_steps(plan.steps))


def _with_steps(plan: VisitPlan, steps: int) -> VisitPlan:
    """The plan with so many steps in each visit, as many visits before it, and as many in all."""
    total, first = (count // plan.steps * steps for count in (plan.total_steps, plan.first_step))
    return plan._replace(steps=steps, total_steps=total, first_step=first)


def train(
    lm: LanguageModel,
    own: Opened,
    base_delta: StateDict,
    corpus: Corpus,
    config: TrainConfig,
    plan: VisitPlan,
) -> OwnModel:
    """Train a client's own adapter.

    Args:
        lm: the model.
        own: where it begins, and what the method asks of its training.
        base_delta: factors that the server adds to the base.
        corpus: the client's new rows.
        config: the optimizer, its schedule, and how batches are made.
        plan: the visit with the steps that are the own adapter's and the place in the rows where these begin.

    Raises:
        FloatingPointError: the loss or a gradient became NaN or infinite.
    """
    if not plan.steps:
        return OwnModel(dict(own.adapter), None)
    result = trainer.fit(lm, lora.whole(own.adapter, base_delta), corpus, config, plan._replace(hooks=own.hooks))
    return OwnModel(add(own.adapter, result.delta), result)


def plan_of_own(local: LocalAlgorithm, plan: VisitPlan, sent: FitResult) -> VisitPlan:
    """The plan of a whole visit with the own adapter's steps, which go on in the rows where `sent` ended."""
    old = plan.replay
    goes_on = None if old is None else Replay(old.corpus, sent.replay, old.share)
    steps = local.own_steps(plan.steps)
    return _with_steps(plan, steps)._replace(cursor=sent.cursor, replay=goes_on)


def whole_visit(sent: FitResult, own: OwnModel) -> FitResult:
    """The result of both trainings: the change and the loss of what is sent, the counts of both."""
    if own.result is None:
        return sent
    one, two = sent.report, own.result.report
    report = one._replace(
        tokens=one.tokens + two.tokens,
        examples=one.examples + two.examples,
        steps=one.steps + two.steps,
        seconds=one.seconds + two.seconds,
        replayed=one.replayed + two.replayed,
    )
    return sent._replace(cursor=own.result.cursor, replay=own.result.replay, report=report)
