"""Whether the code still does what it did at an older commit, bit for bit: small fixed runs with both, compared.

    python benchmarks/golden.py OLD_COMMIT [--only NAME ...] [--keep DIR]

Both sides are driven by the command line that their own `pyproject.toml` names, so modules may move and be renamed.
Compared are all tensors and files of a run directory, the content of each message between server and clients, the
numbers of `metrics.json`, the events of `log.jsonl` and what is printed; left out is what a clock or the machine says.
Runs called "broken" are interrupted in their second round and resumed; "taken over" is a run that the old code began
and the new code ends, so that what stands on disk must be read as before. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
Parts = dict[str, dict[str, str]]  # of a run, by kind and name: what is compared

SMALL: Final = (
    "rounds=2",
    "model.name=@model",
    "model.dtype=float32",
    "model.device=cpu",
    "adapter.rank=4",
    "data.source=@rows",
    "data.clients=3",
    "data.partition=iid",
    "prompt.template=plain",
    "prompt.max_tokens=96",
    "train.steps=2",
    "train.batch_tokens=256",
    "train.lr=5e-3",
    "train.threads=1",
    "evaluate.max_examples=8",
    "evaluate.max_new_tokens=4",
    "evaluate.generate=false",
    "evaluate.baselines=[]",
)
_STAGES: Final = ('continual.stages=[["first", "last"], ["count"]]', "rounds=3")
_FIVE: Final = ("data.clients=5", "strategy.min_clients=5", "simulate.attackers=0.2", "strategy.options.byzantine=1")
_STEPS: Final = (
    'curate.steps=["mask", "duplicates", {name="near_duplicates", threshold=0.6}, "length", "held_out", '
    '{name="ifd", threshold=1.5, keep=0.6, floor=0, warmup=1}, {name="random", keep=0.9, floor=0}]'
)
_CURATED: Final = 'curate.steps=["mask", "duplicates", {name="near_duplicates", threshold=0.6}, "length"]'
_PRIVATE: Final = ("privacy.unit=record", "privacy.batch_rows=8", "privacy.epsilon=6.0", "privacy.delta=1e-4")

RUNS: Final[dict[str, tuple[str, ...]]] = {
    "builtin": (
        "model.name=builtin:tiny",
        "data.source=builtin:skills",
        "data.max_rows=600",
        "data.partition={name='dirichlet', alpha=0.3, by='skill'}",
        "prompt.template=chat",
        "evaluate.generate=true",
        "evaluate.baselines=@baselines",
    ),
    "fedavg": ("data.clients=5", "strategy.fraction=0.6", "rounds=3", "evaluate.every=2", "seed=3"),
    "fedprox": (
        "train.penalties=[{name='fedprox', mu=0.1}]",
        "train.epochs=0.5",
        "train.accumulate=2",
        "adapter.dropout=0.1",
        "strategy.weighting=uniform",
        "evaluate.baselines=@baselines",
    ),
    "natural": ("data.source=@sites", "data.partition=natural", "prompt.template=alpaca", "prompt.max_tokens=256"),
    "by_value": (
        "data.partition={name='by_value', by='skill'}",
        "train.schedule=constant",
        "adapter.targets=['q_proj']",
        "adapter.scaling=lora",
        "prompt.max_tokens=56",
    ),
    "pathological": ("data.partition={name='pathological', by='skill', classes=2}", "prompt.on_long=drop"),
    "size": ("data.partition={name='size', skew='square'}", "data.test=@root", "data.test_fraction=0.0"),
    "flora": ("strategy.name=flora", "adapter.ranks=[2, 4]"),
    "flexlora": ("strategy.name=flexlora",),
    "flexlora-absolute": ("strategy.name=flexlora", "strategy.options.form=absolute", "adapter.ranks=[2, 4]"),
    "hetlora": (
        "strategy.name=hetlora",
        "strategy.options={prune=0.5, penalty=3.0}",
        "adapter.ranks=[2, 4]",
        "rounds=3",
    ),
    "rank_slices": ("strategy.name=rank_slices", "adapter.ranks=[1, 2, 4]", "strategy.server_optimizer=adagrad"),
    "auto": ("strategy.name=auto", "strategy.options.threshold=0.01"),
    "fedex": ("strategy.name=fedex", "strategy.options={rank=3, base_rank=5}"),
    "lora_fair": ("strategy.name=lora_fair",),
    "fedrot": ("strategy.name=fedrot", "strategy.server_optimizer=yogi"),
    "fedkseed": ("strategy.name=fedkseed", "strategy.options.candidates=64", "train.lr=1e-3", "rounds=3"),
    "scaffold": ("strategy.name=scaffold", "train.optimizer=sgd", "train.lr=0.1", "rounds=3"),
    "fedsa": ("adapter.share=a", "rounds=3"),
    "median": ("strategy.name=median", *_FIVE, "simulate.attack={name='alie', z=1.5}"),
    "trimmed_mean": ("strategy.name=trimmed_mean", *_FIVE, "simulate.attack=inner_product"),
    "bulyan": ("strategy.name=bulyan", *_FIVE, "data.clients=7", "strategy.min_clients=7"),
    "norm_clip": ("strategy.name=norm_clip", *_FIVE, "simulate.attack=scaled"),
    "krum": ("strategy.name=krum", *_FIVE, "simulate.attack=gaussian"),
    "multi_krum": ("strategy.name=multi_krum", *_FIVE, "simulate.attack={name='sign_flip', scale=2.0}"),
    "geometric_median": (
        "strategy.name=geometric_median",
        *_FIVE,
        "strategy.options.nearest=true",
        "simulate.attack=gauge",
    ),
    "fltrust": ("strategy.name=fltrust", "strategy.root=@root", *_FIVE, "simulate.attack=not_a_number"),
    "trigger": ("data.clients=4", "simulate.attackers=0.25", "simulate.attack={name='trigger', boost=3}"),
    "private": (*_PRIVATE, "train.warmup=0.0"),
    "private-replay": (
        *_PRIVATE,
        *_STAGES,
        "continual.buffer=0.3",
        "continual.policy=poisson",
        "privacy.accountant=rdp",
        "adapter.train=b",
        "train.optimizer=sgd",
    ),
    "curated": (_STEPS, "curate.every=1", "rounds=3"),
    "continual": (*_STAGES, "continual.buffer=0.3", "rounds=4"),
    "sequential": (*_STAGES, "wire.down=int8"),
    "alternate": ("adapter.train=alternate", "rounds=3"),
    "orthonormal": ("adapter.train=b", "adapter.init=orthonormal", "strategy.server_optimizer={name='plain', lr=1.4}"),
    "int8-up": ("wire.up=int8",),
    "int4-both": ("wire.up=int4", "wire.down=int4", "rounds=3"),
    "topk-up": ("wire.up={name='topk', share=0.05}", "rounds=3"),
    "bf16-both": ("wire.up=bf16", "wire.down=bf16", "strategy.server_optimizer=adam"),
    "sparse-up": ("wire.up=sparse",),
    "momentum": ("strategy.server_optimizer={name='momentum', lr=0.9, momentum=0.5}", "rounds=3"),
    "nesterov": ("strategy.server_optimizer={name='nesterov', lr=0.7, momentum=0.5}", "rounds=3"),
    "broken-coded": (
        "wire.up={name='topk', share=0.1}",
        "wire.down=int8",
        "strategy.server_optimizer=momentum",
        *_STAGES,
        "continual.buffer=0.3",
    ),
    "broken-curated": (_STEPS, "curate.every=1", "adapter.share=a", "rounds=3"),
    "broken-private": (*_PRIVATE, "rounds=3"),
    "broken-scaffold": ("strategy.name=scaffold", "train.optimizer=sgd", "train.lr=0.1", "rounds=3"),
    "broken-pruned": ("strategy.name=hetlora", "strategy.options={prune=0.5, penalty=3.0}", "rounds=3"),
    "commands": ('evaluate.baselines=["base", "local"]', "evaluate.generate=true"),
    "ray": ("simulate.engine=ray",),
    "ray-attacked": ("simulate.engine=ray", "strategy.name=median", *_FIVE),
}
TAKEN_OVER: Final = ", taken over"
_CLOCK: Final = {"time", "seconds", "machine", "versions", "commit"}  # keys of what a clock or the machine says
_PAGES: Final = {".html", ".png"}  # durations are drawn in them


# -- what is compared ---------------------------------------------------------------------------


def sha(*parts: str | bytes) -> str:
    """A digest of parts, of which each one's end shows."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:16]


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The single values of nested JSON with their places, without those of the clock."""
    inner: Iterable[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping):
        inner = ((key, below) for key, below in value.items() if key not in _CLOCK)
    elif isinstance(value, list):
        inner = enumerate(value)
    if not value or inner is None:
        yield place, json.dumps(value)
    else:
        for key, below in inner:
            yield from leaves(below, f"{place}.{key}" if place else str(key))


def tensors(path: Path) -> dict[str, str]:
    """A digest of each tensor of a safetensors file, by its name, and of what else its head says."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    found = dict(leaves({name: _read(text) for name, text in head.pop("__metadata__", {}).items()}, "head"))
    for name, told in sorted(head.items()):
        begin, end = told["data_offsets"]
        found[name] = sha(told["dtype"], json.dumps(told["shape"]), body[begin:end])
    return found


