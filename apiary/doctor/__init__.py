"""`apiary doctor`: every problem of a configuration at once, and the plan, before any training.

Data, model, template and device are checked apart, so that what is wrong with one does not hide
what is wrong with another, and whatever can be told of the rest is told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.text import Text

from apiary import config as configs
from apiary.config import ModelConfig, RunConfig, UserError
from apiary.units import bytes_text

if TYPE_CHECKING:
    import torch

    from apiary.examples import Example, Federation
    from apiary.models import LanguageModel
    from apiary.prompts import Corpus, Template

Check = Callable[[RunConfig], object]
T = TypeVar("T")

_WIDTH = 120  # columns where there is no terminal to ask


def examine(
    config_path: Path | None,
    overrides: Sequence[str],
    console: Console | None = None,
    *,
    checks: Sequence[Check] = (),
) -> bool:
    """Print the plan of a run and all its problems, one line each; True when there is none.

    Args:
        config_path: the TOML file; None = the defaults.
        overrides: `key=value` on top of it.
        console: where to print; the terminal, or plain text in a pipe.
        checks: further checks of the configuration that raise `UserError`.
    """
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    problems: list[str] = []
    config = _attempt(problems, lambda: configs.load(config_path, overrides))
    if config is not None:
        for check in checks:
            _attempt(problems, lambda check=check: check(config))  # type: ignore[misc]
        _examine_parts(config, problems, console)
    return _print_problems(list(dict.fromkeys(problems)), console)


def _attempt(problems: list[str], action: Callable[[], T]) -> T | None:
    try:
        return action()
    except UserError as error:
        problems += error.problems
        return None


def _examine_parts(config: RunConfig, problems: list[str], console: Console) -> None:
    """Print what can be told of a run, and add all that is wrong with it to `problems`."""
    # Here and not above: what is wrong with the file itself is told without waiting for torch.
    from apiary import bases, examples
    from apiary.doctor import plan

    device = _attempt(problems, lambda: bases.resolve_device(config.model))
    federation = _attempt(problems, lambda: examples.federate(config.data, config.seed))
    if device is not None:
        plan.print_machine(config, device, console)
    lm = _load(config, device, problems)
    template = _attempt(problems, lambda: _template(config, lm))
    if federation is None:
        return
    plan.print_rows(federation, console)
    problems += _federation_problems(config, federation)
    if lm is None or template is None:
        return
    corpora = _attempt(problems, lambda: _encode(config, federation, lm, template))
    if corpora is not None:
        plan.print_run(plan.Run(config, federation, lm, template, corpora), console)


# --- checks


def _load(config: RunConfig, device: torch.device | None, problems: list[str]) -> LanguageModel | None:
    """The model; where its device is not here, on the CPU, so that the rest can still be told."""
    import torch

    from apiary import models

    model = config.model
    if device is None:
        model, device = model.model_copy(update={"device": "cpu"}), torch.device("cpu")
    if not _attempt(problems, lambda: _fits(model, device)):
        return None
    return _attempt(problems, lambda: models.load(model, config.adapter))


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
    from apiary import builtin, prompts

    if lm is not None:
        return prompts.make_template(config.prompt, lm.tokenizer)
    if config.prompt.template != "chat":
        prompts.make_template(config.prompt, builtin.load_tiny_tokenizer())
    return None


def _federation_problems(config: RunConfig, federation: Federation) -> Iterator[str]:
    minimum, n = config.strategy.min_clients, len(federation.clients)
    if minimum > n:
        yield (f"strategy.min_clients = {minimum}: there are {n} clients; lower it or raise data.clients")
    if not federation.test:
        yield (
            f"data.test_fraction = {config.data.test_fraction}: leaves no held-out example; raise "
            "it, or set data.test to a held-out source"
        )


def _encode(config: RunConfig, federation: Federation, lm: LanguageModel, template: Template) -> tuple[Corpus, ...]:
    """The clients' training examples as tokens.

    Raises:
        UserError: nothing of a client, or nothing of the held-out set, fits prompt.max_tokens.
    """
    from apiary import prompts

    def encode(rows: Sequence[Example]) -> Corpus:
        return prompts.encode_all(rows, template, lm.tokenizer, config.prompt)

    corpora = tuple(encode(client.train) for client in federation.clients)
    limit = f"prompt.max_tokens = {config.prompt.max_tokens}"
    problems = [
        f"{limit}: no example of {client.name} fits; raise it"
        for client, corpus in zip(federation.clients, corpora, strict=True)
        if not len(corpus)
    ]
    if federation.test and not len(encode(federation.test)):
        problems.append(f"{limit}: no held-out example fits; raise it")
    if problems:
        raise UserError(*problems)
    return corpora


# --- what is said


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
