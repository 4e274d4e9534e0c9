"""What the aggregation methods get right, and what they cost the server.

Four measurements of the server's arithmetic alone; nothing is trained, changes are drawn at random:

- error: how far the model of each method ends from the exact mean of the clients' changes of the products, which is
  computed dense in float64, by how far clients drift in a round and how unlike they are.
- module: seconds and memory of one module of 4096 x 4096 with 16 clients, by rank, each in a process of its own; and
  FlexLoRA by QR of the factors against the dense singular value decomposition that its authors run.
- memory: peak memory while 1,000 updates of 50 MB are folded in, for the methods that are sums.
- round: seconds of a round of the 224 modules of a model with 7 billion parameters, rank 16, 16 clients.

    python benchmarks/aggregation.py [--only error,module,memory,round] [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # another package is called benchmarks too

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from apiary.core import lora  # noqa: E402
from apiary.core.lora import Factors  # noqa: E402
from apiary.core.messages import ClientInfo, Update  # noqa: E402
from apiary.core.tensors import StateDict, generator  # noqa: E402
from apiary.tracking.environment import machine  # noqa: E402
from strategies import AGGREGATORS, Aggregator, Gradient, ServerState, averaging_error  # noqa: E402
from strategies.aggregator import ROOT as SERVER  # noqa: E402
from strategies.aggregator import of_rank  # noqa: E402

RESULTS: Final = ROOT / "benchmarks" / "results" / "aggregation.json"
GAUGE: Final = "the gauge, beside each method"  # what its row is called
CLIENTS: Final = 16
BYZANTINE: Final = 3  # the most that Bulyan bears of 16
SCALING: Final = lora.scaling(16.0, "rslora")
SHAPES_7B: Final = {
    f"layers.{layer}.{name}": shape
    for layer in range(32)
    for name, shape in (
        *((f"{letter}_proj", (4096, 4096)) for letter in "qkvo"),
        ("gate_proj", (11008, 4096)),
        ("up_proj", (11008, 4096)),
        ("down_proj", (4096, 11008)),
    )
}
# Those whose aim is the mean of the clients' changes; the robust ones aim elsewhere.
MEANS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "fedavg": ("fedavg", {}),
    "fedrot": ("fedrot", {}),
    "lora_fair": ("lora_fair", {}),
    "flexlora": ("flexlora", {}),
    "flexlora, absolute": ("flexlora", {"form": "absolute"}),
    "rank_slices": ("rank_slices", {}),
    "hetlora": ("hetlora", {}),
    "hetlora, delta": ("hetlora", {"form": "delta"}),
    "fedex, residual cut to rank r": ("fedex", {"rank": 16}),
    "fedex": ("fedex", {}),
    "flora": ("flora", {}),
}

Shapes = Mapping[str, tuple[int, int]]  # d_out, d_in by module


def methods() -> list[str]:
    """Those that take changes of an adapter."""
    return [name for name in AGGREGATORS if not build(name).scalars]


class Done(NamedTuple):
    """A round, and the seconds it took."""

    state: ServerState
    fold: float  # while answers come in
    finish: float  # after the last one, with the step


def build(name: str, options: Mapping[str, Any] | None = None) -> Aggregator:
    """A method with `BYZANTINE` hostile clients where it must know a number."""
    if name in ("krum", "multi_krum", "trimmed_mean", "bulyan"):
        options = {"byzantine": BYZANTINE}
    return AGGREGATORS.build(name, options, scaling=SCALING, seed=0, weighting="tokens", alike=True)


def run_round(method: Aggregator, state: ServerState, updates: Sequence[Update]) -> Done:
    """Fold the updates in, and step."""
    own = [updates[0]._replace(client=SERVER)] if method.root else []
    if extra := method.payload(state, ClientInfo("", 16, 0, len(updates))).extra:
        updates = [update._replace(extra=extra, lr_sum=0.01) for update in updates]
    began = time.perf_counter()
    acc = method.reduce.start(state)
    for update in [*own, *updates]:
        acc = method.reduce.add(acc, update)
    folded = time.perf_counter()
    gradient: Gradient = method.reduce.finish(state, acc, torch.Generator().manual_seed(0))
    after = method.step(state, gradient)
    return Done(after, folded - began, time.perf_counter() - folded)


def draw(shapes: Shapes, rank: int, scale: float, *path: int | str) -> dict[str, Tensor]:
    """Factors whose entries are normal, those of A and of B alike."""
    made = {}
    for module, (d_out, d_in) in shapes.items():
        rng = generator(0, *path, module)
        b, a = torch.randn(d_out, rank, generator=rng), torch.randn(rank, d_in, generator=rng)
        made[module] = Factors(b * scale, a * scale)
    return lora.join(made)


def adapter_of(shapes: Shapes, rank: int) -> ServerState:
    """A server in its fourth round."""
    return ServerState(3, draw(shapes, rank, 0.02, "adapter", rank), {}, {})


# -- error ------------------------------------------------------------------------------------------------------------


def cohort(
    state: ServerState, shapes: Shapes, ranks: Sequence[int], drift: float, skew: float, seed: int
) -> list[Update]:
    """Clients that moved by `drift` times the size of the adapter.

    `skew` is the share of the move's energy that is a client's own and not everybody's. The logarithm of its weight is
    normal with that standard deviation.
    """
    top = max(ranks)
    common = draw(shapes, top, 0.02 * drift, seed, "all")
    made = []
    for k, rank in enumerate(ranks):
        own = draw(shapes, top, 0.02 * drift, seed, k)
        whole = {name: (1 - skew) ** 0.5 * common[name] + skew**0.5 * own[name] for name in common}
        weight = 10_000 * float(torch.exp(skew * torch.randn((), generator=generator(0, seed, k, "weight"))))
        delta = of_rank(whole, rank, SCALING) if rank < top else whole
        made.append(Update(f"client-{k:02}", delta, float(round(weight)), rank))
    return made


def weights_of(adapter: StateDict, base_delta: StateDict) -> dict[str, Tensor]:
    """What an adapter and a base delta add to the weights, dense, float64."""
    scale = SCALING(lora.split(adapter)[next(iter(lora.split(adapter)))].rank)
    made = {module: scale * (f.b.double() @ f.a.double()) for module, f in lora.split(adapter).items()}
    for module, f in lora.split(base_delta).items():
        made[module] = made[module] + f.b.double() @ f.a.double()
    return made


def true_mean(state: ServerState, updates: Sequence[Update]) -> dict[str, Tensor]:
    """sum_k p_k s_k (B_k A_k - B_k0 A_k0), dense, float64."""
    total = sum(update.weight for update in updates)
    made: dict[str, Tensor] = {}
    for update in updates:
        start = of_rank(state.adapter, update.rank, SCALING)
        end = {name: tensor.double() + update.delta[name].double() for name, tensor in start.items()}
        before, after = weights_of(start, {}), weights_of(end, {})
        for module, weight in after.items():
            made[module] = made.get(module, 0.0) + update.weight / total * (weight - before[module])
    return made


def error(method: Aggregator, state: ServerState, updates: Sequence[Update]) -> float:
    """How far the model ends from the true mean, relative to how far that is from where it began."""
    after = run_round(method, state, updates).state
    old, new = weights_of(state.adapter, state.base_delta), weights_of(after.adapter, after.base_delta)
    mean = true_mean(state, updates)
    missed = sum(float((new[module] - old[module] - mean[module]).square().sum()) for module in mean)
    return float((missed / sum(float(change.square().sum()) for change in mean.values())) ** 0.5)


def errors(quick: bool) -> list[dict[str, Any]]:
    """The error of each method over drift and skew, and with clients of four ranks."""
    shapes = {"small": (192, 128)} if quick else {"square": (512, 512), "tall": (768, 512)}
    drifts, skews = ((0.1, 1.0), (0.5,)) if quick else ((0.02, 0.1, 0.3, 1.0), (0.1, 0.5, 1.0))
    state = adapter_of(shapes, 16)
    made = []
    for kind, ranks in (("one", [16] * 8), ("mixed", [2, 4, 8, 16] * 2)):
        for name, (method_name, options) in MEANS.items():
            method = build(method_name, options)
            if kind == "mixed" and method.ranks == "one":
                continue
            for drift in drifts:
                for skew in skews:
                    found = [
                        error(method, state, cohort(state, shapes, ranks, drift, skew, seed))
                        for seed in range(1 if quick else 3)
                    ]
                    row = {"ranks": kind, "method": name, "drift": drift, "skew": skew}
                    made.append(row | {"error": statistics.mean(found)})
            print(json.dumps(made[-1]), flush=True)
    return made


# -- one module -------------------------------------------------------------------------------------------------------


def module_updates(shapes: Shapes, rank: int, clients: int = CLIENTS) -> list[Update]:
    """Clients that moved by a twentieth of the adapter, all their own ways."""
    return [
        Update(f"client-{k:02}", draw(shapes, rank, 0.001, "client", rank, k), 1000.0 + k, rank) for k in range(clients)
    ]


def peak_bytes() -> int:
    """The highest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_module(name: str, rank: int, repeats: int) -> dict[str, Any]:
    """Seconds and working memory of a method; the first round is for memory and does not count in the time."""
    shapes = {"q_proj": (4096, 4096)}
    small = {"q_proj": (64, 64)}
    method, state, updates = build(name), adapter_of(shapes, rank), module_updates(shapes, rank)
    run_round(method, adapter_of(small, 4), module_updates(small, 4))  # what libraries take when first called
    before = peak_bytes()
    run_round(method, state, updates)
    working = peak_bytes() - before
    done = [run_round(method, state, updates) for _ in range(repeats)]
    return {
        "method": name,
        "rank": rank,
        "ms": round(1000 * statistics.median(d.fold + d.finish for d in done), 1),
        "working_bytes": working,
    }


