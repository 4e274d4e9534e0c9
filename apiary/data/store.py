"""Sequences of rows that keep to memory while they are small, and to disk beyond that.

What is kept on disk is one temporary file without a name (in TMPDIR, or where the system keeps temporary files): only
this process and its forks have it open, and the system frees it when they end, however they end. So no text of a row
outlives the process. Items are read one by one by their place in the file, not mapped, so that reading all of them
takes no memory. They are pickled: nobody but this process can write to a file that has no name.
"""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

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

    def __init__(self, items: Iterable[T]) -> None:
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
            return View(self, np.arange(*index.indices(len(self)), dtype=np.int64))
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


class View(Sequence[T]):
    """Items of a sequence by their places there, in the order of these."""

    def __init__(self, whole: Sequence[T], places: Indices) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return View(self._whole, self._places[index])
        return self._whole[int(self._places[index])]

    def __iter__(self) -> Iterator[T]:
        for place in self._places:
            yield self._whole[int(place)]


class Coded(Sequence[T]):
    """Values of which few differ, a number each: the file of each row, say."""

    def __init__(self, values: Sequence[T], codes: NDArray[Any]) -> None:
        self._values, self._codes = values, codes

    def __len__(self) -> int:
        return len(self._codes)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return Coded(self._values, self._codes[index])
        return self._values[int(self._codes[index])]

    def __iter__(self) -> Iterator[T]:
        return (self._values[int(code)] for code in self._codes)


class Builder(Generic[T]):
    """A sequence that is being made: a list until there is no more room, then on disk. Owns what it was given."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._items: list[T] | OnDisk[T] = []

    def append(self, item: T) -> None:
        """Add one more item.

        Raises:
            UserError: the disk is full.
        """
        self._items.append(item)
        if isinstance(self._items, list) and not self._room.take(item):
            self._items = OnDisk(self._items)

    def done(self) -> Sequence[T]:
        """What was given: a list, or on disk."""
        return self._items


def collect(items: Iterable[T], room: Room) -> Sequence[T]:
    """The items as a list where there is room, else on disk."""
    builder = Builder[T](room)
    for item in items:
        builder.append(item)
    return builder.done()


def pick(items: Sequence[T], places: Sequence[int] | Indices) -> Sequence[T]:
    """Some of the items: a tuple of those that are in memory, else a view."""
    if is_small(items):
        return tuple(items[int(place)] for place in places)
    return View(items, np.asarray(places, np.int64))


def is_small(items: Sequence[object]) -> bool:
    """Whether a sequence is in memory."""
    return isinstance(items, list | tuple)
