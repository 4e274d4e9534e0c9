"""Sequences of rows that keep to memory while they are small, and to disk beyond that.

What is kept on disk is one temporary file without a name (in TMPDIR, or where the system keeps temporary files): only
this process and its forks have it open, and the system frees it when they end, however they end. So no text of a row
outlives the process. Items are read one by one by their place in the file, not mapped, so that reading all of them
takes no memory. They are pickled: nobody but this process can write to a file that has no name.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, TypeVar, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from apiary.core.errors import UserError

T = TypeVar("T")
Indices = NDArray[np.int64]

IN_MEMORY_BYTES = 256 * 2**20  # of Python values, about; of one source
_WRITE_BYTES = 2**20
_OBJECT_BYTES = 56  # what a value takes beside its characters


class Room:
    """How much more may be kept in memory. Owns that number."""

    def __init__(self, bytes_left: int | None = None) -> None:
        self.left = IN_MEMORY_BYTES if bytes_left is None else bytes_left

    def take(self, value: object) -> bool:
        """Take the room that a value needs; False where there is not so much left."""
        self.left -= _weight(value)
        return self.left >= 0


def _weight(value: object) -> int:
    """About how many bytes a row takes in memory."""
    if isinstance(value, str | bytes):
        return _OBJECT_BYTES + len(value)
    if isinstance(value, Mapping):
        return _OBJECT_BYTES + sum(_OBJECT_BYTES + _weight(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return _OBJECT_BYTES + sum(map(_weight, value))
    return _OBJECT_BYTES


def temporary_file() -> IO[bytes]:
    """A file without a name, open for this process alone.

    Raises:
        UserError: there is no place for one.
    """
    try:
        return tempfile.TemporaryFile(prefix="apiary-", buffering=0)
    except OSError as error:
        raise no_space(error) from None


def write(file: IO[bytes], data: bytes | bytearray | memoryview) -> None:
    """Write all of `data`.

    Raises:
        UserError: the disk is full.
    """
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise no_space(error) from None


def no_space(error: OSError) -> UserError:
    """What is told where the temporary folder takes no more."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    why = "is full" if full else f"cannot be used ({error.strerror})"
    return UserError(
        f"rows that do not fit into memory are kept in the temporary folder, which {why}; set TMPDIR to a folder with "
        "space for about three times the data"
    )


