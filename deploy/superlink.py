"""Flower's SuperLink with our settings, in this process: `python -P -m deploy.superlink` and its own flags.

It hears callers of our own user alone, and answers `apiary deploy` in JSON beside Flower's own calls: so one call
registers any number of keys, and asking it something starts no process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from flwr.app import Error, Message
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from apiary.core.formatting import clean
from deploy import admission, objects, peers, superlink_state
from deploy.connections import allow_many_files

_START = "flwr.superlink.cli.flower_superlink"
_FLEET = "flwr.superlink.servicer.fleet.fleet_handlers"
_RUNTIME = "flwr.superlink.servicer.runtime.runtime_handlers"
_CONTROL = "flwr.superlink.servicer.control.control_handlers"
_REQUESTS = "flwr.proto.control_pb2"
_ERRORS = "flwr.supercore.error"
_LINK = "flwr.server.superlink.linkstate.linkstate_factory"
_STORE = "flwr.supercore.object_store.object_store_factory"
# Calls that carry a message or an object of one; some hundred of them make a round.
_CARRY = ("push_messages", "pull_messages", "push_object", "pull_object", "confirm_message_received")
_MOST_RUNS = 10_000  # in one answer
_LINE, _LINES = 500, 50  # characters of a line of the log, and lines of either end of a traceback

_Answer = Callable[[Mapping[str, Any], Any], dict[str, Any]]


class UnknownFlower(RuntimeError):
    """This version of Flower is not built as the one that this module was written for."""


def private(module: str, name: str) -> Any:
    """What Flower keeps to itself by that name.

    Raises:
        UnknownFlower: this version has none.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise _unknown(f"{module}.{name}") from None


def _unknown(what: str) -> UnknownFlower:
    return UnknownFlower(f"flwr {importlib.metadata.version('flwr')} has no {what}: `apiary deploy` needs flwr 1.41")


def check() -> None:
    """Look whether Flower has what our state puts itself before: else a protection would be off in silence.

    Raises:
        UnknownFlower: it lacks a method with these parameters, or a table or a column.
    """
    store, state = private(_STORE, "SqlObjectStore"), private(_LINK, "SqlLinkState")
    wanted = [(store, "get", ["self", "object_id"]), (store, "delete", ["self", "object_id"])]
    wanted += [(state, name, ["self", "message"]) for name in ("store_message_res", "_store_generated_message")]
    for base, ours in ((store, superlink_state.STORE), (state, superlink_state.STATE)):
        methods = {name: method for part in ours for name, method in vars(part).items() if callable(method)}
        wanted += [(base, name, _parameters(method)) for name, method in methods.items() if name[0] != "_"]
    for base, name, parameters in wanted:
        theirs = getattr(base, name, None)
        if theirs is None or parameters not in (_parameters(theirs), ["self", "args", "kwargs"]):
            raise _unknown(f"{base.__name__}.{name}({', '.join(parameters)})")
    for handlers, name in ((place, each) for place in (_FLEET, _RUNTIME) for each in _CARRY):
        if _parameters(private(handlers, name))[:2] != ["request", "state"]:
            raise _unknown(f"{handlers}.{name}(request, state)")
    _check_tables()


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _check_tables() -> None:
    """Let SQLite read each of our statements, beside Flower's tables."""
    engine = create_engine("sqlite://")
    for name in ("linkstate", "corestate", "objectstore"):
        make = private(f"flwr.supercore.state.schema.{name}_tables", f"create_{name}_metadata")
        make().create_all(engine)
    with engine.connect() as database:
        for statement in superlink_state.statements():
            explained = text(statement if "CREATE" in statement else f"EXPLAIN {statement}")
            try:
                database.execute(explained, dict.fromkeys(explained.compile().params))
            except OperationalError as error:
                raise _unknown(f"table or column that is needed ({error.orig})") from None
    engine.dispose()


