"""Database URIs, which never hold a secret: a password is the name of an environment variable, `${NAME}`.

So a configuration can be saved, sent and shown as it is.
"""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, quote, urlsplit

from apiary.core.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NAME = re.compile(r"\$\{(\w+)\}")
_SECRET_WORDS = ("pass", "pwd", "secret", "token", "key", "credential")


def is_uri(text: str) -> bool:
    """Whether a source is written as a URI."""
    return _SCHEME.match(text.lstrip(" \t\r\n'\"")) is not None  # typed or copied with a blank or a quote: still one


def holds_secret(uri: str) -> bool:
    """Whether a password or the like stands in a URI itself, not as `${NAME}`; also where it cannot be read."""
    try:
        parts = urlsplit(uri)
        secrets = [parts.password or ""]
        given = parse_qsl(parts.query)
        # A value may itself be a list of settings: odbc_connect=DRIVER=...;PWD=...
        inner = [part.partition("=")[::2] for _, value in given for part in value.split(";") if "=" in part]
        secrets += [value.strip() for name, value in (*given, *inner) if _is_secret(name)]
        # A password with a '/', '#' or '?' that is not written as %2F ends the host too early.
        is_file = parts.scheme == "sqlite"
        secrets += ["x"] if not is_file and (parts.netloc.count("@") > 1 or "@" in parts.path + parts.fragment) else []
        if ":" in parts.netloc.rpartition("@")[2] and "@" not in parts.netloc:
            _ = parts.port  # "user:pass/word@host" is no port
    except ValueError:
        return True
    return any(secret and not _NAME.fullmatch(secret) for secret in secrets)


def _is_secret(name: str) -> bool:
    lower = name.strip().lower()
    return lower == "auth" or any(word in lower for word in _SECRET_WORDS)


def fill(uri: str, key: str) -> tuple[str, tuple[str, ...]]:
    """The URI with the values of the variables that it names, and these values, which no line may show.

    Raises:
        UserError: the URI holds a secret itself, or a variable is not set.
    """
    if holds_secret(uri):
        raise UserError(refusal(key))
    names = dict.fromkeys(_NAME.findall(uri))
    if missing := next((name for name in names if not os.environ.get(name)), None):
        raise UserError(f"{key} = {uri!r}: the environment variable {missing} is not set")
    values = {name: os.environ[name] for name in names}
    filled = _NAME.sub(lambda match: quote(values[match[1]], safe=""), uri)
    secrets = {*values.values(), *(quote(value, safe="") for value in values.values())}
    return filled, tuple(sorted(secrets, key=len, reverse=True))


def refusal(key: str) -> str:
    """The line on a URI with a secret in it; it does not repeat the URI."""
    return (
        f"{key}: a password must not stand in the URI, which is saved and shown; write ${{NAME}} in its place and set "
        "that environment variable"
    )


def hide(text: str, secrets: tuple[str, ...]) -> str:
    """A text without the secrets."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
