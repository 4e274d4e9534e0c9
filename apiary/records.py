"""Exchange types to and from Flower records: the only place that knows the keys on the wire.

Both halves of each message stand side by side. Only float32 adapter tensors and counts travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from apiary.exchange import Fingerprint, FitReport, Hello, Payload, Score, Update
from apiary.tensors import StateDict

_T = TypeVar("_T")
HELLO = "query.hello"
_ADAPTER, _BASE_DELTA, _ROUND, _COUNTS, _WHO, _PRINT = "adapter", "base_delta", "round", "counts", "who", "fingerprint"


class WireError(ValueError):
    """A message does not hold what it should; the text names the part, never its content."""


def to_arrays(state: StateDict) -> ArrayRecord:
    """The record of a state dict."""
    return ArrayRecord(dict(state))


def from_arrays(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The state dict of a record."""
    return dict(record.to_torch_state_dict())


def array_bytes(content: RecordDict) -> int:
    """The encoded bytes of all arrays of a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def request(round_number: int, adapter: ArrayRecord, base_delta: ArrayRecord) -> RecordDict:
    """The content of a train or evaluate message; the caller makes the records, so that equal payloads share them."""
    return RecordDict({_ADAPTER: adapter, _BASE_DELTA: base_delta, _ROUND: ConfigRecord({_ROUND: round_number})})


def read_request(content: RecordDict) -> tuple[int, Payload]:
    """The round and payload that `request` wrote."""
    adapter, base_delta = (from_arrays(_part(content, key, ArrayRecord)) for key in (_ADAPTER, _BASE_DELTA))
    number = _part(content, _ROUND, ConfigRecord)[_ROUND]
    if not isinstance(number, int):
        raise WireError("its round is not a number")
    return number, Payload(adapter, base_delta)


def train_reply(update: Update, report: FitReport) -> RecordDict:
    """The content of a client's answer to a train message."""
    counts = {"weight": float(update.weight), "rank": update.rank, **report._asdict()}
    return RecordDict(
        {
            _ADAPTER: to_arrays(update.delta),
            _COUNTS: MetricRecord(counts),
            _WHO: ConfigRecord({_WHO: update.client}),
        }
    )


def read_train_reply(content: RecordDict) -> tuple[Update, FitReport]:
    """The update and counts that `train_reply` wrote.

    Raises:
        WireError: a part is missing or of the wrong type.
    """
    with _reading("update"):
        counts = _numbers(content)
        delta = from_arrays(_part(content, _ADAPTER, ArrayRecord))
        update = Update(_name(content), delta, counts.pop("weight"), int(counts.pop("rank")))
        tokens, examples, steps = (int(counts[key]) for key in ("tokens", "examples", "steps"))
        return update, FitReport(tokens, examples, steps, counts["loss"], counts["seconds"])


def hello_reply(hello: Hello) -> RecordDict:
    """The content of a client's answer to the handshake."""
    return RecordDict(
        {
            _WHO: ConfigRecord({_WHO: hello.client}),
            _PRINT: ConfigRecord(dict(hello.fingerprint._asdict())),
            _COUNTS: MetricRecord({"rank": hello.rank, "examples": hello.examples, "tokens": hello.tokens}),
        }
    )


def read_hello_reply(content: RecordDict) -> Hello:
    """The handshake that `hello_reply` wrote."""
    with _reading("handshake"):
        fingerprint = Fingerprint(**{k: str(v) for k, v in _part(content, _PRINT, ConfigRecord).items()})
        return Hello(_name(content), fingerprint, **{k: int(v) for k, v in _numbers(content).items()})


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


def _numbers(content: RecordDict) -> dict[str, float]:
    return {key: float(value) for key, value in _part(content, _COUNTS, MetricRecord).items()}  # type: ignore[arg-type]


def _name(content: RecordDict) -> str:
    return str(_part(content, _WHO, ConfigRecord)[_WHO])


def _part(content: RecordDict, key: str, kind: type[_T]) -> _T:
    part = content.get(key)
    if not isinstance(part, kind):
        raise WireError(f"its message holds no {kind.__name__} {key!r}")
    return part