def dense(state: ServerState, updates: Sequence[Update]) -> dict[str, Tensor]:
    """FlexLoRA as its authors compute it: the weighted sum of dense products, and the SVD of it; of one rank."""
    rank, total = updates[0].rank, sum(update.weight for update in updates)
    made = {}
    for module, held in lora.split(state.adapter).items():
        changed = [(update.weight / total, lora.split(update.delta)[module]) for update in updates]
        mean = sum(p * ((held.b + d.b) @ (held.a + d.a)) for p, d in changed)
        u, s, vt = torch.linalg.svd(mean, full_matrices=False)
        made[module] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return made


def against_dense(rank: int, width: int) -> dict[str, Any]:
    """FlexLoRA by QR and by the dense SVD, one after the other."""
    shapes = {"q_proj": (width, width)}
    state, updates, method = adapter_of(shapes, rank), module_updates(shapes, rank), build("flexlora")
    done = [run_round(method, state, updates) for _ in range(4)][1:]
    began = time.perf_counter()
    expected = dense(state, updates)["q_proj"]
    seconds = time.perf_counter() - began
    again = run_round(method, state, updates)  # after it as well, should the machine have become busier
    ours = statistics.median(d.fold + d.finish for d in [*done, again])
    b, a = lora.split(again.state.adapter)["q_proj"]
    apart = float((b @ a - expected).norm() / expected.norm())
    return {
        "rank": rank,
        "width": width,
        "dense_s": round(seconds, 3),
        "qr_s": round(ours, 4),
        "times_faster": round(seconds / ours, 1),
        "relative_difference": apart,
    }


