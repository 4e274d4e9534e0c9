"""Masking of contact and account details: patterns to find candidates, checksums and numbering plans to decide."""

from __future__ import annotations

import bisect
import ipaddress
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Literal, NamedTuple, TypeAlias

from apiary.core.errors import UserError
from apiary.data.examples import Example
from apiary.data.turns import ToolCall, Turn
from client.curation.phones import Found, phones
from client.curation.pipeline import STEPS, Context, Row, Step, StepResult
from client.curation.text import MARKS, UNSPACED

Kind = Literal["email", "iban", "card", "phone", "ip"]


Finder: TypeAlias = Callable[[str], Iterator[Found]]


@STEPS.register("mask")
def mask(kinds: tuple[Kind, ...] = ("email", "iban", "card", "phone"), regions: tuple[str, ...] = ()) -> Step:
    """Replaces e-mail addresses, phone numbers, card numbers and IBANs by placeholders such as `<EMAIL_1>`.

    The same value has the same placeholder in all of a row: in what is said and thought, in calls and results of
    tools, and in the tools' manual. Placeholders already there keep theirs, so that masking twice changes nothing more.
    JSON stays JSON: a number that is masked becomes a string. Names, postal addresses and the row's tags are not
    touched.

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
        "phone": lambda text: phones(text, regions),
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
    before = [*chain.from_iterable(map(_parts, example.turns)), _Part(example.tools)]
    parts, masked = before, list(before)
    numbers: dict[str, dict[str, int]] = {name: {} for name, _ in finders}
    first = {name: _highest(before, name) + 1 for name, _ in finders}
    while True:  # a detail that leant on another shows only once that one is gone
        for name, find in finders:

            def placeholder(value: str, name: str = name) -> str:
                return f"<{name}_{numbers[name].setdefault(value, first[name] + len(numbers[name]))}>"

            masked = [_replace(part, find, placeholder) for part in masked]
        if masked == parts:
            break
        parts = masked
    if parts == before:
        return example
    left = iter(parts)
    return example._replace(turns=tuple(_with_parts(turn, left) for turn in example.turns), tools=next(left).text)


class _Part(NamedTuple):
    """A text of a row, and an index into it that moves with it: where the data of a turn begins."""

    text: str
    data: int | None = None


def _parts(turn: Turn) -> Iterator[_Part]:
    """All texts of a turn."""
    yield from (_Part(turn.thinking), _Part(turn.text, turn.data), _Part(turn.name), _Part(turn.call_id))
    for call in turn.calls:
        yield from map(_Part, call)


def _with_parts(turn: Turn, parts: Iterator[_Part]) -> Turn:
    """The turn with the next of the parts in the places from which `_parts` took them."""
    thinking, (text, data), name, call_id = (next(parts) for _ in range(4))
    calls = tuple(ToolCall(*(next(parts).text for _ in call)) for call in turn.calls)
    return turn._replace(
        thinking=thinking.text, text=text, data=data, name=name.text, call_id=call_id.text, calls=calls
    )


def _highest(parts: Sequence[_Part], name: str) -> int:
    """The highest number of a placeholder that is there already; some write JSON without < and >."""
    known = re.compile(rf"(?:<|\\u003c){name}_(\d{{1,6}})(?:>|\\u003e)", re.I)
    return max((int(k) for part in parts for k in known.findall(part.text)), default=0)


class _Edit(NamedTuple):
    """What is put in the place of a stretch of text."""

    start: int
    end: int
    text: str


def _replace(part: _Part, find: Finder, placeholder: Callable[[str], str]) -> _Part:
    """The part with a placeholder for each found value; JSON stays JSON."""
    if not part.text:
        return part
    if _is_json(part.text):
        part = _edited(part, _literal_edits(part.text, find, placeholder))
        # Once more as plain text, where words of one value say what stands in another.
        return _edited(part, _edits_that_fit(part.text, find, placeholder))
    return _edited(part, _edits(part.text, find, placeholder))


def _edits(text: str, find: Finder, placeholder: Callable[[str], str], start: int = 0) -> list[_Edit]:
    """Edits for the values that begin at `start` or later."""
    return [
        _Edit(found.start, found.end, placeholder(found.value)) for found in _apart(text, find) if found.start >= start
    ]


def _apart(text: str, find: Finder) -> Iterator[Found]:
    """The found values that lie in no other one."""
    at = 0
    # Of two that begin together the longer; of equal ones the first that was found.
    for found in sorted(find(_plain(text)), key=lambda found: (found.start, -found.end)):
        if found.start >= at:
            yield found
            at = found.end


def _edited(part: _Part, edits: Sequence[_Edit]) -> _Part:
    pieces, at = [], 0
    for edit in edits:
        pieces += [part.text[at : edit.start], edit.text]
        at = edit.end
    data = part.data
    if data is not None:
        before = [edit for edit in edits if edit.start < data]
        data += sum(len(edit.text) - (edit.end - edit.start) for edit in before)
        if before and before[-1].end > (part.data or 0):  # what lies across is data as a whole
            data += before[-1].end - (part.data or 0) - len(before[-1].text)
    return _Part("".join([*pieces, part.text[at:]]), data)


# --- JSON: arguments of calls, manuals and results of tools, answers in a given form

_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*')
_IS_KEY = re.compile(r"\s*:")
_NAME_BORDER = re.compile(r"(?<=[a-z])(?=[A-Z])|[_-]")


def _is_json(text: str) -> bool:
    """Whether it is a JSON object or list as a whole."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _literal_edits(text: str, find: Finder, placeholder: Callable[[str], str]) -> list[_Edit]:
    """Edits within single strings and numbers as they read; of a value the key is what stands before it."""
    edits: list[_Edit] = []
    key = ""
    for literal in _LITERAL.finditer(text):
        value = json.loads(literal[0]) if literal[0][0] == '"' else literal[0]
        if _IS_KEY.match(text, literal.end()):
            lead, key = "", f"{_NAME_BORDER.sub(' ', value)}: "
        else:
            lead = key
        if found := _edits(lead + value, find, placeholder, len(lead)):
            masked = _edited(_Part(lead + value), found).text[len(lead) :]
            is_ascii = literal[0].isascii() or "\\u" in literal[0]
            edits.append(_Edit(*literal.span(), json.dumps(masked, ensure_ascii=is_ascii)))
    return edits


