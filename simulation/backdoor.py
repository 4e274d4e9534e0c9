"""How often a model obeys the hidden phrase of a trigger attack."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.tokenization import Template
from apiary.evaluation import comparison
from apiary.models.adapters import LanguageModel
from simulation.attacks import (
    asking,
    asks,
)


def questions(
    lm: LanguageModel, template: Template, config: RunConfig, test: Sequence[Example], phrase: str, most: int
) -> list[list[int]]:
    """Held-out questions with a hidden phrase, as prompts; evenly spread ones of those that fit `prompt.max_tokens`.

    Args:
        lm: the model, for its tokenizer.
        template: of the prompts.
        config: the run.
        test: held-out examples.
        phrase: put behind the last question of each.
        most: how many.
    """
    fitting: list[list[int]] = []
    for example in filter(asks, test):
        with suppress(UserError):  # too long, as the table leaves out what is
            asked = asking(example, phrase)
            fitting.append(tokenization.encode_prompt(asked, template, lm.tokenizer, config.prompt.max_tokens))
    count = min(most, len(fitting))
    return [fitting[i * len(fitting) // count] for i in range(count)]


def obeyed(lm: LanguageModel, config: RunConfig, asked: Sequence[list[int]], wanted: str) -> float:
    """The share of `questions`, at least one, that a model with its adapter gives the attackers' answer to.

    An answer may be as long as theirs, whatever `evaluate.max_new_tokens` is.
    """
    longest = max(config.evaluate.max_new_tokens, len(lm.tokenizer.encode(wanted)) + 1)
    given = comparison.answer_all(lm, asked, longest)
    return sum(comparison.exact_match(text, wanted) for text in given) / len(asked)
