"""Rows of a database by a query that only reads: SQLite files by Python's own driver, others by SQLAlchemy.

A query is one SELECT. SQLite is opened read-only. In other databases the transaction is read-only where the dialect
has that (PostgreSQL, MySQL, MariaDB, Oracle), and is always rolled back; a user who may only read is safer still.
A password stands in an environment variable that the URI names: `postgresql://me:${DB_PASSWORD}@host/name`.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apiary.core import database_uris
from apiary.core.errors import UserError
from apiary.core.formatting import first_line
from apiary.data.readers.files import DataFile, Part, Unreadable

_AT_ONCE = 1000  # rows fetched in one go
_SELECT = re.compile(r"\s*(?:--[^\n]*\n\s*|/\*.*?\*/\s*)*(?:select|with|values)\b", re.IGNORECASE | re.DOTALL)
_FILES = ("http", "https", "ftp", "s3", "gs", "abfs", "az", "hdfs", "hf", "file")  # of URIs that name no database
_READ_ONLY = {
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "oracle": "SET TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = ON",
}


def sqlite(file: DataFile, split: str, query: str | None = None) -> list[Part]:
    """The rows of a query, or of the only table of a SQLite file.

    Raises:
        UserError: no database, several tables and no query, or a query that fails or does more than read.
    """
    return [Part(_sqlite_rows(file, query))]


def _sqlite_rows(file: DataFile, query: str | None) -> Iterator[tuple[int, object]]:
    if query is not None:
        check_query(query)
    connection = None
    try:
        connection = sqlite3.connect(f"{file.path.resolve().as_uri()}?mode=ro", uri=True)
        connection.text_factory = _text
        cursor = connection.execute(query or _only_table(connection, file.name))
        names = _names(file.name, [column[0] for column in cursor.description])
        number = 0
        while rows := cursor.fetchmany(_AT_ONCE):
            yield from enumerate((_row(names, row) for row in rows), number + 1)
            number += len(rows)
    except UserError:
        raise
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        raise UserError(f"{file.name}: {_what(query)}: {first_line(error)}") from None
    finally:
        if connection is not None:
            connection.close()


def _text(value: bytes) -> str | Unreadable:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return Unreadable("not UTF-8 text")


def _row(names: list[str], row: Any) -> object:
    """The row by column; unreadable as a whole where one of its texts is."""
    bad = next((cell for cell in row if isinstance(cell, Unreadable)), None)
    return dict(zip(names, row, strict=True)) if bad is None else bad


def _what(query: str | None) -> str:
    return "cannot be read as a SQLite database" if query is None else "data.query fails"


def _only_table(connection: sqlite3.Connection, name: str) -> str:
    listed = "select name from sqlite_master where type in ('table', 'view') and name not like 'sqlite_%' order by name"
    tables = [str(table) for (table,) in connection.execute(listed)]
    if len(tables) != 1:
        there = ", ".join(tables[:8]) + (", ..." if len(tables) > 8 else "") if tables else "none"
        raise UserError(f'{name}: say by data.query which rows to read, e.g. "select * from ..."; its tables: {there}')
    quoted = tables[0].replace('"', '""')
    return f'select * from "{quoted}"'


def _names(source: str, names: list[str]) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{source}: the query gives two columns named {twice!r}; rename one with AS")
    return names


def check_query(query: str) -> None:
    """Check that a query is one statement that reads.

    Raises:
        UserError: it begins otherwise, or there are several.
    """
    if not _SELECT.match(query):
        raise UserError("data.query: must be one SELECT, for a source is only read")
    if ";" in re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", "", query, flags=re.DOTALL).rstrip(
        "; \n\t"
    ):
        raise UserError("data.query: must be one statement, without ';' inside it")


def connected(uri: str, query: str | None, key: str) -> list[Part]:
    """The rows of a query to the database at a URI of SQLAlchemy's.

    Raises:
        UserError: SQLAlchemy or the driver is not installed, no query, or the database refuses it.
    """
    if (scheme := uri.partition("://")[0].lower()) in _FILES:
        raise UserError(f"{key} = {uri!r}: nothing is read from {scheme}://; copy it here and give its path")
    if query is None:
        raise UserError(f'{key} = {uri!r}: say by data.query which rows to read, e.g. "select * from ..."')
    check_query(query)
    return [Part(_connected_rows(uri, query, key))]


def _connected_rows(uri: str, query: str, key: str) -> Iterator[tuple[int, object]]:
    try:
        import sqlalchemy
    except ImportError:
        raise UserError(f"{key} = {uri!r}: databases need SQLAlchemy; install apiary[sql]") from None
    filled, secrets = database_uris.fill(uri, key)
    engine = None
    try:
        engine = sqlalchemy.create_engine(filled)
        options: dict[str, Any] = {"stream_results": True}
        if engine.dialect.name == "postgresql":
            options["postgresql_readonly"] = True
        with engine.connect().execution_options(**options) as connection:
            if statement := _READ_ONLY.get(engine.dialect.name):
                connection.exec_driver_sql(statement)
                if engine.dialect.name in ("mysql", "mariadb"):
                    connection.rollback()  # it holds from the next transaction on
            rows = connection.execute(sqlalchemy.text(query.rstrip("; \n\t").replace(":", r"\:")))
            names = _names(uri, list(rows.keys()))
            for number, row in enumerate(rows, 1):
                yield number, dict(zip(names, row, strict=True))
            connection.rollback()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{key} = {uri!r}: its driver is not installed: {first_line(error)}") from None
    except Exception as error:  # each driver has errors of its own
        why = database_uris.hide(first_line(error), secrets)
        raise UserError(f"{key} = {uri!r}: the database does not give these rows: {why}") from None
    finally:
        if engine is not None:
            engine.dispose()


def sqlite_path(uri: str) -> Path | None:
    """The file that a URI of SQLite names, as SQLAlchemy reads it: `sqlite:///relative.db`, `sqlite:////absolute.db`."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
