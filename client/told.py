"""The numbers of a client's messages, told as its policy for counts says (`apiary.core.counts`).

A client with the policy `exact`, as in a simulation, tells them as they are. What is told always passes the server's
checks: it stays within what the run's steps, batches and `prompt.max_tokens` can hold.
"""

from __future__ import annotations

import math

from apiary.config.schema import RunConfig
from apiary.core.counts import ROUNDED, CountPolicy, most, raised
from apiary.core.messages import CurationCounts, FitReport, Score


def handshake(policy: CountPolicy, rows: int, tokens: int, config: RunConfig) -> tuple[int, int]:
    """How many rows a client has to train on, and response tokens in them; unless stated, zeros where it has none."""
    if policy.kind == "declared":
        return policy.rows, _stated_tokens(policy, config)
    if policy.kind == "exact" or not tokens:
        return rows, tokens
    rows = policy.told_some(rows)
    return rows, min(policy.told_some(tokens), rows * config.prompt.max_tokens)


def _stated_tokens(policy: CountPolicy, config: RunConfig) -> int:
    """The declared response tokens; fewer where the run cuts the rows so short that these cannot hold them."""
    return min(policy.tokens, policy.rows * config.prompt.max_tokens)


def report(policy: CountPolicy, made: FitReport, config: RunConfig, rows: int) -> FitReport:
    """The counts of a visit without privacy; `tokens`, the weight of its update, follow the policy too.

    Steps are told as they are where the run sets their number, else raised to two digits, for a batch may be a row. Of
    declared numbers a visit tells
    the part that it covers: `train.epochs` of them, or all of them where the run sets steps, but no more than fit into
    its batches.

    Args:
        policy: the client's.
        made: the counts as they are.
        config: the run.
        rows: that the visit could have trained on.
    """
    if policy.kind == "exact":
        return made
    if policy.kind == "declared":
        return _declared(policy, made, config)
    steps = made.steps if config.train.epochs is None else _raised_steps(made.steps, rows, config)
    room = steps * _step_tokens(config)
    return made._replace(
        tokens=min(policy.told_some(made.tokens), room),
        examples=policy.told_some(made.examples),
        steps=steps,
        replayed=min(policy.told_some(made.replayed), room),
    )


def _raised_steps(steps: int, rows: int, config: RunConfig) -> int:
    """Steps raised to two digits, but to no more than the server believes: a batch for each row it may think there."""
    passes = config.train.epochs or 1.0
    believed = math.ceil(passes * most("rounded", ROUNDED.told_some(rows)) / config.train.accumulate)
    return min(raised(steps), max(1, believed))


def _declared(policy: CountPolicy, made: FitReport, config: RunConfig) -> FitReport:
    passes = 1.0 if config.train.epochs is None else config.train.epochs
    stated, steps = _stated_tokens(policy, config), made.steps
    if config.train.epochs is not None:
        steps = max(1, math.ceil(passes * stated / _step_tokens(config)))
    room = steps * _step_tokens(config)
    tokens = max(1, min(round(passes * stated), room))
    share = config.continual.replay
    replayed = min(room, round(tokens * share / (1 - share))) if made.replayed else 0
    examples = max(1, round(policy.rows * tokens / stated))
    return made._replace(tokens=tokens, examples=examples, steps=steps, replayed=replayed)


def _step_tokens(config: RunConfig) -> int:
    """Tokens that a step can hold at most."""
    return config.train.accumulate * max(config.train.batch_tokens, config.prompt.max_tokens)


def curated(policy: CountPolicy, made: CurationCounts | None) -> CurationCounts | None:
    """What curation did, as counts that add up; nothing where counts are declared, for of these nobody stated any."""
    if made is None or policy.kind == "declared":
        return None
    if policy.kind == "exact":
        return made
    kept, dropped = policy.told_some(made.kept), {step: policy.told(count) for step, count in made.dropped.items()}
    return CurationCounts(kept + sum(dropped.values()), kept, dropped)


def score(policy: CountPolicy, made: Score, config: RunConfig) -> Score:
    """The mean loss on a client's held-out rows as it is, times a number of tokens that the policy lets it tell."""
    if policy.kind == "exact" or not made.tokens:
        return made
    examples, tokens = policy.told_some(made.examples), policy.told_some(made.tokens)
    if policy.kind == "declared":  # the held-out fraction, which is no secret, of all rows
        part = config.data.test_fraction / (1 - config.data.test_fraction)
        examples, tokens = (max(1, round(part * count)) for count in handshake(policy, 1, 1, config))
    tokens = min(tokens, examples * config.prompt.max_tokens)
    return Score(made.loss * tokens, tokens, examples)
