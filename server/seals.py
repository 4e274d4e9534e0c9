"""Whose answer it is, and to what: the signature of each answer is checked before anything else of it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from apiary.core.errors import WireError
from apiary.tracking.reply_log import ReplyLog
from apiary.transport import sealed
from apiary.transport.sealed import Sealed
from apiary.transport.signatures import Question, fingerprint, is_signed

# What is found of an answer.
SIGNED, UNSIGNED, FALSE, ANOTHER, STALE = "signed", "not signed", "false signature", "another name", "stale"
FAILED = "failed"  # without a signature, as Flower answers where no worker does; it counts as no answer and no more


class Site(NamedTuple):
    """A site as it is registered."""

    name: str
    key: str  # public, in OpenSSH form; "" where it has none


class Seals:
    """Opens what sites answer, and keeps the account of it.

    Args:
        run: the run's name, as the sites know it.
        site_of: who is registered as a node.
        log: receives an entry for each answer.
    """

    def __init__(self, run: str, site_of: Callable[[int], Site], log: ReplyLog) -> None:
        self._run, self._site_of, self._log = run, site_of, log

    def open(self, asked: Message, answer: RecordDict | Error) -> RecordDict | Error:
        """The answer, if it was signed by who was asked, for what was asked; else why it does not count.

        Args:
            asked: the message, of which the head is used.
            answer: the content of what came for it, or the error that it is.

        Raises:
            OSError: the account cannot be written, for the disk is full.
        """
        head = asked.metadata
        site = self._site_of(head.dst_node_id)
        question = Question(self._run, head.group_id, head.message_type, head.message_id, site.name)
        if isinstance(answer, Error):
            self._log.add(**question._asdict(), verdict=FAILED)
            return answer
        found = sealed.read(answer)
        if found is None:
            self._log.add(**question._asdict(), verdict=UNSIGNED)
            return _refusal("its answer is not signed")
        verdict, reason = _judged(found, question, site.key)
        self._log.add(
            **question._asdict(),
            verdict=verdict,
            key=fingerprint(site.key) if site.key else "",
            outcome=found.claim.outcome,
            digest=found.claim.digest,
            signature=found.signature,
            claimed=None if found.claim.question == question else found.claim.question._asdict(),
        )
        return _refusal(reason) if reason else _opened(found)


def _judged(found: Sealed, question: Question, key: str) -> tuple[str, str]:
    """What is found of an answer, and why it does not count; "" where it does."""
    claimed = found.claim.question
    if not key or not is_signed(found.claim, found.signature, key):
        return FALSE, "the signature of its answer is not that of its registered key"
    if claimed.site != question.site:
        return ANOTHER, f"it signs as {claimed.site!r}, which is not who was asked"
    if claimed != question:
        other = f"{claimed.kind[:20]} of round {claimed.round[:20]} of run {claimed.run[:100]}"
        same = claimed._replace(message="") == question._replace(message="")
        return STALE, f"its answer is stale: it is to {'an earlier message' if same else other}"
    return SIGNED, ""


def _opened(found: Sealed) -> RecordDict | Error:
    if found.claim.outcome == sealed.ERROR:
        return _refusal(found.body[:2000].decode(errors="replace"))
    if found.claim.outcome != sealed.ANSWER:
        return _refusal("its answer is neither one nor an error; is it another version?")
    try:
        return sealed.unpack(found.body)
    except WireError as error:
        return _refusal(str(error))


def _refusal(reason: str) -> Error:
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
