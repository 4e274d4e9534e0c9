"""A data file as its readers see it: opened, unpacked as it is read, and with what there is to say about it.

A packed file is never unpacked as a whole: its bytes pass through a stream, so an archive that unpacks to far more
than its size costs time and no memory. One line of it, and a file that can only be parsed as a whole, have a limit.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

from apiary.core.errors import UserError
from apiary.core.formatting import name_text

LINE_BYTES = 256 * 2**20  # of one row's text
WHOLE_BYTES = 2**30  # of a text that is parsed as a whole
_PIECE = 2**20

Rows = Iterable[tuple[int, object]]


class Unreadable(NamedTuple):
    """A row that could not be read, and why."""

    reason: str


class Part(NamedTuple):
    """Rows of a file that belong together, each with its 1-based number; held_out: they are not trained on."""

    rows: Rows
    held_out: bool = False


def _zst(path: Path) -> BinaryIO:
    import pyarrow as pa

    return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))


def _zip(path: Path) -> BinaryIO:
    archive = zipfile.ZipFile(path)
    stream = archive.open(_member(archive, path.name))
    archive.close()  # the stream holds the file until it is closed
    return cast(BinaryIO, stream)


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The one file of an archive; what Finder puts beside it, and hidden files, do not count.

    Raises:
        UserError: there is none, or several, or it is encrypted.
    """
    found = [
        info
        for info in archive.infolist()
        if not info.is_dir() and not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(info.filename).parts)
    ]
    if len(found) != 1:
        names = ", ".join(name_text(info.filename) for info in found[:3]) + (", ..." if len(found) > 3 else "")
        held = f"{len(found)} files ({names})" if found else "no file"
        raise UserError(f"{name}: this archive holds {held}; give it one file, or unpack it into a folder")
    if found[0].flag_bits & 1:
        raise UserError(f"{name}: this archive is encrypted; unpack it first")
    return found[0]


# The caller closes what these open.
PACKINGS: Mapping[str, Callable[[Path], BinaryIO]] = {
    ".gz": lambda path: cast(BinaryIO, gzip.open(path)),  # noqa: SIM115
    ".bz2": lambda path: cast(BinaryIO, bz2.open(path)),  # noqa: SIM115
    ".xz": lambda path: cast(BinaryIO, lzma.open(path)),  # noqa: SIM115
    ".zst": _zst,
    ".zip": _zip,
}
# What the unpackers raise for bytes that are no such archive, or end too early.
BROKEN = (EOFError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class DataFile:
    """A file of rows.

    path: where it is, for a data set that `datasets` saved a folder; suffix: of what is in it, such as ".jsonl", in
    small letters; packing: such as ".gz", "" for none; notes: what its readers have to say, one line each; guesses:
    whether text that is not UTF-8 may be read by a guess, which all its rows decide together.
    """

    path: Path
    suffix: str
    packing: str = ""
    notes: list[str] = field(default_factory=list)
    guesses: bool = True

    @property
    def name(self) -> str:
        """The name by which lines call it."""
        return self.path.name

    @property
    def stem(self) -> str:
        """Its name without the endings: what a client of this file is called."""
        stem = self.path.stem
        return Path(stem).stem if self.packing and Path(stem).suffix.lower() == self.suffix else stem

    def open(self) -> BinaryIO:
        """Its bytes, unpacked as they are read."""
        return PACKINGS[self.packing](self.path) if self.packing else self.path.open("rb")

    def head(self, count: int = 4) -> bytes:
        """Its first bytes."""
        with self.open() as stream:
            return stream.read(count)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Its lines that are not blank, without a byte order mark, by number from 1; a line ends in a line feed.

        Raises:
            UserError: one is longer than `LINE_BYTES`.
        """
        with self.open() as stream:
            number = 0
            while line := stream.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise UserError(f"{self.name}: line {number} is longer than {LINE_BYTES >> 20} MiB; is this text?")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line

    def whole(self) -> bytes:
        """All its bytes.

        Raises:
            UserError: they are more than `WHOLE_BYTES`.
        """
        data = bytearray()
        with self.open() as stream:
            while piece := stream.read(_PIECE):
                data += piece
                if len(data) > WHOLE_BYTES:
                    raise UserError(
                        f"{self.name}: holds more than {WHOLE_BYTES >> 20:,} MiB of text that must be parsed as a "
                        "whole; save it as JSON Lines, which is read row by row"
                    )
        return bytes(data)


def data_file(path: Path, suffixes: Iterable[str], packed: Iterable[str]) -> DataFile | None:
    """The file at a path, by its name and, of a .zip, by the name of the file in it; None where that is no known kind.

    Args:
        path: of a file.
        suffixes: of the kinds that are known.
        packed: those of them that may be packed.

    Raises:
        UserError: a .zip that cannot be opened, or of several files.
    """
    suffix = path.suffix.lower()
    if suffix in suffixes:
        return DataFile(path, suffix)
    if suffix not in PACKINGS:
        return None
    inner = Path(path.stem).suffix.lower()
    if suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                inner = PurePosixPath(_member(archive, path.name).filename).suffix.lower()
        except UserError:
            raise
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise UserError(f"{path.name}: not a readable .zip archive ({error}); copy it again") from None
    return DataFile(path, inner, suffix) if inner in packed else None
