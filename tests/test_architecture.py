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

from strategies import AGGREGATORS

ROOT = Path(__file__).resolve().parents[1]

# Each room with the rooms that it may use beside itself; "apiary" is the version alone.
_SHARED = ("core", "config", "data", "transport", "tracking", "models", "privacy", "evaluation", "export")
MAY_IMPORT: dict[str, set[str]] = {
    "apiary": set(),
    "apiary.core": set(),
    "apiary.config": {"apiary.core"},
    "apiary.data": {"apiary.core", "apiary.config"},
    "apiary.transport": {"apiary.core", "apiary.config"},
    "apiary.tracking": {"apiary", "apiary.core", "apiary.config"},
    "apiary.models": {"apiary.core", "apiary.config", "apiary.data"},
    "apiary.privacy": {"apiary.core", "apiary.config", "apiary.data"},
    "apiary.evaluation": {"apiary.core", "apiary.config", "apiary.data", "apiary.models"},
    "apiary.report": {
        *("apiary.core", "apiary.config", "apiary.data", "apiary.tracking", "apiary.privacy", "apiary.evaluation")
    },
    "apiary.export": {
        *("apiary.core", "apiary.config", "apiary.data", "apiary.tracking", "apiary.privacy", "apiary.evaluation"),
        *("apiary.models", "apiary.report"),
    },
    "strategies": {"apiary.core", "apiary.config", "apiary.transport"},
    "client": {*(f"apiary.{room}" for room in _SHARED), "strategies"},
    "server": {*(f"apiary.{room}" for room in _SHARED), "apiary.report", "strategies"},
    "simulation": {*(f"apiary.{room}" for room in _SHARED), "apiary.report", "strategies", "client", "server"},
    "deploy": {"apiary.core", "apiary.config", "apiary.data", "apiary.models", "apiary.tracking"},
    "tools": {"apiary.core", "apiary.data", "apiary.models"},
}
USES_ALL = {"apiary.cli", "apiary.doctor"}  # and is used by each other alone
# The server's own update, for FLTrust, must come about exactly as a client's does, or the two could not be compared.
BESIDES = {("server/trusted_update.py", "client.worker"), ("server/trusted_update.py", "client.site")}
# The mathematics of aggregation runs on torch alone.
STRATEGIES_NEVER = {"flwr", "flwr_datasets", "transformers", "peft", "datasets", "accelerate"}
# Flower is spoken here and nowhere else.
SPEAKS_FLOWER = {
    "apiary/transport/flower_records.py",
    "apiary/transport/sealed.py",
    "server/app.py",
    "server/messaging.py",
    "server/membership.py",
    "server/payloads.py",
    "server/replies.py",
    "server/rounds.py",
    "server/seals.py",
    "server/site_grid.py",
    "client/handlers.py",
    "client/app.py",
    "client/site_worker.py",
    "deploy/admission.py",
    "deploy/superexec.py",
    "deploy/superlink.py",
    "deploy/fleet.py",
    "simulation/engines.py",
    "simulation/in_process_grid.py",
}


# Aggregation methods are named by the rooms that hold them, and by the configuration, which lets people choose.
NAMES_METHODS = ("strategies/", "apiary/config/")
# Names that are also words of English, of statistics or of another key, such as `model.device = "auto"`.
ALSO_WORDS = {"auto", "median"}
# How papers and people call what has no key of its own in the registry.
ALSO_CALLED = ("fedsa", "fedit", "rolora", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "diloco")
# Where such a word is none of a method: (file, word in small letters) -> why.
NO_METHOD = {
    ("apiary/data/skills/words.py", "flora"): "a given name, for people in made-up rows",
    ("tools/pretrain_tiny/drills.py", "ditto"): "a word of made-up texts",
}


class Import(NamedTuple):
    file: str  # relative to the root
    line: int
    module: str  # what is imported, in full
    deferred: bool  # inside a function

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def room(self) -> str:
        """The room of the file that imports."""
        return _room(self.file.removesuffix(".py").replace("/", "."))


def _room(module: str) -> str:
    """The room that a module is in, such as `apiary.core` or `client`."""
    parts = module.removesuffix(".__init__").split(".")
    return ".".join(parts[: 2 if parts[0] == "apiary" else 1])


