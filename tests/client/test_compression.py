"""Coded messages in whole runs: what they weigh, what they cost in loss, and what becomes of kills and damage."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import overrides_for
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from safetensors.torch import load_file, save_file
from torch import Tensor

import strategies
from apiary.config import loading
from apiary.core.errors import UserError
from apiary.core.lora import is_b
from apiary.core.messages import ClientInfo
from apiary.core.tensors import digest, generator
from apiary.models import adapters
from apiary.transport import codec as codecs
from apiary.transport import downlink, flower_records, from_config
from apiary.transport.codecs import floats, integers
from client import app as client_app
from client import compression, handlers, round_files, state
from client.site import Site
from client.site_worker import _refuse_foreign_code
from client.worker import Worker
from server import broadcast, checkpoint
from simulation import engines
from simulation.in_process_grid import LocalGrid
from simulation.run import check_names, simulate
from strategies.local import PLAIN

QUIET = ["evaluate.baselines=[]", "evaluate.generate=false", "evaluate.max_examples=8"]
INT4 = 'wire.up={ name = "int4", rounding = "nearest", feedback = true }'


def run(folder: Path, overrides: list[str], **kwargs: Any) -> dict[str, Tensor]:
    """The final adapter of a run."""
    simulate(loading.load(None, [*overrides, *QUIET]), folder, **kwargs)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["event"] == kind]


def site_in(folder: Path) -> Site:
    return Site("a", (), (), folder, folder / "ledger.json", 4)


def held_by(folder: Path, client: str) -> dict[str, Tensor]:
    return load_file(folder / "clients" / client / "copy.safetensors")


# -- whole runs ---------------------------------------------------------------------------------


def test_the_default_is_what_unencoded_tensors_make(
    tmp_path: Path, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = run(tmp_path / "coded", small_run)
    monkeypatch.setattr(Worker, "send", lambda *args: b"")
    assert digest(run(tmp_path / "plain", small_run), 64) == digest(coded, 64)
    files = {path.name.partition("-")[0] for path in (tmp_path / "coded" / "clients" / "client-00").iterdir()}
    assert files == {"round", "steps.jsonl"}
    assert not list((tmp_path / "coded" / "checkpoints").rglob("copies*"))


@pytest.mark.slow
def test_int8_up_and_down_ends_where_fp32_does_in_a_quarter_of_the_bytes(tmp_path: Path, small_run: list[str]) -> None:
    longer = [*small_run, "rounds=6", "train.steps=4", "adapter.rank=16", "evaluate.clients=false"]
    whole = run(tmp_path / "fp32", longer)
    coded = run(tmp_path / "int8", [*longer, "wire.up=int8", "wire.down=int8"])
    losses = [events_of(tmp_path / name, "evaluate")[-1]["loss"] for name in ("fp32", "int8")]
    start = events_of(tmp_path / "fp32", "evaluate")[0]["loss"]
    assert losses[0] < start - 0.2
    assert abs(losses[1] - losses[0]) < 0.002 * losses[0]
    assert digest(coded) != digest(whole)
    first, *later = ([e["bytes_down"] for e in events_of(tmp_path / name, "round")][1:] for name in ("fp32", "int8"))
    assert min(first) > 3.7 * max(later[0])
    up = [sum(e["bytes_up"] for e in events_of(tmp_path / name, "round")) for name in ("fp32", "int8")]
    assert up[0] > 3.8 * up[1]
    # What it would have been without a codec: the tensors alone, without the message around them.
    for way in ("up", "down"):
        plain = [e[f"float32_{way}"] for e in events_of(tmp_path / "int8", "round")]
        assert plain == pytest.approx([e[f"bytes_{way}"] for e in events_of(tmp_path / "fp32", "round")], rel=0.05)
        assert f"float32_{way}" not in events_of(tmp_path / "fp32", "round")[0]


@pytest.mark.parametrize(
    ("up", "label", "size"),
    [
        ("fp32", "fp32", lambda n: 4 * n),
        ("bf16", "bf16", lambda n: 2 * n),
        ("int8", "int8/128", lambda n: n + 2 * math.ceil(n / 128)),
        ("int4", "int4/64", lambda n: math.ceil(n / 2) + 2 * math.ceil(n / 64)),
    ],
)
def test_bytes_are_those_of_the_message_and_frozen_halves_cost_a_bit_each(
    tmp_path: Path, small_run: list[str], up: str, label: str, size: Callable[[int], int]
) -> None:
    adapter = run(tmp_path / "run", [*small_run, "rounds=1", "adapter.train=b", f"wire.up={up}"])
    frame = 4 + 1 + 1 + len(label) + 8 + math.ceil(len(adapter) / 8) + 4
    expected = frame + sum(size(t.numel()) for name, t in adapter.items() if "lora_B" in name)
    assert [e["bytes_up"] for e in events_of(tmp_path / "run", "client")] == [expected] * 3
    assert [e["bytes_up"] for e in events_of(tmp_path / "run", "round")] == [3 * expected]
    start = adapters.fresh_adapter(adapters.load(*_model(small_run)), 0)
    assert all(torch.equal(t, start[name]) for name, t in adapter.items() if "lora_A" in name)


def _model(overrides: list[str]) -> tuple[Any, Any]:
    settings = loading.load(None, overrides)
    return settings.model, settings.adapter


KRUM = ["strategy.name=multi_krum", "strategy.options.byzantine=0", "strategy.min_clients=3"]


def test_a_robust_method_keeps_the_factor_that_rests_and_so_goes_with_codecs(
    tmp_path: Path, small_run: list[str]
) -> None:
    coded = ["adapter.train=b", "wire.up=int4", "wire.down=int8", "evaluate.clients=false"]
    run(tmp_path / "run", [*small_run, *KRUM, *coded])
    assert events_of(tmp_path / "run", "refused") == []
    found = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert found is not None
    settings = loading.load(None, small_run)
    fresh = adapters.fresh_adapter(adapters.load(settings.model, settings.adapter), settings.seed)
    same = {(is_b(name), torch.equal(tensor, fresh[name])) for name, tensor in found[0].adapter.items()}
    assert same == {(False, True), (True, False)}


def test_zeros_are_left_out_on_the_way_down_without_loss(tmp_path: Path, small_run: list[str]) -> None:
    """With one factor that rests, half of the adapter travels, and what is learnt is the same but for rounding."""
    settings = [*small_run, "adapter.train=b", "evaluate.clients=false"]
    plain, sparse = (run(tmp_path / down, [*settings, f"wire.down={down}"]) for down in ("fp32", "sparse"))
    whole, part = (events_of(tmp_path / down, "round")[-1]["bytes_down"] for down in ("fp32", "sparse"))
    moved = sum(t.numel() for name, t in plain.items() if is_b(name)) / sum(t.numel() for t in plain.values())
    assert 0.3 < part / whole < moved + 0.02
    for name, tensor in plain.items():
        torch.testing.assert_close(sparse[name], tensor, rtol=1e-4, atol=1e-6)


def test_what_is_sent_down_is_what_clients_lack(tmp_path: Path, small_run: list[str]) -> None:
    """First the whole adapter, whose B is zero yet; then the change, in the next message, to train or to measure."""
    adapter = run(tmp_path / "run", [*small_run, "wire.down=int8", "evaluate.clients=false"])
    frame = 4 + 1 + 1 + 8 + math.ceil(len(adapter) / 8) + 4
    whole = frame + len("fp32") + 4 * sum(t.numel() for name, t in adapter.items() if "lora_A" in name)
    change = frame + len("int8/128") + sum(t.numel() + 2 * math.ceil(t.numel() / 128) for t in adapter.values())
    down = [e["bytes_down"] for e in events_of(tmp_path / "run", "round")]
    assert down == [3 * whole, 3 * change, 3 * change]
    run(tmp_path / "measured", [*small_run, "wire.down=int8", "evaluate.clients=true"])
    assert [e["bytes_evaluate"] for e in events_of(tmp_path / "measured", "evaluate")[1:]] == [3 * change] * 3
    assert [e["bytes_down"] for e in events_of(tmp_path / "measured", "round")] == [0] * 3


@pytest.mark.parametrize("down", ["int4", "topk", "bf16"])
def test_all_clients_hold_what_the_server_thinks(tmp_path: Path, small_run: list[str], down: str) -> None:
    """Also those of other ranks, and those that were left out for some rounds."""
    mixed = ["strategy.name=rank_slices", "adapter.ranks=[2, 4, 3]", "data.clients=6", "strategy.fraction=0.4"]
    run(tmp_path / "run", [*small_run, *mixed, "rounds=5", f"wire.down={down}", "evaluate.clients=false"])
    found = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert found is not None
    links = broadcast._from_tensors(found[0].copies)
    assert events_of(tmp_path / "run", "refused") == [] and set(links) == {2, 3, 4}
    known = {
        version for link in links.values() for change in link.changes for version in (change.since, change.version)
    }
    known |= {link.copy.version for link in links.values()}
    asked = events_of(tmp_path / "run", "asked")[-1]["clients"]
    assert {digest(held_by(tmp_path / "run", client)) for client in asked} <= known
    server = found[0].adapter
    for rank, link in links.items():
        assert {t.shape[0] for name, t in link.copy.adapter.items() if "lora_A" in name} == {rank}
        exact = strategies.aggregator.of_rank(server, rank, lambda r: r**-0.5)
        off = sum(float((exact[n] - t).square().sum()) for n, t in link.copy.adapter.items())
        assert off < 0.05 * sum(float(t.square().sum()) for t in exact.values())


class Killed(BaseException):
    """Ends the run where it is raised, as a kill would."""


MOMENTS = [
    (state, "save", "after"),
    (round_files, "save", "after"),
    (state, "save_copy", "after"),
    (checkpoint, "save", "before"),
    (checkpoint, "save", "after"),
]


SELDOM = ["rounds=4", "data.clients=4", "strategy.fraction=0.7", "train.steps=1"]
COARSE = [*SELDOM, INT4, 'wire.down={ name = "int4", rounding = "stochastic" }']


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path) -> dict[str, Tensor]:
    """The adapter of a run with clients that are not asked in each round, feedback up, coarse and stochastic down."""
    return run(tmp_path_factory.mktemp("runs") / "unbroken", [*overrides_for(tiny_model, rows_file), *COARSE])


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "side"), MOMENTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_run_that_is_killed_and_resumed_is_bit_identical(
    tmp_path: Path,
    small_run: list[str],
    unbroken: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    side: str,
) -> None:
    overrides = [*small_run, *COARSE]
    real, calls = getattr(module, name), [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] in (2, 6) and side == "before":
            raise Killed
        done = real(*args, **kwargs)
        if calls[0] in (2, 6) and side == "after":
            raise Killed
        return done

    monkeypatch.setattr(module, name, deadly)
    for attempt in range(2):
        with pytest.raises(Killed):
            run(tmp_path / "broken", overrides, resume=attempt > 0)
        if name == "save" and module is checkpoint:
            break  # it is called four times in all
    assert digest(run(tmp_path / "broken", overrides, resume=True), 64) == digest(unbroken, 64)
    assert {e["round"] for e in events_of(tmp_path / "broken", "round")} == {1, 2, 3, 4}


def test_who_resumes_says_what_it_holds(tmp_path: Path, small_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a restart costs no whole adapter for each client."""
    overrides = [*small_run, "wire.down=int8", "evaluate.clients=false"]
    run(tmp_path / "unbroken", overrides)
    real = checkpoint.save

    def deadly(folder: Path, state: Any, *args: Any, **kwargs: Any) -> Any:
        real(folder, state, *args, **kwargs)
        if state.round == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", deadly)
        with pytest.raises(Killed):
            run(tmp_path / "broken", overrides)
    run(tmp_path / "broken", overrides, resume=True)
    down = [[e["bytes_down"] for e in events_of(tmp_path / name, "round")] for name in ("unbroken", "broken")]
    assert down[0] == down[1]


