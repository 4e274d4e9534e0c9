"""Partitions: no row lost or doubled, what each kind promises, and the error lines."""

from __future__ import annotations

import collections
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apiary.core.errors import UserError
from apiary.data import partitioning, partitions
from apiary.data.partitions import PARTITIONS, Table

KINDS = [
    ("iid", {}),
    ("dirichlet", {"alpha": 0.5, "by": "kind", "min_rows": 1}),
    ("by_value", {"by": "kind"}),
    ("pathological", {"by": "kind", "classes": 2}),
    ("size", {"skew": "linear"}),
    ("size", {"skew": "square"}),
    ("size", {"skew": "exponential"}),
    ("natural", {}),
]
# A trailing NUL is what numpy's own strings cannot hold: such values must stay apart all the same.
LABELS = ["a", "a\0", "b", "10", "9", "é"]


def table_of(values: list[str], origins: list[str] | None = None) -> Table:
    return Table(origins or ["one"] * len(values), {"kind": values})


def spread(name: str, options: dict[str, object], table: Table, clients: int, seed: int = 0):
    return PARTITIONS.build(name, options)(table, clients, seed)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize(("name", "options"), KINDS)
@given(
    values=st.lists(st.sampled_from(LABELS), min_size=4, max_size=60),
    files=st.lists(st.sampled_from(["f2", "f10", "x"]), min_size=60, max_size=60),
    clients=st.integers(1, 6),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_row_is_in_exactly_one_client(name, options, values, files, clients, seed):
    table = table_of(values, files[: len(values)])
    try:
        shares = spread(name, options, table, clients, seed)
    except UserError:  # refusing is allowed (its lines are tested below), losing rows is not
        return
    assert len(shares) == (len(set(table.origins)) if name == "natural" else clients)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(values)))
    assert all(len(share) and (np.diff(share) > 0).all() for share in shares)


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_the_seed_decides_and_nothing_else(name, options):
    rng = np.random.default_rng(3)
    table = table_of([LABELS[i] for i in rng.integers(0, 6, 400)], [f"f{i % 4}" for i in range(400)])
    once, again = (spread(name, options, table, 4, seed=7) for _ in range(2))
    other = spread(name, options, table, 4, seed=8)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    same = all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))
    assert same == (name in ("natural", "by_value"))  # these two have nothing to draw


def test_iid_sizes_differ_by_at_most_one_and_rows_are_mixed():
    shares = spread("iid", {}, table_of(["a"] * 50 + ["b"] * 53), 4)
    assert sorted(map(len, shares)) == [25, 26, 26, 26]
    assert all(3 < np.count_nonzero(share < 50) < 23 for share in shares)


def test_dirichlet_skew_follows_alpha():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, 4000)
    table = table_of([str(code) for code in codes])

    def unevenness(alpha: float) -> float:
        """Mean total variation distance between a client's mix and the whole mix."""
        shares = spread("dirichlet", {"alpha": alpha, "by": "kind"}, table, 8)
        whole = np.bincount(codes, minlength=5) / len(codes)
        mixes = [np.bincount(codes[share], minlength=5) / len(share) for share in shares]
        return float(np.mean([np.abs(mix - whole).sum() / 2 for mix in mixes]))

    assert unevenness(0.1) > 0.4 > 0.1 > unevenness(1000.0)


def test_dirichlet_min_rows_is_kept():
    table = table_of([LABELS[i % 6] for i in range(300)])
    shares = spread("dirichlet", {"alpha": 0.3, "by": "kind", "min_rows": 20}, table, 5)
    assert min(map(len, shares)) >= 20


def test_by_value_keeps_values_together_and_balances():
    values = ["a"] * 50 + ["b"] * 30 + ["c"] * 25 + ["d"] * 5
    two = spread("by_value", {"by": "kind"}, table_of(values), 2)
    # largest first: a -> 0, b -> 1, c -> 1 (30 < 50), d -> 0 (50 < 55)
    assert [collections.Counter(values[i] for i in share) for share in two] == [
        {"a": 50, "d": 5},
        {"b": 30, "c": 25},
    ]


@pytest.mark.parametrize(("clients", "values", "classes"), [(8, 10, 2), (5, 10, 2), (12, 4, 3)])
def test_pathological_gives_each_client_its_number_of_values_and_drops_none(clients, values, classes):
    column = [f"v{i % values}" for i in range(values * 40)]
    for seed in range(6):
        shares = spread("pathological", {"by": "kind", "classes": classes}, table_of(column), clients, seed)
        assert [len({column[i] for i in share}) for share in shares] == [classes] * clients
        assert sum(map(len, shares)) == len(column)


def test_size_shares_grow_as_they_say():
    table = table_of(["a"] * 1000)
    linear = [len(share) for share in spread("size", {}, table, 4)]
    square = [len(share) for share in spread("size", {"skew": "square"}, table, 4)]
    assert linear == [100, 200, 300, 400]
    assert square == [33, 133, 300, 534]  # 1000 * i^2 / 30, the rest to the last


