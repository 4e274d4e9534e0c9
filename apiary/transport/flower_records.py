"""Exchange types to and from Flower records: the only place that knows the keys on the wire.

Both halves of each message stand side by side. Only float32 adapter tensors, as they are or encoded, and counts travel.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import save as pack
from safetensors.torch import load as unpack

from apiary.core.errors import WireError
from apiary.core.messages import (
    COUNT_POLICIES,
    CurationCounts,
    Decline,
    Fingerprint,
    FitReport,
    Hello,
    Payload,
    Score,
    Spent,
    Update,
    Visit,
)
from apiary.core.tensors import StateDict
from apiary.transport.downlink import Change, Parcel

_T = TypeVar("_T")
HELLO = "query.hello"
_ADAPTER, _BASE_DELTA, _ROUND, _COUNTS, _WHO, _PRINT = "adapter", "base_delta", "round", "counts", "who", "fingerprint"
_MESSAGE, _PARCEL, _CHANGE, _HOLDS, _PACKED = "message", "parcel/", "change/", "holds", "packed"
_CURATED, _SPENT, _DECLINED, _DROPPED = "curated", "spent", "declined", "dropped."
_EXTRA, _LAST = "control", "counted"  # the first is named after the first method that had one


def to_arrays(state: StateDict) -> ArrayRecord:
    """The record of a state dict: one array with the bytes of a safetensors file, or none for an empty one.

    Flower stores and fetches every array of a message by itself, and an adapter has a hundred.
    """
    if not state:
        return ArrayRecord()
    numbered = {f"{n:06}/{name}": t.detach().contiguous().numpy() for n, (name, t) in enumerate(state.items())}
    return ArrayRecord({_PACKED: _encoded(pack(numbered))})


def _unpacked(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The tensors in their order, which a safetensors file does not keep; also of a record of an array a tensor."""
    if _PACKED not in record:
        return dict(record.to_torch_state_dict())
    tensors = unpack(record[_PACKED].data)
    return {name.partition("/")[2]: tensors[name] for name in sorted(tensors)}


class _Decoded(NamedTuple):
    """What a record was decoded to, while it lives and holds the same bytes."""

    record: weakref.ref[ArrayRecord]
    names: tuple[str, ...]
    data: tuple[bytes, ...]
    state: dict[str, torch.Tensor]


_decoded: dict[int, _Decoded] = {}  # by the id of the record