# -- memory -----------------------------------------------------------------------------------------------------------


def folded(name: str, updates: int, entries: int) -> list[dict[str, Any]]:
    """The highest resident size after 10, 100, ... updates of so many entries, made as they come in."""
    modules = max(1, entries // (2 * 4096 * 16))
    shapes = {f"layers.{layer}.q_proj": (4096, 4096) for layer in range(modules)}
    method, state = build(name), adapter_of(shapes, 16)
    delta = draw(shapes, 16, 0.001, "client")
    size = sum(tensor.numel() * tensor.element_size() for tensor in delta.values())
    extra = method.payload(state, ClientInfo("", 16, 0, updates)).extra
    acc, made = method.reduce.start(state), []
    for count in range(1, updates + 1):
        fresh = {tensor_name: tensor * (1 + 1 / count) for tensor_name, tensor in delta.items()}
        acc = method.reduce.add(acc, Update(f"client-{count}", fresh, float(count), 16, extra, 0.01))
        if count == updates or count in (10, 100):
            row = {"method": name, "updates": count, "update_bytes": size, "peak_bytes": peak_bytes()}
            made.append(row)
    return made


# -- the whole round --------------------------------------------------------------------------------------------------


def gauge_round(state: ServerState, updates: Sequence[Update]) -> Done:
    """What every round has beside its method: how far averaging A and B apart is from the mean of the products."""
    fold = averaging_error.estimated(SCALING)
    began = time.perf_counter()
    acc = fold.start(state, torch.Generator().manual_seed(0))
    for update in updates:
        acc = fold.add(acc, update)
    folded = time.perf_counter()
    fold.finish(state, acc)
    return Done(state, folded - began, time.perf_counter() - folded)


def whole_rounds(layers: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Seconds of each method in turn, on the same updates."""
    shapes = {module: shape for module, shape in SHAPES_7B.items() if int(module.split(".")[1]) < layers}
    state, updates = adapter_of(shapes, 16), module_updates(shapes, 16)
    run_round(build("fedavg"), state, updates)  # memory that the process has not touched yet costs more
    for name in names:
        began = time.process_time()
        done = gauge_round(state, updates) if name == GAUGE else run_round(build(name), state, updates)
        yield {
            "method": name,
            "layers": layers,
            "fold_s": round(done.fold, 2),
            "finish_s": round(done.finish, 2),
            "processor_s": round(time.process_time() - began, 2),
        }


# -- all of them ------------------------------------------------------------------------------------------------------


def alone(task: Mapping[str, Any], threads: int) -> Any:
    """What a task of `work` gives, in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--task", json.dumps(task)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(found), flush=True)
    return found


def work(task: Mapping[str, Any]) -> Any:
    """What `alone` asks a new process for."""
    kinds: Mapping[str, Callable[..., Any]] = {"module": one_module, "dense": against_dense, "memory": folded}
    return kinds[task["kind"]](**{key: value for key, value in task.items() if key != "kind"})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that are asked for, by name."""
    parts, quick, threads = options.only.split(","), options.quick, options.threads
    names = options.methods.split(",") if options.methods else methods()
    made: dict[str, Any] = {}
    if "error" in parts:
        made["error"] = errors(quick)
    if "module" in parts:
        ranks = [4, 8] if quick else [int(rank) for rank in options.ranks.split(",")]
        tasks = [{"kind": "module", "name": name, "rank": rank, "repeats": 3} for name in names for rank in ranks]
        made["module"] = [alone(task, threads) for task in tasks]
        widths = {"rank": 4, "width": 512} if quick else {"rank": 16, "width": 4096}
        made["dense"] = alone({"kind": "dense", **widths}, threads)
    if "memory" in parts:
        sums = [name for name in names if build(name).needs == "sum"]
        task = {"kind": "memory", "updates": 20 if quick else options.updates, "entries": options.update_mb * 250_000}
        made["memory"] = [row for name in sums for row in alone({**task, "name": name}, threads)]
    if "round" in parts:
        made["round"] = []
        for row in whole_rounds(1 if quick else options.layers, [*names, GAUGE]):
            print(json.dumps(row), flush=True)
            made["round"].append(row)
    return made


def _among(known: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows in the place of those of the same methods."""
    new = {row["method"] for row in rows}
    order = list(dict.fromkeys(row["method"] for row in [*known, *rows]))
    return sorted([*(row for row in known if row["method"] not in new), *rows], key=lambda r: order.index(r["method"]))


def main() -> None:
    """Measure, and write the results; parts that are not asked for stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="error,module,memory,round")
    parser.add_argument("--methods", help="separated by commas; rows of others stay as they were")
    parser.add_argument("--quick", action="store_true", help="small, to see that it works; writes nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", default="4,8,16,32,64", help="of the one module")
    parser.add_argument("--updates", type=int, default=1000, help="how many are folded in for their memory")
    parser.add_argument("--update-mb", type=int, default=50)
    parser.add_argument("--layers", type=int, default=32, help="of the 7B model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task:
        print(json.dumps(work(options.task)))
        return
    made = measure(options)
    if not options.quick:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        facts = {"machine": machine(gpu=False), "torch": torch.__version__, "threads": options.threads}
        if options.methods:
            made = {part: _among(known.get(part, []), rows) for part, rows in made.items() if isinstance(rows, list)}
        options.out.write_text(json.dumps({**known, **facts, **made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
