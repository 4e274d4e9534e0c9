"""The house keeps its shape: who imports whom, what loads without what, what a bundle carries."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each part with the parts it may use. The command line and doctor alone may use all.
MAY_IMPORT = {
    "apiary": set(),
    "strategies": {"apiary"},
    "client": {"apiary", "strategies"},
    "server": {"apiary", "strategies"},
    "simulation": {"apiary", "server", "client", "strategies"},
    "deploy": {"apiary"},
}
# The server's own update, for FLTrust, must come about exactly as a client's does, or the two could not be compared.
BESIDES = {("server/trusted_update.py", "client.worker")}
COMMAND_LINE = ("apiary/cli/", "apiary/doctor/")
# The mathematics of aggregation runs on torch alone.
STRATEGIES_NEVER = {"flwr", "flwr_datasets", "transformers", "peft", "datasets", "accelerate"}
# Flower is spoken here and nowhere else.
SPEAKS_FLOWER = {
    "apiary/transport/flower_records.py",
    "server/app.py",
    "server/messaging.py",
    "server/membership.py",
    "server/rounds.py",
    "client/handlers.py",
    "client/app.py",
    "client/site_worker.py",
    "deploy/code_guard.py",
    "simulation/engines.py",
    "simulation/in_process_grid.py",
}


class Import(NamedTuple):
    file: str  # relative to the root
    line: int
    module: str  # what is imported, in full
    deferred: bool  # inside a function

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def _parts() -> list[str]:
    return [part for part in MAY_IMPORT if (ROOT / part).is_dir()]


def _imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    file = path.relative_to(ROOT).as_posix()
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{package}.{node.module or ''}" if node.level else str(node.module)]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name, id(node) in inside)


def _all_imports() -> list[Import]:
    return [found for part in _parts() for path in sorted((ROOT / part).rglob("*.py")) for found in _imports(path)]


IMPORTS = _all_imports()


def test_the_walk_sees_the_house() -> None:
    files = {found.file for found in IMPORTS}
    assert set(_parts()) >= {"apiary", "strategies", "client", "server", "simulation"}
    assert {"apiary/config/schema.py", "strategies/fedavg.py", "client/worker.py"} <= files
    assert len(IMPORTS) > 200


@pytest.mark.parametrize("part", _parts())
def test_a_part_imports_only_what_it_may(part: str) -> None:
    wrong = [
        found
        for found in IMPORTS
        if found.file.startswith(f"{part}/")
        and found.top in set(MAY_IMPORT) - MAY_IMPORT[part] - {part}
        and not found.file.startswith(COMMAND_LINE)
        and (found.file, found.module) not in BESIDES
    ]
    assert wrong == []


def test_tests_and_benchmarks_are_never_imported() -> None:
    assert [found for found in IMPORTS if found.top in {"tests", "benchmarks", "reference"}] == []


def test_strategies_know_neither_flower_nor_transformers() -> None:
    wrong = [i for i in IMPORTS if i.file.startswith("strategies/") and i.top in STRATEGIES_NEVER]
    assert wrong == []


def test_flower_is_spoken_in_a_few_places_only() -> None:
    assert {found.file for found in IMPORTS if found.top == "flwr"} <= SPEAKS_FLOWER


def test_no_deprecated_room_of_flower_is_entered() -> None:
    old = ("flwr.client", "flwr.compat", "flwr.server")
    wrong = [i for i in IMPORTS if i.module in old or i.module.startswith(tuple(f"{o}." for o in old))]
    assert [i for i in wrong if not i.module.startswith(("flwr.clientapp", "flwr.serverapp"))] == []


_BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not there", name=name)
sys.meta_path.insert(0, Blocker())
import importlib
for name in {names!r}:
    importlib.import_module(name)
print("loaded", len({names!r}))
"""


def _load_without(blocked: set[str], names: list[str], cwd: Path = ROOT) -> str:
    code = _BLOCKER.format(blocked=blocked, names=names)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _modules(*folders: str) -> list[str]:
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            found.append(name.removesuffix(".__init__"))
    return found


def test_strategies_load_with_torch_alone() -> None:
    names = _modules("strategies")
    assert len(names) >= 3
    _load_without(STRATEGIES_NEVER | {"rich", "typer", "matplotlib", "ray"}, names)


