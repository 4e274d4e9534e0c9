"""What can go wrong, as one tree of exceptions.

    ValueError
    ├── UserError            the user's input is wrong: one line, exit code 2
    │   ├── Unwritable       (apiary.data.templates) a conversation that a template can't write
    │   └── StillGoing       (apiary.tracking.run_directory) a run is still under way
    ├── WireError            a message doesn't hold what it should
    │   └── Poisoned         ... which no honest client would send
    ├── CodecError           a coded tensor is of no use to the receiver
    │   └── NotFinite        ... for it holds NaN or infinity
    └── TooFewAnswers        a round has too few good answers for what a method promises
    FloatingPointError
    └── UnsoundStart         the adapter that a client was sent gives no number
    RuntimeError
    ├── RunFailed            a run that can't go on: exit code 1
    ├── CheckFailed          what was written is not what was meant: exit code 1
    ├── BudgetSpent          the next visit would take a row above its privacy budget
    └── StateLost            a client has lost what the server knows of it

Errors of one file, such as a row that can't be read, stand beside the code that raises and catches them.
"""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(ValueError):
    """The user's input is wrong; the message is one line a person can act on (exit code 2).

    Args:
        problems: one or more lines; the first one is the message. Names in them may hold anything: line breaks,
            control characters and what is not UTF-8 are escaped, so that each stays one line that can be written.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems = tuple(
            _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], problem) for problem in problems
        )
        more = f" (and {len(problems) - 1} more: run `apiary doctor`)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)


class WireError(ValueError):
    """A message does not hold what it should; the text names the part, never its content."""


class Poisoned(WireError):
    """A well-formed change that no training makes. Whoever sends it is hostile, or as good as that."""


class CodecError(ValueError):
    """A message is not what the receiver can use; the text names the fault, and of the message only numbers."""


class NotFinite(CodecError):
    """A message that arrived as it was sent, and holds NaN, infinity or a scale that leads there: no encoder's."""


class TooFewAnswers(ValueError):
    """A round has fewer good answers than a method needs to keep its promise."""


class UnsoundStart(FloatingPointError):
    """The loss or the gradient is no number before the first step: what was received does it, and no learning rate."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message is one clear line (exit code 1)."""


class CheckFailed(RuntimeError):
    """What was written does not say what it should, and was removed; the message is one clear line (exit code 1)."""


class BudgetSpent(RuntimeError):
    """The next visit would take a row above its budget; nothing was trained and nothing is charged."""


class StateLost(RuntimeError):
    """A client has lost what the server knows of it, so it cannot take part in this run again."""