def test_natural_follows_the_order_of_the_files():
    table = table_of(["a"] * 5, ["z", "z", "b", "z", "a"])
    assert [share.tolist() for share in spread("natural", {}, table, 99)] == [[0, 1, 3], [2], [4]]


@pytest.mark.parametrize(
    ("name", "options", "values", "clients", "words"),
    [
        ("iid", {}, ["a"] * 3, 4, ["data.clients = 4", "3 usable rows"]),
        ("dirichlet", {"alpha": 1, "by": "kin"}, ["a"] * 99, 2, ["'kin'", "did you mean 'kind'"]),
        ("dirichlet", {"alpha": 1, "by": "topic"}, ["a"] * 99, 2, ["'topic'", "it has kind"]),
        (
            "dirichlet",
            {"alpha": 1, "by": "kind"},
            ["a"] * 19,
            2,
            ["min_rows = 10", "20 rows", "19"],
        ),
        (
            "dirichlet",
            {"alpha": 0.01, "by": "kind"},
            ["a"] * 50,
            5,
            ["alpha = 0.01", "raise alpha"],
        ),
        ("dirichlet", {"alpha": 0, "by": "kind"}, ["a"], 1, ["data.partition.alpha = 0"]),
        ("dirichlet", {"alpha": 1}, ["a"], 1, ["'by'"]),
        ("by_value", {"by": "kind"}, ["a", "b", "a"], 3, ["data.clients = 3", "only 2 values"]),
        ("by_value", {"by": "kind"}, ["a", None, "a"], 1, ["1 of 3 rows have no value"]),
        ("pathological", {"by": "kind"}, ["a"] * 9, 3, ["classes = 2", "only 1 values"]),
        ("pathological", {"by": "kind"}, list("abcdef"), 2, ["all 6 values", "at least 3"]),
        ("pathological", {"by": "kind"}, list("aaab"), 4, ["fewer rows than clients"]),
        ("size", {"skew": "exponential"}, ["a"] * 1000, 900, ["'exponential'", "900 clients"]),
        ("size", {"skew": "cubic"}, ["a"], 1, ["skew", "cubic"]),
        ("idd", {}, ["a"], 1, ["data.partition = 'idd'", "did you mean 'iid'"]),
    ],
)
def test_error_lines_name_key_value_and_fix(name, options, values, clients, words):
    with pytest.raises(UserError) as error:
        spread(name, options, table_of(values), clients)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_written_to_the_terminal(capfd):
    table = table_of(["a", "b"] * 30, ["f", "g"] * 30)
    for name, options in KINDS:
        spread(name, options, table, 2)
    assert capfd.readouterr() == ("", "")


def test_even_shares_are_those_of_flwr_datasets():
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    table = table_of([LABELS[i % 6] for i in range(103)])
    order = partitions._order(table, 5)
    for clients in (1, 7, 103):
        reference = IidPartitioner(clients)
        reference.dataset = Dataset.from_dict({"row": order})
        wanted = [sorted(reference.load_partition(i)["row"][:]) for i in range(clients)]
        assert [share.tolist() for share in spread("iid", {}, table, clients, seed=5)] == wanted


def test_the_rows_of_a_value_are_those_of_flwr_datasets():
    from datasets import Dataset
    from flwr_datasets.partitioner import GroupedNaturalIdPartitioner

    groups = np.random.default_rng(1).integers(0, 9, 200)
    reference = GroupedNaturalIdPartitioner("code", 1, sort_unique_ids=True)
    reference.dataset = Dataset.from_dict({"row": np.arange(200), "code": groups})
    wanted = [reference.load_partition(i)["row"][:] for i in range(reference.num_partitions)]
    assert [share.tolist() for share in partitions._grouped(groups)] == [sorted(rows) for rows in wanted]


@pytest.mark.slow
def test_the_first_question_leaves_nothing_imported_and_gets_the_same_answer():
    code = (
        "import sys, numpy as np; from apiary.data.partitions import PARTITIONS, Table\n"
        "table = Table(['x'] * 300, {'kind': [str(i % 5) for i in range(300)]})\n"
        "build = PARTITIONS.build('dirichlet', {'alpha': 0.5, 'by': 'kind', 'min_rows': 1})\n"
        "heavy = {'flwr_datasets', 'datasets', 'pandas', 'pyarrow', 'matplotlib'}\n"
        "for _ in range(2):\n"
        "    print(sorted(heavy & set(sys.modules)), [share.tolist() for share in build(table, 4, 9)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == second and first.startswith("[] [[")  # the second one imports it, after the line is begun


def test_a_partitioner_that_breaks_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(partitioning, "_asked", 0)
    monkeypatch.delitem(sys.modules, "flwr_datasets", raising=False)
    with pytest.raises(RuntimeError, match=r"could not be cut by flwr-datasets: .*NoSuchPartitioner"):
        partitioning.shares(partitioning.Question([("NoSuchPartitioner", ())], np.arange(4)))
