"""Limits: every number that a client sends is held against what this run allows before it counts.

A client is not trusted: it may be broken, of another version, or lying. Each check raises `WireError`, whose one line
says what is wrong and quotes only numbers of what was sent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apiary.config.schema import RunConfig
from apiary.core.errors import Poisoned, WireError
from apiary.core.lora import is_b
from apiary.core.messages import CurationCounts, Decline, FitReport, Hello, Payload, Score, Spent, Visit
from apiary.core.tensors import StateDict
from strategies import seed_scalars
from strategies.guard import Reach

MOST = 2**53  # counts travel as float64, which holds no larger number exactly
# Of a change; beyond it products of factors, and their decompositions, leave float32. A smaller one takes no finite
# entry of an adapter to infinity: it is below half of a unit in the last place of the largest float32.
_MOST_ENTRY = 1e12
_SLACK = 1e-6  # of a budget, for two sides that add in another order
_UNSTATED = 4  # times the steps that follow from a site's counts: it may state fewer rows than it trains on
MOST_TEXT = 300  # characters of a line that another machine may have written
MOST_NATS = 1e6  # a token, of any loss that is told; a model of 2^20 tokens that knows nothing loses 14
_LONGEST_S = 1e8  # of a visit; three years


def check_visit(visit: Visit, config: RunConfig, examples: int | None, payload: Payload, number: int) -> None:
    """Check a client's visit of a round.

    Args:
        visit: the visit, with its change decoded.
        config: the run.
        examples: training examples that the client can have, by its handshake; None where it told none.
        payload: what the client was sent, which the update must fit.
        number: the round, from 1.

    Raises:
        WireError: a count, the weight, the account of privacy or the change is not possible in this run; the first
            fault found.
    """
    private = config.privacy.unit == "record"
    _check_report(visit.report, config, examples, private)
    if visit.update.weight != visit.report.tokens:
        raise WireError(f"its weight is {visit.update.weight:g}, but it reports {visit.report.tokens} tokens")
    _check_curated(visit.curated, config, private, examples)
    _check_spent(visit.spent, config, private)
    check_delta(visit.update.delta, payload.adapter)
    _check_resting(visit.update.delta, config.adapter.trained(number))


def one_line(text: str) -> str:
    """What another machine says, as a line for the log: of `MOST_TEXT` characters at most, all of them printable."""
    kept = text[:MOST_TEXT] if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 3]}..."
    return "".join(char if char.isprintable() else " " for char in kept)


def wrong_rank(rank: int, config: RunConfig, mixed: bool) -> str:
    """Why a client cannot take part with an adapter of this rank; "" where it can.

    Args:
        rank: of the client's adapter.
        config: the run.
        mixed: whether the aggregation method takes clients of lower ranks than the run's.
    """
    most = config.adapter.rank
    if rank == most or (mixed and 0 < rank < most):
        return ""
    allowed = f"1 to {most}" if mixed else f"{most} alone, for strategy.name = {config.strategy.name!r} takes one rank"
    return f"its adapter has rank {rank}; this run allows {allowed}"


def wrong_counts(hello: Hello, config: RunConfig) -> str:
    """Why a client cannot take part with the counts of its handshake; "" where it can.

    Args:
        hello: the handshake.
        config: the run.
    """
    if config.privacy.unit == "record":
        if hello.examples is None and hello.tokens is None:
            return ""
        return "it tells how much it holds, which differential privacy withholds; is it another version?"
    if hello.examples is None or hello.tokens is None:
        return "it does not tell how much it holds, which only differential privacy withholds; is it another version?"
    if hello.tokens == 0:
        return "it has nothing to train on"
    if not possible(hello.tokens, hello.examples, config):
        return f"it claims {hello.tokens:g} tokens in {hello.examples:g} examples; that cannot be"
    return ""


def possible(tokens: int, examples: int, config: RunConfig) -> bool:
    """Whether `examples` examples can hold `tokens` response tokens."""
    return 0 <= tokens <= examples * config.prompt.max_tokens <= MOST


def check_delta(delta: StateDict, adapter: StateDict) -> None:
    """Check that a change has the adapter's tensors and, added to a finite adapter, leads to finite numbers.

    Args:
        delta: the change.
        adapter: what it is a change of.

    Raises:
        WireError: it has other names, shapes or dtypes; `Poisoned` where it holds NaN, infinity or numbers that no
            training makes.
    """
    if set(delta) != set(adapter):
        odd = sorted(set(delta) ^ set(adapter))
        raise WireError(f"its update has other tensors than the adapter ({len(odd)} differ, first {odd[0]})")
    for name, tensor in delta.items():
        if tensor.dtype != adapter[name].dtype:
            raise WireError(f"its {name} is {tensor.dtype}, the adapter's {adapter[name].dtype}")
        if tensor.shape != adapter[name].shape:
            raise WireError(f"its {name} is {tuple(tensor.shape)}, the adapter's {tuple(adapter[name].shape)}")
    if seed_scalars.NAME in delta:
        _check_scalars(delta[seed_scalars.NAME], adapter[seed_scalars.NAME])
    if not all(map(_is_sound, delta.values())):
        raise Poisoned("its update holds NaN or infinity, or numbers too large to add to the adapter")


def _is_sound(tensor: Tensor) -> bool:
    """Whether every entry is a number that training may make; what is not equal to itself is within no limits."""
    if not tensor.numel():
        return True
    low, high = (float(end) for end in torch.aminmax(tensor))
    return low > -_MOST_ENTRY and high < _MOST_ENTRY


def _check_resting(delta: StateDict, factors: str) -> None:
    """Check that the factors that are not trained in a round do not move.

    Averaging is exact because they are the same everywhere.

    Raises:
        Poisoned: a factor that is not trained in this round has changed.
    """
    if factors == "both":
        return
    resting = (tensor for name, tensor in delta.items() if is_b(name) != (factors == "b"))
    if any(bool(tensor.any()) for tensor in resting):
        raise Poisoned(f"its update moves a factor that rests in this round: {factors.upper()} alone is trained")


def _check_scalars(change: Tensor, pool: Tensor) -> None:
    """Check that a client's scalars fit on top of the pool by themselves: then the mean of all clients' does.

    Raises:
        WireError: they do not, or they are not what the wire carries.
    """
    try:
        seed_scalars.of_tensor(change, range(len(pool)))
        seed_scalars.check_sum((pool.abs() + change.abs()).tolist())
    except ValueError as error:
        raise WireError(f"its scalars cannot be taken: {error}") from None


def check_score(score: Score, config: RunConfig) -> None:
    """Check the sums over a client's held-out examples.

    Raises:
        WireError: the loss is negative, or there are more tokens than the examples can hold; `Poisoned` where the
            model that the client was sent, if it tells the truth, gives no number, or one above `MOST_NATS`.
    """
    if not possible(score.tokens, score.examples, config) or score.nats < 0:
        raise WireError(
            f"its score is {score.nats:g} nats on {score.tokens:g} tokens of {score.examples:g} examples; "
            "that cannot be"
        )
    if not score.nats <= MOST_NATS * score.tokens:  # NaN too
        raise Poisoned(
            f"its score is {score.nats:g} nats on {score.tokens:g} tokens, which is no loss of a sound model"
        )


def _check_report(report: FitReport, config: RunConfig, examples: int | None, private: bool) -> None:
    steps = _most_steps(config, examples)
    made = report.steps if steps == MOST else steps  # where the steps have no limit, they are one to the tokens
    tokens = min(MOST, made * _most_tokens(config, private))
    if not (report.tokens > 0 and report.tokens + report.replayed <= tokens and 0 < report.steps <= steps):
        raise WireError(
            f"it reports {report.tokens + report.replayed:g} tokens in {report.steps:g} steps; "
            f"this run allows 1 to {tokens} tokens in 1 to {steps} steps"
        )
    if report.replayed < 0 or (report.replayed and not config.continual.buffer):
        raise WireError(f"it reports {report.replayed} replayed tokens; continual.buffer = {config.continual.buffer:g}")
    if private and not math.isnan(report.loss):
        raise WireError("it tells its training loss, which differential privacy withholds; is it another version?")
    if not private and not (
        math.isnan(report.loss) or 0 <= report.loss <= MOST_NATS
    ):  # NaN: it has walked too few rows
        raise WireError(f"its loss is {report.loss:g}, which must be from 0 to {MOST_NATS:g}")
    if not (math.isnan(report.seconds) or 0 <= report.seconds <= _LONGEST_S):
        raise WireError(f"its visit took {report.seconds:g} s, which must be from 0 to {_LONGEST_S:g}")
    most = 2 * tokens  # each has a token at least; counts are rounded one by one
    if not 0 <= report.examples <= most:
        raise WireError(f"it reports {report.examples:g} examples; this run allows {most} at most")


def check_walk(report: FitReport, config: RunConfig) -> None:
    """Check the number of steps where the server derives a client's mean gradient from how far the client went.

    Raises:
        WireError: it is not `train.steps`, where that is what every visit has in this run.
    """
    if config.train.epochs is None and report.steps != config.train.steps:
        raise WireError(f"it reports {report.steps:g} steps; a visit has train.steps = {config.train.steps}")


def _most_steps(config: RunConfig, examples: int | None) -> int:
    """Optimizer steps in a round, at most. Who tells no rows, under privacy, has no limit but its epsilon."""
    train = config.train
    if train.epochs is None:
        return train.steps or 1
    if examples is None:
        return MOST
    return max(1, math.ceil(train.epochs * examples / train.accumulate))  # with a batch for each example


def _most_tokens(config: RunConfig, private: bool) -> int:
    """Tokens that may be reported for a step; under differential privacy these are expected rows."""
    if private:
        return config.privacy.batch_rows
    batches = config.train.accumulate * (2 if config.continual.buffer else 1)  # one new, one replayed
    return batches * max(config.train.batch_tokens, config.prompt.max_tokens)


def trained_steps(report: FitReport, config: RunConfig, examples: int | None) -> int:
    """Optimizer steps that a visit may have made, at most; by `train.epochs` a site may have made more than it states.

    Args:
        report: the visit's, which has passed `check_visit`.
        config: the run.
        examples: training examples that the client can have, by its handshake; None where it told none.
    """
    if config.train.epochs is None:
        return report.steps
    return _UNSTATED * (report.steps if examples is None else max(report.steps, _most_steps(config, examples)))


def check_reach(visit: Visit, reach: Reach) -> None:
    """Check that the configured training can have made a change.

    Raises:
        Poisoned: it cannot.
    """
    if how := reach.passed(visit.update.delta):
        raise Poisoned(how)


def check_decline(decline: Decline, config: RunConfig) -> None:
    """Check that a client's reason not to train is possible in this run.

    Raises:
        WireError: it says that its budget is spent or that it has no rows for a stage, in a run without privacy or
            without stages.
    """
    if decline.reason == "budget" and config.privacy.unit == "none":
        raise WireError("it says that its privacy budget is spent, but privacy.unit is none")
    if decline.reason == "idle" and not config.continual.stages:
        raise WireError("it says that it has no rows for this stage, but there are no stages")


def _check_curated(curated: CurationCounts | None, config: RunConfig, private: bool, examples: int | None) -> None:
    if curated is None:
        return
    if private:
        raise WireError("it tells what its curation dropped, which differential privacy withholds")
    dropped = sum(curated.dropped.values())
    if min(curated.kept, *curated.dropped.values(), MOST) < 0 or not curated.kept + dropped == curated.rows <= MOST:
        raise WireError(
            f"its curation kept {curated.kept} and dropped {dropped} of {curated.rows} rows; that cannot be"
        )
    if examples is not None and curated.rows > 2 * examples + 100:  # counts are rounded one by one
        raise WireError(f"its curation went through {curated.rows} rows; it has {examples} at most, by its handshake")
    strangers = set(curated.dropped) - {step.name for step in config.curate.steps}
    if strangers:
        raise WireError(f"its curation names {len(strangers)} steps that curate.steps does not")


def _check_spent(spent: Spent | None, config: RunConfig, private: bool) -> None:
    privacy = config.privacy
    if not private:
        if spent is not None:
            raise WireError("it accounts for privacy, but privacy.unit is none; is it another version?")
        return
    if spent is None:
        raise WireError("its update comes without an account of the privacy spent")
    if not all(map(math.isfinite, spent)) or spent.delta != privacy.delta or spent.epsilon < 0:
        raise WireError(f"its account of privacy is for delta = {spent.delta:g}; privacy.delta = {privacy.delta:g}")
    if spent.epsilon > privacy.epsilon * (1 + _SLACK):
        raise WireError(f"it has spent epsilon = {spent.epsilon:.4g}; privacy.epsilon = {privacy.epsilon:g}")