def prepare() -> None:
    """Put our settings and our state in the place of Flower's, for what is started in this process afterwards.

    Raises:
        UnknownFlower: Flower is another version.
    """
    check()
    _replace("flwr.supercore.sql_mixin", "SQLITE_PRAGMAS", lambda theirs: superlink_state.PRAGMAS)
    for name in ("sql_corestate", "in_memory_corestate"):
        _replace(
            f"flwr.supercore.corestate.{name}", "OBJECT_PUSH_SESSION_TTL_SECONDS", lambda s: superlink_state.PUSH_S
        )
    _replace(_STORE, "SqlObjectStore", superlink_state.store_class)
    _replace(_LINK, "SqlLinkState", functools.partial(superlink_state.state_class, lost_answer=lost_answer))
    for name, guard in objects.GUARDS.items():  # before the transactions, which then go around them
        _replace(_FLEET, name, guard)
    for name in _CARRY:
        for handlers in (_FLEET, _RUNTIME):
            _replace(handlers, name, superlink_state.in_one_transaction)
    _replace(_FLEET, "push_object", _of_well_formed)  # of the other calls the door has read the body


def _of_well_formed(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    def handle(request: Any, *args: Any, **kwargs: Any) -> Any:
        if not admission.well_formed(request):
            raise HTTPException(400, "no id")
        return handler(request, *args, **kwargs)

    return handle


def lost_answer(row: Mapping[str, Any]) -> Message:
    """What Flower says of a node that is gone, as the answer to a message.

    Args:
        row: of the message, as the database has it.
    """
    ids = {key: objects.unsigned(row[key]) for key in ("run_id", "src_node_id", "dst_node_id")}
    asked: Message = private("flwr.server.superlink.linkstate.utils", "dict_to_message")({**row, **ids})
    code = private("flwr.common.constant", "ErrorCode").NODE_UNAVAILABLE
    answer = Message(Error(code, "its node began anew and lost the message"), reply_to=asked)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    return answer


def _replace(module: str, name: str, change: Callable[[Any], Any]) -> None:
    changed = change(private(module, name))
    setattr(importlib.import_module(module), name, changed)


def make_app() -> tuple[FastAPI, Any]:
    """The SuperLink that the flags of this process ask for, and Flower's account of these flags.

    Raises:
        UnknownFlower: this version of Flower lacks something that is needed.
    """
    prepare()
    config = private(_START, "_parse_superlink_lifespan_config")()
    app: FastAPI = private("flwr.superlink.main", "create_app")(config, private(_START, "SuperLinkLifespan"))
    account = private("flwr.superlink.auth_plugin.noop_auth_plugin", "_create_noop_account_info")()
    answers = _answers(account)

    def answer(what: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        if what not in answers:
            raise HTTPException(404)
        return _told(lambda: answers[what](asked, app.state.linkstate_factory.state()))

    @app.post("/apiary/{what}")
    async def apiary(what: str, request: Request) -> dict[str, Any]:
        return await run_in_threadpool(answer, what, await request.json())

    return app, config


def _told(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of `act`, or Flower's refusal as its own command line words it."""
    failure, known = private(_ERRORS, "FlowerError"), private(f"{_ERRORS}.catalog", "API_ERROR_MAP")
    try:
        return {"success": True, **act()}
    except failure as error:
        said = known[error.code].public_message if error.code in known else "refused"
        return {"success": False, "error-message": f"[code: {int(error.code)}] {said}"}


def _answers(account: Any) -> dict[str, _Answer]:
    """What `apiary deploy` and its runs ask, by the last part of the path: each takes the request and the state."""

    def ask(call: str, request: str) -> Callable[..., Any]:
        handler, kind = private(_CONTROL, call), private(_REQUESTS, request)
        return lambda state, **fields: handler(kind(**fields), account, state)

    enter, strike = ask("register_node", "RegisterNodeRequest"), ask("unregister_node", "UnregisterNodeRequest")
    nodes, stop = ask("list_nodes", "ListNodesRequest"), ask("stop_run", "StopRunRequest")
    runs = ask("list_runs", "ListRunsRequest")

    def register(asked: Mapping[str, Any], state: Any) -> dict[str, Any]:
        def one(name: str, key: str) -> dict[str, Any]:
            return {"node-id": str(enter(state, public_key=key.encode(), name=name).node_id)}

        return {"sites": {name: _told(functools.partial(one, name, key)) for name, key in asked["keys"].items()}}

    def unregister(asked: Mapping[str, Any], state: Any) -> dict[str, Any]:
        strike(state, node_id=int(asked["node"]))
        return {}

    def list_nodes(asked: Mapping[str, Any], state: Any) -> dict[str, Any]:
        return {"nodes": [{"node-id": str(n.node_id), "status": n.status} for n in nodes(state).nodes_info]}

    def list_runs(asked: Mapping[str, Any], state: Any) -> dict[str, Any]:
        one = asked.get("run")
        found = runs(state, **({"limit": _MOST_RUNS} if one is None else {"run_id": int(one)}))
        rows = sorted(found.run_dict.values(), key=lambda run: str(run.pending_at), reverse=True)
        return {"runs": [_run(row, found.now) for row in rows]}

    def stop_run(asked: Mapping[str, Any], state: Any) -> dict[str, Any]:
        return {"stopped": stop(state, run_id=int(asked["run"])).success}

    def limit(asked: Mapping[str, Any], state: Any) -> dict[str, Any]:
        superlink_state.set_limit(state, int(asked["run"]), int(asked["size"]), int(asked["objects"]))
        return {}

    return {
        "register": register,
        "unregister": unregister,
        "nodes": list_nodes,
        "runs": list_runs,
        "stop": stop_run,
        "limit": limit,  # of answers to a run; asked by the run itself
    }


def _run(run: Any, now: str) -> dict[str, Any]:
    """A run as Flower's own command line tells it, as far as we read that."""
    parts = [run.status.status, *([run.status.sub_status] if run.status.sub_status else [])]
    began, ended = run.running_at, run.finished_at or now
    return {
        "run-id": str(run.run_id),
        "status": ":".join(parts),
        "status-details": run.status.details,
        "elapsed": (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds() if began else 0.0,
    }


def keep_log_plain() -> None:
    """Let nothing that a caller says fill this process's log, forge a line of it or speak to a terminal.

    A record is one line of `_LINE` printable characters at most. Only the lines of a traceback, each of them cut as
    well, stand below it, and are indented.
    """
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        try:
            said = made.getMessage()
        except Exception:  # its arguments do not fit
            said = str(made.msg)
        made.msg, made.args = clean(said, _LINE), ()
        if made.exc_info and made.exc_info[0] is not None:
            lines = "".join(traceback.format_exception(*made.exc_info)).splitlines()
            if len(lines) > 2 * _LINES:
                lines[_LINES:-_LINES] = ["..."]
            made.exc_text = "\n".join(f"  {clean(line, _LINE)}" for line in lines)
        return made

    logging.setLogRecordFactory(record)


def main() -> None:
    """Serve until the process is ended; exit code 3 where Flower is another version."""
    keep_log_plain()
    try:
        app, config = make_app()
        private("flwr.supercore.logger", "update_console_handler")(colored=False)
        log_config = private("flwr.supercore.http_logging", "get_uvicorn_log_config")(
            private("flwr.supercore.logger", "console_handler").level
        )
    except UnknownFlower as error:
        print(f"apiary: {error}", file=sys.stderr, flush=True)
        raise SystemExit(3) from None
    allow_many_files()
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        access_log=False,  # a line for every call, with ids of nodes and runs
        log_config=log_config,
        http=peers.guarded(AutoHTTPProtocol),
        ws="none",
    )


if __name__ == "__main__":
    main()