def _read(text: str) -> Any:
    """What a text says as JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def folder_parts(folder: Path, hide: str, *, ordered: bool = True) -> Parts:
    """All of a run directory.

    Args:
        folder: the run's.
        hide: the part of paths that differs between the sides.
        ordered: whether events come in the same order in each run.
    """
    parts: Parts = {"tensors": {}, "numbers": {}, "log": {}, "files": {}}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            parts["tensors"] |= {f"{name} {tensor}": digest for tensor, digest in tensors(path).items()}
        elif name == "metrics.json":
            parts["numbers"] = dict(leaves(json.loads(path.read_text())))
        elif name == "log.jsonl":
            lines = path.read_text().replace(hide, "").splitlines()
            parts["log"] = dict(_events(lines if ordered else sorted(lines, key=_told)))
        else:
            parts["files"][name] = _file(path, hide)
    return parts


def _events(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        event = json.loads(line)
        yield from leaves(event, f"{number} {event.get('event', '')}".rstrip())


def _told(line: str) -> list[tuple[str, str]]:
    return sorted(leaves(json.loads(line)))


def _file(path: Path, hide: str) -> str:
    if path.suffix in _PAGES:
        return "is there"
    data = path.read_bytes().replace(hide.encode(), b"")
    if path.suffix == ".jsonl":
        return sha(json.dumps([*map(_told, data.decode().splitlines())]))
    return sha(json.dumps(_told(data.decode()))) if path.suffix == ".json" else sha(data)


# -- messages -----------------------------------------------------------------------------------


class Mailbox:
    """Hears what any Flower grid of this process carries.

    Args:
        interrupt: end the run, as Ctrl-C does, once the first answer of the second round of training is there.
        nodes: whether nodes are numbered alike in each run, which Ray's are not.
    """

    def __init__(self, *, interrupt: bool = False, nodes: bool = True) -> None:
        self._heard: dict[str, list[str]] = defaultdict(list)
        self._trained: list[str] = []
        self._interrupt, self._nodes, self._lock = interrupt, nodes, threading.Lock()

    def hear(self, way: str, messages: Iterable[Any], nodes: Iterable[int]) -> None:
        """Take down messages that are on their way."""
        order = sorted(nodes)
        for message in messages:
            data = message.metadata
            node = data.dst_node_id if way == "down" else data.src_node_id
            place = order.index(node) if self._nodes and node in order else -1
            with self._lock:
                self._heard[f"{data.group_id} {data.message_type} {way}"].append(_message(message, place))
            if way == "up" and data.message_type == "train" and data.group_id not in self._trained:
                self._trained.append(data.group_id)
                if self._interrupt and len(self._trained) == 2:
                    raise KeyboardInterrupt

    def parts(self) -> dict[str, str]:
        """How many messages there were of each kind in each round, and a digest of them in any order."""
        return {key: f"{len(found)} {sha(*sorted(found))}" for key, found in sorted(self._heard.items())}


def _message(message: Any, place: int) -> str:
    if message.has_error():
        return sha(message.metadata.message_type, str(place), str(message.error.code), message.error.reason or "")
    content = [[key, *_record(record)] for key, record in sorted(message.content.items())]
    return sha(message.metadata.message_type, str(place), json.dumps(content))


def _record(record: Any) -> list[Any]:
    from flwr.app import ArrayRecord

    if isinstance(record, ArrayRecord):
        arrays = [[name, a.dtype, list(a.shape), a.stype, sha(a.data)] for name, a in sorted(record.items())]
        return ["arrays", arrays]
    values = [[key, repr(value)] for key, value in sorted(record.items()) if key not in _CLOCK]
    return [type(record).__name__, values]


_box = Mailbox()
_inside = threading.local()  # a grid's method may call the one of the class above


def watch_grids() -> None:
    """Hear all grids there are, and each class of them that is made from now on."""
    from flwr.serverapp import Grid

    def made(kind: type[Any], /, **given: Any) -> None:
        super(Grid, kind).__init_subclass__(**given)
        _watch(kind)

    def below(kind: type[Any]) -> None:
        for child in kind.__subclasses__():
            _watch(child)
            below(child)

    Grid.__init_subclass__ = classmethod(made)  # type: ignore[assignment]
    below(Grid)


def _watch(kind: type[Any]) -> None:
    if "push_messages" in vars(kind):
        kind.push_messages = _heard(kind.push_messages, "down")
    if "pull_messages" in vars(kind):
        kind.pull_messages = _heard(kind.pull_messages, "up")


def _heard(method: Callable[..., Any], way: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, given: Iterable[Any], *more: Any, **keys: Any) -> Any:
        given = list(given)
        if getattr(_inside, "now", False):
            return method(self, given, *more, **keys)
        _inside.now = True
        try:
            answer = list(method(self, given, *more, **keys))
        finally:
            _inside.now = False
        _box.hear(way, given if way == "down" else answer, self.get_node_ids())
        return answer

    return call


# -- one side -----------------------------------------------------------------------------------


class Side:
    """The code of one tree, run in this process by its own command line.

    Args:
        tree: the root of the tree.
        work: where its runs are kept.
        given: the inputs that both sides read.
    """

    def __init__(self, tree: Path, work: Path, given: Path) -> None:
        self._tree, self._work, self._given = tree, work, given
        watch_grids()
        scripts = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]
        module, _, function = scripts["apiary"].partition(":")
        self._main: Callable[[], Any] = getattr(importlib.import_module(module), function)
        package = str(sys.modules[module.partition(".")[0]].__file__)
        assert Path(package).resolve().is_relative_to(tree), f"{package} is not in {tree}"

    def run(self, name: str, begun: Path | None) -> Parts:
        """What a run leaves behind.

        Args:
            name: of `RUNS`.
            begun: where the old side left its interrupted runs; the run is then taken over from there.
        """
        out = self._work / name
        if begun is not None:
            shutil.copytree(begun / name, out)
            return self._resumed(out)
        if name.startswith("broken"):
            return self._broken(name, out)
        with _seeded(nodes="ray" not in name):
            code, text = self._call(*self._simulate(name, out))
        parts = self._parts(out, code, text)
        return parts | self._commands(out) if name == "commands" else parts

    def _broken(self, name: str, out: Path) -> Parts:
        with _seeded(interrupt=True):
            code, text = self._call(*self._simulate(name, out))
        before = {f"before {key}": value for key, value in _box.parts().items()}
        assert code == 130, f"not interrupted but ended with {code}: {text}"
        shutil.copytree(out, self._work / "broken" / name)
        return self._resumed(out) | {"before": before}

    def _resumed(self, out: Path) -> Parts:
        with _seeded():
            code, text = self._call("simulate", "--resume", "--out", str(out), "--quiet")
        return self._parts(out, code, text)

    def _simulate(self, name: str, out: Path) -> list[str]:
        arguments = ["simulate", str(self._given / "small.toml"), "--out", str(out), "--quiet"]
        for item in RUNS[name]:
            arguments += ["-s", with_inputs(item, self._given)]
        return arguments

    def _parts(self, out: Path, code: object, text: str) -> Parts:
        ended = {"code": str(code), "text": text}
        left = folder_parts(out, f"{self._work}/", ordered="ray" not in out.name)
        if code == 0:  # or two sides of which nothing was heard or found would be equal
            assert any(key.endswith(" train up") for key in _box.parts()), f"no message of {out.name} was heard"
            assert any(key.startswith("adapter/") for key in left["tensors"]), f"{out.name} left no adapter"
        return {"ended": ended, "messages": _box.parts(), **left}

    def _commands(self, run: Path) -> Parts:
        """What the other commands make of a run, and of its rows."""
        rows, made = str(self._given / "rows.jsonl"), run.parent / "made"
        made.mkdir()
        settings = ["-s", f"data.source={rows}", "-s", "data.partition=iid"]
        calls: dict[str, list[str]] = {
            "evaluate": ["evaluate", str(run), "--data", rows],
            "chat": ["chat", str(run), "-p", "Say the last word: wax honey", "--max-new-tokens", "4"],
            "export": ["export", str(run), "--to", str(made / "adapter")],
            "merge": ["export", str(run), "--to", str(made / "merged"), "--merge"],
            "report": ["report", str(run)],
            "curate": ["curate", rows, "--out", str(made / "kept.jsonl"), *settings, "-s", _CURATED],
            "plan": ["privacy", "plan", *settings, *(word for item in _PRIVATE for word in ("-s", item))],
            "config": ["config"],
            "methods": ["config", "strategy"],
        }
        told = {}
        for name, arguments in calls.items():
            code, told[name] = self._call(*arguments)
            assert code == 0, f"{' '.join(arguments)} ended with {code}: {told[name]}"
        return {"commands": told, **{f"made {key}": part for key, part in folder_parts(made, f"{self._work}/").items()}}

    def _call(self, *arguments: str) -> tuple[object, str]:
        """The exit code of a command, and what it prints."""
        sys.argv, told = ["apiary", *arguments], io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            try:
                code: object = self._main() or 0
            except SystemExit as done:
                code = done.code or 0
            except BaseException:
                code = traceback.format_exc()
        return code, told.getvalue().replace(f"{self._work}/", "")

    def strays(self) -> list[str]:
        """Modules that came neither from the tree nor from the interpreter's own folders, as from another tree."""
        homes = [Path(home).resolve() for home in (self._tree, sys.prefix, sys.base_prefix, Path(__file__).parent)]
        files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
        paths = {name: Path(file).resolve() for name, file in files.items() if file}
        return [f"{n} ({p})" for n, p in paths.items() if not any(p.is_relative_to(home) for home in homes)]