# -- what goes wrong ----------------------------------------------------------------------------


def _endless(data: bytes) -> bytes:
    """An int8 message whose first scale is infinity, with a checksum that fits."""
    at = (
        4 + 1 + 1 + len("int8/128") + 8 + 1
    )  # the small model's adapter has at most 8 tensors: one byte says which came
    content = data[:at] + struct.pack("<H", 0x7F80) + data[at + 2 : -4]
    return content + struct.pack("<I", zlib.crc32(content))


class Damaged(LocalGrid):
    """Changes the second client's encoded update in round 2."""

    change: Callable[[bytes], bytes]

    def _execute(self, message: Message) -> Message:
        reply, about = super()._execute(message), message.metadata
        if (about.message_type, about.group_id, about.dst_node_id) == ("train", "2", 1001):
            data = type(self).change(flower_records.read_message(reply.content))
            reply.content["adapter"] = ArrayRecord({"message": Array("uint8", (len(data),), "apiary", data)})
        return reply


@pytest.mark.parametrize(
    ("change", "told", "hostile"),
    [
        (lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:], "its checksum differs", 0),
        (lambda data: data[:-1], "its checksum differs", 0),
        (lambda data: b"no such thing", "it is no encoded adapter", 0),
        (lambda data: codecs.encode({"x": torch.ones(3)}, integers.int8(), {}, generator(0))[0], "shapes", 0),
        (
            lambda data: codecs.encode({"x": torch.ones(3)}, floats.fp32(), {}, generator(0))[0],
            "otherwise than int8",
            0,
        ),
        (_endless, "it holds a scale", 1),
    ],
)
def test_a_damaged_message_costs_one_client_the_round(
    tmp_path: Path,
    small_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[bytes], bytes],
    told: str,
    hostile: int,
) -> None:
    """What no encoder writes makes robust methods count one hostile client less; damage on the way does not."""
    Damaged.change, counted, build = staticmethod(change), [], strategies.from_config

    def counting(loaded: Any) -> Any:
        made = build(loaded)
        return made._replace(reduce=made.reduce._replace(refused=lambda acc: counted.append(acc) or acc))

    monkeypatch.setattr(engines, "LocalGrid", Damaged)
    monkeypatch.setattr(strategies, "from_config", counting)
    run(tmp_path / "run", [*small_run, "wire.up=int8", "wire.down=int8"])
    (refused,) = events_of(tmp_path / "run", "refused")
    assert (refused["client"], refused["round"]) == ("client-01", 2)
    assert refused["reason"].startswith("its update cannot be decoded: ") and told in refused["reason"]
    assert len(counted) == hostile
    assert [e["clients"] for e in events_of(tmp_path / "run", "round")] == [3, 2, 3]


