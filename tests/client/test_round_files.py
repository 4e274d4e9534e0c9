"""What a client keeps by round: what a new round removes, what stays, and who may read it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from apiary.config import loading
from client import round_files, state
from client.round_files import RoundFiles
from client.state import Memory
from strategies.local import LocalAlgorithm

KINDS = ("round-{}.json", "curated-{}.json", "feedback-{}.safetensors", "control-{}.safetensors")
KINDS += ("personal-{}.safetensors",)
# Beside them in a client's folder; none of it is a round's own, whatever round is done again.
OTHERS = ("release-0003-abc.safetensors", "release-0001-0f.safetensors", "buffer-0003.jsonl", "copy.safetensors")
OTHERS += ("steps.jsonl", "errors.log", "rank.txt", "released.txt", "ledger.json", "secret")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def at(*rounds: int) -> set[str]:
    return {kind.format(f"{number:04d}") for kind in KINDS for number in rounds}


@pytest.mark.parametrize(("number", "left"), [(1, ()), (2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (5, (1, 2, 3))])
def test_a_round_begins_without_what_was_left_of_it_and_of_later_ones(
    tmp_path: Path, number: int, left: tuple[int, ...]
) -> None:
    for name in (*at(1, 2, 3), *OTHERS):
        (tmp_path / name).write_text(name)
    round_files.begin(tmp_path, number)
    assert names(tmp_path) == at(*left) | set(OTHERS)
    assert all(path.read_text() == path.name for path in tmp_path.iterdir())


def test_a_round_beyond_four_digits_is_known_by_its_number(tmp_path: Path) -> None:
    for number in (9_999, 10_000, 12_000):
        (tmp_path / f"round-{number}.json").touch()
    round_files.begin(tmp_path, 10_000)
    assert names(tmp_path) == {"round-9999.json"}


def test_what_the_product_writes_goes_too(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        state.save(tmp_path, Memory(number))
        round_files.save(tmp_path, "feedback", number, {"x": torch.tensor([float(number)])})
        RoundFiles(tmp_path, "curated", ".json").write(number, "{}")
    round_files.begin(tmp_path, 2)
    assert names(tmp_path) == {"round-0001.json", "feedback-0001.safetensors", "curated-0001.json"}


def test_drafts_go_and_the_folder_is_its_owners(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "client"
    round_files.begin(folder, 1)  # which makes it
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)  # by an older version
    (folder / ".round-0001.json.tmp").touch()
    (folder / ".buffer-0001.jsonl.tmp").touch()
    (folder / ".adapter-x1").mkdir()
    (folder / ".adapter-x1" / "adapter_model.safetensors").touch()
    (folder / ".of-the-user").touch()
    round_files.begin(folder, 9)
    assert names(folder) == {".of-the-user"}
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("every", "rounds"), [(1, 12), (4, 20), (5, 20), (7, 30)])
def test_a_client_can_go_back_to_each_round_that_an_exploding_run_goes_back_to(
    tmp_path: Path, every: int, rounds: int
) -> None:
    """The loss is measured after every so many rounds; if it explodes in one, the run goes on after the one before."""
    config = loading.load(None, [f"evaluate.every={every}", f"rounds={rounds}"])
    absent = {every, 2 * every + 1}  # rounds in which the client took no part
    for number in range(1, rounds + 1):
        if number not in absent:
            state.save(tmp_path, Memory(number), round_files.sound_before(config, number))
        if number % every == 0 and number > every:
            back_to = number - every
            there = max((one for one in range(1, back_to + 1) if one not in absent), default=0)
            assert state.load(tmp_path, before=back_to + 1).round == there
    assert len(list(tmp_path.iterdir())) <= 5


@pytest.mark.parametrize("seed", range(40))
def test_what_the_server_counts_on_is_there_when_a_run_goes_back(tmp_path: Path, seed: int) -> None:
    """Answers come too late now and then, and a client is away: the server then counts on an older state."""
    rng = random.Random(seed)
    every, local = rng.randint(1, 6), LocalAlgorithm(keeps="control", resumes="counted")
    config = loading.load(None, [f"evaluate.every={every}", "rounds=30"])
    counted = [0]
    for number in range(1, 31):
        if rng.random() < 0.8:
            kept = {"x": torch.tensor([float(number)])}
            round_files.save_of_method(tmp_path, local, number, kept, counted[-1], config)
            if rng.random() < 0.6:
                counted.append(number)
        if number % every == 0 and number > every:
            last = max(one for one in counted if one <= number - every)
            found = round_files.of_method(tmp_path, local, number - every + 1, last)
            assert not last or found["x"].item() == last
    assert len(list(tmp_path.iterdir())) <= 10


def test_the_newest_few_are_kept_and_one_more_that_is_named(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path / "client", "round", ".json", keep=2)
    assert files.numbers() == [] and files.newest(9) is None
    for number in (1, 4, 5, 7):
        files.write(number, f"of {number}", back={1})
    assert files.numbers() == [1, 5, 7]
    assert [files.newest(before) for before in (1, 2, 5, 6, 7, 8)] == [None, 1, 1, 5, 5, 7]
    assert files.path(5).read_text() == "of 5"
    assert all(files.path(number).stat().st_mode & 0o077 == 0 for number in files.numbers())
    files.write(8, "of 8")  # the one that was named is no longer
    assert files.numbers() == [7, 8]
    for number in range(9, 13):
        round_files.save(tmp_path, "control", number, {"x": torch.zeros(1)})
    assert RoundFiles(tmp_path, "control", ".safetensors").numbers() == [10, 11, 12]  # three, unless told otherwise


def test_a_round_done_again_replaces_its_file_and_a_straggler_changes_nothing(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path, "curated", ".json")
    files.write(3, "first")
    files.write(3, "again")
    files.write(2, "late")
    assert files.numbers() == [3] and files.path(3).read_text() == "again"
    RoundFiles(tmp_path, "round", ".json").write(2, "of another kind")
    RoundFiles(tmp_path, "curated", ".safetensors").write(2, b"with another ending")
    assert names(tmp_path) == {"curated-0003.json", "round-0002.json", "curated-0002.safetensors"}
    assert files.newest(3) is None


def test_tensors_come_back_to_the_bit_and_nothing_is_nothing(tmp_path: Path) -> None:
    kept = {"b": torch.randn(3, 4).T, "a": torch.tensor([0.1])}  # the first does not lie as it is stored
    round_files.save(tmp_path, "personal", 2, kept)
    for found in (round_files.load(tmp_path, "personal", 2), round_files.newest(tmp_path, "personal", before=3)):
        assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in kept)
    assert round_files.load(tmp_path, "personal", 1) == {} == round_files.load(tmp_path, "personal", None)
    assert round_files.newest(tmp_path, "personal", before=2) == {} == round_files.newest(tmp_path / "no", "x", 2)
