"""The container recipe: what can be checked of it without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Stage(NamedTuple):
    base: str
    steps: list[tuple[str, str]]  # instruction and its arguments

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.steps if name == instruction]


def _stages() -> dict[str, Stage]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, arguments = line.split(maxsplit=1)
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", arguments).groups()  # type: ignore[union-attr]
            stages[name] = Stage(base, [])
        else:
            list(stages.values())[-1].steps.append((instruction, arguments))
    return stages


STAGES = _stages()


def test_there_is_a_server_and_a_client_on_a_shared_runtime() -> None:
    assert {"server", "client"} <= set(STAGES)
    assert STAGES["server"].base == STAGES["client"].base == "runtime"


def test_outside_images_have_a_version() -> None:
    outside = [stage.base for stage in STAGES.values() if stage.base not in STAGES]
    assert outside
    for base in outside:
        assert re.search(r":3\.11[\w.-]*$", base), base
        assert "latest" not in base


def test_it_runs_as_a_number_that_is_not_root() -> None:
    assert STAGES["runtime"].all("USER") == ["10001"]
    for name in ("server", "client"):
        assert STAGES[name].all("USER") == []
        assert STAGES[name].all("RUN") == []  # nothing is done after root is left


@pytest.mark.parametrize("name", ["server", "client"])
def test_the_entry_point_is_a_list_behind_an_init(name: str) -> None:
    (entry,) = STAGES[name].all("ENTRYPOINT")
    words = json.loads(entry)
    assert words[:7] == ["tini", "-g", "--", "apiary", "deploy", name, "/kit"]
    state = words[words.index("--state") + 1]
    assert state in json.loads(STAGES["runtime"].all("VOLUME")[0])
    command = [str(Path(sys.executable).with_name("apiary")), "deploy", name, "--help"]
    wide = {**os.environ, "COLUMNS": "200"}
    help_text = subprocess.run(command, capture_output=True, text=True, env=wide).stdout
    for option in (word for word in words if word.startswith("--") and word != "--"):
        assert option in help_text, option


def test_a_site_publishes_no_port_and_the_server_one() -> None:
    assert STAGES["client"].all("EXPOSE") == [] and STAGES["runtime"].all("EXPOSE") == []
    (port,) = STAGES["server"].all("EXPOSE")
    assert f":{port}/health" in STAGES["server"].all("ENV")[0]
    (entry,) = STAGES["client"].all("ENTRYPOINT")
    words = json.loads(entry)
    assert f":{words[words.index('--port') + 1]}/health" in STAGES["client"].all("ENV")[0]


def test_models_come_from_a_volume_and_nothing_is_fetched_at_run_time() -> None:
    runtime = STAGES["runtime"]
    settings = dict(pair.split("=", 1) for pair in " ".join(runtime.all("ENV")).split())
    assert settings["HF_HUB_OFFLINE"] == "1"
    assert settings["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    volumes = json.loads(runtime.all("VOLUME")[0])
    assert settings["HF_HOME"] in volumes
    made = " ".join(runtime.all("RUN"))
    assert all(f" {volume}" in made for volume in volumes)  # owned by the user, or it could not write


def test_every_version_is_pinned() -> None:
    installs = [run for run in STAGES["build"].all("RUN") if "pip install" in run]
    parts = [part for run in installs for part in run.split("&&") if "pip install" in part]
    assert len(parts) == 3
    assert all("constraints.txt" in part or "--no-deps" in part for part in parts)


def test_all_our_packages_and_nothing_else_are_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    copied = {word for copy in STAGES["build"].all("COPY") for word in copy.split()[:-1]}
    assert copied == packages | {"pyproject.toml", "constraints.txt", "LICENSE", "README.md"}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("name", ["server", "client"])
def test_the_health_check_tells_alive_from_dead(name: str) -> None:
    (check,) = STAGES[name].all("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    (setting,) = STAGES[name].all("ENV")
    url = setting.partition("HEALTH_URL=")[2]
    assert url.endswith("/health")
    with HTTPServer(("127.0.0.1", 0), _Healthy) as server:
        here = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def exit_code(url: str) -> int:
            environment = {**os.environ, "HEALTH_URL": url}
            words = [sys.executable, *command[1:]]
            return subprocess.run(words, env=environment, capture_output=True).returncode

        assert exit_code(f"{here}/health") == 0
        assert exit_code(f"{here}/elsewhere") != 0
        server.shutdown()
    assert exit_code(f"{here}/health") != 0


def test_hadolint_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
