"""What is wrong with a configuration, one line a key: key, value, what is allowed, likely fix."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel, ValidationError

_LONGEST = 60  # characters of a value that its line repeats
_LISTS: dict[Any, str] = {int: "whole numbers, such as [4, 8]", str: 'texts, such as ["a", "b"]'}
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def error_lines(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line for each key that is wrong, in the order in which they were met."""
    lines: dict[str, str] = {}  # by key, for a union complains once for each of its members
    for item in error.errors():
        key, kind, limits = _expected(item["loc"], root)
        value = f"{key} = {shown(item['input'])}"
        match item["type"]:
            case "extra_forbidden":
                line = f"unknown key {key!r}{_nearest(key, root)}"
            case "value_error":
                line = str(item["ctx"]["error"])
            case "missing":
                table, _, last = key.rpartition(".")
                line = f"{table} = {_table(item['input'])}: it has no {last}; {last} = ... is needed"
            case "literal_error" if get_origin(kind) is Literal:
                meant = _meant(item["input"], get_args(kind))
                line = f"{value}: allowed are {_allowed(kind, limits)}{meant}"
            case "finite_number":
                line = f"{value}: must be finite{_bounds(limits)}"
            case _:
                line = f"{value}: must be {_allowed(kind, limits)}"
        lines.setdefault(key, line)
    # What is wrong in a list says more than that the list is not the other thing that may stand there.
    return [line for key, line in lines.items() if not any(other.startswith(f"{key}[") for other in lines)]


def _expected(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[str, Any, Sequence[Any]]:
    """The key at a place in the tree, the type that belongs there, and the limits on it."""
    key: str = ""
    kind: Any = root
    limits: Sequence[Any] = ()
    for part in loc:
        if _is_table(kind):
            field = kind.model_fields.get(str(part))
            key = f"{key}.{part}".lstrip(".")
            kind, limits = (_bare(field.annotation), field.metadata) if field else (Any, ())
        elif get_origin(kind) is tuple:
            key, kind, limits = f"{key}[{part}]", _bare(get_args(kind)[0]), ()
        elif get_origin(kind) is Mapping:
            key, kind, limits = f"{key}.{part}", get_args(kind)[1], ()
        elif get_origin(kind) is Union and str(part).startswith("tuple") and isinstance(loc[-1], int):
            kind = next(member for member in get_args(kind) if get_origin(member) is tuple)
        else:
            break  # the name of another member of a union
    return key, kind, limits


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _bare(kind: Any) -> Any:
    """The type without `Annotated` and without `| None`."""
    if get_origin(kind) is Annotated:
        return get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        members = tuple(member for member in get_args(kind) if member is not type(None))
        return Union[members]  # noqa: UP007  # made at run time
    return kind


def _allowed(kind: Any, limits: Sequence[Any] = ()) -> str:
    """What may stand at a key, in words."""
    if _is_table(kind):
        if kind.model_config.get("extra") == "allow":
            return 'a name, or a table such as { name = "..." }'
        return f"a table with the keys {', '.join(kind.model_fields)}"
    origin, members = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(repr(member) for member in members)
    if origin is tuple:
        inner = _bare(members[0])
        if get_origin(inner) is Literal:
            return f"a list of {_allowed(inner)}"
        return f"a list of {_LISTS[inner]}" if inner in _LISTS else "a list, in [ ]"
    if origin is Mapping:
        return "a table, such as { key = ... }"
    if origin is Union:
        *most, last = map(_allowed, members)
        comma = "," if most and most[-1].endswith("]") else ""
        return f"{', '.join(most)}{comma} or {last}"
    return _WORDS.get(kind, str(kind)) + _bounds(limits)


def _bounds(limits: Sequence[Any]) -> str:
    words = []
    for limit in limits:
        match limit:
            case Gt(gt=edge):
                words.append(f"above {edge}")
            case Ge(ge=edge):
                words.append(f"at least {edge}")
            case Lt(lt=edge):
                words.append(f"below {edge}")
            case Le(le=edge):
                words.append(f"at most {edge}")
            case MultipleOf(multiple_of=step):
                words.append(f"a multiple of {step}")
    return f", {' and '.join(words)}" if words else ""


def _meant(given: object, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(given), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _nearest(key: str, root: type[BaseModel]) -> str:
    """The closest key of the same table, else one of that name elsewhere, else all of the table."""
    table, _, last = key.rpartition(".")
    known = list(_keys(root))
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == table}
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    for names, cutoff in ((siblings, 0.6), (elsewhere, 0.85)):
        if close := difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            return f": did you mean {names[close[0]]!r}?"
    return f": allowed are {', '.join(siblings)}"


def _keys(table: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in table.model_fields.items():
        yield path + name
        if _is_table(field.annotation):
            yield from _keys(field.annotation, f"{path}{name}.")  # type: ignore[arg-type]


def wanted_text(kind: Any) -> str:
    """What may stand for an option of this annotated type, as a sentence; nothing where it can't be told in words."""
    limits: Sequence[Any] = ()
    if get_origin(kind) in (Union, types.UnionType):
        kind = _bare(kind)
    if get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
        limits = [limit for item in metadata for limit in getattr(item, "metadata", (item,))]
    if get_origin(kind) is Literal:
        return f"allowed are {_allowed(kind)}"
    return f"must be {_allowed(kind, limits)}" if kind in _WORDS else ""


def _table(value: object) -> str:
    """A table about as TOML has it."""
    if not isinstance(value, Mapping):
        return shown(value)
    text = ", ".join(f"{key} = {shown(inner)}" for key, inner in value.items())
    return f"{{ {text} }}" if text else "{}"


def shown(value: object) -> str:
    """The value about as TOML has it, cut where it is long."""
    plain = list(value) if isinstance(value, tuple) else value
    text = str(value).lower() if isinstance(value, bool) else repr(plain)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
