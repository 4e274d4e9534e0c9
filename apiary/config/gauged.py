"""The exact methods that a round's error of averaging is held against, for those who read logs and advise.

Here and in the other files of this folder methods may be named; who reads a run asks its log for the method's traits.
"""

from __future__ import annotations

# Keys of a round's `gauge` in `log.jsonl` and `metrics.json`: what a method would take away of the error.
ADDING_RANKS = "flora"
KEEPING_RANK = "flexlora"

KEEPS_RANK = "FlexLoRA"  # as a sentence names it


def adds_ranks(mixed: bool) -> str:
    """As a sentence names them: those that put the error into the base, and may be used.

    Args:
        mixed: whether clients have several ranks.
    """
    return "FLoRA" if mixed else "FLoRA and FedEx-LoRA"
