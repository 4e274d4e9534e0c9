"""Checks later, and away from the server, who sent what in a run: by its account of answers and the sites' public keys.

Written apart from what the server and the sites run, so that a mistake there does not vouch for itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from apiary.core.errors import UserError
from apiary.tracking import event_log
from apiary.tracking.run_directory import RUN_ID

_FILE, _ANSWER = "replies.jsonl", "answer"
_ASKED = ("run", "round", "kind", "message", "site")
_SHOWN = 20  # problems
_TOOK_PART = ("client", "declined")  # events of a train answer that counted
_PANEL = ("clients", "clients_few")  # fields of an `evaluate` event: who answered


class Found(NamedTuple):
    """What an account comes to."""

    lines: list[str]  # one for each site
    problems: list[str]


def verify(run: Path, keys: Path) -> Found:
    """Check each line of a run's account, and that the log claims no answer that is not in it.

    Args:
        run: the run directory.
        keys: a folder with NAME.pub of each site, such as `sites` of the server's kit.

    Raises:
        UserError: there is no account, or no key.
    """
    path = run / _FILE
    if not path.exists():
        raise UserError(f"{str(run)!r} holds no {_FILE}: a run at sites writes one, and a simulation none")
    public = {file.stem: file.read_text(encoding="utf-8") for file in sorted(keys.glob("*.pub"))}
    if not public:
        raise UserError(f"--keys {str(keys)!r}: holds no NAME.pub; give the folder `sites` of the server's kit")
    own_id = (run / RUN_ID).read_text(encoding="utf-8").strip() if (run / RUN_ID).exists() else ""
    problems = (
        [] if own_id else [f"there is no {RUN_ID} in {str(run)!r}, which tells whether the answers are to this run"]
    )
    verdicts: dict[str, Counter[str]] = {}
    answered: Counter[tuple[str, str, str]] = Counter()  # site, kind and round
    seen: set[tuple[str, str]] = set()  # site and message
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            site, verdict = str(entry["site"]), str(entry["verdict"])
            own = _verdict(entry, public.get(site, ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"line {number}: it cannot be read ({type(error).__name__})")
            continue
        verdicts.setdefault(site, Counter())[own] += 1
        if own != verdict:
            problems.append(f"line {number}, site {site}: it is said to be {verdict!r}, and is {own!r}")
        elif own == "signed" and own_id and not str(entry["run"]).endswith(f"-{own_id}"):
            problems.append(f"line {number}, site {site}: it is signed for another run")
        elif own == "signed" and (site, str(entry["message"])) in seen:
            problems.append(f"line {number}, site {site}: its message has been answered in an earlier line")
        elif own == "signed":
            seen.add((site, str(entry["message"])))
            answered[site, str(entry["kind"]), str(entry["round"])] += entry["outcome"] == _ANSWER  # else an error
    problems += _unaccounted(run, answered)
    return Found([_line(site, counts, public) for site, counts in sorted(verdicts.items())], problems)


def _verdict(entry: Mapping[str, Any], key: str) -> str:
    """What an entry is by itself, whatever the server wrote of it."""
    if "signature" not in entry:
        return "failed" if entry["verdict"] == "failed" else "not signed"
    asked = [entry[name] for name in _ASKED]
    claimed = asked if entry["claimed"] is None else [entry["claimed"][name] for name in _ASKED]
    parts = [*claimed, entry["outcome"], entry["digest"]]
    if not _is_signed(b"apiary reply 1\n" + json.dumps(parts).encode(), entry["signature"], key):
        return "false signature"
    if claimed == asked:
        return "signed"
    return "another name" if claimed[4] != asked[4] else "stale"


def _is_signed(statement: bytes, signature: str, key: str) -> bool:
    try:
        public = load_ssh_public_key(" ".join(key.split()[:2]).encode())
        if not isinstance(public, ec.EllipticCurvePublicKey):
            return False
        public.verify(base64.b64decode(signature), statement, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True


def _unaccounted(run: Path, answered: Counter[tuple[str, str, str]]) -> list[str]:
    """The answers that the log counts, and no signed one stands for."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for event in event_log.read_events(run):
        if event["event"] in _TOOK_PART:
            counted[str(event["client"]), "train", str(event["round"])] += 1
        elif event["event"] == "handshake":
            counted[str(event["client"]), "query.hello", "0"] += 1
        elif event["event"] == "evaluate":
            counted.update(
                (str(site), "evaluate", str(event["round"])) for key in _PANEL for site in event.get(key, ())
            )
    return [
        f"site {site}: the log counts {times} answers to {kind} of round {number}, and {answered[site, kind, number]} "
        "of the account are signed"
        for (site, kind, number), times in sorted(counted.items())
        if answered[site, kind, number] < times
    ]


def _line(site: str, counts: Counter[str], public: Mapping[str, str]) -> str:
    told = ", ".join(f"{times} {verdict}" for verdict, times in sorted(counts.items()))
    if site not in public:
        return f"site {site}: {told} (no key of this name)"
    blob = base64.b64decode(public[site].split()[1])
    shown = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return f"site {site}: {told}, by key SHA256:{shown}"


def describe(found: Found) -> list[str]:
    """The lines to print."""
    more = len(found.problems) - _SHOWN
    shown = [*found.problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
    return [*found.lines, *(f"problem: {line}" for line in shown)]
