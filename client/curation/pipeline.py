"""What a curation step is, and running several of them: rows in, rows and reasons out.

Everything here happens at the client and stays there; of a report only `Curation.dropped` may travel.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from apiary.config.registry import Registry
from apiary.config.schema import Method, PromptConfig
from apiary.core.errors import UserError
from apiary.data.examples import Example
from apiary.data.turns import conversation_text

if TYPE_CHECKING:  # not otherwise: most steps need no model, and no torch
    from transformers import PreTrainedTokenizerBase

    from apiary.data.templates import Template
    from apiary.models.inference import Probe

_NEARLY_ALL = 0.95  # a step that drops more than this share is probably set wrongly
_FEW = 20  # of so few rows any share is soon reached

Row: TypeAlias = tuple[int, Example]  # where it stands among the client's rows, and what it now says


class Reader(NamedTuple):
    """How the client's model reads rows; the probe is made when a step first asks for losses."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptConfig
    probe: Callable[[], Probe]


class Context(NamedTuple):
    """What a step may know besides the rows; randomness is derived from (seed, client, "curate", ...)."""

    seed: int = 0
    client: str = ""
    held_out: Sequence[Example] = ()  # the client's own, with those that choose its own model
    reader: Reader | None = None  # None: no model at hand
    trained: int | None = None  # rounds that the model has been trained for; None: not a run, it is what it is


class StepResult(NamedTuple):
    """What a step makes of its rows.

    rows: the kept ones in the order they came, perhaps rewritten; dropped: row index -> reason, a short text that
    quotes no row; scores: row index -> score, where the step has one.
    """

    rows: tuple[Row, ...]
    dropped: Mapping[int, str] = MappingProxyType({})
    scores: Mapping[int, float] = MappingProxyType({})


class Step(NamedTuple):
    """One step of curation.

    Args:
        apply: rows -> kept rows; never changes its input.
        pointwise: whether what happens to a row depends on no other row of the client, held-out ones included;
            differential privacy allows only such steps. Only they may rewrite rows.
        needs_model: whether it asks for `Context.reader`.
    """

    apply: Callable[[Sequence[Row], Context], StepResult]
    pointwise: bool
    needs_model: bool = False


class StepReport(NamedTuple):
    """What one step did."""

    name: str
    rows_in: int
    rows_out: int
    rewritten: int
    reasons: Mapping[str, int]  # of the dropped rows
    seconds: float


