"""Phone numbers in text: numbering plans say what may be one, and what stands beside it says whether it is."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from client.curation import context_words
from client.curation.context_words import folded

if TYPE_CHECKING:
    from phonenumbers import PhoneNumberMatch

_FEWEST_DIGITS = 4  # of a number as it is dialled on the smallest islands
_BEFORE, _WORDS_BETWEEN = 60, 4  # how far a word reaches: characters, words
_AFTER = 20


class Found(NamedTuple):
    """A detail in a text: where it stands, and the form in which equal ones are equal."""

    start: int
    end: int
    value: str


def phones(text: str, regions: Sequence[str]) -> Iterator[Found]:
    """The phone numbers of a text, in E.164 form.

    Those with a country code are always found. Those dialled at home are valid in one of `regions`, and besides: a word
    for phone stands before them; or they are written as numbers are there and not as amounts and codes are.
    """
    if sum(character.isdigit() for character in text) < _FEWEST_DIGITS:
        return  # the matcher is slow, and most texts hold no number
    from phonenumbers import Leniency, PhoneNumberFormat, PhoneNumberMatcher, format_number

    others = _no_phones(text)
    # The matcher refuses digits right after a Latin letter, as in Tel030.
    spread = _GLUED().sub(lambda match: " " * len(match[0]), text)
    for region in regions or (None,):
        last = None  # end of the number before, where that was one
        for match in PhoneNumberMatcher(spread, region, leniency=Leniency.VALID, max_tries=len(text)):
            if _is_phone(match, text, region, last, others):
                last = match.end
                # The matcher takes a bracket around the whole number for one around its area code.
                unclosed = match.raw_string.startswith("(") and ")" not in match.raw_string
                yield Found(match.start + unclosed, match.end, format_number(match.number, PhoneNumberFormat.E164))


def _is_phone(
    match: PhoneNumberMatch, text: str, region: str | None, last: int | None, others: Sequence[tuple[int, int]]
) -> bool:
    raw = match.raw_string
    if raw.lstrip("(").startswith("+"):
        return not any(start <= match.start and match.end <= end for start, end in others)
    if any(start < match.end and match.start < end for start, end in others):
        return False
    said = _said_before(text[max(0, match.start - _BEFORE) : match.start])
    if said is None and last is not None and _BETWEEN_TWO.fullmatch(text[last : match.start]):
        said = "phone"  # several numbers after one word
    if said is not None or region is None:
        return said == "phone"
    if _SHORT_DATE.search(raw):  # 20.11.85 may be either
        return False
    if _AMOUNT.fullmatch(raw):
        is_amount = bool(_UNIT().match(folded(text[match.end : match.end + _AFTER]))) or not _SPACED.fullmatch(raw)
        return not is_amount and _grouped_as_there(raw, region)
    return not raw.isdigit() or raw.startswith("0")


_BETWEEN_TWO = re.compile(
    r"[\W_]*(?:and|or|und|oder|y|o|et|ou|e|lub|i|nebo|a|и|или|ve|veya|og|och|eller|ja|tai|en|of|και|ή|和|或|または|و|या)?"
    r"[\W_]*",
    re.I,
)


def _said_before(before: str) -> str | None:
    """Whether the words right before a number say "phone" or "code"; None where they say neither."""
    before = folded(re.split(r"[\d\n!?\u3002\uff01\uff1f\u061f]", before)[-1])
    ends = {
        kind: max((match.end() for match in pattern().finditer(before)), default=-1)
        for kind, pattern in (("code", _CODE), ("phone", _PHONE))
    }
    kind = max(ends, key=lambda kind: ends[kind])  # the nearer one
    if ends[kind] < 0 or len(re.findall(r"\w+", before[ends[kind] :])) > _WORDS_BETWEEN:
        return None
    return kind


def _grouped_as_there(raw: str, region: str) -> bool:
    """Whether the digits are grouped in a way that is usual for phone numbers in the region."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    found = PhoneNumberMatcher(raw, region, leniency=Leniency.EXACT_GROUPING)
    return any(match.raw_string == raw for match in found)


@functools.cache
def _PHONE() -> re.Pattern[str]:
    return re.compile(context_words.pattern(context_words.PHONE.values()))


@functools.cache
def _CODE() -> re.Pattern[str]:
    return re.compile(context_words.pattern(context_words.CODE.values()))


@functools.cache
def _GLUED() -> re.Pattern[str]:
    words = [word.rstrip("*") for text in context_words.PHONE.values() for word in text.split()]
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?=\d|[+(]\d)", re.I)


# --- what looks like a phone number and is none

_AMOUNT = re.compile(r"[1-9]\d{0,2}(?:[ ,.'\u2019\xa0\u202f]\d{3})+(?:[.,]\d+)?")
_SPACED = re.compile(r"[\d \xa0\u202f]+")
_ISBN = re.compile(r"(?<![\d-])(?:97[89][- ]?)?\d{1,5}[- ]\d{1,7}[- ]\d{1,7}[- ][\dXx](?![\w-])")
_ISBN_WORD = re.compile(r"ISBN(?:-1[03])?:?\s*[\dXx -]+", re.I)
_DAY, _MONTH, _YEAR = "(?:0?[1-9]|[12][0-9]|3[01])", "(?:0?[1-9]|1[0-2])", "(?:19|20)[0-9]{2}"


def _date(year: str) -> re.Pattern[str]:
    forms = [
        sep.join(parts)
        for sep in ("-", "/", r"\.")
        for parts in ((_DAY, _MONTH, year), (_MONTH, _DAY, year), (_YEAR, _MONTH, _DAY))
    ]
    return re.compile(rf"(?<![\d+])(?<!\d[-/.])(?:{'|'.join(forms)})(?![-/.]?\d)")


_DATE, _SHORT_DATE = _date(_YEAR), _date("[0-9]{2}")
_VERSION = re.compile(r"\bv(?:ersion|er\.?)?\s*\d[\d.]*", re.I)
_SIGN = r"(?:R\$|S/\.?|[$€£¥₹₽₩₫₺₴₱₪₦₸₾฿៛﷼])"
_FIGURE = r"\d{1,3}(?:[ ,.'\u2019\xa0\u202f]\d{3})+(?:[.,]\d{1,2})?|\d+(?:[.,]\d+)*"


@functools.cache
def _PRICE() -> re.Pattern[str]:
    codes = "|".join(map(re.escape, context_words.MONEY_CODES.split()))
    words = context_words.pattern([context_words.MONEY], str)
    money = rf"(?:{_SIGN}|(?<!\w)(?:{codes})\.?(?!\w)|(?i:{words}))"
    return re.compile(rf"{money}\s?(?:{_FIGURE})|(?<![\d.,])(?:{_FIGURE})\s?{money}")


@functools.cache
def _UNIT() -> re.Pattern[str]:
    words = context_words.pattern([context_words.UNITS])
    unspaced = "|".join(map(re.escape, folded(context_words.UNITS_UNSPACED).split()))
    return re.compile(rf"\s?(?:[%‰°]|{unspaced}|(?:{words}))")


def _no_phones(text: str) -> list[tuple[int, int]]:
    """Stretches that hold dates, versions, prices or ISBNs."""
    from stdnum import isbn

    spans = [m.span() for pattern in (_ISBN_WORD, _DATE, _VERSION, _PRICE()) for m in pattern.finditer(text)]
    return spans + [m.span() for m in _ISBN.finditer(text) if isbn.is_valid(m[0])]