_TOPS = ("apiary", "strategies", "client", "server", "simulation", "deploy", "tools")
_ROOMS = sorted({*MAY_IMPORT, *USES_ALL})


def _imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    file = path.relative_to(ROOT).as_posix()
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = f"{package}.{node.module or ''}" if node.level else str(node.module)
            inner = [f"{whole}.{alias.name}" for alias in node.names]
            names = [name if _is_module(name) else whole for name in inner]
        else:
            continue
        for name in dict.fromkeys(names):
            yield Import(file, node.lineno, name, id(node) in inside or id(node) in typing_only)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _files() -> list[Path]:
    return [path for top in _TOPS for path in sorted((ROOT / top).rglob("*.py"))]


IMPORTS = [found for path in _files() for found in _imports(path)]


def test_the_walk_sees_the_house() -> None:
    files = {found.file for found in IMPORTS}
    assert {found.room for found in IMPORTS} >= set(_ROOMS) - {"apiary"}
    assert {"apiary/config/schema.py", "strategies/fedavg.py", "client/worker.py"} <= files
    assert len(IMPORTS) > 500
    assert {_room(str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".")) for path in _files()} == set(
        _ROOMS
    )


@pytest.mark.parametrize("room", [room for room in _ROOMS if room not in USES_ALL])
def test_a_room_imports_only_what_it_may(room: str) -> None:
    wrong = [
        found
        for found in IMPORTS
        if found.room == room
        and _room(found.module) in set(_ROOMS) - MAY_IMPORT[room] - {room}
        and (found.file, found.module) not in BESIDES
    ]
    assert wrong == []


def test_losses_of_single_rows_are_kept_by_a_simulation_alone() -> None:
    users = {found.file for found in IMPORTS if found.module.startswith("apiary.evaluation.row_losses")}
    assert users == {"simulation/summary.py", "simulation/sweep/results.py", "apiary/evaluation/runs.py"}


def test_the_arithmetic_of_audits_asks_no_model() -> None:
    """Attacks are functions of arrays: whoever replays a client's training stands where client code may be imported."""
    audits = [found for found in IMPORTS if found.file.startswith("apiary/privacy/audit/")]
    assert {found.top for found in audits} <= {"numpy", "torch", "math", "typing", "collections", "__future__"}
    assert {Path(found.file).name for found in audits} >= {"membership.py", "one_run.py", "inversion.py"}


def test_nothing_imports_in_a_circle() -> None:
    """Of all imports that run when a module is loaded; one inside a function waits until it is called."""
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        if not found.deferred and found.top in _TOPS:
            module = found.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            graph.setdefault(module, set()).add(found.module)
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(graph.get(module, set()) - {module}):
                walk(other, (*way, module))
            done.add(module)

    for module in sorted(graph):
        walk(module, ())


# What each package offers by itself; everything else is imported from the module that has it.
EXPORTED = {
    "apiary": {"__version__"},
    "apiary.transport.codecs": {"CODECS"},
    "client.curation": {
        *("STEPS", "Context", "Curation", "StepResult", "Reader", "Row", "Step", "StepReport"),
        *("build_steps", "curate", "digest", "restore", "steps"),
    },
    "strategies": {
        "AGGREGATORS",
        "Aggregator",
        "Gradient",
        "Reducer",
        "ServerState",
        "from_config",
        "traits",
    },
}


def test_packages_offer_what_they_say_and_no_more() -> None:
    """By their source: names that `__init__` binds without an underscore; most are empty but for a docstring."""
    offered: dict[str, set[str]] = {}
    for path in _files():
        if path.name != "__init__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        names: set[str] = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        if public := {name for name in names if not name.startswith("_")} - {"annotations"} or names & {"__version__"}:
            offered[package] = public
    assert {p: names for p, names in offered.items() if p not in ROOMY} == EXPORTED


# Packages whose `__init__` is itself the module that people read first.
ROOMY = {"apiary.doctor", "apiary.report", "apiary.models.tiny"}


