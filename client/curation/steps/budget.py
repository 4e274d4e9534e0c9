"""How many rows a scoring step keeps, and the step that keeps rows at random: the baseline of every other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple, TypeAlias

from pydantic import Field

from apiary.core.errors import UserError
from client.curation.pipeline import Context, Row

_FLOOR_ROWS, _FLOOR_SHARE = 32, 0.05

Share: TypeAlias = Annotated[float, Field(gt=0, le=1)]
Count: TypeAlias = Annotated[int, Field(ge=1)]

OVER = "over the budget"


class Budget(NamedTuple):
    """At most so much; all None: everything.

    keep: share of the rows that came into the step; rows: a number; tokens: of the whole rows, prompts included, as
    the template writes them; floor: rows that `keep` never goes below, by default max(32, 5% of what came in).
    """

    keep: float | None = None
    rows: int | None = None
    tokens: int | None = None
    floor: int | None = None

    @property
    def limited(self) -> bool:
        """Whether it limits anything."""
        return any(limit is not None for limit in self[:3])


def budget(step: str, keep: float | None, rows: int | None, tokens: int | None, floor: int | None) -> Budget:
    """A checked budget.

    Raises:
        UserError: more than one limit, or a floor where it would break an absolute one.
    """
    given = [name for name, value in (("keep", keep), ("rows", rows), ("tokens", tokens)) if value is not None]
    if len(given) > 1:
        raise UserError(f"curate.steps: {step!r} has {' and '.join(given)}; give one of keep, rows and tokens")
    if floor is not None and given != ["keep"]:
        raise UserError(f"curate.steps: {step!r} has a floor without keep; rows and tokens are exact limits")
    return Budget(keep, rows, tokens, floor)


def within(ranked: Sequence[int], limit: Budget, came_in: int, tokens: Mapping[int, int]) -> set[int]:
    """The rows that the budget has room for, best first; a row that does not fit a token budget is passed over.

    Args:
        ranked: row indices, best first.
        limit: the budget.
        came_in: rows that came into the step, dropped ones included.
        tokens: of each ranked row; read for a token budget alone.
    """
    if limit.tokens is not None:
        chosen, left = set(), limit.tokens
        for index in ranked:
            if tokens[index] <= left:
                chosen.add(index)
                left -= tokens[index]
        return chosen
    if limit.rows is not None:
        return set(ranked[: limit.rows])
    if limit.keep is not None:
        floor = max(_FLOOR_ROWS, int(_FLOOR_SHARE * came_in)) if limit.floor is None else limit.floor
        return set(ranked[: max(int(limit.keep * came_in), floor)])
    return set(ranked)


def over(ranked: Sequence[int], limit: Budget, rows: Sequence[Row], context: Context) -> dict[int, str]:
    """Reasons for the rows that the budget has no room for, and with a token budget for those without tokens."""
    tokens = token_counts([row for row in rows if row[0] in set(ranked)], context) if limit.tokens else {}
    usable = [index for index in ranked if not limit.tokens or index in tokens]
    chosen = within(usable, limit, len(rows), tokens)
    return {i: OVER if i in tokens or not limit.tokens else "cannot be tokenised" for i in ranked if i not in chosen}


def token_counts(rows: Sequence[Row], context: Context) -> dict[int, int]:
    """Tokens of each row as the template writes it, cut at `prompt.max_tokens`; rows that cannot be used are left out.

    Raises:
        ValueError: the context has no reader.
    """
    if context.reader is None:
        raise ValueError("counting tokens needs Context.reader")
    from apiary.data import tokenization  # with torch, which a budget of rows does without

    template, tokenizer, prompt, _ = context.reader
    corpus = tokenization.encode_all([example for _, example in rows], template, tokenizer, prompt)
    usable: Iterable[int] = (index for place, (index, _) in enumerate(rows) if place not in corpus.dropped)
    return dict(zip(usable, corpus.lengths.tolist(), strict=True))
