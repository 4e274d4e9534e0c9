"""Instruction-following difficulty: how much a question helps the model with its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from apiary.core.errors import UserError
from apiary.data.examples import Example
from apiary.data.templates import Segment, Template
from apiary.data.turns import Turn, answer_index
from client.curation.pipeline import STEPS, Context, Reader, Row, Step, StepResult, by_reason
from client.curation.steps.budget import Count, Share, budget, over

if TYPE_CHECKING:  # with torch, which naming this step does without
    from apiary.data.batches import Corpus
    from apiary.models.inference import Probe

_OTHERWISE = "answer is written otherwise without its question"

Quantile = Annotated[float, Field(ge=0, le=1)]


class AnswerNats(NamedTuple):
    """Mean nats per token of each last trained answer, (n,) float64, in the order of the rows scored.

    rows: their indices; given: after the whole conversation; alone: after the bare response header; tokens: of the
    answer, the same in both; lost: index of a row that cannot be scored -> why. Rows without a question are in neither.
    """

    rows: tuple[int, ...]
    given: np.ndarray
    alone: np.ndarray
    tokens: np.ndarray
    lost: Mapping[int, str]


@STEPS.register("ifd")
def ifd(
    threshold: Annotated[float, Field(gt=0)] | None = 1.0,
    keep: Share | None = None,
    rows: Count | None = None,
    tokens: Count | None = None,
    floor: int | None = None,
    band: tuple[Quantile, Quantile] | None = None,
    order: Literal["highest", "lowest"] = "highest",
    ratio: Literal["loss", "perplexity"] = "loss",
    alone: bool = False,
    warmup: Count | None = None,
) -> Step:
    """Drops rows whose question does not help with the answer, and keeps the best of the others.

    IFD = nats of the answer given the question / nats of the answer after the bare response header (Li et al. 2024,
    "From Quantity to Quality", equation 4; both per token). Above 1 the question makes the answer harder: the two do
    not belong together, or the model does not understand the question yet. The answer is the last one that is trained,
    with its thinking and calls. Rows that `prompt.max_tokens` cuts or drops are dropped. Rows without a question, such
    as plain text, have no IFD: they stay, and a budget takes them after all others, in their order.

    Args:
        threshold: largest IFD; none: any.
        keep: share of the rows that come in, best first.
        rows: or so many rows.
        tokens: or as many rows as have so many tokens.
        floor: rows that `keep` never goes below; by default max(32, 5% of what came in).
        band: quantiles of the IFD below and above which rows go too, such as [0.05, 0.95].
        order: which are best. highest: what the model finds hard though it belongs together (the paper's choice);
            lowest: what it finds easy, the cautious choice for noisy data.
        ratio: of losses (the paper), or of perplexities (Li et al. 2024, "Superfiltering"), which ranks differently.
        alone: score each row in a batch of its own. Slower; only then does no row change the last digits of another's
            score, which differential privacy asks for.
        warmup: rounds of training before the model is asked at all; until then every row stays. An untuned model takes
            what it cannot do yet for noise (the paper first gives it a "brief experience"). Needs `curate.every`.

    Raises:
        UserError: more than one budget, a floor without `keep`, or a band that is none.
    """
    limit = budget("ifd", keep, rows, tokens, floor)
    if band is not None and band[0] >= band[1]:
        raise UserError(f"curate.steps: 'ifd' has band = {list(band)}; it must rise, e.g. [0.05, 0.95]")

    def apply(given: Sequence[Row], context: Context) -> StepResult:
        if context.reader is None:
            raise ValueError("IFD needs Context.reader")
        if warmup is not None and context.trained is not None and context.trained < warmup:
            return StepResult(tuple(given))
        nats = answer_nats(given, context.reader, one_by_one=alone)
        scores = dict(zip(nats.rows, _ratio(nats, ratio).tolist(), strict=True))
        reasons = {**nats.lost, **_beyond(scores, threshold)}
        left = {index: score for index, score in scores.items() if index not in reasons}
        reasons |= _outside(left, band)
        sign = -1 if order == "highest" else 1
        ranked = sorted((i for i in left if i not in reasons), key=lambda i: (sign * scores[i], i))
        if limit.limited:
            ranked += [index for index, example in given if not _asks(example)]
            reasons |= over(ranked, limit, given, context)
        return by_reason(given, reasons, scores)

    return Step(apply, pointwise=alone and band is None and not limit.limited, needs_model=True)


def _ratio(nats: AnswerNats, ratio: str) -> np.ndarray:
    if ratio == "perplexity":
        return np.asarray(np.exp(nats.given - nats.alone))
    return np.asarray(nats.given / np.maximum(nats.alone, np.finfo(np.float32).tiny))


def _beyond(scores: Mapping[int, float], threshold: float | None) -> dict[int, str]:
    reasons = {index: "IFD is not a number" for index, score in scores.items() if not np.isfinite(score)}
    if threshold is not None:
        reasons |= {
            i: f"IFD above {threshold:g}" for i, score in scores.items() if np.isfinite(score) and score > threshold
        }
    return reasons


def _outside(scores: Mapping[int, float], band: tuple[float, float] | None) -> dict[int, str]:
    if band is None or not scores:
        return {}
    low, high = np.quantile(list(scores.values()), band)
    return {index: "IFD outside the band" for index, score in scores.items() if not low <= score <= high}


def answer_nats(rows: Sequence[Row], reader: Reader, *, one_by_one: bool = False) -> AnswerNats:
    """The loss of each row's last answer with and without what comes before it.

    Both are written by the run's own template, the second with an empty question, and tokenised segment by segment,
    so the answer's tokens are the same ones. A row of which a template makes other tokens without its question is lost.

    Args:
        rows: what to score.
        reader: template, tokenizer and model.
        one_by_one: each in a forward pass of its own.
    """
    probe, rows = reader.probe(), [row for row in rows if _asks(row[1])]
    if one_by_one and len(rows) > 1:
        return _joined([_nats([row], reader, probe) for row in rows])
    return _nats(rows, reader, probe)


def _asks(example: Example) -> bool:
    """Whether anything is asked, by a user or with a tool's result, before the last trained answer."""
    return any(turn.role in ("user", "tool") for turn in example.turns[: answer_index(example.turns)])


def _nats(rows: Sequence[Row], reader: Reader, probe: Probe) -> AnswerNats:
    lost: dict[int, str] = {}
    asked, rows = _encoded(rows, [_whole(example) for _, example in rows], reader, lost)
    bare, usable = _encoded(rows, [_bare(example) for _, example in rows], reader, lost)
    if len(usable) < len(rows):
        asked, rows = _encoded(usable, [_whole(example) for _, example in usable], reader, lost)
    given, tokens = probe.losses(asked)
    alone, same = probe.losses(bare)
    fits = tokens == same
    lost |= {index: _OTHERWISE for (index, _), fit in zip(rows, fits.tolist(), strict=True) if not fit}
    indices = tuple(index for (index, _), fit in zip(rows, fits.tolist(), strict=True) if fit)
    return AnswerNats(indices, (given / tokens)[fits], (alone / tokens)[fits], tokens[fits], lost)


def _joined(parts: Sequence[AnswerNats]) -> AnswerNats:
    lost = {index: why for part in parts for index, why in part.lost.items()}
    given, alone, tokens = (np.concatenate([part[column] for part in parts]) for column in (1, 2, 3))
    return AnswerNats(tuple(index for part in parts for index in part.rows), given, alone, tokens, lost)


def _whole(example: Example) -> Example:
    """The row up to its last trained answer, which alone is trained."""
    end = answer_index(example.turns)
    before = (turn._replace(trained=turn.role != "assistant") for turn in example.turns[:end])
    return example._replace(turns=(*before, example.turns[end]))


def _bare(example: Example) -> Example:
    return Example((Turn("user", ""), example.turns[answer_index(example.turns)]), {})


def _encoded(
    rows: Sequence[Row], examples: Sequence[Example], reader: Reader, lost: dict[int, str]
) -> tuple[Corpus, tuple[Row, ...]]:
    """The whole examples as tokens, and their rows; those that are cut or cannot be written go to `lost`."""
    from apiary.data import tokenization

    prompt = reader.prompt.model_copy(update={"on_long": "drop"})  # half an answer has another loss
    corpus = tokenization.encode_all(examples, last_answer(reader.template), reader.tokenizer, prompt)
    lost |= {rows[place][0]: why for place, why in corpus.dropped.items()}
    return corpus, tuple(row for place, row in enumerate(rows) if place not in corpus.dropped)


def last_answer(template: Template) -> Template:
    """The same template with the last answer alone trained."""

    def split(turns: Sequence[Turn], tools: str = "", think: bool = False) -> list[Segment]:
        segments = template.split(turns, tools, think)
        last = max((i for i, segment in enumerate(segments) if segment.trained), default=-1)
        first = last  # of the answer's own segments, between which nothing stands that is not trained
        while first and segments[first - 1].trained:
            first -= 1
        return [segment._replace(trained=first <= i <= last) for i, segment in enumerate(segments)]

    return dataclasses.replace(template, split=split)
