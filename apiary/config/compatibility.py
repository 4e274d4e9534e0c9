"""Which methods go together: every pair that the configuration can name either works or is refused here.

`problems` is asked whenever a configuration is read, so nothing that breaks a promise ever starts. The table in
`docs/together.md` asks it about each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from apiary.config.schema import RunConfig

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
            "of rows; raise privacy.batch_rows instead"
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


def _stopped_by_nothing(config: RunConfig) -> Iterator[str]:
    if config.evaluate.patience and not config.evaluate.every:
        yield (
            f"evaluate.patience = {config.evaluate.patience}: evaluate.every = 0 measures nothing between rounds, so "
            "nothing could stop the run; set evaluate.every = 1"
        )


def nothing_decides(config: RunConfig) -> str:
    """Why a deployment without held-out rows on its server (`data.test`) could not stop early; "" where it can."""
    if not config.evaluate.patience or config.scores_from_clients:
        return ""
    return (
        f"evaluate.patience = {config.evaluate.patience}: no rows decide when to stop, for clients tell no loss "
        "(evaluate.clients, privacy.unit) and the server has no held-out rows; set data.test, or 0"
    )


def _ranks(config: RunConfig) -> Iterator[str]:
    adapter = config.adapter
    if adapter.ranks != "memory" and (odd := [rank for rank in adapter.ranks if not 1 <= rank <= adapter.rank]):
        yield f"adapter.ranks = {list(adapter.ranks)}: {odd[0]} is not from 1 to adapter.rank = {adapter.rank}"


def _start(config: RunConfig) -> Iterator[str]:
    if config.adapter.start is not None and config.adapter.init != "kaiming":
        yield f"adapter.init = {config.adapter.init!r}: adapter.start brings an A of its own; leave one of the two out"
    if config.adapter.start is None and config.adapter.start_digest is not None:
        yield "adapter.start_digest is of an adapter.start; set that too, or leave it out"


def _scaffold(config: RunConfig) -> Iterator[str]:
    """Its control variates are gradients, read off the way that plain stochastic gradient descent went."""
    if config.strategy.name != "scaffold":
        return
    train, name = config.train, 'strategy.name = "scaffold"'
    if train.optimizer != "sgd":
        yield (
            f"train.optimizer = {train.optimizer!r}: {name} reads a client's gradient off its steps, which AdamW "
            'rescales entry by entry; set "sgd" (with a learning rate to suit, often 10 to 100 times as large), or use '
            "the penalty fedprox, which goes with both"
        )
    if train.lr_b != 1:
        yield f"train.lr_b = {train.lr_b:g}: {name} reads all gradients off steps of one learning rate; set 1"
    if config.adapter.train == "alternate":
        yield (
            f"adapter.train = 'alternate': {name} would measure a gradient of zero for the factor that rests; set "
            '"both" or "b"'
        )
    if config.adapter.share != "both":
        yield f"adapter.share = {config.adapter.share!r}: {name} corrects what all clients share; leave it out"
    if train.penalties:
        yield (
            f"train.penalties: {name} corrects the clients' drift already, and would take the pull of "
            f"{train.penalties[0].name!r} for a part of their gradients; use one of the two"
        )
    if config.privacy.unit == "record":
        yield (
            f'{name}: control variates are gradients of the rows without noise, which breaks privacy.unit = "record"; '
            "use fedavg"
        )


def _seeds(config: RunConfig) -> Iterator[str]:
    """Clients of FedKSeed tell a scalar for each seed, and train by looking along its direction."""
    if config.strategy.name != "fedkseed":
        return
    name = 'strategy.name = "fedkseed"'
    if config.privacy.unit == "record":
        yield f'{name}: its clients take no gradients that privacy.unit = "record" could clip and noise; use fedavg'
    if config.train.penalties:
        yield f"train.penalties: {name} looks at the loss of rows alone; leave them out"
    if config.simulate.attackers:
        yield f"simulate.attackers = {config.simulate.attackers:g}: attacks change factors, {name} sends scalars; set 0"
    if config.adapter.dropout:
        yield f"adapter.dropout = {config.adapter.dropout:g}: {name} compares two losses, which it would blur; set 0"
    if config.continual.buffer:
        yield f"continual.buffer = {config.continual.buffer:g}: {name} trains on new rows alone; set 0"
    for way, method in (("up", config.wire.up), ("down", config.wire.down)):
        if method.name not in ("fp32", "sparse" if way == "up" else "fp32"):
            yield f"wire.{way} = {method.name!r}: {name} sends a few exact scalars; leave it out"
    if config.train.lr_b != 1:
        yield f"train.lr_b = {config.train.lr_b:g}: {name} looks along both factors at once; set 1"
    if config.train.weight_decay:
        yield f"train.weight_decay = {config.train.weight_decay:g}: {name} has none; set 0"


def _personal_factors(config: RunConfig) -> Iterator[str]:
    """With `adapter.share` = "a" there is no one model that the server could hold, average otherwise or measure."""
    if config.adapter.share == "both":
        return
    share = f"adapter.share = {config.adapter.share!r}"
    if config.adapter.train != "both":
        yield f"adapter.train = {config.adapter.train!r}: {share} trains both factors, and shares one; leave it out"
    if config.strategy.name not in ("fedavg", "scaffold"):  # the latter refuses by itself
        yield (
            f"strategy.name = {config.strategy.name!r}: {share} leaves the server with one factor alone, which fedavg "
            "averages exactly; other methods need both"
        )
    if config.continual.stages:
        yield f"continual.stages: what is forgotten is measured on one model for all, and {share} makes one a client"
    if config.simulate.attackers:
        yield f"simulate.attackers = {config.simulate.attackers:g}: attacks aim at one model for all; {share} has none"
    if config.evaluate.patience:
        yield (
            f"evaluate.patience = {config.evaluate.patience}: {share} leaves each client a factor of the last round, "
            "so no earlier one could be delivered; set 0"
        )
    if config.evaluate.clients is False:
        yield f"evaluate.clients = false: {share} leaves models that clients alone can score; leave the key out"


def _server_optimizer(config: RunConfig) -> Iterator[str]:
    """What "auto" comes to has options of its own."""
    optimizer = config.strategy.server_optimizer
    if optimizer.name == "auto" and optimizer.options:
        yield (
            f"strategy.server_optimizer: 'auto' takes no option ({', '.join(optimizer.options)}): name the optimizer "
            'that they are of, such as { name = "nesterov", lr = 0.7 }'
        )


def _personal_models(config: RunConfig) -> Iterator[str]:
    """A client chooses by rows of the same tasks from the first round to the last."""
    if config.personal.enabled and config.continual.stages:
        yield (
            "personal.enabled = true: with continual.stages a client's rows change from stage to stage, and its "
            "validation rows would be of other tasks; leave one of the two out"
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
    _stopped_by_nothing,
    _ranks,
    _start,
    _scaffold,
    _seeds,
    _personal_factors,
    _personal_models,
    _server_optimizer,
)
