"""What methods there are, as their source says: names, options and what they do, without importing any of it.

A method is a function under `@REGISTRY.register("name")` in one of our packages, and importing those takes seconds, for
they need torch. A wrong name is therefore refused, and `apiary config strategy` answered, from the text of the files.
A test holds what is read here to what the imported registries say.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from apiary.config import toml_text
from apiary.config.registry import Described, meaning, unknown_name
from apiary.config.schema import Method, RunConfig

_PACKAGES: Final = ("apiary", "client", "server", "simulation", "strategies")
_ABSENT: Final = object()

_Function = tuple["_Module", ast.FunctionDef]


class Kind(NamedTuple):
    """The methods that may stand at one key of the configuration."""

    elsewhere: Mapping[str, str]  # by a name that is looked for here, what to set instead
    given: Sequence[str]  # parameters that are no options
    functions: Mapping[str, _Function]  # by name, in the order of the files

    def describe(self) -> Iterator[Described]:
        """As `Registry.describe` has it."""
        for name, (module, function) in self.functions.items():
            text = ast.get_docstring(function) or ""
            options = [
                (option, "needed" if default is None else module.shown(default), meaning(text, option))
                for option, default in _parameters(function)
                if option not in self.given
            ]
            yield Described(name, text.partition("\n")[0], options)


class _Module:
    """The top level of one file, parsed when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @functools.cached_property
    def text(self) -> str:
        return self._path.read_text(encoding="utf-8")

    @functools.cached_property
    def body(self) -> list[ast.stmt]:
        return ast.parse(self.text).body

    def assigned(self) -> Iterator[tuple[str, ast.expr]]:
        """Each name that is assigned to, with its value."""
        for node in self.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                yield node.target.id, node.value
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    yield from _unpacked(target, node.value)

    def imported(self) -> dict[str, tuple[str, str]]:
        """By the name that it has here, the module and the name there of each `from MODULE import NAME`."""
        nodes = [node for node in self.body if isinstance(node, ast.ImportFrom)]
        return {alias.asname or alias.name: (str(n.module), alias.name) for n in nodes for alias in n.names}

    def shown(self, default: ast.expr) -> str:
        """A default as TOML; as it stands where it is more than a literal or the name of one."""
        value = self.value(default)
        return ast.unparse(default) if value is _ABSENT else toml_text.shown(value)

    def value(self, expression: ast.expr) -> Any:
        """The value of a literal, or of a name that stands for one in a module of ours; else `_ABSENT`."""
        match expression:
            case ast.Name(id=name):
                for known, assigned in self.assigned():
                    if known == name:
                        return self.value(assigned)
                module, there = self.imported().get(name, ("", ""))
                return _value_in(module, there)
            case ast.Attribute(value=ast.Name(id=name), attr=there):
                return _value_in(".".join(self.imported().get(name, ())), there)
        try:
            return ast.literal_eval(expression)
        except ValueError:
            return _ABSENT


def _value_in(module: str, name: str) -> Any:
    source = _modules().get(module)
    return source.value(ast.Name(name)) if source else _ABSENT


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for each, part in zip(target.elts, value.elts, strict=True):
            yield from _unpacked(each, part)


def _parameters(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr | None]]:
    """Each parameter with its default, in order."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [*[None] * (len(plain) - len(given.defaults)), *given.defaults, *given.kw_defaults]
    for argument, default in zip([*plain, *given.kwonlyargs], defaults, strict=True):
        yield argument.arg, default


@functools.cache
def _modules() -> Mapping[str, _Module]:
    """All modules of our packages by name, sorted; finding a package at the top imports nothing."""
    modules = {}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in Path(folder).rglob("*.py"):
                parts = (package, *path.relative_to(folder).with_suffix("").parts)
                modules[".".join(parts).removesuffix(".__init__")] = _Module(path)
    return dict(sorted(modules.items()))


@functools.cache
def kinds() -> Mapping[str, Kind]:
    """The kinds of methods by configuration key."""
    registries: dict[str, ast.Call] = {}
    functions: dict[str, dict[str, _Function]] = {}
    for module in _modules().values():
        if "= Registry(" in module.text:
            registries |= {
                name: value
                for name, value in module.assigned()
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Registry"
            }
        if ".register(" in module.text:
            for node in module.body:
                for registry, name in _registered(node):
                    functions.setdefault(registry, {})[name] = module, node  # type: ignore[assignment]
    by_key = {}
    for registry, call in registries.items():
        extra = {part.arg: part.value for part in call.keywords}
        elsewhere, given = (ast.literal_eval(extra[name]) if name in extra else () for name in ("elsewhere", "given"))
        table, _, keys = ast.literal_eval(call.args[0]).rpartition(".")  # such as "wire.up/down"
        for key in keys.split("/"):
            by_key[f"{table}.{key}"] = Kind(dict(elsewhere), given, functions.get(registry, {}))
    order = list(RunConfig.model_fields)
    return dict(sorted(by_key.items(), key=lambda item: order.index(item[0].partition(".")[0])))


def _registered(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """The registry and the name of each `@REGISTRY.register("name")` over a function."""
    for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
        match decorator:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=registry), attr="register"), args=[ast.Constant(value=str(name))]
            ):
                yield registry, name


def problems(config: RunConfig) -> list[str]:
    """A line for each name of a method in `config` that no file registers; `module:function` is not looked at."""
    return [
        unknown_name(key, name, kind.functions, kind.elsewhere)
        for key, kind in kinds().items()
        for name in _named(config, key)
        if name not in kind.functions and ":" not in name
    ]


def _named(config: RunConfig, key: str) -> list[str]:
    """The names of methods that stand at a key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    several = value if isinstance(value, tuple) else (value,)
    return [each.name if isinstance(each, Method) else each for each in several]
