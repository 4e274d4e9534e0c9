"""Methods by name: the builder's signature is the schema of its options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from apiary.config.registry import Registry
from apiary.core.errors import UserError

GREETINGS: Registry[str] = Registry("test.greeting")


@GREETINGS.register("plain")
def plain() -> str:
    return "hello"


@GREETINGS.register("shout")
def shout(times: Annotated[int, Field(ge=1)], style: Literal["!", "?"] = "!", *, who: str = "you") -> str:
    return f"{who}: " + ("hello" + style) * times


def outside(mark: str = "~") -> str:
    return f"{mark}hello{mark}"


def test_a_method_is_built_with_its_options() -> None:
    assert GREETINGS.build("plain") == "hello"
    assert GREETINGS.build("shout", {"times": 2, "style": "?"}) == "you: hello?hello?"
    assert list(GREETINGS) == ["plain", "shout"]


def test_what_is_given_reaches_only_the_builders_that_ask_for_it() -> None:
    assert GREETINGS.build("plain", {}, who="bee") == "hello"
    assert GREETINGS.build("shout", {"times": 1}, who="bee") == "bee: hello!"


def test_what_is_given_is_no_option_of_the_user() -> None:
    with pytest.raises(UserError, match="has no option 'who'"):
        GREETINGS.build("shout", {"times": 1, "who": "wasp"}, who="bee")


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("shuot", {}, ("test.greeting = 'shuot'", "plain, shout", "did you mean 'shout'?")),
        ("zzz", {}, ("test.greeting = 'zzz'", "plain, shout", "module:function")),
        ("shout", {"tims": 1}, ("'shout' has no option 'tims'", "did you mean 'times'?")),
        ("plain", {"x": 1}, ("'plain' has no option 'x'", "it has no options at all")),
        ("shout", {}, ("'shout' needs the option 'times'",)),
        ("shout", {"times": 0}, ("times = 0: must be a whole number, at least 1",)),
        ("shout", {"times": "many"}, ("times = 'many': must be a whole number, at least 1",)),
        ("shout", {"times": 1, "style": "."}, ("style = '.': allowed are '!', '?'",)),
        ("no_such_module_here:f", {}, ("test.greeting", "no_such_module_here")),
        (f"{__name__}:absent", {}, ("test.greeting", "absent")),
    ],
)
def test_a_slip_is_one_line_that_says_what_is_allowed(
    name: str, options: dict[str, object], parts: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        GREETINGS.build(name, options)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_allowed_names_are_told_by_the_alphabet() -> None:
    """In whatever order files are read and modules imported."""
    sizes: Registry[str] = Registry("test.size")
    for name in ("small", "big", "medium"):
        sizes.register(name)(plain)
    assert list(sizes) == ["small", "big", "medium"]
    with pytest.raises(UserError, match=r"^test\.size = 'huge': allowed are big, medium, small; "):
        sizes.build("huge")


def test_what_is_looked_for_here_and_is_elsewhere_is_said() -> None:
    colours: Registry[str] = Registry("test.colour", elsewhere={"loud": 'test.volume = "loud"'})
    colours.register("cloud")(plain)
    with pytest.raises(UserError, match=r'for Loud set test.volume = "loud"$'):
        colours.build("Loud")
    with pytest.raises(UserError, match=r"did you mean 'cloud'\?$"):
        colours.build("clod")


def test_methods_are_described_with_their_options_and_without_what_the_run_gives() -> None:
    """As a user reads it: defaults as TOML has them."""
    tools: Registry[str] = Registry("test.tool", given=("seed",))

    @tools.register("saw")
    def saw(seed: int, teeth: int, sharp: bool = True) -> str:
        """Cuts along the grain.

        Args:
            seed: of the run.
            teeth: on the blade.
            sharp: whether it has been filed.
        """
        return f"{teeth} {sharp} {seed}"

    (described,) = tools.describe()
    assert described == (
        "saw",
        "Cuts along the grain.",
        [("teeth", "needed", "on the blade"), ("sharp", "true", "whether it has been filed")],
    )


def test_a_function_of_ones_own_goes_by_module_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_greetings", sys.modules[__name__])
    assert GREETINGS.build("my_greetings:outside", {"mark": "*"}) == "*hello*"
    with pytest.raises(UserError, match="has no option 'times'"):
        GREETINGS.build("my_greetings:outside", {"times": 2})


def test_a_module_may_lie_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A console script's own search path holds the folder of the script instead."""
    (tmp_path / "greetings_of_mine.py").write_text("def polite() -> str:\n    return 'good day'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    assert GREETINGS.build("greetings_of_mine:polite") == "good day"


@pytest.mark.parametrize("value", [True, "1", 1.5])
def test_options_are_as_strict_as_the_rest_of_the_configuration(value: object) -> None:
    with pytest.raises(UserError, match=r"times = (true|'1'|1.5): must be a whole number"):
        GREETINGS.build("shout", {"times": value})


def test_a_function_from_outside_that_makes_something_else_is_refused() -> None:
    numbers: Registry[int] = Registry("test.number", makes=int)
    with pytest.raises(UserError, match=r"^test.number = 'os:getcwd': it makes a str; .* make a int"):
        numbers.build("os:getcwd")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'plain' is registered twice"):
        GREETINGS.register("plain")(plain)


def test_registries_do_not_share_names() -> None:
    other: Registry[str] = Registry("test.other")
    assert list(other) == []