def from_arrays(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The state dict of a record; one that all virtual clients of a round are sent is decoded once."""
    names, data = tuple(record), tuple(array.data for array in record.values())
    key = id(record)
    held = _decoded.get(key)
    if held is None or held.names != names or not all(map(operator.is_, held.data, data)):
        gone = weakref.ref(record, lambda _: _decoded.pop(key, None))
        held = _decoded[key] = _Decoded(gone, names, data, _unpacked(record))
    return dict(held.state)


def parcel_arrays(sent: Parcel) -> ArrayRecord:
    """The record of a parcel, which stands where an adapter's does."""
    changes = {f"{_CHANGE}{place}/{c.since}/{c.version}": _encoded(c.message) for place, c in enumerate(sent.changes)}
    return ArrayRecord({_PARCEL + sent.version: _encoded(sent.whole), **changes})


def _encoded(message: bytes) -> Array:
    return Array("uint8", (len(message),), "apiary", message)


def _read_parcel(record: ArrayRecord) -> Parcel | None:
    """The parcel in a record; None where it holds an adapter."""
    names = [name for name in record if name.startswith(_PARCEL)]
    if len(names) != 1:
        return None
    changes = []
    for place in range(len(record) - 1):
        name = next(name for name in record if name.startswith(f"{_CHANGE}{place}/"))
        _, _, since, version = name.split("/")
        changes.append(Change(since, version, record[name].data))
    return Parcel(names[0].removeprefix(_PARCEL), record[names[0]].data, tuple(changes))


def array_bytes(content: RecordDict) -> int:
    """The encoded bytes of all arrays of a message."""
    return sum(map(record_bytes, content.array_records.values()))


def record_bytes(record: ArrayRecord) -> int:
    """The encoded bytes of all arrays of a record."""
    return sum(len(array.data) for array in record.values())


def request(
    round_number: int,
    adapter: ArrayRecord,
    base_delta: ArrayRecord,
    extra: ArrayRecord | None = None,
    *,
    last_round: int = 0,
) -> RecordDict:
    """The content of a train or evaluate message; the caller makes the records, so that equal payloads share them."""
    numbers = ConfigRecord({_ROUND: round_number, _LAST: last_round})
    content = RecordDict({_ADAPTER: adapter, _BASE_DELTA: base_delta, _ROUND: numbers})
    if extra:
        content[_EXTRA] = extra
    return content


def _no_parcel(sent: Parcel) -> StateDict:
    raise WireError("its adapter comes as changes, which are not expected here")


def read_request(content: RecordDict, receive: Callable[[Parcel], StateDict] = _no_parcel) -> tuple[int, Payload]:
    """The round and payload that `request` wrote.

    Args:
        content: of the message.
        receive: the adapter that a parcel leads to; asked where it is not sent as it is.
    """
    arrays, base_delta = _part(content, _ADAPTER, ArrayRecord), from_arrays(_part(content, _BASE_DELTA, ArrayRecord))
    sent = _read_parcel(arrays)
    adapter = from_arrays(arrays) if sent is None else receive(sent)
    numbers = _part(content, _ROUND, ConfigRecord)
    number, last = numbers[_ROUND], numbers.get(_LAST, 0)
    if not isinstance(number, int) or not isinstance(last, int):
        raise WireError("its round is not a number")
    extra = from_arrays(_part(content, _EXTRA, ArrayRecord)) if _EXTRA in content else {}
    return number, Payload(adapter, base_delta, extra, last)


def train_reply(answer: Visit | Decline, message: bytes = b"") -> RecordDict:
    """The content of a client's answer to a train message.

    Args:
        answer: whose change travels as it is, where there is no message.
        message: the change as `apiary.transport.codec` encoded it.
    """
    if isinstance(answer, Decline):
        return RecordDict(
            {_DECLINED: ConfigRecord({_DECLINED: answer.reason}), _WHO: ConfigRecord({_WHO: answer.client})}
        )
    update, report, curated, spent = answer
    counts = {"weight": float(update.weight), "rank": update.rank, **report._asdict()}
    content = RecordDict(
        {
            _ADAPTER: ArrayRecord({_MESSAGE: _encoded(message)}) if message else to_arrays(update.delta),
            _COUNTS: MetricRecord(counts),
            _WHO: ConfigRecord({_WHO: update.client}),
        }
    )
    if curated is not None:
        dropped = {_DROPPED + step: count for step, count in curated.dropped.items()}
        content[_CURATED] = MetricRecord({"rows": curated.rows, "kept": curated.kept, **dropped})
    if spent is not None:
        content[_SPENT] = MetricRecord(dict(spent._asdict()))
    return content


def read_message(content: RecordDict) -> bytes:
    """The encoded change in what `train_reply` wrote; nothing where it travels as it is, or there is none."""
    arrays = content.get(_ADAPTER)
    return arrays[_MESSAGE].data if isinstance(arrays, ArrayRecord) and _MESSAGE in arrays else b""


def read_train_reply(content: RecordDict) -> Visit | Decline:
    """What `train_reply` wrote, but for a change that is encoded: `read_message` has it, and this one is empty.

    Raises:
        WireError: a part is missing or of the wrong type.
    """
    with _reading("update"):
        if _DECLINED in content:
            return _read_decline(content)
        counts = _numbers(content)
        weight, rank = counts.pop("weight"), int(counts.pop("rank"))
        arrays = _part(content, _ADAPTER, ArrayRecord)
        delta = {} if _MESSAGE in arrays else from_arrays(arrays)
        update = Update(_name(content), delta, weight, rank)
        whole = {key: int(counts[key]) for key in ("tokens", "examples", "steps", "replayed")}
        report = FitReport(loss=counts["loss"], seconds=counts["seconds"], **whole)
        return Visit(update, report, _read_curated(content), _read_spent(content))


def _read_decline(content: RecordDict) -> Decline:
    reason = _part(content, _DECLINED, ConfigRecord)[_DECLINED]
    if reason not in ("idle", "budget"):
        raise WireError("it declines for a reason that this version does not know")
    return Decline(_name(content), reason)  # type: ignore[arg-type]


def _read_curated(content: RecordDict) -> CurationCounts | None:
    if _CURATED not in content:
        return None
    counts = {key: int(value) for key, value in _numbers(content, _CURATED).items()}
    dropped = {key.removeprefix(_DROPPED): value for key, value in counts.items() if key.startswith(_DROPPED)}
    return CurationCounts(counts["rows"], counts["kept"], dropped)


def _read_spent(content: RecordDict) -> Spent | None:
    if _SPENT not in content:
        return None
    values = _numbers(content, _SPENT)
    steps = int(values.pop("steps"))
    return Spent(**values, steps=steps)


def hello_reply(hello: Hello) -> RecordDict:
    """The content of a client's answer to the handshake; a count that is withheld is not in it."""
    counts = {"rank": hello.rank, "examples": hello.examples, "tokens": hello.tokens}
    return RecordDict(
        {
            _WHO: ConfigRecord({_WHO: hello.client, _HOLDS: hello.holds, _COUNTS: hello.counts}),
            _PRINT: ConfigRecord(dict(hello.fingerprint._asdict())),
            _COUNTS: MetricRecord({name: count for name, count in counts.items() if count is not None}),
        }
    )


def read_hello_reply(content: RecordDict) -> Hello:
    """The handshake that `hello_reply` wrote."""
    with _reading("handshake"):
        fingerprint = Fingerprint(**{k: str(v) for k, v in _part(content, _PRINT, ConfigRecord).items()})
        who, counts = _part(content, _WHO, ConfigRecord), {k: int(v) for k, v in _numbers(content).items()}
        policy = str(who.get(_COUNTS, "exact"))
        if policy not in COUNT_POLICIES:
            raise WireError("it tells its counts in a way that this version does not know")
        rank, examples, tokens = counts.pop("rank"), counts.pop("examples", None), counts.pop("tokens", None)
        if counts:
            raise WireError(f"its handshake has {len(counts)} numbers that this version does not know")
        return Hello(_name(content), fingerprint, rank, examples, tokens, str(who.get(_HOLDS, "")), policy)


def score_reply(client: str, score: Score) -> RecordDict:
    """The content of a client's answer to an evaluate message."""
    return RecordDict({_WHO: ConfigRecord({_WHO: client}), _COUNTS: MetricRecord(dict(score._asdict()))})


def read_score_reply(content: RecordDict) -> tuple[str, Score]:
    """The client and sums that `score_reply` wrote."""
    with _reading("score"):
        counts = _numbers(content)
        return _name(content), Score(counts["nats"], int(counts["tokens"]), int(counts["examples"]))


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Whatever a stranger's message can make go wrong while it is read becomes one `WireError`."""
    try:
        yield
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"its {what} cannot be read ({type(error).__name__}); is it another version?") from None


def _numbers(content: RecordDict, part: str = _COUNTS) -> dict[str, float]:
    return {key: float(value) for key, value in _part(content, part, MetricRecord).items()}  # type: ignore[arg-type]


def _name(content: RecordDict) -> str:
    return str(_part(content, _WHO, ConfigRecord)[_WHO])


def _part(content: RecordDict, key: str, kind: type[_T]) -> _T:
    part = content.get(key)
    if not isinstance(part, kind):
        raise WireError(f"its message holds no {kind.__name__} {key!r}")
    return part
