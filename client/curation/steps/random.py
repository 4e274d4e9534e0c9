"""Keep a random share of the rows."""

from __future__ import annotations

from collections.abc import Sequence

from apiary.core.errors import UserError
from apiary.core.seeds import derive_seed
from client.curation.pipeline import STEPS, Context, Row, Step, StepResult, by_reason, row_digest
from client.curation.steps.budget import (
    Count,
    Share,
    budget,
    over,
)


@STEPS.register("random")
def random(
    keep: Share | None = None, rows: Count | None = None, tokens: Count | None = None, floor: int | None = None
) -> Step:
    """Keeps rows at random, by a hash of seed, client and row: what a clever selection is to be held against.

    Args:
        keep: share of the rows that come in.
        rows: or so many rows.
        tokens: or as many rows as have so many tokens.
        floor: rows that `keep` never goes below; by default max(32, 5% of what came in).

    Raises:
        UserError: not exactly one limit, or a floor without `keep`.
    """
    limit = budget("random", keep, rows, tokens, floor)
    if not limit.limited:
        raise UserError("curate.steps: 'random' needs one of keep, rows and tokens; e.g. keep = 0.5")

    def apply(given: Sequence[Row], context: Context) -> StepResult:
        draws = {i: derive_seed(context.seed, context.client, "curate", "random", row_digest(e)) for i, e in given}
        return by_reason(given, over(sorted(draws, key=lambda i: (draws[i], i)), limit, given, context))

    return Step(apply, pointwise=False, needs_model=tokens is not None)
