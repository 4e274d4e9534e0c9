"""Steps that read one row at a time, and the one that keeps held-out rows out of training."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from apiary.core.errors import UserError
from apiary.data.examples import Example
from apiary.data.turns import answer_index
from client.curation.pipeline import STEPS, Context, Row, Step, StepResult, by_reason
from client.curation.steps.budget import Count, Share
from client.curation.text import ngrams, normalise, question, response, spoken, words

_REPEATED_WORDS = 3  # words in a run that counts as said again


@STEPS.register("length")
def length(
    min: Annotated[int, Field(ge=0)] = 1,
    max: Count | None = None,
    unit: Literal["words", "characters"] = "words",
    repetition: Share | None = None,
) -> Step:
    """Drops answers that are too short or long, only punctuation, the question once more, or going in circles.

    Args:
        min: fewest words or characters of the last trained answer, of its text and calls without the thinking.
        max: most of them.
        unit: what is counted; a character of a script without spaces is a word.
        repetition: largest share of an answer's runs of three words that may have stood in it before, and likewise of
            its thinking's; unset: any.

    Raises:
        UserError: `min` is above `max`.
    """
    if max is not None and min > max:
        raise UserError(f"curate.steps: 'length' has min = {min} above max = {max}")

    def problem(example: Example) -> str | None:
        text = response(example)
        if _only_punctuation(text):
            return "answer is empty or only punctuation"
        size = len(words(text)) if unit == "words" else len(unicodedata.normalize("NFC", text))
        # Signs such as "+" or an emoji are no words, and may yet be a whole answer.
        if size < min and not (unit == "words" and min <= 1):
            return "answer too short"
        if max is not None and size > max:
            return "answer too long"
        if normalise(text) == normalise(question(example)):
            return "answer is the question"
        thinking = example.turns[answer_index(example.turns)].thinking  # which often tells the answer ahead
        if repetition is not None and (_repeated(text) > repetition or _repeated(thinking) > repetition):
            return "answer repeats itself"
        return None

    def apply(rows: Sequence[Row], context: Context) -> StepResult:
        return by_reason(rows, {index: reason for index, example in rows if (reason := problem(example))})

    return Step(apply, pointwise=True)


def _only_punctuation(text: str) -> bool:
    return all(unicodedata.category(character)[0] in "PZC" for character in text)


def _repeated(text: str) -> float:
    """Share of the runs of three words that stood in the text before."""
    runs = ngrams(words(text), _REPEATED_WORDS)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@STEPS.register("held_out")
def held_out(n: Annotated[int, Field(ge=2)] = 10, boilerplate: Count = 10) -> Step:
    """Drops rows that share a run of `n` words, or the whole question, with a held-out row of the client.

    Runs that hold an instruction which many rows have tell nothing; without that rule, one long instruction in front
    of every row would drop them all. So a run does not count where half of it stands in many training rows.

    Args:
        n: words in a run.
        boilerplate: training rows above which half a run is an instruction.
    """

    def apply(rows: Sequence[Row], context: Context) -> StepResult:
        asked = {_asked(example) for example in context.held_out}
        runs = {run for example in context.held_out for run in ngrams(words(spoken(example)), n)}
        tokens = {index: words(spoken(example)) for index, example in rows}
        counts = Counter(half for found in tokens.values() for half in set(ngrams(found, (n + 1) // 2)))

        def tells(run: tuple[str, ...]) -> bool:
            return all(counts[half] <= boilerplate for half in ngrams(list(run), (n + 1) // 2))

        reasons = {}
        for index, example in rows:
            if _asked(example) in asked:
                reasons[index] = "same question as a held-out row"
            elif any(tells(run) for run in runs.intersection(ngrams(tokens[index], n))):
                reasons[index] = f"{n} words in a row as in a held-out row"
        return by_reason(rows, reasons)

    # Which rows go depends on the held-out rows, and what is boilerplate on all training rows.
    return Step(apply, pointwise=False)


def _asked(example: Example) -> str:
    """The question; of a row without one all that is said, or each would be the same as every other."""
    asked = question(example) or spoken(example)
    return " ".join(words(asked)) or normalise(asked)