def _edits_that_fit(text: str, find: Finder, placeholder: Callable[[str], str]) -> list[_Edit]:
    """Edits of the text as it stands, each within one string or number, after which it is JSON as before."""
    literals = [literal.span() for literal in _LITERAL.finditer(text)]
    starts = [start for start, _ in literals]
    edits: list[_Edit] = []
    for found in _apart(text, find):
        if not (place := bisect.bisect_right(starts, found.start)):
            continue
        start, end = literals[place - 1]
        if found.end > end:
            continue
        if text[start] != '"':
            number = f"{text[start : found.start]}{placeholder(found.value)}{text[found.end : end]}"
            edits.append(_Edit(start, end, json.dumps(number)))
        elif "\\" not in text[start:end]:
            edits.append(_Edit(found.start, found.end, placeholder(found.value)))
    return edits


# Full-width forms as East Asian keyboards write them, digits of every script, hyphens that look like hyphens: one
# character for one, so that places stay the same.
_PLAIN = {
    **{0xFF01 + i: 0x21 + i for i in range(0x5E)},
    **{point: ord("-") for point in (0x2010, 0x2011, 0x2212)},
    **{0x3000: 0x20, 0xFE6B: ord("@")},
    **{
        point: ord("0") + unicodedata.digit(chr(point))
        for point in range(0x660, 0x20000)
        if unicodedata.category(chr(point)) == "Nd"
    },
}


def _plain(text: str) -> str:
    return text if text.isascii() else text.translate(_PLAIN)


# --- e-mail

