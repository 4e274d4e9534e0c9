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
"""
_LOAD = """
import importlib
for name in {names!r}:
    importlib.import_module(name)
print("loaded", len({names!r}))
"""
_CALL = """
sys.argv = {words!r}
from apiary.cli.main import main
main()
"""


def _run_without(blocked: set[str], code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What code does in a Python of its own where some packages are not there."""
    command = [sys.executable, "-c", _BLOCKER.format(blocked=blocked) + code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def _load_without(blocked: set[str], names: list[str], cwd: Path = ROOT) -> str:
    done = _run_without(blocked, _LOAD.format(names=names), cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _apiary_without(blocked: set[str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return _run_without(blocked, _CALL.format(words=["apiary", *map(str, words)]))


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


def test_training_loads_without_flower_and_the_privacy_libraries() -> None:
    flower = {file.removesuffix(".py").replace("/", ".") for file in SPEAKS_FLOWER}
    names = [name for name in _modules("apiary", "client") if name not in flower]
    assert {"client.training.trainer", "client.worker", "apiary.models.adapters", "apiary.data.tokenization"} <= set(
        names
    )
    blocked = {"flwr", "flwr_datasets", "datasets", "opacus", "dp_accounting", "ray"}
    _load_without(blocked, names)


HEAVY = {"torch", "transformers", "peft", "flwr", "flwr_datasets", "datasets", "accelerate", "ray"}


def test_a_wrong_key_is_told_without_waiting_for_torch() -> None:
    _load_without(HEAVY | {"numpy"}, ["apiary.cli.main", "apiary.config.schema"])


def test_most_curation_and_a_site_load_without_torch() -> None:
    names = ["client.curation", "apiary.cli.curate", "apiary.cli.curation_page", "apiary.report", "apiary.data.sources"]
    _load_without(HEAVY | {"matplotlib"}, [*names, "deploy.site", "deploy.runs", "deploy.server"])


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "config",
        "config strategy",
        "config simulate.engine",
        "config --json",
        "config --schema",
        "config wire.up --json",
    ],
)
def test_help_and_configuration_need_nothing_heavy(words: str) -> None:
    done = _apiary_without(HEAVY | {"numpy", "cryptography", "grpc"}, *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout


WRONG = {  # key -> a setting with the name of a method that there is not
    "strategy.name": "strategy.name=fedavvg",
    "strategy.server_optimizer": "strategy.server_optimizer=adamm",
    "wire.up": "wire.up={name='int9', feedback=true}",
    "wire.down": "wire.down=int9",
    "data.partition": "data.partition=diriclet",
    "train.objective": "train.objective=stf",
    "train.penalties": "train.penalties=['fedproxx']",
    "curate.steps": "curate.steps=['msk']",
    "simulate.engine": "simulate.engine=rayy",
    "simulate.attack": "simulate.attack=sign_filp",
}


@pytest.mark.parametrize("command", ["simulate", "doctor", "doctor --json", "curate", "deploy submit", "privacy plan"])
def test_wrong_names_are_refused_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    rest = {"curate": ["rows.jsonl", "--out", tmp_path / "kept.jsonl"], "deploy submit": [tmp_path]}.get(command, [])
    blocked = HEAVY if command == "curate" else HEAVY | {"numpy"}
    for key in WRONG if command == "simulate" else ("strategy.name", "curate.steps"):
        done = _apiary_without(blocked, *command.split(), *rest, "-s", WRONG[key])
        assert done.returncode == 2, done.stderr
        lines = (done.stdout if command == "doctor" else done.stderr).splitlines()
        (line,) = [line for line in lines if " = '" in line]
        assert re.search(rf"^(apiary: |  - ){re.escape(key)} = '\w+': allowed are .*; did you mean '\w+'\?$", line)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_curated_without_torch_where_no_step_needs_a_model(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "Say {n}", "output": "a{n}@b.org"}}\n' for n in range(9)))
    for steps in ([], ["-s", "curate.steps=['mask', {name='random', rows=9}]"]):
        out = tmp_path / f"kept-{len(steps)}.jsonl"
        done = _apiary_without(HEAVY | {"matplotlib"}, "curate", rows, "--out", out, *steps)
        assert done.returncode == 0, done.stderr
        assert out.read_text().count("<EMAIL_1>") == 9


def test_a_site_hears_of_an_empty_file_before_its_worker_starts(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    kits = ["deploy", "init", tmp_path / "fed", "--server", "localhost:18443", "--site", "north"]
    assert _apiary_without(HEAVY, *kits).returncode == 0
    done = _apiary_without(HEAVY, "deploy", "client", tmp_path / "fed" / "north", "--data", rows)
    assert (done.returncode, done.stderr) == (
        2,
        "apiary: --data: rows.jsonl is empty, it holds no rows; remove it or fill it\n",
    )
    assert not (tmp_path / "fed" / "north" / "state").exists()
    done = _apiary_without(HEAVY, "deploy", "status", tmp_path / "fed" / "server")
    assert done.returncode == 2 and done.stderr.startswith("apiary: no server is running")


def test_a_run_says_that_it_begins_before_torch_is_imported(tmp_path: Path) -> None:
    done = _apiary_without(HEAVY, "simulate", "--out", tmp_path / "run")
    assert done.stderr.splitlines()[0] == "phase: starting"
    assert "torch is not there" in done.stderr


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
