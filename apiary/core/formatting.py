"""Quantities as people read them; one wording for terminal and report."""

from __future__ import annotations

import math

MISSING = "–"  # noqa: RUF001 (an en dash reads as "no value" in a column of numbers)


def loss_text(value: float | None, digits: int = 3) -> str:
    """A loss in nats per token, or a dash where there is none."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def change_text(value: float) -> str:
    """A difference with its sign, `-0.12` or `+0.01`, and a minus that is as wide as the plus."""
    return f"{value:+.3f}".replace("-", "−")  # noqa: RUF001


def share_text(value: float | None, digits: int = 1) -> str:
    """A share in 0..1 as a percentage, or a dash."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def missed_text(share: float) -> str:
    """What averaging A and B apart misses of a change; beyond all of it the number says nothing more."""
    return share_text(share) if share <= 1 else "over 100%"


def count_text(value: float | None) -> str:
    """A whole number with thousands separators, or a dash."""
    return MISSING if value is None or not math.isfinite(value) else f"{round(value):,}"


def bytes_text(value: float | None) -> str:
    """Bytes in decimal units with three digits, such as `1.24 MB`; a dash for None."""
    if value is None or not math.isfinite(value):
        return MISSING
    amount, unit = float(value), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(amount) < 999.5 or unit == "TB":
            break
        amount /= 1000
    if unit == "bytes":
        return f"{round(amount):d} bytes"
    digits = 0 if abs(amount) >= 99.95 else 1 if abs(amount) >= 9.995 else 2
    return f"{amount:.{digits}f} {unit}"


def seconds_text(value: float | None) -> str:
    """A duration such as `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`; a dash for None."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 9.95:
        return f"{max(value, 0.0):.1f} s"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


_LONGEST = 300  # characters of a message from outside


def first_line(error: BaseException) -> str:
    """What an error of another library says first, short enough to stand inside a line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def clean(text: object, longest: int = _LONGEST) -> str:
    """`text` on one line without control characters, of `longest` characters at most.

    Names and reasons come from other machines, and a terminal obeys escapes.
    """
    flat = " ".join(str(text).split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in flat)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; names that the file system has in another encoding cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def name_text(name: str) -> str:
    """A name as a message can show it: bytes that are not UTF-8, and control characters, are escaped."""
    plain = name.encode("utf-8", "surrogateescape" if _from_bytes(name) else "backslashreplace")
    shown = plain.decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)


def _from_bytes(name: str) -> bool:
    return all(not "\ud800" <= letter <= "\udfff" or "\udc80" <= letter <= "\udcff" for letter in name)


def plural(count: int, noun: str) -> str:
    """`1 client`, `2 clients`, `2 guesses`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith(("s", "ch")) else "s")
