"""Which methods go together: every pair that the configuration can name either works or is refused here.

`problems` is asked whenever a configuration is read, so nothing that breaks a promise ever starts. The table in
`docs/together.md` asks it about each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from apiary.config import RunConfig

POINTWISE: Final = ("mask", "length")
"""Curation steps in which what happens to a row depends on no other row of the client; a test holds them to it."""


def problems(config: RunConfig) -> list[str]:
    """One line for each combination in `config` that cannot work, with the reason and a way out."""
    return [line for rule in _RULES for line in rule(config)]


def _private_curation(config: RunConfig) -> Iterator[str]:
    """The guarantee is over neighbouring training sets, so one row must not decide about another."""
    if config.privacy.unit == "none":
        return
    if coupled := [repr(step.name) for step in config.curate.steps if step.name not in POINTWISE]:
        yield (
            f"curate.steps: {', '.join(coupled)} may let one row decide about "
            f'another, which breaks privacy.unit = "record"; allowed with it are {", ".join(POINTWISE)}'
        )


def _warmup_for_ever(config: RunConfig) -> Iterator[str]:
    for step in config.curate.steps:
        if step.options.get("warmup") and not config.curate.every:
            yield (
                f"curate.steps: {step.name!r} waits for {step.options['warmup']} rounds, but rows are chosen once, "
                "before the first; set curate.every"
            )


def _private_buffer(config: RunConfig) -> Iterator[str]:
    """In a full reservoir a row that comes in drives another out."""
    if config.privacy.unit == "record" and config.continual.buffer and config.continual.policy == "reservoir":
        yield (
            'continual.policy = "reservoir": a row that comes in drives another out, which breaks privacy.unit = '
            '"record"; set continual.policy = "poisson"'
        )


def _private_buffer_size(config: RunConfig) -> Iterator[str]:
    """A number of rows makes the chance of each depend on how many others there are."""
    if config.privacy.unit == "record" and config.continual.buffer >= 1:
        yield (
            f"continual.buffer = {config.continual.buffer:g}: a number of rows makes one row's chance depend on the "
            'others, which breaks privacy.unit = "record"; give a share below 1'
        )


def _private_thinning(config: RunConfig) -> Iterator[str]:
    if config.privacy.unit == "record" and config.data.max_rows is not None:
        yield (
            f"data.max_rows = {config.data.max_rows}: which rows are taken depends on how many there are, which breaks "
            'privacy.unit = "record"; make a smaller file, or lower rounds'
        )


def _masked_tasks(config: RunConfig) -> Iterator[str]:
    by, answer = config.continual.by, config.data.columns.get("output")
    if config.continual.stages and by == answer and any(step.name == "mask" for step in config.curate.steps):
        yield (
            f"continual.by = {by!r} is the answer itself, which the curation step 'mask' may rewrite; name another "
            "column, or leave 'mask' out"
        )


def _private_scores(config: RunConfig) -> Iterator[str]:
    if config.privacy.unit == "record" and config.evaluate.clients:
        yield (
            "evaluate.clients = true: the losses on clients' held-out rows would leave without noise under "
            'privacy.unit = "record"; leave the key out'
        )


def _private_dropout(config: RunConfig) -> Iterator[str]:
    if config.privacy.unit == "record" and config.adapter.dropout:
        yield (
            f"adapter.dropout = {config.adapter.dropout:g}: its masks are drawn for a whole batch, not for each row "
            'that privacy.unit = "record" protects; set 0'
        )


def _private_accumulation(config: RunConfig) -> Iterator[str]:
    if config.privacy.unit == "record" and config.train.accumulate > 1:
        yield (
            f'train.accumulate = {config.train.accumulate}: under privacy.unit = "record" a step is one random draw '
            "of rows; raise privacy.batch_rows instead (train.batch_tokens only bounds the memory)"
        )


def _too_many_stages(config: RunConfig) -> Iterator[str]:
    stages = len(config.continual.stages)
    if stages > config.rounds:
        yield f"rounds = {config.rounds}: continual.stages names {stages} stages; each needs a round at least"


def _nothing_to_remember(config: RunConfig) -> Iterator[str]:
    if config.continual.buffer and not config.continual.stages:
        yield (
            f"continual.buffer = {config.continual.buffer:g}: without continual.stages there is nothing to replay; "
            "name the stages, or set the buffer to 0"
        )


def _stopped_before_the_last_task(config: RunConfig) -> Iterator[str]:
    if config.continual.stages and config.evaluate.patience:
        yield (
            f"evaluate.patience = {config.evaluate.patience}: stopping early would leave out the later "
            "continual.stages; set 0"
        )


_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _private_curation,
    _warmup_for_ever,
    _private_buffer,
    _private_buffer_size,
    _private_thinning,
    _masked_tasks,
    _private_scores,
    _private_dropout,
    _private_accumulation,
    _too_many_stages,
    _nothing_to_remember,
    _stopped_before_the_last_task,
)
