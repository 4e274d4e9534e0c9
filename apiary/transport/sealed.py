"""An answer with its signature, as it travels: the bytes that were signed as one array, and what is claimed of them.

The server checks the signature before it reads anything inside. No torch here: the process that sends lives for one
message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from apiary.core.errors import WireError
from apiary.transport.signatures import Claim, Question, digest

ANSWER, ERROR = "answer", "error"
_SEAL, _BODY, _OUTCOME, _SIGNATURE = "seal", "body", "outcome", "signature"
_SIZE, _LENGTH = 4, 8  # bytes of the head's length, and of an array's
_MOST_HEAD = 65_536  # bytes: what small messages of bytes unfold to in memory is many times as much
_MOST_TEXT = 500  # characters of each part of a claim


class Sealed(NamedTuple):
    """What has arrived; nothing of it is checked."""

    claim: Claim
    signature: str
    body: bytes


def pack(content: RecordDict) -> bytes:
    """The bytes of an answer: a head with all but the arrays' data, and that.

    Raises:
        ValueError: there is more beside the arrays than `unpack` takes.
    """
    hollow, data = RecordDict(), []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            data += [array.data for array in record.values()]
            sizes = {key: len(array.data).to_bytes(_LENGTH, "big") for key, array in record.items()}
            record = ArrayRecord({k: Array(a.dtype, tuple(a.shape), a.stype, sizes[k]) for k, a in record.items()})
        hollow[name] = record
    head: bytes = recorddict_to_proto(hollow).SerializeToString(deterministic=True)
    if len(head) > _MOST_HEAD:
        raise ValueError(f"an answer with {len(head)} bytes beside its arrays; {_MOST_HEAD} are the most")
    return b"".join([len(head).to_bytes(_SIZE, "big"), head, *data])


def unpack(body: bytes) -> RecordDict:
    """The answer that `pack` wrote.

    Raises:
        WireError: it did not.
    """
    end = _SIZE + int.from_bytes(body[:_SIZE], "big")
    if end > _SIZE + _MOST_HEAD:
        raise WireError("its answer holds more beside its arrays than any")
    try:
        content = recorddict_from_proto(RecordDictProto.FromString(body[_SIZE:end]))
        for record in content.values():
            for array in record.values() if isinstance(record, ArrayRecord) else ():
                begin, end = end, end + int.from_bytes(array.data, "big")
                array.data = body[begin:end]
    except Exception as error:
        raise WireError(f"its answer cannot be read ({type(error).__name__})") from None
    if end != len(body):
        raise WireError("its answer has another length than it says")
    return content


def seal(header: Mapping[str, str], body: bytes) -> RecordDict:
    """The content of a message with a signed answer.

    Args:
        header: what `header` made.
        body: the bytes that were signed.
    """
    array = Array("uint8", (len(body),), "apiary", body)
    return RecordDict({_SEAL: ConfigRecord(dict(header)), _BODY: ArrayRecord({_BODY: array})})


def header(claim: Claim, signature: str) -> dict[str, str]:
    """What travels beside the bytes that are signed."""
    return {**claim.question._asdict(), _OUTCOME: claim.outcome, _SIGNATURE: signature}


def read(content: RecordDict) -> Sealed | None:
    """What `seal` wrote; None where it did not."""
    said, arrays = content.get(_SEAL), content.get(_BODY)
    if not (isinstance(said, ConfigRecord) and isinstance(arrays, ArrayRecord) and len(content) == 2):
        return None
    names = [*Question._fields, _OUTCOME, _SIGNATURE]
    texts = [text for name in names if isinstance(text := said.get(name), str) and len(text) <= _MOST_TEXT]
    if len(texts) != len(names) or len(said) != len(names) or list(arrays) != [_BODY]:
        return None
    body = arrays[_BODY].data
    return Sealed(Claim(Question(*texts[:-2]), texts[-2], digest(body)), texts[-1], body)