@pytest.mark.parametrize("fault", ["gone", "torn", "other"])
def test_a_client_that_lost_its_copy_gets_the_whole_one_the_next_time(
    tmp_path: Path, small_run: list[str], fault: str
) -> None:
    path = tmp_path / "run" / "clients" / "client-01" / "copy.safetensors"

    def spoil(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 1:
            if fault == "gone":
                path.unlink()
            elif fault == "torn":
                path.write_bytes(path.read_bytes()[:-9])
            else:
                save_file({name: t + 1e-6 for name, t in load_file(path).items()}, path)

    run(tmp_path / "run", [*small_run, "rounds=4", "wire.down=int8", "evaluate.clients=false"], observers=[spoil])
    (refused,) = events_of(tmp_path / "run", "refused")
    assert (refused["client"], refused["round"]) == ("client-01", 2) and "needs the whole" in refused["reason"]
    done = events_of(tmp_path / "run", "round")
    assert [e["clients"] for e in done] == [3, 2, 3, 3]
    assert done[2]["bytes_down"] > 1.5 * done[1]["bytes_down"] and done[3]["bytes_down"] == done[1]["bytes_down"]


def test_what_left_out_rounds_kept_is_added_when_a_client_comes_again(tmp_path: Path, small_run: list[str]) -> None:
    """Rounds 1, 2 and 7; all that was sent, and what is kept in the end, add up to all changes."""
    settings = loading.load(None, [*small_run, INT4])
    codec = from_config.configured_codec(settings, "up")
    deltas = {n: {"x": torch.randn(300, generator=generator(n))} for n in (1, 2, 7)}
    sent = {n: compression.encode(settings, codec, site_in(tmp_path), n, delta) for n, delta in deltas.items()}
    arrived = sum(codecs.decode(message, codec, {"x": (300,)})["x"].double() for message in sent.values())
    left_out = round_files.newest(tmp_path, "feedback", before=8)["x"].double()
    torch.testing.assert_close(arrived + left_out, sum(d["x"].double() for d in deltas.values()), rtol=0, atol=1e-6)
    assert left_out.abs().max() > 0.01
    again = {n: compression.encode(settings, codec, site_in(tmp_path), n, deltas[n]) for n in (7, 7)}
    assert again[7] == sent[7]
    # A server that went back:
    assert {n: compression.encode(settings, codec, site_in(tmp_path), n, deltas[n]) for n in (2, 7)} == {
        n: sent[n] for n in (2, 7)
    }


def test_feedback_of_another_rank_is_not_added(tmp_path: Path, small_run: list[str]) -> None:
    settings = loading.load(None, [*small_run, INT4])
    codec = compression.up(settings, PLAIN)
    compression.encode(settings, codec, site_in(tmp_path), 1, {"x": torch.randn(4, 8)})
    delta = {"x": torch.randn(2, 8)}
    expected, _ = codecs.encode(delta, from_config.configured_codec(settings, "up"), {}, generator(0))
    assert compression.encode(settings, codec, site_in(tmp_path), 2, delta) == expected


PRIVATE = ["privacy.unit=record", "privacy.batch_rows=8", "train.steps=1"]


def test_the_codec_makes_no_other_release_of_the_same_round(tmp_path: Path, small_run: list[str]) -> None:
    """It comes after the noise; a second release of the round would cost budget, and noise of its own."""
    for up in ("fp32", "int8"):
        handlers.forget()
        settings = loading.load(None, [*small_run, *PRIVATE, f"wire.up={up}"])
        grid = LocalGrid(client_app.make_app(engines.site_facts(settings.to_json(), tmp_path)), settings.data.clients)
        adapter = flower_records.to_arrays(adapters.fresh_adapter(adapters.load(settings.model, settings.adapter), 0))
        content = flower_records.request(1, adapter, ArrayRecord())
        (reply,) = grid.send_and_receive([Message(content, 1000, "train", group_id="1")])
        assert not reply.has_error(), reply.error
    assert len(list((tmp_path / "clients" / "client-00").glob("release-*"))) == 1


@pytest.mark.parametrize("private", [False, True])
def test_a_round_that_is_asked_again_gives_the_same_bytes(tmp_path: Path, small_run: list[str], private: bool) -> None:
    """Under privacy the noise is secret: other bytes could only come from another release."""
    handlers.forget()
    settings = loading.load(None, [*small_run, INT4, *(PRIVATE if private else [])])
    grid = LocalGrid(client_app.make_app(engines.site_facts(settings.to_json(), tmp_path)), settings.data.clients)
    adapter = flower_records.to_arrays(adapters.fresh_adapter(adapters.load(settings.model, settings.adapter), 0))

    def ask(number: int) -> bytes:
        content = flower_records.request(number, adapter, ArrayRecord())
        (reply,) = grid.send_and_receive([Message(content, 1000, "train", group_id=str(number))])
        assert not reply.has_error(), reply.error
        return flower_records.read_message(reply.content)

    first, second, third = ask(1), ask(2), ask(3)
    assert len({first, second, third}) == 3
    assert [ask(3), ask(2), ask(3)] == [third, second, third]


def test_feedback_sees_only_what_was_released(tmp_path: Path, small_run: list[str]) -> None:
    """What is kept is the release less what was sent: with its noise, and nothing of the rows besides."""
    handlers.forget()
    settings = loading.load(None, [*small_run, INT4, *PRIVATE])
    grid = LocalGrid(client_app.make_app(engines.site_facts(settings.to_json(), tmp_path)), settings.data.clients)
    start = adapters.fresh_adapter(adapters.load(settings.model, settings.adapter), 0)
    content = flower_records.request(1, flower_records.to_arrays(start), ArrayRecord())
    (reply,) = grid.send_and_receive([Message(content, 1000, "train", group_id="1")])
    folder = tmp_path / "clients" / "client-00"
    released = load_file(next(folder.glob("release-0001-*.safetensors")))
    shapes = codecs.shapes_of(start)
    arrived = codecs.decode(
        flower_records.read_message(reply.content), from_config.configured_codec(settings, "up"), shapes
    )
    left_out = round_files.newest(folder, "feedback", before=2)
    assert left_out.keys() == {name for name, tensor in released.items() if tensor.any()}
    assert all(torch.equal(left_out[name], released[name] - arrived[name]) for name in left_out)
    assert (folder / "feedback-0001.safetensors").stat().st_mode & 0o077 == 0


class Impostor(LocalGrid):
    """The second client answers in the first one's name."""

    def _execute(self, message: Message) -> Message:
        reply = super()._execute(message)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1001:
            reply.content["who"] = ConfigRecord({"who": "client-00"})
        return reply


def test_an_update_in_another_name_does_not_count(
    tmp_path: Path, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LocalGrid", Impostor)
    run(tmp_path / "run", [*small_run, "rounds=2", "wire.up=int8", "wire.down=int8", "evaluate.clients=false"])
    refused = events_of(tmp_path / "run", "refused")
    assert [e["client"] for e in refused] == ["client-01"] * 2 and "answers as 'client-00'" in refused[0]["reason"]
    assert [e["clients"] for e in events_of(tmp_path / "run", "round")] == [2, 2]


# -- what is refused at the start ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("wire.up=int5", ("wire.up = 'int5'", "bf16, fp32, int4, int8, sparse, topk")),
        ("wire.down=int5", ("wire.down = 'int5'",)),
        ('wire.up={ name = "int8", rond = "nearest" }', ("wire.up", "no option 'rond'", "'rounding'")),
        ('wire.up={ name = "topk", share = 2 }', ("wire.up.share = 2", "above 0 and at most 1")),
        ('wire.down={ name = "int4", feedback = true }', ("wire.down", "feedback by itself")),
    ],
)
def test_a_slip_is_told_at_the_start(override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        check_names(loading.load(None, [override]))
    assert len(caught.value.problems) == 1
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["strategy.name=flora", "wire.up=int4"], "wire.up = 'int4': its error feedback"),
        (["strategy.name=flexlora", "wire.up=topk"], "wire.up = 'topk': its error feedback"),
        (["strategy.name=flexlora", "wire.down=int8"], "wire.down = 'int8'.*factors the adapter anew"),
        (["strategy.name=flora", "wire.down=bf16"], "wire.down = 'bf16'.*factors the adapter anew"),
        (["strategy.name=fedex", "wire.down=int8"], "wire.down = 'int8'.*residual"),
        (["strategy.name=flexlora", 'wire.up={ name = "int4", feedback = false }'], None),
        (["strategy.name=flora", "wire.up=int8"], None),
        (["strategy.name=fedex", "wire.up=int4"], None),
        (["strategy.name=fedavg", "wire.up=topk", "wire.down=topk"], None),
        ([*KRUM, "wire.up=int4"], "wire.up = 'int4': its error feedback"),
        ([*KRUM, "wire.up=int4", "wire.down=int8", "adapter.train=b"], None),
        ([*KRUM, "wire.down=sparse", "adapter.train=alternate"], None),
        (["strategy.name=flexlora", "adapter.init=orthonormal"], "adapter.init = 'orthonormal'.*factors A anew"),
        ([*KRUM, "adapter.init=orthonormal", "adapter.train=b"], None),
    ],
)
def test_methods_that_factor_anew_take_no_feedback(overrides: list[str], told: str | None) -> None:
    settings = loading.load(None, overrides)
    if told is None:
        strategies.from_config(settings)
        return
    with pytest.raises(UserError, match=told):
        strategies.from_config(settings)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_site_loads_no_codec_that_a_server_names(way: str) -> None:
    settings = loading.load(None, [f"wire.{way}=os:getcwd"])
    with pytest.raises(handlers.Refusal, match="does not load"):
        _refuse_foreign_code(settings)


