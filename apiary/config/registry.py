"""Methods by name: a builder is registered under a name, and its signature is the schema of its options."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from apiary.config import toml_text
from apiary.config.errors import shown, wanted_text
from apiary.core.errors import UserError

T = TypeVar("T")


class Described(NamedTuple):
    """A method as a user reads of it."""

    name: str
    summary: str
    options: list[tuple[str, str, str]]  # name, default, meaning


class Registry(Generic[T]):
    """Builders of one kind of thing.

    Args:
        key: the configuration key that names a method of this kind; used in error lines.
        options_key: the key that its options stand under, where that is another.
        makes: what its builders make; one from outside that makes something else is refused.
        elsewhere: by a name that is looked for here, what to set instead.
        given: parameters of builders that are no options, for the run supplies them.
    """

    def __init__(
        self,
        key: str,
        options_key: str | None = None,
        makes: type[T] | None = None,
        elsewhere: Mapping[str, str] = MappingProxyType({}),
        given: Collection[str] = (),
    ) -> None:
        self.key, self.options_key, self._makes = key, options_key or key, makes
        self._elsewhere, self._given = elsewhere, given
        self._builders: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """A decorator that registers a builder under `name`."""

        def add(builder: Callable[..., T]) -> Callable[..., T]:
            if name in self._builders:
                raise ValueError(f"{self.key}: {name!r} is registered twice")
            self._builders[name] = builder
            return builder

        return add

    def __iter__(self) -> Iterator[str]:
        """Names in order of registration."""
        return iter(self._builders)

    def builder(self, name: str) -> Callable[..., T]:
        """The builder registered as `name`, or the one at `module:function`.

        Raises:
            UserError: no such name; the nearest one is offered.
        """
        if name in self._builders:
            return self._builders[name]
        if ":" in name:
            return self._outside(name)
        raise UserError(unknown_name(self.key, name, self._builders, self._elsewhere))

    def _outside(self, name: str) -> Callable[..., T]:
        module, _, function = name.partition(":")
        if "" not in sys.path:  # the working directory; last, so that it hides nothing
            sys.path.append("")
        try:
            builder = getattr(importlib.import_module(module), function)
        except Exception as error:  # a module of the user's may fail in any way when it is imported
            raise UserError(f"{self.key} = {name!r}: {type(error).__name__}: {error}") from None
        if not callable(builder):
            raise UserError(f"{self.key} = {name!r}: that is no function")
        return cast("Callable[..., T]", builder)

    def build(self, method: str, /, options: Mapping[str, Any] | None = None, **given: Any) -> T:
        """What the builder makes of checked `options`.

        Args:
            method: a registered name or `module:function`.
            options: from the configuration; checked against the builder's annotations.
            given: passed on unchecked, and only where the builder asks for them by name.

        Raises:
            UserError: unknown name, unknown option, missing option, or a value of the wrong type.
        """
        builder = self.builder(method)
        parameters = _parameters(builder)
        passed = {k: v for k, v in given.items() if k in parameters}
        checked = self._check(method, builder, {k: p for k, p in parameters.items() if k not in given}, options or {})
        value = builder(**passed, **checked)
        if self._makes is not None and not isinstance(value, self._makes):
            raise UserError(
                f"{self.key} = {method!r}: it makes a {type(value).__name__}; docs/extending.md says how to make a "
                f"{self._makes.__name__}"
            )
        return value

    def _check(
        self,
        name: str,
        builder: Callable[..., T],
        allowed: Mapping[str, inspect.Parameter],
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        hints = get_type_hints(builder, include_extras=True) if options else {}
        checked = {}
        for option, value in options.items():
            if option not in allowed:
                close = difflib.get_close_matches(option, allowed, n=1)
                known = f"it has {', '.join(allowed)}" if allowed else "it has no options at all"
                hint = f"did you mean {close[0]!r}?" if close else known
                raise UserError(f"{self.key}: {name!r} has no option {option!r}; {hint}")
            try:
                # As in the rest of the configuration, true is no number, and "1" neither.
                strict = isinstance(value, bool | str)
                checked[option] = TypeAdapter(hints.get(option, Any)).validate_python(value, strict=strict)
            except ValidationError as error:
                problem = error.errors()[0]
                wanted = wanted_text(hints.get(option, Any)) or problem["msg"][0].lower() + problem["msg"][1:]
                if problem["type"] == "finite_number":
                    wanted = "must be finite"
                raise UserError(f"{self.options_key}.{option} = {shown(value)}: {wanted}") from None
        for option, parameter in allowed.items():
            if parameter.default is inspect.Parameter.empty and option not in checked:
                what = f", {text}" if (text := meaning(inspect.getdoc(builder) or "", option)) else ""
                raise UserError(
                    f"{self.key}: {name!r} needs the option {option!r}{what}; set {self.options_key}.{option}"
                )
        return checked

    def describe(self) -> Iterator[Described]:
        """Of each method its name, what it does, and its options."""
        for name, builder in self._builders.items():
            text = inspect.getdoc(builder) or ""
            options = []
            for option, parameter in inspect.signature(builder).parameters.items():
                if option not in self._given:
                    default = parameter.default
                    shown_default = "needed" if default is inspect.Parameter.empty else toml_text.shown(default)
                    options.append((option, shown_default, meaning(text, option)))
            yield Described(name, text.partition("\n")[0], options)


@functools.cache
def _parameters(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A builder's parameters, asked once: a client's visit builds several methods."""
    return inspect.signature(builder).parameters


def unknown_name(key: str, name: str, known: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """The line that refuses the name of a method.

    Args:
        key: of the configuration.
        name: what stands there.
        known: the names that may; told by the alphabet, for their own order is that of files and imports.
        elsewhere: by a name that is looked for here, what to set instead.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "your own goes by module:function"
    if name.lower() in elsewhere:
        hint = f"for {name} set {elsewhere[name.lower()]}"
    return f"{key} = {name!r}: allowed are {', '.join(names)}; {hint}"


def meaning(text: str, option: str) -> str:
    """What a builder's docstring says of an option, without its full stop; nothing where it says nothing."""
    lines = text.partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    meanings: dict[str, str] = {}
    name = ""
    for line in lines:
        if line.startswith("    ") and not line.startswith("     "):
            name, _, line = line.strip().partition(": ")
        meanings[name] = f"{meanings.get(name, '')} {line.strip()}".strip()
    return meanings.get(option, "").removesuffix(".")