@contextmanager
def _seeded(*, interrupt: bool = False, nodes: bool = True) -> Iterator[None]:
    """All that is drawn at random, secrets too, is drawn alike in each run; a new mailbox stands open."""
    import numpy as np
    import torch

    global _box
    _box = Mailbox(interrupt=interrupt, nodes=nodes)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    asked: Counter[int] = Counter()

    def drawn(nbytes: int | None = None) -> bytes:
        size = 32 if nbytes is None else nbytes
        asked[size] += 1
        return hashlib.shake_256(f"{size} {asked[size]}".encode()).digest(size)

    kept = secrets.token_bytes, os.urandom
    if nodes:  # Ray names what it shares with other processes by such bytes
        secrets.token_bytes = os.urandom = drawn
    try:
        yield
    finally:
        secrets.token_bytes, os.urandom = kept


def with_inputs(item: str, given: Path) -> str:
    """A setting with the paths of its inputs."""
    if "@baselines" in item:
        return item.replace("@baselines", (given / "baselines.json").read_text())
    for name in ("model", "rows.jsonl", "root.jsonl", "sites"):
        item = item.replace(f"@{name.partition('.')[0]}", str(given / name))
    return item


def side(tree: Path, work: Path, given: Path, begun: Path | None, names: list[str]) -> None:
    """Run some runs of a tree, and write what they left to `results.json`."""
    runner, results = Side(tree, work, given), {}
    for name in names:
        began = time.monotonic()
        results[name + (TAKEN_OVER if begun else "")] = runner.run(name, begun)
        print(f"{work.name}: {name}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    assert not (strays := runner.strays()), f"imported from elsewhere than {tree}: {', '.join(strays)}"
    (work / "results.json").write_text(json.dumps(results))


# -- inputs -------------------------------------------------------------------------------------


def instruction_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of three easy skills, some with copies, addresses, empty phrases and too much text."""
    rng, rows = random.Random(seed), []
    words = ["bee", "hive", "wax", "comb", "honey", "queen", "drone", "nectar"]
    for i in range(count):
        pick, skill = rng.sample(words, 3), ("first", "last", "count")[i % 3]
        answer = {"first": pick[0], "last": pick[-1], "count": f"there are {len(pick)} of them"}[skill]
        ask = f"Say the {skill} word: {' '.join(pick)} {i}"
        if i % 9 == 4:
            ask += f", and write to bee{i}@hive.example or +49 30 1234567{i % 10}"
        if i % 11 == 5:
            answer = "..."
        if i % 13 == 6:
            ask += " and once more" * 12
        rows.append({"instruction": ask, "output": answer, "skill": skill})
        if i % 7 == 3:
            rows.append(dict(rows[-1]))
    return rows


def baselines_of_both(*trees: Path) -> list[str]:
    """The baselines that all trees have: an older one refuses a name that came later."""
    shared = ["base", "local", "central"]
    for name in ("central_serial",):
        if all(any(f'"{name}"' in path.read_text() for path in (tree / "apiary").rglob("*.py")) for tree in trees):
            shared.append(name)
    return shared


def make_inputs(given: Path, baselines: list[str]) -> None:
    """What both sides read: rows, a root set, a file for each site, the baselines, settings, and a small model."""
    (given / "sites").mkdir(parents=True)
    files = {"rows": (150, 0), "root": (40, 1), "sites/east": (40, 2), "sites/north": (30, 3), "sites/south": (50, 4)}
    for name, (count, seed) in files.items():
        text = "".join(json.dumps(row) + "\n" for row in instruction_rows(count, seed))
        (given / f"{name}.jsonl").write_text(text)
    (given / "baselines.json").write_text(json.dumps(baselines))
    (given / "small.toml").write_text(_toml([with_inputs(item, given) for item in SMALL]))
    _make_model(given / "model")


def _toml(settings: Iterable[str]) -> str:
    """Settings `KEY=VALUE` as a file, bare words in quotes."""
    lines = []
    for item in settings:
        key, _, value = item.partition("=")
        try:
            tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            value = json.dumps(value)
        lines.append(f"{key} = {value}\n")
    return "".join(lines)


def _make_model(folder: Path) -> None:
    """A two-layer Llama that knows nothing, with a byte-level tokenizer, saved as Hugging Face does."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core, special = Tokenizer(models.BPE()), ["<pad>", "<eos>"]
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=letters, show_progress=False)
    core.train_from_iterator([row["instruction"] for row in instruction_rows(50, 0)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


# -- both sides ---------------------------------------------------------------------------------


class Process:
    """One side at work on some runs, in a process of its own."""

    def __init__(self, label: str, tree: Path, scratch: Path, names: list[str], begun: Path | None = None) -> None:
        self.work = scratch / label
        self.work.mkdir()
        # A copy: Ray puts the folder of the script before all others, and the benchmarks have names of common modules.
        script = scratch / "script" / "golden.py"
        script.parent.mkdir(exist_ok=True)
        shutil.copy(__file__, script)
        job = [str(tree), str(self.work), str(scratch / "given"), str(begun or ""), *names]
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        environment = {**os.environ, **threads, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
        environment["TQDM_DISABLE"] = "1"
        with (self.work / "output.txt").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), "--side", *job],
                cwd=tree,
                env=environment,
                stdout=output,
                stderr=output,
            )

    def results(self) -> dict[str, Parts]:
        """What the runs left, once they are over."""
        if self._process.wait():
            raise SystemExit(f"{self.work.name}:\n{(self.work / 'output.txt').read_text()[-6000:]}")
        found: dict[str, Parts] = json.loads((self.work / "results.json").read_text())
        return found

    def stop(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def both(old: Path, new: Path, scratch: Path, names: list[str]) -> list[dict[str, Parts]]:
    """What the runs left with the old tree and with the new one: side by side, but Ray, which takes all cores."""
    local, ray = ([n for n in names if ("ray" in n) is told] for told in (False, True))
    broken = [name for name in local if name.startswith("broken")]
    results: list[dict[str, Parts]] = [{}, {}]
    started: list[Process] = []

    def start(label: str, chosen: list[str], begun: Path | None = None) -> Process:
        started.append(Process(label, old if label.startswith("old") else new, scratch, chosen, begun))
        return started[-1]

    try:
        sides = [start(label, local) for label in ("old", "new") if local]
        for result, process in zip(results, sides, strict=False):
            result.update(process.results())
        if broken:
            results[1].update(start("new-after-old", broken, scratch / "old" / "broken").results())
            results[0].update({name + TAKEN_OVER: _after(results[0][name]) for name in broken})
        for result, label in zip(results, ("old-ray", "new-ray"), strict=True):
            if ray:
                result.update(start(label, ray).results())
    finally:
        for process in started:
            process.stop()
    return results


def _after(parts: Parts) -> Parts:
    """Of a broken run, what does not tell of the time before it broke."""
    return {kind: part for kind, part in parts.items() if kind != "before"}


def differences(old: Parts, new: Parts) -> list[str]:
    """A line for each value that is not the same."""
    lines = []
    for kind in sorted(old.keys() | new.keys()):
        left, right = old.get(kind, {}), new.get(kind, {})
        for name in sorted(left.keys() | right.keys(), key=lambda name: [*left, *right].index(name)):
            if left.get(name) != right.get(name):
                lines.append(f"{kind}: {name}: {_short(left.get(name))} -> {_short(right.get(name))}")
    return lines


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) < 400 else f"... {value[-400:]}"