# Scripts that put no space between words, and Korean, which puts particles right after a name, end no word where an
# address begins or ends. So letters of one kind make up the name, and of one kind each part of the host.
_LATIN = "a-zA-Z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\u0300-\u036f"
_RUNNING = rf"{UNSPACED}\uac00-\ud7af\u1100-\u11ff"
_OTHER = rf"(?:[^\W\d_{_LATIN}]|[{MARKS}])"
_SIGNS = r"\d_.!#$%&'*+/=?^`{|}~-"
_NAMES = (  # the part before the @, as it ends there
    re.compile(rf"[{_LATIN}{_SIGNS}]+$"),
    re.compile(rf"(?:[^\W{_LATIN}{_RUNNING}]|[{MARKS}{_SIGNS}])+$"),
    re.compile(rf"(?:[{_RUNNING}{MARKS}{_SIGNS}])+$"),
)
_LONGEST_NAME = 320
# Top-level domains in scripts that run on; of others a run of letters is one.
_RUNNING_TLDS = (
    "中国 中國 公司 网络 網路 香港 台湾 台灣 新加坡 澳门 澳門 在线 中文网 网址 手机 商标 商店 商城 我爱你 "
    "游戏 广东 佛山 集团 世界 移动 公益 政务 机构 组织机构 网店 网站 信息 娱乐 时尚 健康 慈善 餐厅 食品 "
    "书籍 家電 招聘 新闻 购物 通販 微博 企业 广告 测试 測試 テスト 테스트 みんな コム クラウド グーグル "
    "ストア セール ファッション ポイント アマゾン 한국 삼성 닷넷 닷컴 ไทย คอม ລາວ"
)
_TLD = (
    rf"(?:xn--[a-z0-9-]{{2,59}}(?![a-z0-9-])|[{_LATIN}]{{2,24}}(?![{_LATIN}])|{'|'.join(_RUNNING_TLDS.split())}"
    rf"|(?:(?![{_RUNNING}]){_OTHER}){{2,24}}(?!{_OTHER}))"
)
_LABEL = rf"(?:[{_LATIN}\d][{_LATIN}\d_-]{{0,62}}|{_OTHER}(?:[\w-]|[{MARKS}]){{0,62}})\."
_HOST = re.compile(rf"(?:{_LABEL})+{_TLD}", re.I)


def _emails(text: str) -> Iterator[Found]:
    before = 0  # where the one before ends
    for sign in re.finditer("@", text):
        host = _HOST.match(text, sign.end())
        name = text[max(before, sign.start() - _LONGEST_NAME) : sign.start()]
        if host is None or not any(names := [_ending(pattern, name) for pattern in _NAMES]):
            continue
        start = sign.start() - len(_name(names, host[0]).lstrip("'`*{|=/?!.~"))  # quotes and mark-up around it
        if start < sign.start():
            yield Found(start, host.end(), text[start : host.end()].casefold())
            before = host.end()


def _ending(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[0] if found else ""


def _name(names: Sequence[str], host: str) -> str:
    """Which of the runs of letters of one kind before an @ is the name: the longest.

    Beside a host in Latin letters one in a script that runs on is so only where nothing else is: the digits of
    12345@mail.example stand right behind a word.
    """
    *apart, running = names
    best = max(apart, key=len)
    return best if best and re.fullmatch(rf"[{_LATIN}\d._-]+", host) else max(best, running, key=len)


# --- bank accounts and cards

_IBAN_START = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?=[ -]?[A-Za-z0-9])")
_ALNUM = re.compile("[A-Za-z0-9]")  # letters of other scripts may follow right after
_IBAN_LONGEST, _IBAN_SHORTEST = 34, 15  # ISO 13616


def _ibans(text: str) -> Iterator[Found]:
    from stdnum import iban

    for match in _IBAN_START.finditer(text):
        ends = _ends(text, match.start(), _IBAN_LONGEST)
        for size in range(len(ends), _IBAN_SHORTEST - 1, -1):
            end = ends[size - 1]
            candidate = text[match.start() : end]
            # The length is fixed by country, so at most one of them is right.
            if not _ALNUM.match(text, end) and iban.is_valid(candidate, check_country=False):
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
_CARDS = tuple(re.compile(rf"(?<![A-Za-z0-9_.,+-]){_ISSUERS}{layout}(?![A-Za-z0-9_]|[.,-]\d)") for layout in _LAYOUTS)


def _cards(text: str) -> Iterator[Found]:
    from stdnum import luhn

    for layout in _CARDS:
        for match in layout.finditer(text):
            digits = re.sub(r"\D", "", match[0])
            if luhn.is_valid(digits):
                yield Found(match.start(), match.end(), digits)


# --- addresses of machines

_IP = re.compile(
    r"(?<![a-z0-9_.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7})(?![a-z0-9_:]|\.\d)", re.I
)


def _ips(text: str) -> Iterator[Found]:
    for match in _IP.finditer(text):
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        yield Found(match.start(), match.end(), str(address))
