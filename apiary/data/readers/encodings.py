"""Text in other encodings than UTF-8: what the bytes say themselves, and else a guess that is always told.

UTF-8 is tried first, a byte order mark decides before it. charset-normalizer judges the rest, by how well the text of
an encoding reads as some language; where two encodings read alike and differ, none is taken. All rows of a file decide
about a guess, so none is made where no row may decide about another (`DataFile.guesses`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from apiary.core.errors import UserError
from apiary.data.readers.files import DataFile

_MARKS = (  # the longer ones first: that of UTF-16 opens that of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WIDE_LETTERS = ("shift_jis", "euc_jp", "gb18030", "big5", "euc_kr")
_WESTERN = "cp1252"  # with all of Latin-1's letters
_GUESSED = (_WESTERN, "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", *_WIDE_LETTERS)
# A letter of UTF-8 in two to four bytes, which text in units of one byte hardly ever spells.
_LETTER = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_LETTERS = 0.1  # of the bytes beyond ASCII: from this share of them on, text is UTF-8 with bad bytes in it
_SAMPLE = 2**18  # bytes of lines beyond ASCII that are judged
_CHAOS = 0.2  # of charset-normalizer, from 0: the most that is still text
_COHERENCE = 0.3  # likewise, up to 1: the least of a guess that is not Western
_IN_WORDS = "\u2019\u2018\xb4\xad\xb7\u2013\u2014\u2026\x92"  # marks that stand within words too
_ODD = 0.1  # of the bytes between small letters: more of them that are none there are no cp1252
_MARGIN = 0.1  # by which it must surpass an encoding that reads otherwise


def declared(head: bytes) -> str | None:
    """The encoding that the first four bytes of a text give away: by a mark, or by the zeros of wide units."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    match [byte == 0 for byte in head[:4]]:
        case [False, True, False, True]:
            return "utf-16-le"
        case [True, False, True, False]:
            return "utf-16-be"
        case [False, True, True, True]:
            return "utf-32-le"
        case [True, True, True, False]:
            return "utf-32-be"
    return None


def note(encoding: str) -> str:
    """The line on a file that is not UTF-8."""
    name = encoding.upper().removesuffix("-LE").removesuffix("-BE") if encoding.startswith("utf") else encoding
    by = "" if encoding.startswith("utf") else ", which is a guess by its letters"
    return f"read as {name} text{by}; save it as UTF-8 to be sure"


def guess(text: bytes) -> str | None:
    """The encoding of bytes that are not UTF-8; None where it cannot be told, or where they are but for a few."""
    from charset_normalizer import from_bytes

    lines, size = [], 0
    for line in text.split(b"\n"):
        if not line.isascii() and size < _SAMPLE:
            lines.append(line[: _SAMPLE - size])
            size += len(lines[-1])
    sample = b"\n".join(lines)
    if any(_reads(line, "utf-8") is not None for line in lines[:-1]):  # the last one may be cut
        return None
    spelled = sum(map(len, _LETTER.findall(sample))) > _LETTERS * sum(byte >= 0x80 for byte in sample)
    matches = [match for match in from_bytes(sample, cp_isolation=[*_GUESSED]) if match.encoding in _GUESSED]
    found = [match for match in matches if match.encoding in _WIDE_LETTERS or not _is_odd(sample, match.encoding)]
    if not found or found[0].chaos > _CHAOS:
        return None
    best = found[0]
    for match in found:
        if match.encoding == _WESTERN and (match.chaos, -match.coherence) <= (best.chaos, -best.coherence):
            best = match
    if best.encoding == _WESTERN or _reads(sample, _WESTERN) == _reads(sample, best.encoding):
        return _WESTERN if _in_words(sample) and not spelled else None
    if best.encoding in _WIDE_LETTERS:
        return best.encoding
    if spelled:
        return None
    rivals = [m for m in found if _reads(sample, m.encoding) != _reads(sample, best.encoding)]
    close = [m for m in rivals if m.chaos <= best.chaos and m.coherence > best.coherence - _MARGIN]
    return best.encoding if best.coherence >= _COHERENCE and not close else None


def _reads(sample: bytes, encoding: str) -> str | None:
    try:
        return sample.decode(encoding)
    except UnicodeDecodeError:
        return None


def _in_words(sample: bytes) -> bool:
    """Whether most bytes beyond ASCII stand beside ASCII letters or marks, as accents in Western text do."""
    places = [i for i, byte in enumerate(sample) if byte >= 0x80]
    beside = sum(any(65 <= b <= 122 for b in sample[max(0, i - 1) : i + 2]) for i in places)
    return 2 * beside > len(places)


def _is_odd(sample: bytes, encoding: str) -> bool:
    """Whether letters stand at other places than in an encoding, as in text of DOS, its console, or old Macs.

    What stands between two small letters of ASCII is a small letter, or a mark such as an apostrophe; read by another
    encoding than the writer's it is a quote, a sign or a capital instead.
    """
    inside = re.findall(rb"(?<=[a-z])[\x80-\xff](?=[a-z])", sample)
    letters = [byte.decode(encoding, "replace") for byte in inside]
    return sum(not each.islower() and each not in _IN_WORDS for each in letters) > _ODD * len(letters)


def decode(file: DataFile) -> str:
    """All of a file's text; another encoding than UTF-8 is noted.

    Raises:
        UserError: the file is too large for this, or its encoding cannot be told.
    """
    data = file.whole()
    encoding = declared(data[:4]) or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        guessed = guess(data) if encoding == "utf-8" and file.guesses else None
        if guessed is None or (read := _reads(data, guessed)) is None:
            raise not_text(file.name, encoding, error) from None
        encoding, text = guessed, read
    if not encoding.startswith("utf-8"):
        file.notes.append(note(encoding))
    return text.removeprefix("\ufeff")


def not_text(name: str, encoding: str, error: UnicodeDecodeError) -> UserError:
    """What is told of a file that cannot be decoded."""
    kind = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
    return UserError(f"{name}: not {kind} text at byte {error.start}; save it as UTF-8")


def of_lines(file: DataFile) -> str | None:
    """The encoding of a file of lines of which one is not UTF-8; None where the others say that it is UTF-8 after all.

    One letter of UTF-8 proves it, for no other encoding forms one by chance. A single bad line among many is no
    reason to read the file otherwise.
    """
    if not file.guesses:
        return None
    sample, size, lines, bad = list[bytes](), 0, 0, 0
    for _, line in file.lines():
        lines += 1
        if line.isascii():
            continue
        if _reads(line, "utf-8") is not None:
            return None
        bad += 1
        if size < _SAMPLE:
            sample.append(line)
            size += len(line)
    return guess(b"".join(sample)) if bad > 1 or bad * 10 >= lines else None


def decoded_lines(file: DataFile, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines of a file in units of two or four bytes, as `DataFile.lines` gives them."""
    import io

    with file.open() as stream, io.TextIOWrapper(stream, encoding, newline="\n") as text:
        for number, line in enumerate(iter(text.readline, ""), 1):
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.strip():
                yield number, line