def compare(results: list[dict[str, Parts]]) -> bool:
    """Print a line for each run and what differs below it; whether all is equal, and no run of the old tree failed."""
    old, new = results
    width, good = max(map(len, old)), True
    print(f"{'run':{width}}  {'old':16}  {'new':16}  equal")
    for name, parts in old.items():
        failed = [(label, told["ended"]) for label, told in (("old", parts), ("new", new[name]))]
        lines = [f"the {label} run failed: {_short(str(end))}" for label, end in failed if end["code"] != "0"]
        lines = lines or differences(parts, new[name])
        digests = [sha(json.dumps(told, sort_keys=True)) for told in (parts, new[name])]
        print(f"{name:{width}}  {digests[0]}  {digests[1]}  {'no' if lines else 'yes'}")
        for line in lines[:8]:
            print(f"    {line}")
        if len(lines) > 8:
            print(f"    and {len(lines) - 8} more")
        good = good and not lines
    return good


@contextmanager
def work_tree(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of a commit, as long as it is needed."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> None:
    """Compare the tree that this file is in with the one of a commit."""
    if sys.argv[1:2] == ["--side"]:
        tree, work, given, begun = sys.argv[2:6]
        return side(Path(tree), Path(work), Path(given), Path(begun) if begun else None, sys.argv[6:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the one that things should be as at")
    parser.add_argument("--only", nargs="+", choices=[*RUNS], metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--keep", type=Path, help="keep the run directories of both sides there, a new folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the work tree goes then too
    with tempfile.TemporaryDirectory() as made:
        scratch = (args.keep or Path(made)).resolve()
        with work_tree(args.commit, scratch / "tree") as old:
            make_inputs(scratch / "given", baselines_of_both(old, ROOT))
            good = compare(both(old, ROOT, scratch, args.only or [*RUNS]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
