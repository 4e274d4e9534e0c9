"""How often a site asks the server for work: soon after it had some, seldom while there is none."""

from __future__ import annotations

_LEAST_S, _MOST_S = 0.1, 3.0
_SHARE = 5.0  # a pause is at most this part of the wait so far, so work waits no longer than that part of it
_CALLS = 4.0  # and at least so many times what a call took: many sites then leave a slow server to its work


def pause(waited: float, call: float) -> float:
    """Seconds until the next look.

    Args:
        waited: seconds since the last message was answered.
        call: seconds that the last look took.
    """
    return min(_MOST_S, max(_LEAST_S, waited / _SHARE, call * _CALLS))
