"""The program that runs chat templates, in a process of its own (`apiary.data.rendering` starts it and speaks to it).

A chat template is a program that comes with somebody's model. Jinja's sandbox keeps it from Python's insides, but not
from looping for ever or from filling the memory, and what is written in C cannot be interrupted from within. So the
kernel does it: a timer of processor time ends this process, and the address space is limited.

A request is one line of JSON on stdin, {"source", "date", "talks"}. Each talk is {"messages", "cuts"}: its messages,
and texts to write of it as [how many of the messages, characters in all, other variables]. The reply is one line on
stdout, a list with [outcome, text or error] for each text. It is shorter where the texts together are large, and empty
where they need too much memory together. Runs as a file, and so imports nothing of Apiary.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

WRITTEN, REFUSED, TOO_LONG, TOO_MUCH_MEMORY = "written", "refused", "too long", "too much memory"  # outcomes
_ERROR_CHARACTERS = 300
_REPLY = 1 << 23  # characters; where the texts of a reply have more, the rest is to be asked for again

_HAS_TIMER = hasattr(signal, "setitimer")  # Windows has none: there only the time that a request may take is limited


def _limit(seconds: float) -> None:
    """Has the kernel end this process after some time of the processor; 0 for never."""
    if _HAS_TIMER:
        signal.setitimer(signal.ITIMER_PROF, seconds)


class _Generation(Extension):
    """{% generation %} marks answers for transformers' masks; what stands in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore: those are Python's insides."""

    def __init__(*args: Any, **given: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **given)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError("a namespace takes no name that begins with an underscore")


class _Dict:
    """`dict` as a function alone: the class itself would lead to others."""

    def __call__(self, *args: Any, **given: Any) -> dict[Any, Any]:
        return dict(*args, **given)


def _to_json(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **more)


def _refuse(message: object) -> None:
    raise TemplateError(str(message))


def _environment(date: datetime) -> ImmutableSandboxedEnvironment:
    """What transformers gives to templates, but for the clock, which stands still, and for whatever draws lots."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _refuse,
        "strftime_now": date.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    del made.filters["random"], made.globals["lipsum"]
    return made


@lru_cache(maxsize=16)
def _compiled(source: str, date: str) -> Callable[..., Any]:
    return _environment(datetime.fromisoformat(date)).from_string(source).generate


class _TooLong(Exception):
    pass


def write(source: str, date: str, job: Mapping[str, Any], room: int) -> str:
    """What a template writes.

    Args:
        source: its Jinja text.
        date: the day that it is given, as 2024-07-26.
        job: its variables.
        room: how many characters it may write.
    """
    pieces: list[str] = []
    for piece in _compiled(source, date)(**job):
        room -= len(piece)
        if room < 0:
            raise _TooLong
        pieces.append(piece)
    return "".join(pieces)


def _tried(work: Callable[[], str]) -> tuple[str, str]:
    try:
        return WRITTEN, work()
    except _TooLong:
        return TOO_LONG, ""
    except MemoryError:
        return TOO_MUCH_MEMORY, ""
    except Exception as error:  # a program's own refusals, and whatever else it trips over
        return REFUSED, (str(error) or type(error).__name__)[:_ERROR_CHARACTERS]


def _replies(request: Mapping[str, Any], seconds: float, room: int) -> list[tuple[str, str]]:
    replies = []
    written = 0
    for talk in request["talks"]:
        for end, size, variables in talk["cuts"]:
            _limit(seconds)
            job = {**variables, "messages": talk["messages"][:end]}
            replies.append(_tried(partial(write, request["source"], request["date"], job, room + 4 * size)))
            written += len(replies[-1][1])
            if written > _REPLY:
                return replies
    return replies


def _served(line: bytes, seconds: float, room: int) -> str:
    """The reply to a request."""
    try:
        replies = _replies(json.loads(line), seconds, room)
        _limit(0)
        return json.dumps(replies)
    except MemoryError:
        _limit(0)
        return "[]"


def main(seconds: float, megabytes: int, room: int) -> None:
    """Serve until stdin ends.

    Args:
        seconds: of the processor for one text; more end the process by SIGPROF.
        megabytes: of address space.
        room: characters that a text may have beyond four for each one that the template is given.
    """
    # Both are inherited, and would switch the limit off.
    if _HAS_TIMER:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    except (ImportError, ValueError, OSError):
        pass  # a system without this limit, or with a lower one
    for line in iter(sys.stdin.buffer.readline, b""):
        sys.stdout.write(_served(line, seconds, room) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