class Curation(NamedTuple):
    """The rows that are left, and what happened to the others.

    reports: step by step; fates: index of a dropped row -> (step, reason); scores: step -> row index -> score;
    warnings: lines for the owner. Fates and scores are functions of private text and stay at the client.
    """

    rows: tuple[Row, ...]
    reports: tuple[StepReport, ...]
    fates: Mapping[int, tuple[str, str]]
    scores: Mapping[str, Mapping[int, float]]
    warnings: tuple[str, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """The kept examples as they now read, in their old order."""
        return tuple(example for _, example in self.rows)

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the kept rows, rising; `restore` makes the rows from them."""
        return tuple(index for index, _ in self.rows)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped by each step; steps of the same name are counted together."""
        counts: dict[str, int] = {}
        for report in self.reports:
            counts[report.name] = counts.get(report.name, 0) + report.rows_in - report.rows_out
        return counts


STEPS: Registry[Step] = Registry("curate.steps")


def build_steps(methods: Sequence[Method]) -> tuple[tuple[str, Step], ...]:
    """The steps of a configuration with their names.

    Raises:
        UserError: a step has an unknown name or option.
    """
    return tuple((method.name, STEPS.build(method.name, method.options)) for method in methods)


def curate(
    examples: Sequence[Example], methods: Sequence[Method], context: Context = Context(), *, empty_ok: bool = False
) -> Curation:
    """Run the steps of a configuration over a client's rows, one after the other.

    Args:
        examples: the client's training rows; they are not changed.
        methods: `curate.steps`.
        context: held-out rows, seed, and the model where a step needs one.
        empty_ok: whether nothing may be left. Under differential privacy it may: an error would tell of the last row.

    Raises:
        UserError: an unknown step or option, a step without the model it needs, or nothing is left.
    """
    rows: tuple[Row, ...] = tuple(enumerate(examples))
    reports: list[StepReport] = []
    fates: dict[int, tuple[str, str]] = {}
    scores: dict[str, Mapping[int, float]] = {}
    for name, step in build_steps(methods):
        if not rows:
            break
        kept, report = _run(name, step, rows, context)
        reports.append(report)
        fates |= {index: (name, reason) for index, reason in kept.dropped.items()}
        if kept.scores:
            scores[name] = kept.scores
        rows = kept.rows
        if not rows and not empty_ok:
            raise UserError(f"curate.steps: nothing left: {_told(report)}; loosen it or leave it out")
    return Curation(rows, tuple(reports), fates, scores, tuple(_warnings(reports)))


def _run(name: str, step: Step, rows: tuple[Row, ...], context: Context) -> tuple[StepResult, StepReport]:
    """What one step makes of `rows`.

    Raises:
        UserError: it needs a model and there is none.
        ValueError: it breaks its contract: rows from nowhere, lost without a reason, out of order, or rewritten by a
            step that may not.
    """
    if step.needs_model and context.reader is None:
        raise UserError(f"curate.steps: {name!r} needs a model, and there is none here")
    began = time.perf_counter()
    kept = step.apply(rows, context)
    seconds = time.perf_counter() - began
    before = dict(rows)
    stay = [index for index, _ in kept.rows]
    if stay != [index for index, _ in rows if index not in kept.dropped] or not before.keys() >= kept.dropped.keys():
        raise ValueError(f"curation step {name!r} must keep or drop each row exactly once, in order")
    rewritten = sum(before[index] != example for index, example in kept.rows)
    if rewritten and (step.needs_model or not step.pointwise):
        raise ValueError(f"curation step {name!r} rewrites rows, which only pointwise steps without a model may do")
    return kept, StepReport(name, len(rows), len(stay), rewritten, dict(Counter(kept.dropped.values())), seconds)


def _warnings(reports: Iterable[StepReport]) -> Iterable[str]:
    for report in reports:
        if report.rows_in >= _FEW and report.rows_out < (1 - _NEARLY_ALL) * report.rows_in:
            yield f"curate.steps: {_told(report)}; is it meant to be that strict?"


def _told(report: StepReport) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
    return f"{report.name!r} drops {report.rows_in - report.rows_out} of {report.rows_in} rows ({reasons})"


def restore(
    examples: Sequence[Example], methods: Sequence[Method], kept: Sequence[int], context: Context = Context()
) -> tuple[Row, ...]:
    """The rows of an earlier `curate` from the indices it kept: what steps rewrote is written again.

    No step is asked again whom to keep, so neither model nor time is needed.

    Args:
        examples: the same rows as then; `digest` tells.
        methods: the same steps as then.
        kept: `Curation.kept`.
        context: for steps from outside that look at it while they rewrite.

    Raises:
        ValueError: the indices do not fit these rows and steps.
    """
    if any(not 0 <= index < len(examples) for index in kept):
        raise ValueError(f"kept rows are of another data set: there are {len(examples)} rows here")
    rows: tuple[Row, ...] = tuple((index, examples[index]) for index in kept)
    for name, step in build_steps(methods):
        if step.pointwise and not step.needs_model:
            again = step.apply(rows, context)
            if again.dropped:
                raise ValueError(f"kept rows are of other data or steps: {name!r} would now drop some")
            rows = again.rows
    return rows


def digest(examples: Sequence[Example], methods: Sequence[Method]) -> str:
    """A SHA-256 over rows and steps (16 hex digits): what stored indices are good for."""
    hasher = hashlib.sha256()
    for method in methods:
        hasher.update(json.dumps([method.name, method.options], sort_keys=True, default=str).encode())
    for example in examples:
        hasher.update(row_digest(example).encode())
    return hasher.hexdigest()[:16]


def row_digest(example: Example) -> str:
    """A SHA-256 over a row's turns and tags (32 hex digits)."""
    text = json.dumps([conversation_text(example.turns), sorted(example.tags.items()), example.tools])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def by_reason(rows: Sequence[Row], reasons: Mapping[int, str], scores: Mapping[int, float] | None = None) -> StepResult:
    """The rows without those that have a reason to go."""
    return StepResult(tuple(row for row in rows if row[0] not in reasons), dict(reasons), dict(scores or {}))