def test_down_rounds_to_the_nearest_unless_told_otherwise() -> None:
    """Its feedback makes up for the bias, and half the error is left."""
    state, change = torch.zeros(4096), torch.randn(4096, generator=generator(0))
    errors = {}
    for name in ("int8", '{ name = "int8", rounding = "stochastic" }'):
        codec = from_config.configured_codec(loading.load(None, [f"wire.down={name}"]), "down")
        link = downlink.advance(downlink.begin({"x": state}), {"x": change}, codec, generator(1))
        errors[name] = float((link.copy.adapter["x"] - change).square().mean())
    nearest, stochastic = errors.values()
    assert stochastic == pytest.approx(2 * nearest, rel=0.1)


def test_clients_with_old_copies_share_one_whole_adapter(small_run: list[str]) -> None:
    """Each may say what it likes that it holds; the server's memory must not follow."""
    run = loading.load(None, [*small_run, "wire.down=int8"])
    made = broadcast.Broadcast(run, {})
    adapter = adapters.fresh_adapter(adapters.load(run.model, run.adapter), 0)
    sent = []
    for i in range(5):
        made.set_version(f"c{i}", f"{i:016x}")
        sent.append(made.parcel(ClientInfo(f"c{i}", run.adapter.rank, 0), adapter))
    assert all(record is sent[0] for record in sent)
