"""What the documentation says is what the code does."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apiary.config import loading
from apiary.core.messages import Update
from strategies import AGGREGATORS, ServerState

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))


def test_tables_come_from_the_committed_results() -> None:
    from benchmarks.tables import _FROM, PAGES, RESULTS, TABLES, render

    for name in TABLES:
        assert (RESULTS / f"{_FROM.get(name, name)}.json").exists()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert render(text) == text, "run python benchmarks/tables.py"


def test_readme_links_and_recipes_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(r"configs/[\w-]+\.toml", text)
    assert len(targets) >= 5
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_readme_commands_exist() -> None:
    from typer.main import get_command

    from apiary.cli.main import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"^(?:\.venv/bin/)?apiary +(\w+)", text, flags=re.MULTILINE))
    assert used <= known
    assert {"simulate", "doctor", "evaluate", "chat", "export", "report"} <= used


def test_every_command_is_in_the_table_with_what_it_does_and_its_json() -> None:
    from typer.main import get_command

    from apiary.cli.main import app

    def leaves(group: Any, name: str) -> Iterator[tuple[str, str, str]]:
        for part, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from leaves(command, f"{name} {part}")
            else:
                told = any("--json" in option.opts for option in command.params)
                yield f"{name} {part}", command.help, "yes" if told else ""

    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(apiary [\w ]+)` \| (.*) \| ?(\w*) \|$", text, flags=re.MULTILINE)
    assert sorted(rows) == sorted(leaves(get_command(app), "apiary"))


def test_the_schema_in_the_docs_is_the_one_of_the_code() -> None:
    stored = json.loads((ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8"))
    assert stored == loading.json_schema(), "run apiary config --schema > docs/config.schema.json"


def test_the_example_of_a_new_method_works() -> None:
    """The code block of docs/extending.md, run as it stands."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    try:
        exec(compile(block[1], "extending.md", "exec"), {})
        half = AGGREGATORS.build("half", {"share": 0.25}, weighting="tokens")
        state = ServerState(0, {"w": torch.zeros(3)}, {}, {})
        acc = half.reduce.add(half.reduce.start(state), Update("c", {"w": torch.full((3,), 8.0)}, 5.0, 1))
        torch.testing.assert_close(
            half.reduce.finish(state, acc, torch.Generator()).adapter["w"], torch.full((3,), 2.0)
        )
    finally:
        AGGREGATORS._builders.pop("half", None)


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "configs").glob("*.toml")))
def test_every_recipe_says_what_it_is(recipe: str) -> None:
    assert (ROOT / "configs" / recipe).read_text(encoding="utf-8").startswith("# ")
