"""Masking of contact and account details: patterns to find candidates, checksums and numbering plans to decide."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from apiary.core.errors import UserError
from apiary.data.examples import Example
from client.curation.pipeline import STEPS, Context, Row, Step, StepResult

Kind = Literal["email", "iban", "card", "phone", "ip"]


class Found(NamedTuple):
    """A detail in a text: where it stands, and the form in which equal ones are equal."""

    start: int
    end: int
    value: str


Finder: TypeAlias = Callable[[str], Iterator[Found]]


@STEPS.register("mask")
def mask(kinds: tuple[Kind, ...] = ("email", "iban", "card", "phone"), regions: tuple[str, ...] = ()) -> Step:
    """Replaces e-mail addresses, phone numbers, card numbers and IBANs by placeholders such as `<EMAIL_1>`.

    The same value has the same placeholder in all turns of a row, and placeholders already there keep theirs, so
    that masking twice changes nothing more. Names, postal addresses and the row's tags are not touched.

    Args:
        kinds: what to look for; `ip` is off by default, because version numbers look the same.
        regions: countries (ISO 3166, such as "DE") whose phone numbers are found as they are dialled at home; numbers
            with a country code (+49 ...) always are. Home numbers without any separator need a leading 0 or a word
            such as "phone" before them, for an order number looks the same.

    Raises:
        UserError: an unknown region.
    """
    if "phone" in kinds:
        _check_regions(regions)
    finders: dict[str, Finder] = {
        "email": _emails,
        "iban": _ibans,
        "card": _cards,
        "phone": lambda text: _phones(text, regions),
        "ip": _ips,
    }
    chosen = [(kind.upper(), finders[kind]) for kind in finders if kind in kinds]

    def apply(rows: Sequence[Row], context: Context) -> StepResult:
        return StepResult(tuple((index, _masked(example, chosen)) for index, example in rows))

    return Step(apply, pointwise=True)


def _check_regions(regions: Sequence[str]) -> None:
    import phonenumbers

    for region in regions:
        if region not in phonenumbers.SUPPORTED_REGIONS:
            raise UserError(f'curate.steps.regions: {region!r} is no country code; two capitals, such as "DE" or "US"')


def _masked(example: Example, finders: Sequence[tuple[str, Finder]]) -> Example:
    before = [turn.text for turn in example.turns]
    texts, masked = before, list(before)
    numbers: dict[str, dict[str, int]] = {name: {} for name, _ in finders}
    first = {name: _highest(before, name) + 1 for name, _ in finders}
    while True:  # a detail that leant on another shows only once that one is gone
        for name, find in finders:
            masked = [_replace(text, name, find, numbers[name], first[name]) for text in masked]
        if masked == texts:
            break
        texts = masked
    if texts == before:
        return example
    turns = (turn._replace(text=text) for turn, text in zip(example.turns, texts, strict=True))
    return example._replace(turns=tuple(turns))


def _highest(texts: Sequence[str], name: str) -> int:
    """The highest number of a placeholder that is there already."""
    return max((int(k) for text in texts for k in re.findall(rf"<{name}_(\d{{1,6}})>", text)), default=0)


def _replace(text: str, name: str, find: Finder, numbers: dict[str, int], first: int) -> str:
    """The text with each found value as `<NAME_k>`; values not yet in `numbers` are added, counting on from `first`."""
    parts, at = [], 0
    for start, end, value in sorted(find(text)):
        if start < at:
            continue  # inside the one before
        number = numbers.setdefault(value, first + len(numbers))
        parts += [text[at:start], f"<{name}_{number}>"]
        at = end
    return "".join([*parts, text[at:]])


# --- e-mail

_LOCAL = r"[\w.!#$%&'*+/=?^`{|}~-]"
_EMAIL = re.compile(
    rf"(?<!{_LOCAL}){_LOCAL}+@(?:[^\W_](?:[\w-]{{0,62}})\.)+(?:xn--[a-z0-9-]{{2,59}}|[^\W\d_]{{2,24}})(?![\w-])",
    re.I,
)


def _emails(text: str) -> Iterator[Found]:
    for match in _EMAIL.finditer(text):
        start = match.start() + len(match[0]) - len(match[0].lstrip("'`*{|=/?!.~"))  # quotes and mark-up around it
        yield Found(start, match.end(), text[start : match.end()].casefold())


# --- bank accounts and cards

_IBAN_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?=[ -]?[A-Za-z0-9])")
_IBAN_LONGEST, _IBAN_SHORTEST = 34, 15  # ISO 13616


def _ibans(text: str) -> Iterator[Found]:
    from stdnum import iban

    for match in _IBAN_START.finditer(text):
        ends = _ends(text, match.start(), _IBAN_LONGEST)
        for size in range(len(ends), _IBAN_SHORTEST - 1, -1):
            end = ends[size - 1]
            candidate = text[match.start() : end]
            # The length is fixed by country, so at most one of them is right.
            if not text[end : end + 1].isalnum() and iban.is_valid(candidate, check_country=False):
                yield Found(match.start(), end, iban.compact(candidate))
                break


def _ends(text: str, start: int, most: int) -> list[int]:
    """Where each of up to `most` ASCII letters or digits from `start` ends, single spaces or hyphens between them."""
    ends: list[int] = []
    at = start
    while at < len(text) and len(ends) < most:
        if text[at].isascii() and text[at].isalnum():
            ends.append(at + 1)
        elif text[at] not in " -\xa0" or at != ends[-1]:
            break
        at += 1
    return ends


# Beginnings that issuers have been given (ISO/IEC 7812); ISBNs (978) and timestamps (20240131...) have others.
_ISSUERS = r"(?=4|5[0-8]|6\d|3[0-9]|2[ \xa0-]?(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720))"
_LAYOUTS = (  # a row of two-digit numbers is no card, though its digits may pass the check
    r"\d{13,19}",
    r"\d{4}([ \xa0-])\d{4}\1\d{4}\1\d{4}\1\d{3}",
    r"\d{4}([ \xa0-])\d{4}\1\d{4}\1\d{1,4}",
    r"\d{4}([ \xa0-])\d{6}\1\d{4,5}",
)
_CARDS = tuple(re.compile(rf"(?<![\w.,+-]){_ISSUERS}{layout}(?!\w|[.,-]\d)") for layout in _LAYOUTS)


def _cards(text: str) -> Iterator[Found]:
    from stdnum import luhn

    for layout in _CARDS:
        for match in layout.finditer(text):
            digits = re.sub(r"\D", "", match[0])
            if luhn.is_valid(digits):
                yield Found(match.start(), match.end(), digits)


# --- phones

_ISBN = re.compile(r"(?<![\d-])(?:97[89][- ]?)?\d{1,5}[- ]\d{1,7}[- ]\d{1,7}[- ][\dXx](?![\w-])")
_ISBN_WORD = re.compile(r"ISBN(?:-1[03])?:?\s*[\dXx -]+", re.I)
_DATE = re.compile(r"(?<![\d+])(?:\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4})(?!\d)")
_VERSION = re.compile(r"(?:\bv(?:ersion|er\.?)?\s*\d[\d.]*)", re.I)
_MONEY = r"(?:[$€£¥₹₽]|\b(?:USD|EUR|GBP|CHF|JPY|CAD|AUD|INR|CNY|SEK|NOK|DKK|PLN|Rs|dollars?|euros?|pounds?|francs?)\b)"
_PRICE = re.compile(rf"{_MONEY}\s*\d[\d.,' \xa0]*|\d[\d.,' \xa0]{{0,30}}{_MONEY}", re.I)
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:[ ,.'\xa0]\d{3})+(?:[.,]\d+)?")
_PHONE_WORD = re.compile(
    r"(?:phone|tel|telephone|telefon|mobile|cell|handy|call|fax|ring|whatsapp|sms)\W{0,3}(?:\w+\W{1,3})?$", re.I
)


def _phones(text: str, regions: Sequence[str]) -> Iterator[Found]:
    import phonenumbers
    from phonenumbers import Leniency, PhoneNumberFormat, PhoneNumberMatcher

    if sum(character.isdigit() for character in text) < 5:
        return  # the matcher is slow, and most texts hold no number
    others = _no_phones(text)
    for region in regions or (None,):
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.VALID, max_tries=len(text)):
            if any(start < match.end and match.start < end for start, end in others):
                continue
            if match.raw_string.lstrip("(").startswith("+") or _dialled_at_home(match.raw_string, text[: match.start]):
                number = phonenumbers.format_number(match.number, PhoneNumberFormat.E164)
                # The matcher takes a bracket around the whole number for one around its area code.
                unclosed = match.raw_string.startswith("(") and ")" not in match.raw_string
                yield Found(match.start + unclosed, match.end, number)


def _dialled_at_home(raw: str, before: str) -> bool:
    """Whether digits without a country code are written as a phone number is, not as any number may be."""
    if _THOUSANDS.fullmatch(raw):
        return False
    return not raw.isdigit() or raw.startswith("0") or bool(_PHONE_WORD.search(before[-40:]))


def _no_phones(text: str) -> list[tuple[int, int]]:
    """Stretches that hold dates, versions, prices or ISBNs."""
    from stdnum import isbn

    spans = [m.span() for pattern in (_ISBN_WORD, _DATE, _VERSION, _PRICE) for m in pattern.finditer(text)]
    return spans + [m.span() for m in _ISBN.finditer(text) if isbn.is_valid(m[0])]


# --- addresses of machines

_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7})(?![\w:]|\.\d)", re.I)


def _ips(text: str) -> Iterator[Found]:
    for match in _IP.finditer(text):
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        yield Found(match.start(), match.end(), str(address))
