"""Kits: a folder for the server and one for each site, with what each needs to find the other side and trust it.

The server proves who it is by a certificate of the federation's own authority (TLS); a site by a key of its own, which
the server knows by its public half (Flower's SuperNode authentication, ECDSA on P-384). No site holds anything that is
another's.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from apiary.core.errors import UserError
from deploy import certificates

_SITE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_PORT = re.compile(r"[0-9]{1,5}")
_OWN = ("server", "ca")  # folders beside those of the sites
FILE, CA, CA_KEY, CERTIFICATE, SERVER_KEY = "kit.toml", "ca.crt", "ca.key", "server.crt", "server.key"
SITE_KEY, SITES = "site.key", "sites"


class Address(NamedTuple):
    """Where the sites reach the server."""

    host: str  # a name or an IP address, without brackets
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Kit(NamedTuple):
    """An opened kit."""

    folder: Path
    role: Literal["server", "site"]
    server: Address
    site: str  # "" in the server's kit


def init(folder: Path, server: str, sites: Sequence[str]) -> list[Path]:
    """The new folders of a federation: the authority's, the server's, and one for each site.

    Args:
        folder: holds them; new or empty.
        server: HOST:PORT as the sites reach it.
        sites: their names.

    Raises:
        UserError: an address or name that cannot be, or a folder that holds something.
    """
    address = parse_address(server)
    _check_names(sites, ())
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is not empty: `apiary deploy add` adds a site; or name another folder")
    ours = folder / "server"
    _make(folder / "ca", folder)
    _make(ours / SITES, folder)
    key, certificate = certificates.authority()
    write(folder / "ca" / CA_KEY, key, 0o600)
    write(folder / "ca" / CA, certificate)
    write(ours / CA, certificate)
    renew(folder, address)
    write(ours / FILE, _kit_toml("server", address))
    return [folder / "ca", ours, *add(folder, sites)]


def add(folder: Path, sites: Sequence[str]) -> list[Path]:
    """A folder for each new site; the server's kit learns their public keys.

    Raises:
        UserError: no federation in `folder`, or a name that cannot be or is taken.
    """
    ours = _read(folder / "server", "server", (CA, SITES))  # the server's key may be with the server alone by now
    _check_names(sites, [path.stem for path in (ours.folder / SITES).glob("*.pub")])
    return [_make_site(folder / name, name, ours) for name in sites]


def renew(folder: Path, address: Address | None = None) -> Path:
    """The server's certificate, written anew by the authority for three years.

    Raises:
        UserError: no authority in `folder`: its key may lie elsewhere.
    """
    where = address or _read(folder / "server", "server", ()).server
    authority = folder / "ca" / CA_KEY
    if not authority.exists():
        raise UserError(f"{str(authority)!r} is not there: bring it back from where it is kept, to sign")
    try:
        key, certificate = certificates.server((folder / "ca" / CA).read_bytes(), authority.read_bytes(), where.host)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{str(folder / 'ca')!r}: the authority's files cannot be read: {error}") from None
    path = folder / "server" / CERTIFICATE
    write(folder / "server" / SERVER_KEY, key, 0o600)
    write(path, certificate)
    return path


def read(folder: Path, role: Literal["server", "site"]) -> Kit:
    """The kit in `folder`.

    Raises:
        UserError: none there, another one's, or an incomplete one.
    """
    return _read(folder, role, (CA, CERTIFICATE, SERVER_KEY, SITES) if role == "server" else (CA, SITE_KEY))


def _read(folder: Path, role: Literal["server", "site"], needed: Sequence[str]) -> Kit:
    try:
        values = tomllib.loads((folder / FILE).read_text(encoding="utf-8"))
        if wrong := [key for key in ("role", "server", "site") if not isinstance(values.get(key, ""), str)]:
            raise UserError(f"{str(folder / FILE)!r}: {wrong[0]} = {values[wrong[0]]!r}: expected a text in quotes")
        kit = Kit(folder.resolve(), values["role"], parse_address(values["server"]), values.get("site", ""))
    except (FileNotFoundError, NotADirectoryError):
        inside = sorted(path.parent.name for path in folder.glob(f"*/{FILE}"))
        hint = (
            f"give a folder in it: {', '.join(inside)}" if inside else "`apiary deploy init` makes one for each machine"
        )
        raise UserError(f"{str(folder)!r} holds no {FILE}: {hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, OSError) as error:
        raise UserError(f"{str(folder / FILE)!r} cannot be read: {error}") from None
    if kit.role != role:
        theirs, wanted = ("the server's", "a site's") if role == "site" else ("a site's", "the server's")
        raise UserError(f"{str(folder)!r} is {theirs} kit; give {wanted}")
    if role == "site" and not _SITE.fullmatch(kit.site):
        raise UserError(f"{str(folder / FILE)!r}: site = {kit.site!r}: not a name that `apiary deploy` gives")
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise UserError(f"{str(folder)!r} lacks {missing[0]}; copy the whole folder")
    return kit


def public_keys(kit: Kit) -> dict[str, Path]:
    """The sites that the server knows: the file of each one's public key, by name."""
    return {path.stem: path for path in sorted((kit.folder / SITES).glob("*.pub")) if _SITE.fullmatch(path.stem)}


