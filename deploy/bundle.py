"""The app that is sent to the sites: two modules that import what is installed there, and no code of ours.

Flower sends a bundle with every run and would run whatever it holds. A site compares it with the one written here.
"""

from __future__ import annotations

import io
import re
import shutil
import tomllib
import zipfile
from pathlib import Path
from typing import Any

PUBLISHER, NAME, VERSION = "apiary", "apiary-run", "1.0.0"
_PROJECT = f"""[project]
name = "{NAME}"
version = "{VERSION}"
description = "Runs what is installed at each site"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "{PUBLISHER}"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "run_server:app"
clientapp = "run_client:app"

[tool.flwr.app.config]
config = ""
out = ""
name = ""
expected = 0
"""
_MODULE = "from {} import app as installed\n\napp = installed\n"  # Flower looks for an assignment
_FILES = {
    "pyproject.toml": _PROJECT,
    "LICENSE": "Apache License, Version 2.0\nhttp://www.apache.org/licenses/\n",
    "run_server.py": _MODULE.format("server.app"),
    "run_client.py": _MODULE.format("client.app"),
}
_ID = f"{PUBLISHER}/{NAME}"  # what Flower calls it
_HASH = re.compile(r"[0-9a-f]{64}")
_CONTENTS = ".info/CONTENT"  # Flower's own list
_FILE_BYTES = 65_536  # of any file of ours, packed or not
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # ways that unpack no more at a time than is asked for


class ForeignCode(RuntimeError):
    """A bundle is not the one written here."""


def write(folder: Path) -> Path:
    """The folder, which now holds the app and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in _FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def check(bundle: bytes) -> None:
    """Check that a bundle holds the app and nothing else.

    Raises:
        ForeignCode: it does not; whoever runs the server sends code, or another version of ours.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            names = archive.namelist()
            # Before anything is unpacked: a small archive may hold gigabytes.
            known = len(names) == len(set(names)) and {*names, _CONTENTS} == {*_FILES, _CONTENTS}
            same = known and _same({name: _text(archive, name) for name in names if name != _CONTENTS})
    except Exception:  # encrypted, cut off, broken, nested too deep: there is one kind of error for each
        same = False
    if not same:
        raise ForeignCode("this site runs what is installed there, not what is sent; do the versions differ?")


def _text(archive: zipfile.ZipFile, name: str) -> str:
    """A file of an archive.

    Raises:
        ValueError: it is longer than any of ours, whatever size it is said to have, or packed otherwise, or no text.
        Exception: it cannot be unpacked; many kinds.
    """
    if archive.getinfo(name).compress_type not in _PACKED:
        raise ValueError("packed otherwise")
    with archive.open(name) as file:
        content = file.read(_FILE_BYTES + 1)
    if len(content) > _FILE_BYTES:
        raise ValueError("too long")
    return content.decode()


def check_names(fab_id: str, fab_version: str, fab_hash: str) -> None:
    """Check what the server calls a bundle, before it is fetched.

    Raises:
        ForeignCode: the run is of another app than the installed one.
    """
    if (fab_id, fab_version) != (_ID, VERSION) or not _HASH.fullmatch(fab_hash):
        raise ForeignCode("this site runs what is installed there, and no other app; do the versions differ?")


def defaults() -> dict[str, Any]:
    """What a run has where it was started without a value."""
    configured: dict[str, Any] = tomllib.loads(_PROJECT)["tool"]["flwr"]["app"]["config"]
    return configured


def _same(texts: dict[str, str]) -> bool:
    # Flower writes pyproject.toml anew, with the same values in it.
    if set(texts) != set(_FILES):
        return False
    try:
        same = tomllib.loads(texts["pyproject.toml"]) == tomllib.loads(_PROJECT)
    except tomllib.TOMLDecodeError:
        return False
    return same and all(texts[name] == text for name, text in _FILES.items() if name != "pyproject.toml")
