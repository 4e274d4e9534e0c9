"""What a sweep varies, `-s KEY=A,B,C` and `-s KEY=LOW..HIGH`, and the configurations it makes. Needs no torch."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from apiary.config import defaults, loading, methods, toml_text
from apiary.config.schema import DataConfig, RunConfig
from apiary.core.errors import UserError

Values: TypeAlias = Mapping[str, Any]  # by key
Number: TypeAlias = int | float

_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::(log|{_NUMBER}))?")
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "\"'"
_OURS = {
    "seed": "a sweep runs every setting with the same seeds: --seeds 5, and the first one by -s seed=N",
    "evaluate.set_apart": "a sweep always sets rows apart",
}


class Choice(NamedTuple):
    """A key with the values that it takes."""

    key: str
    values: tuple[Any, ...]


class Range(NamedTuple):
    """A key that takes any value between two ends, which belong to it."""

    key: str
    low: Number
    high: Number  # of the same type
    log: bool = False  # drawn evenly in the logarithm
    step: Number | None = None  # between neighbouring values; None: 1 of whole numbers, else any


Axis: TypeAlias = Choice | Range


def parse(texts: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """Tell the settings of all runs from what is varied.

    A value that is TOML by itself is one value, so a list in brackets is one, and a text with a comma is one in quotes.
    Else commas outside brackets and quotes stand between values, and two dots between numbers make a range.

    Args:
        texts: `KEY=VALUE`, as for a single run, or `KEY=VALUE,VALUE,...`, `KEY=LOW..HIGH`, `KEY=LOW..HIGH:log` or
            `KEY=LOW..HIGH:STEP`.

    Returns:
        The overrides of all runs, and the axes in the order given.

    Raises:
        UserError: an empty or repeated value, a range without width, or a key that is varied and given again.
    """
    fixed: list[str] = []
    axes: list[Axis] = []
    problems: list[str] = []
    for text in texts:
        try:
            axis = _axis(text)
        except UserError as error:
            problems += error.problems
            continue
        if axis is None:
            fixed.append(text)
        else:
            axes.append(axis)
    varied = [axis.key for axis in axes]
    given = [*varied, *(text.partition("=")[0].strip() for text in fixed)]
    problems += [
        f"{key}: given {given.count(key)} times; name all of its values in one -s"
        for key in dict.fromkeys(varied)
        if given.count(key) > 1
    ]
    problems += [f"{key}: {_OURS[key]}" for key in dict.fromkeys(varied) if key in _OURS]
    if problems:
        raise UserError(*problems)
    return fixed, axes


def _axis(text: str) -> Axis | None:
    """What a text varies; None where it gives one value."""
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key or not raw or _is_toml(raw):
        return None
    if found := _RANGE.fullmatch(raw):
        return _range(key, text, *found.groups())
    pieces = _split(raw)
    if len(pieces) < 2:
        return None
    if not all(pieces):
        raise UserError(f'-s {text!r}: a value between the commas is empty; for an empty text write ""')
    values = tuple(map(_value, pieces))
    if twice := next((v for place, v in enumerate(values) if any(map(_same(v), values[:place]))), None):
        raise UserError(f"-s {text!r}: {toml_text.shown(twice)} stands there twice; each value is run once")
    return Choice(key, values)


def _same(value: object) -> Any:
    return lambda other: other == value and isinstance(other, bool) == isinstance(value, bool)


def _range(key: str, text: str, low: str, high: str, more: str | None) -> Range:
    ends = [_value(low), _value(high)]
    whole = all(isinstance(end, int) for end in ends)
    first, last = ends if whole else map(float, ends)
    log = more == "log"
    step = None if log or more is None else _value(more)
    if not first < last:
        raise UserError(f"-s {text!r}: the lower end comes first, as in {key}=1e-4..1e-2")
    if log and first <= 0:
        raise UserError(f"-s {text!r}: a logarithm needs ends above 0; leave :log out, or raise the lower end")
    if step is not None and not 0 < step <= last - first:
        raise UserError(f"-s {text!r}: a step between 0 and the width of the range, as in {key}=4..32:4")
    if step is not None and whole and not isinstance(step, int):
        raise UserError(f"-s {text!r}: ends that are whole numbers need such a step, as in {key}=4..32:4")
    return Range(key, first, last, log, step)


def _is_toml(raw: str) -> bool:
    try:
        return set(tomllib.loads(f"value = {raw}")) == {"value"}
    except tomllib.TOMLDecodeError:
        return False


def _value(piece: str) -> Any:
    """A value as TOML, and a bare word as a text."""
    return tomllib.loads(f"value = {piece}")["value"] if _is_toml(piece) else piece


def _split(raw: str) -> list[str]:
    """The pieces between commas that stand in no bracket and no quotes."""
    pieces, depth, quote = [""], 0, ""
    for letter in raw:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            pieces.append("")
            continue
        pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def assign(base: RunConfig, values: Values) -> RunConfig:
    """The configuration with these values, which are set one after the other as `-s` does it.

    Raises:
        UserError: what is wrong with it; nothing heavy is imported to find that out.
    """
    tables = tomllib.loads(base.to_toml())
    for key, value in values.items():
        toml_text.override(
            tables, f"{key}={toml_text.shown(value)}", partition=DataConfig().partition.model_dump(mode="json")
        )
    config = loading.parse(tables)
    if wrong := methods.problems(config):
        raise UserError(*wrong)
    return config


def grid(axes: Sequence[Axis]) -> list[Values]:
    """All combinations of the values, the last key changing fastest.

    Raises:
        UserError: a range, which has no end of values.
    """
    if ranges := [axis.key for axis in axes if isinstance(axis, Range)]:
        raise UserError(f"--search grid: {ranges[0]} is a range; name its values ({ranges[0]}=A,B,C), or search it")
    keys = [axis.key for axis in axes]
    return [
        dict(zip(keys, values, strict=True))
        for values in itertools.product(*(axis.values for axis in axes if isinstance(axis, Choice)))
    ]


def check(base: RunConfig, axes: Sequence[Axis], settings: Sequence[Values] | None) -> None:
    """Check every value with the whole configuration.

    Args:
        base: the configuration without what is varied.
        axes: what is varied.
        settings: all combinations that will be run; None where a search draws them. Then each value, and both ends of
            each range, is checked beside the first value of the other keys.

    Raises:
        UserError: each problem once, or two settings that are one and the same run.
    """
    problems = {
        f"{axis.key}: says how clients make their own models once the run is over, and changes no loss by which a "
        f"sweep chooses; vary it on a finished run (apiary personal RUN -s {axis.key}=...)": None
        for axis in axes
        if axis.key.startswith("personal.") and axis.key not in ("personal.enabled", "personal.validation")
    }
    seen: dict[str, Values] = {}
    for values in probes(axes) if settings is None else settings:
        try:
            config = defaults.resolved(assign(base, values)).to_json()
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        if config in seen and settings is not None:
            same = f"{words(seen[config])} and {words(values)} are the same run"
            problems[f"{same}: a key that comes later replaces an earlier one; vary one of them"] = None
        seen[config] = values
    if problems:
        raise UserError(*problems)


def probes(axes: Sequence[Axis]) -> Iterator[Values]:
    """Each value, and both ends of each range, beside the first value of the other keys."""
    of_axis = [axis.values if isinstance(axis, Choice) else (axis.low, axis.high) for axis in axes]
    first = {axis.key: values[0] for axis, values in zip(axes, of_axis, strict=True)}
    for axis, values in zip(axes, of_axis, strict=True):
        for value in values:
            yield {**first, axis.key: value}


def own(base: RunConfig, axes: Sequence[Axis]) -> Values | None:
    """What the configuration itself has at the varied keys; None where that is not among the values.

    The values are those of the axes where these are equal, so that 1 stands for 1.0.
    """
    found: dict[str, Any] = {}
    tables = base.model_dump(mode="json")
    for axis in axes:
        value: Any = tables
        for name in axis.key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(axis, Choice):
            here = [one for one in axis.values if _equal(base, axis.key, one)]
            if not here:
                return None
            found[axis.key] = here[0]
        elif not _within(axis, value):
            return None
        else:
            found[axis.key] = value
    return found


def _equal(base: RunConfig, key: str, value: object) -> bool:
    try:
        return defaults.resolved(assign(base, {key: value})) == defaults.resolved(base)
    except UserError:
        return False


def _within(axis: Range, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not axis.low <= value <= axis.high:
        return False
    if isinstance(axis.low, int) and not float(value).is_integer():
        return False
    return axis.step is None or abs((value - axis.low) / axis.step - round((value - axis.low) / axis.step)) < 1e-9


def words(values: Values) -> str:
    """A setting as one line; a method with options as `nesterov (lr 0.7)`, for these are to be read, not typed."""
    return ", ".join(f"{key} = {_read(value)}" for key, value in values.items())


def _read(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "name" in value:
        options = ", ".join(
            f"{key} {toml_text.shown(v)}" for key, v in value.items() if key != "name" and v is not None
        )
        return f"{value['name']} ({options})" if options else str(value["name"])
    return toml_text.shown(value)