@pytest.mark.slow
def test_training_loads_without_flower_and_the_privacy_libraries() -> None:
    flower = {file.removesuffix(".py").replace("/", ".") for file in SPEAKS_FLOWER}
    names = [name for name in _modules("apiary", "client") if name not in flower]
    assert {"client.training.trainer", "client.worker", "apiary.models.adapters", "apiary.data.tokenization"} <= set(
        names
    )
    blocked = {"flwr", "flwr_datasets", "datasets", "opacus", "dp_accounting", "ray"}
    _load_without(blocked, names)


def test_a_wrong_key_is_told_without_waiting_for_torch() -> None:
    _load_without({"torch", "transformers", "peft", "flwr", "numpy"}, ["apiary.cli.main", "apiary.config.schema"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The Flower app bundle, as `flwr build` makes it from a folder of an allowed name."""
    app = tmp_path_factory.mktemp("bundle") / "apiary"
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis", "dist", "build")
    shutil.copytree(ROOT, app, ignore=skipped)
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment["FLWR_HOME"] = str(app.parent / "flower-home")
    flwr = Path(sys.executable).with_name("flwr")
    done = subprocess.run([str(flwr), "build"], cwd=app, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = app.glob("*.fab")
    return zipfile.ZipFile(io.BytesIO(built.read_bytes()))


def test_the_bundle_carries_both_apps_and_the_tiny_model(bundle: zipfile.ZipFile) -> None:
    names = set(bundle.namelist())
    assert {"LICENSE", "pyproject.toml", "server/app.py", "client/app.py"} <= names
    assert "apiary/models/tiny/checkpoint/weights.jsonl" in names
    assert {f"{name.replace('.', '/')}.py" for name in _modules("strategies") if "." in name} <= names


def test_the_bundle_is_small_and_carries_nothing_else(bundle: zipfile.ZipFile) -> None:
    assert sum(entry.compress_size for entry in bundle.infolist()) < 10_000_000
    tops = {name.partition("/")[0] for name in bundle.namelist()}
    ours = {"apiary", "client", "server", "strategies", "LICENSE", "pyproject.toml", ".info"}
    assert tops <= ours


@pytest.mark.slow
def test_an_unpacked_bundle_runs_by_itself(bundle: zipfile.ZipFile, tmp_path: Path) -> None:
    bundle.extractall(tmp_path)
    code = (
        "import apiary, server.app, client.app, strategies; from apiary.models.tiny import load_tiny;"
        "from pathlib import Path; here = Path.cwd();"
        "files = [m.__file__ for m in (apiary, server.app, client.app, strategies)];"
        "assert all(Path(f).is_relative_to(here) for f in files), files;"
        "model, tokenizer = load_tiny(); print(model.num_parameters(), len(tokenizer))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    parameters, vocabulary = map(int, done.stdout.split()[-2:])
    assert 10**6 <= parameters <= 5 * 10**6
    assert vocabulary > 256


def test_the_wheel_and_the_bundle_name_folders_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(packages) == set(_parts())
    assert re.search(r"^flwr==1\.41\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def _our_files() -> list[Path]:
    skipped = {"runs", "dist", "build", "node_modules"}
    kept = [p for p in ROOT.iterdir() if p.name not in skipped and (p.name[0] != "." or p.name in {".ci"})]
    files = [f for p in kept for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file()]
    return [f for f in files if "__pycache__" not in f.parts and f.suffix not in {".png", ".jsonl"}]


# Put together here, so that this file does not hold what it looks for.
_MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.}])" + "/" + r"(?:work|root)/\w",
            r"(?<![\w.}])" + "/" + r"(?:home|Users)/(?!somebody/)\w",
            r"(?<![\w.}])" + "/" + r"tmp/\w",
            "pypi" + r"\.org",
            "python" + "hosted",
            "download" + r"\.pytorch",
            r"index" + r"-url[= ]\s*http",
        ]
    )
)


def test_no_file_names_a_folder_of_one_machine_or_a_registry() -> None:
    files = _our_files()
    assert ROOT / "pyproject.toml" in files
    assert len(files) > 40
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if _MACHINE.search(line)
    ]
    assert found == []
