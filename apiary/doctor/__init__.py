"""`apiary doctor`: every problem of a configuration at once, and the plan, before any training.

Data, model, template and device are checked apart, so that what is wrong with one does not hide
what is wrong with another, and whatever can be told of the rest is told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from rich.console import Console
from rich.text import Text

from apiary.config.schema import ModelConfig, RunConfig
from apiary.core.errors import UserError
from apiary.core.formatting import bytes_text

if TYPE_CHECKING:
    import torch

    from apiary.data.federation import Federation
    from apiary.data.tokenization import Corpus, Template
    from apiary.models.adapters import LanguageModel

Check: TypeAlias = Callable[[RunConfig], object]
Remarks: TypeAlias = Callable[[RunConfig, Sequence[str]], Sequence[str]]
T = TypeVar("T")

_WIDTH = 120  # columns where there is no terminal to ask


def examine(
    load: Callable[[], RunConfig],
    console: Console | None = None,
    *,
    checks: Sequence[Check] = (),
    remarks: Remarks = lambda config, clients: (),
) -> bool:
    """Print the plan of a run and all its problems, one line each; True when there is none.

    Args:
        load: gives the configuration, or raises `UserError`.
        console: where to print; the terminal, or plain text in a pipe.
        checks: further checks of the configuration that raise `UserError`.
        remarks: what else a run would say at its start, of its configuration and the names of its clients.
    """
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    return _print_problems(_examined(load, console, checks, remarks)["problems"], console)


def document(
    load: Callable[[], RunConfig],
    *,
    checks: Sequence[Check] = (),
    remarks: Remarks = lambda config, clients: (),
) -> dict[str, Any]:
    """The same as plain values: `problems`, `warnings`, and what could be told of `config`, `machine` and the rest."""
    return _examined(load, Console(quiet=True), checks, remarks)


def _examined(
    load: Callable[[], RunConfig], console: Console, checks: Sequence[Check], remarks: Remarks
) -> dict[str, Any]:
    problems: list[str] = []
    told: dict[str, Any] = {}
    config = _attempt(problems, load)
    if config is not None:
        told["config"] = config.model_dump(mode="json")
        for check in checks:
            _attempt(problems, lambda check=check: check(config))  # type: ignore[misc]
        told |= _examine_parts(config, problems, console, remarks)
    return {"problems": list(dict.fromkeys(problems)), "warnings": [], **told}


def _attempt(problems: list[str], action: Callable[[], T]) -> T | None:
    try:
        return action()
    except UserError as error:
        problems += error.problems
        return None


def _examine_parts(config: RunConfig, problems: list[str], console: Console, remarks: Remarks) -> dict[str, Any]:
    """Print what can be told of a run, and add all that is wrong with it to `problems`; the same as plain values."""
    # Here and not above: what is wrong with the file itself is told without waiting for torch.
    from apiary.config import defaults
    from apiary.data import stages
    from apiary.doctor import plan, values
    from apiary.evaluation import comparison
    from apiary.models import base, gates, inference, start
    from apiary.tracking import trackers

    told: dict[str, Any] = {}
    config = defaults.resolved(_attempt(problems, lambda: start.resolved(config)) or config)
    _attempt(problems, lambda: trackers.check(config))
    device = _attempt(problems, lambda: base.resolve_device(config.model))
    federation = _attempt(problems, lambda: stages.rows_of_run(config))
    if device is not None:
        plan.print_machine(config, device, console)
        told["machine"] = values.machine_values(config, device)
    lm = _load(config, device, problems)
    template = _attempt(problems, lambda: _template(config, lm))
    if template is not None:
        plan.print_template(template, console)
    if lm is not None:
        plan.print_decoding(lm, console)
        _attempt(problems, lambda: comparison.check_positions(lm, config))
        if _mixes(config):
            _attempt(problems, lambda: gates.check(lm, f"strategy.name = {config.strategy.name!r}"))
        if config.evaluate.generate:
            _attempt(problems, lambda: inference.check_decoding(lm))
    if federation is None:
        return told
    if config.privacy.unit != "none":
        told["privacy"] = _attempt(problems, lambda: _print_privacy(config, federation, console))
    turns = plan.turn_counts(federation)
    plan.print_rows(federation, turns, console)
    told["data"] = values.rows_values(federation, turns)
    said = _remarks(config, federation, problems, remarks)
    plan.print_warnings(said, console)
    told["warnings"] = said
    problems += _federation_problems(config, federation)
    if lm is None or template is None:
        return told
    corpora = _attempt(problems, lambda: _encode(config, federation, lm, template))
    warnings = _attempt(problems, lambda: _warnings(config, federation, lm, template, corpora or ()))
    plan.print_warnings(warnings or (), console)
    told["warnings"] = [*said, *(warnings or ())]
    if corpora is not None and warnings is not None:
        run = plan.PreparedRun(config, federation, lm, template, corpora)
        cost = plan.cost_of(run)
        plan.print_run(run, cost, console)
        told |= values.run_values(run, cost)
    return told


def _remarks(config: RunConfig, federation: Federation, problems: list[str], remarks: Remarks) -> list[str]:
    """What is worth knowing of a run that is not wrong."""
    from apiary.data import splits, stages
    from apiary.models import start
    from apiary.transport import from_config

    staged = [stages.rows_by_stage(client.train, config) for client in federation.clients]
    return [
        *(_attempt(problems, lambda: remarks(config, [client.name for client in federation.clients])) or ()),
        *splits.remarks(federation, config),
        *from_config.remarks(config),
        *(_attempt(problems, lambda: start.remarks(config)) or ()),
        *stages.unlimited_buffers(staged, config),
    ]


# --- checks


def _load(config: RunConfig, device: torch.device | None, problems: list[str]) -> LanguageModel | None:
    """The model; where its device is not here, on the CPU, so that the rest can still be told."""
    import torch

    from apiary.models import adapters

    model = config.model
    if device is None:
        model, device = model.model_copy(update={"device": "cpu"}), torch.device("cpu")
    if not _attempt(problems, lambda: _fits(model, device)):
        return None
    return _attempt(problems, lambda: adapters.load(model, config.adapter))


def _mixes(config: RunConfig) -> bool:
    """Whether the method asks for gates; not where it cannot be built, which is told elsewhere."""
    from strategies.from_config import method_from_config

    try:
        return method_from_config(config).local.mixes
    except UserError:
        return False


def _fits(model: ModelConfig, device: torch.device) -> bool:
    """True; loading a model that cannot fit would end the process without a word.

    Raises:
        UserError: the weights alone are more than the device has.
    """
    from apiary.doctor import forecast

    needed, there = forecast.weights_bytes(model, device), forecast.device_bytes(device)
    if needed is not None and there is not None and needed > there:
        raise UserError(
            f"model.name = {model.name!r}: its weights take {bytes_text(needed)} and "
            f"{device} has {bytes_text(there)}; use a smaller model, model.dtype = bfloat16, or "
            "model.quantization = nf4 on a CUDA GPU"
        )
    return True


def _template(config: RunConfig, lm: LanguageModel | None) -> Template | None:
    """The template; without the model, only whether a template with slots is sound."""
    from apiary.data import tokenization
    from apiary.models import tiny

    if lm is not None:
        return tokenization.make_template(config.prompt, lm.tokenizer)
    if config.prompt.template not in ("auto", "chat"):
        tokenization.make_template(config.prompt, tiny.load_tiny_tokenizer())
    return None


def _federation_problems(config: RunConfig, federation: Federation) -> Iterator[str]:
    from apiary.data import splits
    from apiary.data.federation import too_few_clients, undecided

    yield from too_few_clients(config, len(federation.clients))
    yield from splits.no_test(federation, config)
    yield from undecided(federation, config)


def _encode(config: RunConfig, federation: Federation, lm: LanguageModel, template: Template) -> tuple[Corpus, ...]:
    """The clients' training examples as tokens.

    Raises:
        UserError: nothing of a client can be used.
    """
    from apiary.data import injection, tokenization

    shares = [client.train for client in federation.clients]
    tokenization.check_template(chain.from_iterable(shares), template)
    corpora = tuple(injection.encode_training(rows, template, lm.tokenizer, config.prompt) for rows in shares)
    problems = [
        f"no example of {client.name} can be used ({'; '.join(sorted(set(corpus.dropped.values())))}); "
        "raise prompt.max_tokens or use another prompt.template"
        for client, corpus in zip(federation.clients, corpora, strict=True)
        if not len(corpus)
    ]
    if problems:
        raise UserError(*problems)
    return corpora


def _warnings(
    config: RunConfig, federation: Federation, lm: LanguageModel, template: Template, corpora: Sequence[Corpus]
) -> list[str]:
    """What a run would say of rows that are cut or left out.

    Raises:
        UserError: no held-out example can be used, or the model has too few positions for the longest.
    """
    from apiary.data import injection, tokenization
    from apiary.data.federation import set_deciding_apart
    from apiary.evaluation import comparison

    figures, _ = set_deciding_apart(federation, config)
    held_out = comparison.prepare(figures.test, template, lm, config)
    if figures.test and not held_out.examples:
        tokenization.check_template(federation.test, template)
        raise UserError(f"prompt.max_tokens = {config.prompt.max_tokens}: no held-out example fits; raise it")
    as_they_are = () if injection.plants(config.prompt) else corpora  # encoded once is enough
    return comparison.data_warnings(federation, held_out, template, lm, config, as_they_are)


# --- what is said


def _print_privacy(config: RunConfig, federation: Federation, console: Console) -> dict[str, Any]:
    """Print what the run would cost each row, from the client whose rows pay most; the same as plain values.

    Raises:
        UserError: some client has too few rows for the promise.
    """
    from apiary.data import stages
    from apiary.privacy import plan, sampling

    clients = [(client.name, stages.rows_by_stage(client.train, config)) for client in federation.clients]
    sampling.check(config, (rows for _, rows in clients))
    console.print(Text("\nprivacy", style="bold"))
    made = plan.plan_for(config, clients)
    for line in plan.describe(config, made):
        console.print(Text(f"  {line}", style="yellow" if line.startswith("warning") else ""))
    return plan.document(config, made)


def _print_problems(problems: Sequence[str], console: Console) -> bool:
    """The problems, one line each; True when there is none."""
    if not problems:
        console.print(Text("\nno problem found", style="bold green"))
        return True
    plural = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    console.print(Text(f"\n{plural}", style="bold red"))
    for problem in problems:
        console.print(Text(f"  - {problem}"), soft_wrap=True)
    return False
