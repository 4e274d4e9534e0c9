"""What a client tells of how much it holds and trained: exactly, rounded, or as its operator states it.

Every count that leaves a client goes through its policy, which is its operator's choice and never the server's. Rounded
numbers are the default of a site: the server needs them to weigh updates and to show how large the sites are, for which
two digits are enough, and one row more or less then almost never shows.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from typing import Literal, NamedTuple

from apiary.core.errors import UserError

COARSEST = 10  # small numbers are rounded to it, for two digits of them would be the number itself
_MOST = 3  # times the median client's tokens that those of one count for in a loss of all
_STATED = re.compile(r"([0-9]{1,12}):([0-9]{1,15})")


class CountPolicy(NamedTuple):
    """How a client tells its counts."""

    kind: Literal["exact", "rounded", "declared"]
    rows: int = 0  # to train on, where they are declared
    tokens: int = 0  # response tokens in them, likewise

    def told(self, count: int) -> int:
        """A count as this policy lets it be told; one that is declared elsewhere stays as it is."""
        return rounded(count) if self.kind == "rounded" else count

    def told_some(self, count: int) -> int:
        """As `told`, but never 0 for a count that is not 0."""
        return max(self.told(count), min(count, 1) * COARSEST) if self.kind == "rounded" else count

    def planned(self, rows_by_stage: list[int]) -> list[int]:
        """The training rows of each stage by which a private visit plans its sampling rate, and which so are public.

        Declared rows are shared evenly by the stages: where the rows really are does not show. A rounded stage without
        rows is planned as one of a few, so that its visits are noise alone and look like any other's.
        """
        if self.kind != "declared":
            if self.kind == "exact":
                return list(rows_by_stage)
            return [max(COARSEST, rounded(rows)) for rows in rows_by_stage]
        stages = len(rows_by_stage)
        return [max(1, self.rows // stages)] * stages


EXACT = CountPolicy("exact")
ROUNDED = CountPolicy("rounded")


def rounded(count: int) -> int:
    """A count to two significant digits, and to tens at least: 7 to 10, 43 to 40, 1,249 to 1,200."""
    return (count + _step(count) // 2) // _step(count) * _step(count)


def most(policy: str, told: int) -> int:
    """The largest count that a client can have that tells `told` under a policy of this kind.

    What it declares is its own statement, which it keeps to in all that it tells.
    """
    return told + _step(told) // 2 if policy == "rounded" else told


def _step(count: int) -> int:
    return int(max(COARSEST, 10 ** (len(str(count)) - 2)))


def raised(count: int) -> int:
    """A count to two significant digits, and to tens at least, but never lower: 7 to 10, 41 to 50, 1,249 to 1,300."""
    return -(-count // _step(count)) * _step(count)


def parse(text: str, key: str) -> CountPolicy:
    """The policy that an option names.

    Args:
        text: "exact", "rounded", or ROWS:TOKENS.
        key: what error lines call the option.

    Raises:
        UserError: it is none of these, or states nothing.
    """
    if text in ("exact", "rounded"):
        return EXACT if text == "exact" else ROUNDED
    stated = _STATED.fullmatch(text)
    if stated is None or not int(stated[1]) or int(stated[2]) < int(stated[1]):
        raise UserError(
            f"{key} {text!r}: expected rounded, exact, or ROWS:TOKENS to state numbers of your own, such as "
            "5000:120000 (a row has one response token at least)"
        )
    return CountPolicy("declared", int(stated[1]), int(stated[2]))


def text_of(policy: CountPolicy) -> str:
    """What `parse` makes the policy of."""
    return policy.kind if policy.kind != "declared" else f"{policy.rows}:{policy.tokens}"


def pooled_loss(sums: Iterable[tuple[float, float]]) -> float:
    """The loss over the held-out rows of several clients together, in nats per response token (NaN without any).

    How many tokens it has is a client's own word: those of one count for three times the median client's at most (the
    lower of the two in the middle), so that no claim of tokens makes the figure. What loss it claims does.

    Args:
        sums: of each client, its nats and its tokens.
    """
    told = [(nats, tokens) for nats, tokens in sums if tokens]
    if not told:
        return math.nan
    most = _MOST * statistics.median_low(tokens for _, tokens in told)
    shares = [min(1.0, most / tokens) for _, tokens in told]
    counted = sum(share * tokens for share, (_, tokens) in zip(shares, told, strict=True))
    return sum(share * nats for share, (nats, _) in zip(shares, told, strict=True)) / counted