def _sizes() -> Iterator[tuple[str, str, int, int, bool]]:
    """Of each function and class: where it is, its kind, its lines, its parameters, and whether it is registered."""
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield (
                    f"{path.relative_to(ROOT)}:{node.name}",
                    "class",
                    (node.end_lineno or 0) - node.lineno + 1,
                    0,
                    False,
                )
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in given if name not in ("self", "cls")])
                registered = any("register" in ast.unparse(d) for d in node.decorator_list)
                where = f"{path.relative_to(ROOT)}:{node.name}"
                yield where, "function", (node.end_lineno or 0) - node.lineno + 1, count, registered


def test_functions_and_classes_stay_small() -> None:
    """No class over 250 lines, no function over 60 lines or with more than 8 parameters.

    The command line's parameters are a person's flags, and those of a registered builder a configuration's options.
    """
    sizes = list(_sizes())
    assert len(sizes) > 1000
    long = [where for where, kind, lines, _, _ in sizes if lines > (250 if kind == "class" else 60)]
    wide = [w for w, _, _, count, builder in sizes if count > 8 and not builder and not w.startswith("apiary/cli/")]
    assert (long, wide) == ([], [])


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


def _spellings(name: str) -> str:
    """A pattern for a method's name as code and sentences write it, such as LoRA-FAIR, MultiKrum or "rank slices"."""
    return "[-_ ]?".join(map(re.escape, name.split("_")))


METHOD = re.compile("|".join(map(_spellings, sorted({*AGGREGATORS, *ALSO_CALLED} - ALSO_WORDS))), re.IGNORECASE)
# The configured name compared with something.
BY_NAME = re.compile(r"""strategy(\.name|\["name"\])(\s*[!=]=|\s+(not\s+)?in\b|\.(starts|ends)with)""")


def _lines_elsewhere() -> Iterator[tuple[str, int, str]]:
    """File, number and text of each line of code outside the rooms that may name methods; line 0 is the file's path."""
    for part in _TOPS:
        for path in sorted((ROOT / part).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if not file.startswith(NAMES_METHODS):
                yield file, 0, file
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    yield file, number, line


@pytest.mark.parametrize(
    "text", ["fedavg", "FLoRA", "Lora-FAIR", "multi-krum", "FedEx-LoRA", "isScaffold", "geometric median", "FedSA-LoRA"]
)
def test_a_methods_name_is_seen_however_it_is_written(text: str) -> None:
    assert METHOD.search(f"x = {text!r}")


def test_no_method_is_named_outside_its_room_and_the_configuration() -> None:
    """What others need to know of a method it declares as a trait of its `Aggregator`."""
    found = {
        (file, name.lower()): f"{file}:{number}: {name}"
        for file, number, line in _lines_elsewhere()
        for name in METHOD.findall(line)
    }
    assert [place for key, place in found.items() if key not in NO_METHOD] == []
    assert found.keys() >= NO_METHOD.keys()  # an exception that is none any more goes


def test_nothing_depends_on_the_name_of_the_method() -> None:
    lines = [*_lines_elsewhere()]
    assert [f"{file}:{number}" for file, number, line in lines if BY_NAME.search(line)] == []
    assert all(map(BY_NAME.search, ('config.strategy.name == "auto"', 'strategy["name"] in ("median",)')))


def test_no_text_lists_methods() -> None:
    """A list would be out of date with the next method that is dropped in: whoever needs one asks the registry."""
    files = [p for room in NAMES_METHODS for p in sorted((ROOT / room).rglob("*.py"))]
    assert ROOT / "strategies" / "from_config.py" in files
    found = [f"{p.relative_to(ROOT)}:{line}" for p in files for line, text in _texts(p) if len(_named(text)) > 2]
    assert found == []
    assert _named("auto, flora and multi_krum") == {"auto", "flora", "multi_krum"}


def _named(text: str) -> set[str]:
    return set(re.findall(r"\w+", text)) & set(AGGREGATORS)


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a file but for those that stand by themselves, as docstrings do."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value


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


@pytest.mark.slow
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
    _load_without(
        HEAVY | {"matplotlib"}, [*names, "deploy.site", "deploy.starting", "deploy.following", "deploy.tending"]
    )


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
    assert set(packages) == set(_TOPS) - {"tools"}
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