def public_key(path: Path) -> str:
    """The public key in a file, without its comment.

    Raises:
        UserError: it cannot be read, or holds none (yet, where it is being copied).
    """
    try:
        text = " ".join(path.read_text(encoding="utf-8").split()[:2])
        certificates.public_pem(text)
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path.name} cannot be read: not a text") from None
    except ValueError as error:
        raise UserError(f"{path.name}: {error}") from None
    return text


def parse_address(text: str) -> Address:
    """The address in HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        UserError: the text is not HOST:PORT.
    """
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    known = _HOST.fullmatch(bare) is not None if bare == host else certificates.is_ip(bare)
    if not colon or not known or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise UserError(f"--server {text!r}: expected HOST:PORT as the sites reach it, such as fl.example.org:8443")
    return Address(bare, int(port))


def write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file that never, not even for a moment, has other rights than `mode`."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _check_names(sites: Sequence[str], taken: Sequence[str]) -> None:
    if not sites:
        raise UserError("--site: name at least one")
    seen = {name.casefold() for name in taken}  # a folder each, also where file names have no case
    for name in sites:
        if not _SITE.fullmatch(name):
            raise UserError(f"--site {name!r}: letters, digits, '.', '_' and '-', not '.' in front, 64 at the most")
        if name.casefold() in _OWN:
            raise UserError(f"--site {name!r}: this name is kept for a folder of ours; choose another")
        if name.casefold() in seen:
            raise UserError(f"--site {name!r}: there is one of this name already; choose another")
        seen.add(name.casefold())


def _make(folder: Path, within: Path) -> None:
    """Make a folder and those above it up to `within`, for the owner alone."""
    within.parent.mkdir(parents=True, exist_ok=True)
    for path in [*reversed([p for p in folder.parents if p.is_relative_to(within)]), folder]:
        path.mkdir(mode=0o700, exist_ok=True)


def _kit_toml(role: str, server: Address, site: str = "") -> str:
    lines = ["# Made by `apiary deploy`.", f'role = "{role}"', f'server = "{server}"']
    return "\n".join([*lines, *([f'site = "{site}"'] if site else [])]) + "\n"


def _make_site(folder: Path, name: str, ours: Kit) -> Path:
    if folder.exists():
        raise UserError(f"--site {name!r}: {str(folder)!r} is there already; remove it first")
    folder.mkdir(mode=0o700)
    private, public = certificates.site_keys()
    write(folder / SITE_KEY, private, 0o600)
    write(folder / CA, (ours.folder / CA).read_bytes())
    write(folder / FILE, _kit_toml("site", ours.server, name))
    write(ours.folder / SITES / f"{name}.pub", public + f" {name}\n".encode())
    return folder