class OnDisk(Sequence[T]):
    """Items in a temporary file, each made anew when it is asked for; a slice is a view of them."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._file, self._ends, self._pending, self._written = temporary_file(), array("q", [0]), bytearray(), 0
        weakref.finalize(self, self._file.close)
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        """Add one more item.

        Raises:
            UserError: the disk is full.
        """
        self._pending += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        self._ends.append(self._written + len(self._pending))
        if len(self._pending) >= _WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        write(self._file, self._pending)
        self._written += len(self._pending)
        self._pending = bytearray()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Mapped(self.__getitem__, np.arange(*index.indices(len(self)), dtype=np.int64))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        if self._pending:
            self._flush()
        index %= len(self)
        start, end = self._ends[index], self._ends[index + 1]
        item: T = pickle.loads(_read(self._file.fileno(), end - start, start))
        return item

    def __reduce__(self) -> Any:
        raise TypeError("rows on disk stay with the process that read them")


def _read(file: int, size: int, start: int) -> bytes:
    data = os.pread(file, size, start)
    while len(data) < size:
        more = os.pread(file, size - len(data), start + len(data))
        if not more:
            raise OSError("a temporary file has become shorter")
        data += more
    return data


class Mapped(Sequence[T]):
    """Items that a function makes of others, each when it is asked for; those of a sequence by their places, say."""

    def __init__(self, make: Callable[[Any], T], of: Sequence[Any] | NDArray[Any]) -> None:
        self._make, self._of = make, of

    def __len__(self) -> int:
        return len(self._of)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return Mapped(self._make, self._of[index]) if isinstance(index, slice) else self._make(self._of[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._make, self._of)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapped):
            return NotImplemented
        one, two = self._of, other._of
        alike = one is two or (isinstance(one, np.ndarray) and isinstance(two, np.ndarray) and np.array_equal(one, two))
        return self._make == other._make and alike

    __hash__ = None  # type: ignore[assignment]

    def picked(self, places: Indices) -> Mapped[T]:
        """Some of the items, by their places here."""
        if isinstance(self._of, np.ndarray):
            return Mapped(self._make, self._of[places])
        return Mapped(self.__getitem__, places)


def collect(items: Iterable[T], room: Room) -> Sequence[T]:
    """The items as a list while there is room, else on disk."""
    kept: list[T] | OnDisk[T] = []
    for item in items:
        kept.append(item)
        if isinstance(kept, list) and not room.take(item):
            kept = OnDisk(kept)
    return kept


def pick(items: Sequence[T], places: Indices) -> Sequence[T]:
    """Some of the items, in the order of their places: a tuple of those that are in memory, else a view."""
    if is_small(items):
        return tuple(items[place] for place in places.tolist())
    return items.picked(places) if isinstance(items, Mapped) else Mapped(items.__getitem__, places)


def joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """The items of several sequences, one after the other: a tuple of those that are in memory, else a view."""
    if all(map(is_small, parts)):
        return tuple(chain.from_iterable(parts))
    filled = tuple(part for part in parts if len(part))
    if len(filled) == 1:
        return filled[0]
    places = [np.stack([np.full(len(part), i), np.arange(len(part))], axis=1) for i, part in enumerate(filled)]
    return Mapped(_Parts(filled), np.concatenate(places))


@dataclass(frozen=True)
class _Parts:
    """Gives an item by the number of its part and its place there. Equal where the parts are."""

    parts: tuple[Sequence[Any], ...]

    def __call__(self, place: Any) -> Any:
        return self.parts[place[0]][int(place[1])]


def is_small(items: Sequence[object]) -> bool:
    """Whether a sequence is in memory."""
    return isinstance(items, list | tuple)


class Numbers:
    """An array that is being made: in memory while it is small, then in a temporary file, mapped. Owns its parts.

    Args:
        dtype: of the array.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._data = bytearray()  # what is not yet in the file
        self._file: IO[bytes] | None = None

    def append(self, part: NDArray[Any]) -> None:
        """Add numbers at the end.

        Raises:
            UserError: the disk is full.
        """
        self._data += np.ascontiguousarray(part, self._dtype).data
        if len(self._data) > (IN_MEMORY_BYTES if self._file is None else _WRITE_BYTES):
            self._file = self._file or temporary_file()
            write(self._file, self._data)
            self._data = bytearray()

    def done(self) -> NDArray[Any]:
        """All numbers: an array, or one that is mapped and can only be read."""
        if self._file is None:
            return np.frombuffer(self._data, self._dtype)
        with self._file as file:
            write(file, self._data)
            return np.memmap(file, self._dtype, "r")


def take(numbers: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """Some of the numbers. Of a mapped array no pages stay with the process, so that an epoch does not fill memory."""
    taken = numbers[places]
    _release(numbers)
    return taken


def pieces(numbers: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The numbers in pieces of about a megabyte, in order; of a mapped array no pages stay with the process."""
    for part in np.array_split(numbers, max(1, numbers.nbytes // _WRITE_BYTES)):
        yield part
        _release(numbers)


def is_mapped(numbers: NDArray[Any]) -> bool:
    """Whether numbers are in a file."""
    return isinstance(numbers.base, mmap.mmap)


def _release(numbers: NDArray[Any]) -> None:
    """Give the pages of a mapped array back: they stay in the system's cache, which is free for whoever needs memory.

    Else each page that was ever read counts as resident until memory runs out.
    """
    if isinstance(numbers.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on every system
        numbers.base.madvise(mmap.MADV_DONTNEED)
